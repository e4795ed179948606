"""Converters: foreign datasets to samples of our schema. A table only; each is imported when chosen.

A converter is a generator `convert(conversion, *, option: type = default, ...)` that yields
`{"__key__": ..., "jpg": bytes, "json": {...}}`. Its keyword parameters are its options, all of them
words, numbers or booleans; one without a default is required. What it cannot use it names by
`conversion.lose(key, reason)`; if it knows how many samples will come, it sets `conversion.total`.
"""

from __future__ import annotations

from vlm_adapt.choices import Choices

CONVERTERS = Choices(
    "converter",
    {
        "ade20k": "vlm_adapt.data.convert.ade20k:convert",
        "coco_captions": "vlm_adapt.data.convert.coco_captions:convert",
        "csv_jsonl": "vlm_adapt.data.convert.csv_jsonl:convert",
        "coco_detection": "vlm_adapt.data.convert.coco_detection:convert",
        "coco_panoptic": "vlm_adapt.data.convert.coco_panoptic:convert",
        "coco_stuff": "vlm_adapt.data.convert.coco_stuff:convert",
        "easy_vqa": "vlm_adapt.data.convert.easy_vqa:convert",
        "gqa": "vlm_adapt.data.convert.gqa:convert",
        "llava": "vlm_adapt.data.convert.llava:convert",
        "mask_folder": "vlm_adapt.data.convert.mask_folder:convert",
        "nlvr": "vlm_adapt.data.convert.nlvr:convert",
        "parquet": "vlm_adapt.data.convert.parquet:convert",
        "sharegpt": "vlm_adapt.data.convert.sharegpt:convert",
        "textvqa": "vlm_adapt.data.convert.textvqa:convert",
        "pascal_voc": "vlm_adapt.data.convert.pascal_voc:convert",
        "refcoco": "vlm_adapt.data.convert.refcoco:convert",
        "vqav2": "vlm_adapt.data.convert.vqav2:convert",
    },
)
