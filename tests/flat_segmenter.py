"""A stand-in for a segmenter that tells classes by colour, with shards for it: for tests of scores."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.data.mask_batch import MaskBatch, collate_masks
from vlm_adapt.data.mask_reader import MaskReader
from vlm_adapt.image_spec import ImageSpec

STEP = 16  # of red between classes
CLASSES = 16


class Labels:
    """The label `cat3` or `cat3|x` looks like class 3; others look as `looks` says, or like 0."""

    def __init__(self) -> None:
        self.looks: dict[str, int] = {}
        self.encoder = SimpleNamespace(trains=False)
        self.asked: list[tuple[str, ...]] = []

    def forget(self) -> None:
        self.asked.clear()

    def __call__(self, names: Sequence[str]) -> Tensor:
        self.asked.append(tuple(names))
        numbers = [
            "".join(filter(str.isdigit, name.split("|")[0])) or self.looks.get(name, 0) for name in names
        ]
        return functional.one_hot(torch.tensor([int(one) for one in numbers]), CLASSES).float()


class FlatSegmenter(nn.Module):
    """Embeds a pixel as its red divided by STEP, one place a pixel; `done` says what was run."""

    def __init__(self, size: tuple[int, int] = (8, 8)):
        super().__init__()
        self.image_spec = ImageSpec(size, resize="squash", interpolation="bilinear")
        self.weight = nn.Parameter(torch.ones(1))
        self.labels, self.halo, self.done = Labels(), 0, []

    def embed(self, pixels_NCHW: Tensor) -> Tensor:
        self.done.append("embed")
        classes_NHW = (pixels_NCHW[:, 0].long() // STEP).clamp(max=CLASSES - 1)
        return functional.one_hot(classes_NHW, CLASSES).permute(0, 3, 1, 2).float()

    def label_logits(self, embeddings_NEhw: Tensor, names: Sequence[str], size: tuple[int, int]) -> Tensor:
        self.done.append("logits")
        logits_NLhw = torch.einsum("nehw,le->nlhw", embeddings_NEhw, self.labels(names))
        return functional.interpolate(logits_NLhw, size, mode="bilinear", align_corners=True)

    def forward(self, batch: MaskBatch) -> tuple[Tensor, Tensor]:
        self.done.append("loss")
        losses = []
        for pixels_CHW, mask_HW, labels in zip(
            batch.pixels_NCHW, batch.masks_NHW.long(), batch.labels, strict=True
        ):
            logits_LHW = torch.einsum("ehw,le->lhw", self.embed(pixels_CHW[None])[0], self.labels(labels))
            losses.append(
                functional.cross_entropy(logits_LHW[None], mask_HW[None], ignore_index=-1, reduction="none")[
                    mask_HW[None] >= 0
                ]
            )
        losses_V = torch.cat(losses)
        return losses_V.sum() + 100, losses_V  # a penalty is in the sum


def assembled(model: FlatSegmenter) -> Any:
    """What an evaluation asks of an assembled segmenter."""
    return SimpleNamespace(
        model=model,
        dtype=torch.float32,
        thumbnails=False,
        reader=lambda sources, seed, data: MaskReader(sources, model.image_spec, seed, data, data.augment),
        collate=collate_masks,
        collate_options={"image_size": model.image_spec.size},
    )


def picture(classes_HW: np.ndarray) -> np.ndarray:
    """pixels_HWC that the segmenter sees as these classes."""
    red_HW = (classes_HW * STEP + STEP // 2).astype(np.uint8)
    return np.stack([red_HW, np.full_like(red_HW, 90), np.full_like(red_HW, 30)], -1)


def png(values: np.ndarray) -> bytes:
    """A PNG of pixels_HWC or of mask_HW."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: Sequence[tuple[np.ndarray, np.ndarray, Sequence[str]]]) -> Path:
    """A tar of (classes that the segmenter will see, mask, labels)."""
    with tarfile.open(path, "w") as tar:
        for number, (seen_HW, mask_HW, labels) in enumerate(samples):
            for end, data in (
                ("png", png(picture(seen_HW))),
                ("mask.png", png(mask_HW.astype(np.uint8))),
                ("json", json.dumps({"labels": list(labels)}).encode()),
            ):
                info = tarfile.TarInfo(f"{number:04d}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path
