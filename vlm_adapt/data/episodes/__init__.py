"""Zero-shot protocols by name. A table only; a new protocol is one file and one line here."""

from vlm_adapt.choices import Choices

PROTOCOLS = Choices(
    "protocol",
    {
        "pascal5i": "vlm_adapt.data.episodes.pascal5i:Pascal5i",
        "coco20i": "vlm_adapt.data.episodes.coco20i:Coco20i",
        "fss1000": "vlm_adapt.data.episodes.fss1000:Fss1000",
    },
)
