"""Parts put together to models: one road for training, evaluation and chat.

Two tables: kinds of models by `model.kind`, and what of a run of each kind can be told to be wrong before
anything heavy is imported. A new kind is one file and one line in each. An entry of KINDS is called as
`build(config, dtype, seed, tokenizer_folder, empty)` and gives an AssembledModel.
"""

from vlm_adapt.choices import Choices

KINDS = Choices(
    "model kind",
    {
        "vision_language": "vlm_adapt.models.build:build_vision_language",
        "segmenter": "vlm_adapt.models.segmenter_build:build",
        "promptable": "vlm_adapt.models.promptable_build:build",
    },
)
CHECKS = Choices(
    "model kind",
    {
        "vision_language": "vlm_adapt.models.check:check_vision_language",
        "segmenter": "vlm_adapt.models.check_masks:check_segmenter",
        "promptable": "vlm_adapt.models.check_masks:check_promptable",
    },
)
MASKS = Choices(
    "way to draw masks that a token asks for", {"sam": "vlm_adapt.models.mask_build:attach_masks"}
)
