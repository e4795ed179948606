"""The segmenter: 1 tower, 2 dense head, 3 text encoder, 4 cosines, 5 regularisation, 6 cross-entropy.

LSeg (Li et al. 2022, arXiv 2201.03546): every pixel has an embedding and so has every label; the label of a
pixel is the one at the smallest angle. Knows the order of the road; knows nothing about files, adaptation
methods, windows or engines.

    N images of H x W pixels, h x w places of the head's map, E channels of an embedding, B of what stands for
    it (heads/projection.py), L labels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.data.mask_batch import MaskBatch
from vlm_adapt.heads.batch_norm import SharedBatchNorm
from vlm_adapt.heads.dense_head import DenseHead
from vlm_adapt.heads.dense_loss import dense_argmax, dense_cross_entropy, dense_logits
from vlm_adapt.heads.regularisation import Regularisation
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.text.labels import LabelEmbeddings
from vlm_adapt.vision.tower import Tower


class Temperature(nn.Module):
    """What cosines are multiplied by: fixed as in LSeg's code, or learned as its logarithm.

    The original's `nn.Parameter(...).exp()` is a plain tensor that no optimizer sees: fixed in effect, at
    1 / 0.07. It is a module that is called, so that ZeRO-3 gathers it.
    """

    def __init__(self, value: float | str):
        super().__init__()
        self.fixed = None if value == "learned" else float(value)
        if self.fixed is None:
            self.logarithm = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, like: Tensor) -> Tensor:
        """The factor, float32 scalar on the device of `like`."""
        if self.fixed is None:
            return self.logarithm.float().exp().squeeze(0)
        return torch.tensor(self.fixed, device=like.device)


class SegmenterHead(nn.Module):
    """What an adaptation plan calls the connector: dense head, regularisation, and a learned temperature."""

    def __init__(self, head: DenseHead, regularisation: Regularisation | None, temperature: Temperature):
        super().__init__()
        self.head, self.regularisation, self.temperature = head, regularisation, temperature

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """A tower's features to (pixels_NBhw, basis_EB), float32: cosines are their product with labels."""
        found: tuple[Tensor, Tensor] = self.head(features, compact=True)
        return found

    def count(self, counted: bool) -> None:
        """Whether the images to come are any, or one that stands in: it has no part in shared statistics."""
        for module in self.head.modules():
            if isinstance(module, SharedBatchNorm):
                module.counts = counted

    def unused_modules(self) -> list[str]:
        """Dotted names of modules whose parameters get no gradient."""
        return [f"head.{name}" for name in self.head.unused_modules()]


class Segmenter(nn.Module):
    """A tower and a text encoder joined by a dense head.

    Args:
        tower, head: the parts.
        labels: vectors of labels. Their encoder is no part of this module unless it trains (`train_text`):
            frozen, it runs once a label, and no engine needs to shard or gather it.
        layers: the four depths of the tower, shallow ones first.
    """

    def __init__(self, tower: Tower, head: SegmenterHead, labels: LabelEmbeddings, layers: Sequence[int]):
        super().__init__()
        self.vision, self.connector, self.layers = tower, head, tuple(layers)
        self._labels = [labels]  # in a list, so that it is not registered
        self.penalties: list[Callable[[], Tensor | None]] = []

    @property
    def labels(self) -> LabelEmbeddings:
        """Vectors of labels."""
        return self._labels[0]

    @property
    def image_spec(self) -> ImageSpec:
        """What the tower wants images to look like."""
        return self.vision.image_spec

    @property
    def halo(self) -> int:
        """How many rows beside a row its logits look at, at the head's resolution."""
        regularisation = self.connector.regularisation
        return 0 if regularisation is None else regularisation.depth

    def parts(self) -> dict[str, nn.Module]:
        """The parts that an adaptation plan speaks of."""
        return {"vision": self.vision, "connector": self.connector, "language": self.labels.encoder}

    def train_text(self) -> None:
        """Make the text encoder a part of this module: a method of the plan adapts it."""
        self.language = self.labels.encoder

    def embed(self, pixels_NCHW: Tensor) -> Tensor:
        """uint8 images of the tower's size to what `label_logits` reads, pixels_NBhw, float32."""
        return self._seen(pixels_NCHW)[0]

    def unit_embeddings(self, pixels_NCHW: Tensor) -> Tensor:
        """uint8 images [N, C, H, W] of the tower's size to embeddings_NEhw of length 1, float32."""
        pixels_NBhw, basis_EB = self._seen(pixels_NCHW)
        return torch.einsum("nbhw,eb->nehw", pixels_NBhw, basis_EB)

    def _seen(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        wants = self.connector.head.wants_class_token
        features = self.vision(self.vision.normalise(pixels_NCHW), self.layers, class_token=wants)
        seen: tuple[Tensor, Tensor] = self.connector(features)
        return seen

    def label_logits(self, pixels_NBhw: Tensor, names: Sequence[str], size: tuple[int, int]) -> Tensor:
        """logits_NLHW at `size` (height, width); memory for all of them."""
        labels_LB, temperature = self._asked(pixels_NBhw, names)
        with torch.autocast(pixels_NBhw.device.type, enabled=False):
            return dense_logits(pixels_NBhw, labels_LB, temperature, size, self.connector.regularisation)

    def classes(
        self, pixels_NBhw: Tensor, names: Sequence[str], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """(classes_NHW, scores_NHW) at `size`, in bounded memory for any number of labels."""
        labels_LB, temperature = self._asked(pixels_NBhw, names)
        with torch.autocast(pixels_NBhw.device.type, enabled=False):
            return dense_argmax(pixels_NBhw, labels_LB, temperature, size, self.connector.regularisation)

    def _asked(self, pixels_NBhw: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        basis_EB = self.connector.head.basis().to(pixels_NBhw)
        with torch.autocast(pixels_NBhw.device.type, enabled=False):
            labels_LB = self.labels(names).to(pixels_NBhw) @ basis_EB
        return labels_LB, self.connector.temperature(pixels_NBhw)

    def forward(self, batch: MaskBatch) -> tuple[Tensor, Tensor]:
        """Sum of the valid pixels' cross-entropies (float32 scalar), and each one's own [V], detached."""
        self.connector.count(bool(batch.learned))
        pixels_NBhw, basis_EB = self._seen(batch.pixels_NCHW)
        labels_LE, places = self._labels_of(batch, pixels_NBhw)
        temperature = self.connector.temperature(pixels_NBhw)
        # Called once a batch, so that ranks with other numbers of images call it equally often.
        block = None if self.connector.regularisation is None else self.connector.regularisation.blocks()
        losses = []
        # Few channels are left, of numbers that cancel: float32, whatever the towers compute in.
        with torch.autocast(pixels_NBhw.device.type, enabled=False):
            labels_LB = labels_LE @ basis_EB
            for image_Bhw, mask_HW, own_L in zip(pixels_NBhw, batch.masks_NHW, places, strict=True):
                own_LB = labels_LB[own_L]
                losses.append(dense_cross_entropy(image_Bhw, own_LB, mask_HW.long(), temperature, block))
        losses_V = torch.cat(losses)
        # Where no pixel is valid there is still a way back through every part: ZeRO waits for it.
        total = losses_V.sum() + (pixels_NBhw.sum() + labels_LB.sum() + temperature) * 0.0
        for penalty in self.penalties:
            value = penalty()
            total = total if value is None else total + value * len(losses_V)
        return total, losses_V.detach()

    def _labels_of(self, batch: MaskBatch, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Vectors of all labels of a batch, each once, and every image's places among them."""
        names = list(dict.fromkeys(name for labels in batch.labels for name in labels))
        place = {name: number for number, name in enumerate(names)}
        vectors_LE = self.labels(names).to(like)
        own = [torch.tensor([place[name] for name in labels], device=like.device) for labels in batch.labels]
        return vectors_LE, own

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, in the tower and in a text encoder that trains."""
        part: Any = self.vision
        (part.ladder or part).set_activation_checkpointing(enabled)
        if self.labels.trains:
            self.labels.encoder.set_activation_checkpointing(enabled)
