"""What a stage does once before its first step: a connector's statistics, and a cache of features.

Knows the first images of the stage's order; every rank does the same work on the same images, so that
nothing needs to be sent.
"""

from __future__ import annotations

import torch

from vlm_adapt import dist
from vlm_adapt.connectors.packed import PackedFeatures
from vlm_adapt.data.lanes import Plan
from vlm_adapt.data.patches import together
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.reader import Reader
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import Assembled
from vlm_adapt.models.feature_cache import FeatureCache

IMAGES = 128  # whose features give a connector's statistics
AT_ONCE = 16


def calibrate(assembled: Assembled, reader: Reader, plan: Plan) -> None:
    """Give a connector with `normalise: data` its statistics, if it still wants them.

    Raises:
        UserError: there is no image to take them from.
    """
    gather = assembled.model.connector.gather
    if not gather.wants_data:
        return
    pixels = []
    for number in plan.order(0):
        try:
            pixels += reader.pixels(reader.sample(int(number))[0])
        except BadSample:
            continue  # entered in the account when the stream comes to it
        if len(pixels) >= IMAGES:
            break
    if not pixels:
        raise UserError("model.connector normalise 'data' needs images to train on, and there are none")
    device = dist.device()
    assembled.model.vision.to(device)
    batches = []
    with (
        torch.no_grad(),
        torch.autocast(device.type, assembled.dtype, enabled=assembled.dtype != torch.float32),
    ):
        for start in range(0, len(pixels), AT_ONCE):
            features = assembled.model.features(together(pixels[start : start + AT_ONCE]).to(device))
            batches.append(features.layers if isinstance(features, PackedFeatures) else features)
    # Of every layer all patches of all images: [1, patches, channels].
    layers = ([part.flatten(0, -2) for part in parts] for parts in zip(*batches, strict=True))
    gather.to(device).calibrate([torch.cat(parts)[None] for parts in layers])


def cache_features(assembled: Assembled, size: int, zero_stage: int) -> None:
    """Keep the features of `size` images, where the tower is frozen.

    Under ZeRO-3 it does nothing: ranks gather the tower's weights together, so all must run it.

    Raises:
        UserError: the tower trains in this stage.
    """
    assembled.model.feature_cache = None
    if not size:
        return
    if any(parameter.requires_grad for parameter in assembled.model.vision.parameters()):
        raise UserError(
            "train.cache_features needs a frozen tower: set it to 0, or adapt the vision side later"
        )
    if zero_stage < 3:
        assembled.model.feature_cache = FeatureCache(size)
