"""What a stage minimises. A new objective is one file and one line here."""

from vlm_adapt.choices import Choices

OBJECTIVES = Choices(
    "objective",
    {
        "language": "vlm_adapt.models.objectives.language:language",
        "embedding": "vlm_adapt.models.objectives.embedding:embedding",
        "distillation": "vlm_adapt.models.objectives.distillation:distillation",
        "masks": "vlm_adapt.models.objectives.masks:masks",
    },
)
