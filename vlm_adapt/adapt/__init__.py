"""Adaptation methods and the plan that applies them. A new method is one file and one line here."""

from vlm_adapt.choices import Choices

METHODS = Choices(
    "adaptation method",
    {
        "full": "vlm_adapt.adapt.full:Full",
        "last_blocks": "vlm_adapt.adapt.full:LastBlocks",
        "lora": "vlm_adapt.adapt.lora:Lora",
        "pela": "vlm_adapt.adapt.pela:Pela",
        "image_prompt": "vlm_adapt.adapt.image_prompt:ImagePrompt",
        "visual_prompt": "vlm_adapt.adapt.visual_prompt:VisualPrompt",
    },
)
