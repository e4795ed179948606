"""What a connector measures once before a stage's first step: statistics of the features that it reads.

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
from vlm_adapt.models.assembled import AssembledModel

IMAGES = 128  # whose features give a connector's statistics
AT_ONCE = 16


def calibrate(assembled: AssembledModel, reader: Reader, plan: Plan) -> None:
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
