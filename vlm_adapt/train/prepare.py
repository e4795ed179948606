"""What a stage does once before its first step: a cache of features, where the tower is frozen.

Knows which parts train; knows nothing about what a cache holds.
"""

from __future__ import annotations

from vlm_adapt.errors import UserError
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.feature_cache import FeatureCache


def cache_features(assembled: AssembledModel, size: int, zero_stage: int) -> None:
    """Keep the features of `size` images, where the tower is frozen.

    Under ZeRO-3 it does nothing: ranks gather the tower's weights together, so all must run it.

    Raises:
        UserError: the tower trains in this stage.
    """
    assembled.model.feature_cache = assembled.model.mask_cache = None
    if not size:
        return
    if any(parameter.requires_grad for parameter in assembled.model.vision.parameters()):
        raise UserError(
            "train.cache_features needs a frozen tower: set it to 0, or adapt the vision side later"
        )
    if zero_stage < 3:
        assembled.model.feature_cache = FeatureCache(size)
        if getattr(assembled.model, "mask_vision", None) is not None:  # always frozen
            assembled.model.mask_cache = FeatureCache(size)
