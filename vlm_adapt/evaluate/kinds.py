"""How a model of each kind is evaluated. A table only; a new kind is one file and one line here.

Each entry has the arguments of `evaluate.run:evaluate` and returns Scores.
"""

from vlm_adapt.choices import Choices

EVALUATIONS = Choices(
    "evaluation",
    {
        "vision_language": "vlm_adapt.evaluate.run:evaluate",
        "segmenter": "vlm_adapt.evaluate.segment:evaluate",
        "promptable": "vlm_adapt.evaluate.promptable:evaluate",
    },
)
