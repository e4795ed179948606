"""CPU-seconds of one training step of a segmenter: vlm-adapt against the way of LSeg's code.

Both sides hold the same random weights (CLIP ViT-B/32 at 384 pixels, its text tower, the DPT head), see the
same image and mask, train tower and head with plain SGD, and take turns on one thread of one process; the
first losses must agree. LSeg's way encodes all labels in every step: `as written`, with a graph that runs
back through the text tower to gradients that nobody reads (the code neither freezes nor detaches it);
`forward only`, as if it did. It holds the logits of all labels at the mask's size. Ours is models/segmenter.

    python scripts/bench/segment_step.py
    python scripts/bench/segment_step.py --labels 20 --size 64 --steps 2        that all of this runs

Knows the segmenter; knows nothing about data or engines.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
TEMPERATURE = 1 / 0.07
LEAST = 8.0  # times LSeg's way as written
# Float32 sums in another order, over a hundred thousand pixels' mean.
LOSS_TOLERANCE = 1e-4


def segmenter(model: str, size: int) -> Any:
    """A segmenter with random weights, tower and head trainable."""
    import torch

    from vlm_adapt.config.models import Segmenter
    from vlm_adapt.models.segmenter_build import build

    config = Segmenter.model_validate(
        {
            "kind": "segmenter",
            "vision": {
                "model": model,
                "weights": "random:0",
                "image_size": size,
                "layers": [2, 5, 8, 11],
                "options": {"final_norm": False},
            },
            "text": {"model": model, "weights": "random:0"},
            "temperature": TEMPERATURE,
        }
    )
    assembled = build(config, torch.float32, 0)
    built: Any = assembled.model
    unused = assembled.unused()
    built.requires_grad_(False)
    for part in ("vision", "connector"):
        for name, parameter in built.parts()[part].named_parameters():
            parameter.requires_grad_(not any(name.startswith(f"{one}.") for one in unused[part]))
    built.labels.encoder.requires_grad_(False)
    built.vision.train()
    built.connector.train()
    return built


def lsegs_way(built: Any, batch: Any, autocast: Any, backward_through_text: bool) -> Callable[[], float]:
    """A step that encodes the labels anew and holds their logits at the mask's size."""
    import torch
    import torch.nn.functional as F

    encoder = built.labels.encoder
    encoder.requires_grad_(backward_through_text)
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)

    def step() -> float:
        with autocast():
            features = built.vision(built.vision.normalise(batch.pixels_NCHW), built.layers, class_token=True)
            embeddings_NEhw = F.normalize(built.connector.head(features), dim=1)
            with torch.set_grad_enabled(backward_through_text):
                labels_LE = F.normalize(encoder(list(batch.labels[0])), dim=-1)
            logits_NLhw = torch.einsum("le,nehw->nlhw", TEMPERATURE * labels_LE, embeddings_NEhw)
            logits_NLHW = F.interpolate(
                logits_NLhw.float(), batch.masks_NHW.shape[1:], mode="bilinear", align_corners=True
            )
            loss = F.cross_entropy(logits_NLHW, batch.masks_NHW.long(), ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        encoder.zero_grad()
        return float(loss.detach())

    return step


def ours(built: Any, batch: Any, autocast: Any) -> Callable[[], float]:
    """A step of models/segmenter: the loss, divided by the pixels learned from."""
    import torch

    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)

    def step() -> float:
        with autocast():
            total, _ = built(batch)
        loss = total / batch.learned
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    """Take turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="open_clip:ViT-B-32", help="tower and text tower")
    parser.add_argument("--size", type=int, default=384, help="side of the image in pixels")
    parser.add_argument("--labels", type=int, default=150)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="counted, after one that is not")
    parser.add_argument("--bf16", action="store_true", help="under autocast, both sides")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()

    import torch

    from vlm_adapt.data.mask_batch import MaskBatch

    torch.set_num_threads(1)
    built = segmenter(given.model, given.size)
    torch.manual_seed(1)
    shape = (given.batch, given.size, given.size)
    masks_NHW = torch.randint(-1, given.labels, shape, dtype=torch.int16)
    names = tuple(f"thing number {number}" for number in range(given.labels))
    batch = MaskBatch(
        torch.randint(0, 256, (given.batch, 3, given.size, given.size), dtype=torch.uint8),
        masks_NHW,
        (names,) * given.batch,
        tuple(int((mask_HW >= 0).sum()) for mask_HW in masks_NHW),
    )

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=given.bf16)

    sides = {
        "LSeg's way, as written": lsegs_way(copy.deepcopy(built), batch, autocast, True),
        "LSeg's way, text forward only": lsegs_way(copy.deepcopy(built), batch, autocast, False),
        "vlm-adapt": ours(built, batch, autocast),
    }
    losses = {name: step() for name, step in sides.items()}  # the first steps: not counted
    tolerance = 0.05 if given.bf16 else LOSS_TOLERANCE  # bf16 products of another order
    if max(losses.values()) - min(losses.values()) > tolerance * max(losses.values()):
        raise SystemExit(f"the sides do not compute the same loss: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.steps):
        for name, step in sides.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    mine = medians["vlm-adapt"]
    print(f"{given.model}, {given.size} pixels, {given.labels} labels, batch {given.batch}, loss {losses}")
    for name, median in medians.items():
        ratios = [one / own for one, own in zip(seconds[name], seconds["vlm-adapt"], strict=True)]
        print(f"{name:30} {median:8.2f} CPU-s a step   {statistics.median(ratios):6.2f} times ours")
    print(f"at least {LEAST} times: {medians[next(iter(sides))] / mine >= LEAST}")
    if given.json:
        given.json.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
