"""Methods look at the model over the first batches, before any training (EVA's start of LoRA).

Knows the stage's stream; knows nothing about what methods look for. Every rank reads the same batches, so
that nothing needs to be sent, and all begin from the same values.
"""

from __future__ import annotations

import torch

from vlm_adapt import dist
from vlm_adapt.data.stream import Shape, Stream
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.train.feed import Feed

MOST = 64  # batches


def watch(assembled: AssembledModel, feed: Feed) -> list[str]:
    """Let those methods of the plan that want it see the first batches, unless they hold values already.

    Returns:
        A line for each of them.
    """
    assert assembled.plan is not None
    fresh = [item for item in assembled.plan.attached if item.trains and not item.begun]
    watching = [(item.label, seen) for item in fresh if (seen := item.method.watch()) is not None]
    if not watching:
        return []
    device, model = dist.device(), assembled.model.to(dist.device())
    mine = feed.stream.shape
    shape = Shape(mine.per_device * mine.ranks, 1, 0, 1)
    data = feed.stream.dataset
    stream = Stream(feed.reader, feed.rows, shape, data.options, collate=data.collate)
    model.eval()
    mixed = torch.autocast(device.type, assembled.dtype, enabled=assembled.dtype != torch.float32)
    for step in stream.steps(feed.rows.start(), MOST):
        with torch.no_grad(), mixed:
            for batch in step.batches:
                model(batch.to(device))
        if all(seen.done for _, seen in watching):
            break
    return [f"{label}: {seen.finish()}" for label, seen in watching]
