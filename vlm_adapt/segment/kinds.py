"""Which kinds of model can be asked for masks. A table only; a new kind is one file and one line here.

Each entry is a class with:

    check(ask, config)            static, before any weight is read. Raises UserError: it cannot be asked this
    __init__(assembled, ask)      with the model on its device, in evaluation mode
    __call__(pixels_HWC)          uint8 of any size -> Segmentation; under autocast, without gradients. Raises
                                  BadSample: this image cannot be done, others may
"""

from vlm_adapt.choices import Choices

KINDS = Choices(
    "segmenting model",
    {
        "segmenter": "vlm_adapt.segment.labelled:Labelled",
        "promptable": "vlm_adapt.segment.promptable:Prompted",
    },
)
