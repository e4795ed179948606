"""Tasks: what is made of a sample before it is put into words. A new task is one file and one line here.

Knows names only; each task is imported when it is chosen.
"""

from vlm_adapt.choices import Choices

TASKS = Choices(
    "task",
    {
        "caption": "vlm_adapt.data.tasks.caption:Caption",
        "class_masks": "vlm_adapt.data.tasks.segmentation:ClassMasks",
        "detection": "vlm_adapt.data.tasks.detection:Detection",
        "object_aware": "vlm_adapt.data.tasks.object_aware:ObjectAware",
        "ocr": "vlm_adapt.data.tasks.ocr:Ocr",
        "referring_masks": "vlm_adapt.data.tasks.segmentation:ReferringMasks",
        "span_corruption": "vlm_adapt.data.tasks.span_corruption:SpanCorruption",
        "split_cap": "vlm_adapt.data.tasks.split_cap:SplitCap",
        "vqa": "vlm_adapt.data.tasks.vqa:Vqa",
        "vqg": "vlm_adapt.data.tasks.vqg:Vqg",
    },
)

# What segmenters learn from; these make no words.
MASK_TASKS = Choices("task of masks", {"masks": "vlm_adapt.data.tasks.masks:Masks"})
