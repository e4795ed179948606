"""Masks for points, boxes, masks and words (SAM: Kirillov et al. 2023, arXiv 2304.02643).

1 tower, 2 neck, 3 prompt encoder, 4 mask decoder, 5 back to the image's own size. Knows the order of
that road; knows nothing about files, adaptation methods or how prompts are drawn in training.

Shapes: N images, P prompts, K points a prompt, M masks a prompt, D channels of the embedding, h x w its grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.data.long_side import Frame, fit_long_side, fit_mask
from vlm_adapt.errors import UserError
from vlm_adapt.heads.sam import SamDecoder, float32_kept
from vlm_adapt.heads.sam_neck import SamNeck
from vlm_adapt.heads.sam_words import WordPrompt
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.models.objectives.promptable import CERTAIN, promptable
from vlm_adapt.text.labels import LabelEmbeddings
from vlm_adapt.vision.tower import Tower

PROMPTS_AT_ONCE = {"cpu": 4, "cuda": 64}  # a processor is fastest while they fit into its cache


@dataclass
class ImageEmbedding:
    """What is kept of an image for any number of prompts.

    Attributes:
        features_1Dhw: what masks are decoded from.
        frame: how the image lay in the square.
    """

    features_1Dhw: Tensor
    frame: Frame


class Prediction(NamedTuple):
    """Masks of some prompts: logits (above 0 is inside), the decoder's own estimate of IoU, and the logits as
    they left the decoder, which are the mask prompt of a next round."""

    logits_PMHW: Tensor
    iou_PM: Tensor
    low_PMhw: Tensor


class PromptConnector(nn.Module):
    """What stands between tower and masks: neck, prompt encoder with mask decoder, and projection of words.

    Args:
        words: None where the model has no text encoder.
    """

    def __init__(self, neck: SamNeck, decoder: SamDecoder, words: WordPrompt | None = None):
        super().__init__()
        self.neck, self.decoder, self.words = neck, decoder, words

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PromptConnector:
        """As usual, but always float32: it is small, and places on the image need the bits."""
        super()._apply(float32_kept(fn), recurse)
        return self


class Promptable(nn.Module):
    """A promptable model.

    Args:
        tower: sees squares.
        layers: the depth that the neck reads, the last one by default.
        labels: vectors of names; None without text. Their encoder is no part of this module unless it trains
            (`train_text`): frozen, it runs once a name.
    """

    def __init__(
        self,
        tower: Tower,
        connector: PromptConnector,
        layers: Sequence[int] = (-1,),
        labels: LabelEmbeddings | None = None,
    ):
        super().__init__()
        self.vision, self.connector, self.layers = tower, connector, tuple(layers)
        self._labels = [labels]  # in a list, so that it is not registered
        self.penalties: list[Callable[[], Tensor | None]] = []
        self.side = tower.image_spec.size[0]

    def parts(self) -> dict[str, nn.Module]:
        """The parts that an adaptation plan speaks of."""
        parts: dict[str, nn.Module] = {"vision": self.vision, "connector": self.connector}
        return parts if self.labels is None else parts | {"language": self.labels.encoder}

    @property
    def labels(self) -> LabelEmbeddings | None:
        """Vectors of names."""
        return self._labels[0]

    @property
    def image_spec(self) -> ImageSpec:
        """What the tower wants images to look like; prepare them by data/long_side.py all the same."""
        return self.vision.image_spec

    def train_text(self) -> None:
        """Make the text encoder a part of this module: a method of the plan adapts it."""
        if self.labels is not None:
            self.language = self.labels.encoder

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are."""
        return next(self.connector.parameters()).device

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the tower's activations in the backward pass."""
        part: Any = self.vision
        (part.ladder or part).set_activation_checkpointing(enabled)
        if self.labels is not None and self.labels.trains:
            self.labels.encoder.set_activation_checkpointing(enabled)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Sum of the batch's losses (float32 scalar), and each one of them, detached."""
        total, losses_N = promptable(self, batch)
        for penalty in self.penalties:
            value = penalty()
            total = total if value is None else total + value * len(losses_N)
        return total, losses_N

    def features(self, pixels_NCHW: Tensor, frames: Sequence[Frame] | None = None) -> Tensor:
        """uint8 squares (data/long_side.py) to embeddings_NDhw, float32.

        Args:
            frames: where each image ends; beyond, normalised pixels are exactly zero, as in SAM. Without,
                they are the rounded mean.
        """
        normalised_NCHW = self.vision.normalise(pixels_NCHW)
        for image_CHW, frame in zip(normalised_NCHW, frames or (), strict=bool(frames)):
            image_CHW[:, frame.resized[0] :] = 0
            image_CHW[:, :, frame.resized[1] :] = 0
        (features_NPD,) = self.vision(normalised_NCHW, self.layers)
        embeddings_NDhw: Tensor = self.connector.neck(features_NPD.to(self._neck_dtype))
        return embeddings_NDhw.float()

    @property
    def _neck_dtype(self) -> torch.dtype:
        return next(self.connector.neck.parameters()).dtype

    @torch.no_grad()
    def embed(self, pixels_HWC: np.ndarray) -> ImageEmbedding:
        """What any number of prompts on an image need of it.

        Args:
            pixels_HWC: uint8, of any size.
        """
        square_CHW, frame = fit_long_side(pixels_HWC, self.side, self.vision.image_spec)
        pixels_1CHW = torch.from_numpy(square_CHW)[None].to(self.device)
        return ImageEmbedding(self.features(pixels_1CHW, [frame]), frame)

    def word_tokens(self, names: Sequence[str]) -> Tensor:
        """Prompt tokens_L1D of names, one token each.

        Raises:
            UserError: the model reads no words, or never learned to.
        """
        if self.connector.words is None or self.labels is None:
            raise UserError(
                "this model has no text encoder, so words cannot prompt it: name masks by a segmenter "
                "(--everything --name-with SEGMENTER --labels ...), or train one with model.text"
            )
        words: Any = self.connector.words
        if not words.learns and not words.trained:
            raise UserError(
                "this model has not learned to be prompted by words: fine-tune it on shards with labels or "
                "expressions first, or name its masks (--everything --name-with SEGMENTER --labels ...)"
            )
        tokens_L1D: Tensor = words(self.labels(list(names)).to(self.device))
        return tokens_L1D

    @torch.no_grad()
    def masks(
        self,
        embedding: ImageEmbedding,
        points_PK2: Any = None,
        point_labels_PK: Any = None,
        boxes_P4: Any = None,
        mask_inputs_Phw: Tensor | None = None,
        multimask: bool = True,
        words: Sequence[str] | None = None,
        full_size: bool = True,
    ) -> Prediction:
        """Masks of prompts on one image.

        Args:
            embedding: of the image.
            points_PK2: (x, y) in pixels of the original image.
            point_labels_PK: 1 inside, 0 outside, -1 none (fills up rows of several lengths); default 1.
            boxes_P4: (left, top, right, bottom) in pixels of the original image.
            mask_inputs_Phw: of an earlier round's `low_PMhw`, one of each prompt's masks; see `mask_prompt`.
            multimask: three masks for an ambiguous prompt (one point), or one.
            words: a name for each prompt.
            full_size: masks of the original size; else as they left the decoder.

        Raises:
            UserError: no prompt, or prompts that do not fit together.
        """
        points, boxes = self._inward(embedding, points_PK2, 3), self._inward(embedding, boxes_P4, 2)
        labels = None
        if points is not None:
            labels = torch.ones(points.shape[:-1], dtype=torch.int64, device=self.device)
            if point_labels_PK is not None:
                labels = torch.as_tensor(np.asarray(point_labels_PK), device=self.device).long()
            if labels.shape != points.shape[:-1]:
                raise UserError(
                    f"{points.shape[:-1].numel()} points have {labels.numel()} labels: give each one"
                )
        tokens = self.word_tokens(words) if words is not None else None
        found: list[tuple[Tensor, ...]] = []
        given = [prompt for prompt in (points, boxes, mask_inputs_Phw, tokens) if prompt is not None]
        prompts = len(given[0]) if given else 1
        if any(len(prompt) != prompts for prompt in given):
            raise UserError(
                f"there are {' and '.join(str(len(prompt)) for prompt in given)} prompts of several kinds: "
                "give as many of each, for they go together"
            )
        at_once = PROMPTS_AT_ONCE.get(self.device.type, 64)
        for start in range(0, prompts, at_once):
            part = slice(start, start + at_once)
            low, iou = self.connector.decoder(
                embedding.features_1Dhw,
                *(None if given is None else given[part][None] for given in (points, labels, boxes)),
                masks_NPHW=None if mask_inputs_Phw is None else mask_inputs_Phw[part][None].to(self.device),
                words_NPTD=None if tokens is None else tokens[part][None],
                multimask=multimask,
            )
            low_PMhw = low[0].float()
            logits = self.full_size(low_PMhw, embedding.frame) if full_size else low_PMhw
            found.append((logits, iou[0].float(), low_PMhw))
        return Prediction(*(torch.cat(pieces) for pieces in zip(*found, strict=True)))

    def _inward(self, embedding: ImageEmbedding, places: Any, dimensions: int) -> Tensor | None:
        """Places of the image as places of the square, on the model's device."""
        if places is None:
            return None
        plain = np.asarray(places, np.float32)
        last = 2 if dimensions == 3 else 4
        if plain.ndim != dimensions or plain.shape[-1] != last:
            kind = "points are [prompts, points, 2]" if last == 2 else "boxes are [prompts, 4]"
            raise UserError(f"{kind}, not {list(plain.shape)}")
        return torch.from_numpy(embedding.frame.inward(plain)).to(self.device)

    def full_size(self, low_PMhw: Tensor, frame: Frame) -> Tensor:
        """The decoder's logits at the image's own size: to the square, cut, and from there, both bilinear."""
        logits = low_PMhw.new_empty(*low_PMhw.shape[:2], *frame.original)
        for prompt, low_Mhw in enumerate(low_PMhw):  # one by one: 64 prompts are 800 MB at 1024 pixels
            square = functional.interpolate(low_Mhw[None], (frame.side, frame.side), mode="bilinear")
            inner = square[..., : frame.resized[0], : frame.resized[1]]
            logits[prompt] = functional.interpolate(inner, frame.original, mode="bilinear")[0]
        return logits

    def mask_prompt(self, mask_HW: np.ndarray, frame: Frame) -> Tensor:
        """A mask of the original image as a prompt_1hw: certain logits, outside beyond the image."""
        if mask_HW.shape != frame.original:
            raise UserError(
                f"the mask is {mask_HW.shape[1]} x {mask_HW.shape[0]} and the image {frame.original[1]} x "
                f"{frame.original[0]}: give a mask of the image's size"
            )
        size = self.connector.decoder.mask_size
        inside = torch.from_numpy(fit_mask(mask_HW.astype(bool), frame, size)).to(self.device)
        return (inside.float() * 2 - 1)[None] * CERTAIN
