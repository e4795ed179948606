"""Names for masks: open-vocabulary segmentation out of a promptable model and a text side.

Two text sides: a segmenter, whose pixel embeddings are averaged inside each mask and compared with the
labels' vectors; or the promptable model's own words, once it has learned them. Knows masks and scores; knows
nothing about where masks come from, colours or files.

Shapes: P masks, L labels, H x W pixels, E channels of an embedding, h x w places of a segmenter's map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlm_adapt.data.images import resize
from vlm_adapt.data.masks import IGNORED_16
from vlm_adapt.errors import UserError
from vlm_adapt.models.automatic_masks import FoundMask
from vlm_adapt.models.promptable import ImageEmbedding, Promptable
from vlm_adapt.models.segmenter import Segmenter
from vlm_adapt.text.labels import shown

UNNAMED = IGNORED_16  # of a map of classes: no mask lies there, or none that has a name


@dataclass(frozen=True)
class NamedMask:
    """A mask and what it is.

    Attributes:
        label: number among the labels; None where no name fits well enough.
        name: of the label, as shown.
        score: of the best label, in 0..1.
    """

    found: FoundMask
    label: int | None
    name: str | None
    score: float


@torch.no_grad()
def scores_by_segmenter(
    segmenter: Segmenter, pixels_HWC: np.ndarray, masks: Iterable[np.ndarray], names: Sequence[str]
) -> np.ndarray:
    """scores_PL in 0..1: of each mask, the softmax over labels of the cosines with its mean embedding.

    Args:
        segmenter: sees the whole image, squashed to its tower's size.
        pixels_HWC: uint8.
        masks: bool arrays of the image's size.
        names: labels, with synonyms as in text/labels.py.
    """
    spec = replace(segmenter.image_spec, resize="squash")
    device = next(segmenter.connector.parameters()).device
    pixels_1CHW = torch.from_numpy(np.ascontiguousarray(resize(pixels_HWC, spec)))[None].to(device)
    embeddings_1Ehw = segmenter.unit_embeddings(pixels_1CHW)
    size = (embeddings_1Ehw.shape[2], embeddings_1Ehw.shape[3])
    shares_PK = _shares(masks, size, device)
    labels_LE, temperature = segmenter.labels(names), segmenter.connector.temperature(shares_PK)
    with torch.autocast(device.type, enabled=False):  # small sums of many: float32 in any computation
        means_PE = functional.normalize(shares_PK @ embeddings_1Ehw[0].float().flatten(1).T, dim=-1)
        cosines_PL = means_PE @ labels_LE.to(means_PE).T
        scores: np.ndarray = (cosines_PL * temperature).softmax(1).cpu().numpy()
    return scores


def _shares(masks: Iterable[np.ndarray], size: tuple[int, int], device: torch.device) -> Tensor:
    """How much of each place of a map lies in each mask, `[P, h*w]`, a mask's summing to 1."""
    rows = [
        functional.interpolate(torch.from_numpy(mask_HW).float()[None, None], size, mode="area").flatten()
        for mask_HW in masks
    ]
    if not rows:
        return torch.zeros(0, size[0] * size[1], device=device)
    shares_PK = torch.stack(rows).to(device)
    return shares_PK / shares_PK.sum(1, keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def scores_by_words(
    model: Promptable, embedding: ImageEmbedding, masks: Iterable[np.ndarray], names: Sequence[str]
) -> np.ndarray:
    """scores_PL in 0..1: the mean probability inside each mask of the mask that each name prompts.

    Raises:
        UserError: the model has not learned words.
    """
    found = model.masks(embedding, words=names, multimask=False, full_size=False)
    chances = model.full_size(found.low_PMhw, embedding.frame)[:, 0].sigmoid().cpu().numpy()
    rows = [
        [float(chance_HW[mask_HW].mean()) if mask_HW.any() else 0.0 for chance_HW in chances]
        for mask_HW in masks
    ]
    return np.array(rows, np.float32).reshape(-1, len(names))


def name_masks(
    masks: Sequence[FoundMask], scores_PL: np.ndarray, names: Sequence[str], least: float = 0.0
) -> list[NamedMask]:
    """Each mask with its best label.

    Args:
        least: score below which a mask stays without a name.

    Raises:
        UserError: no labels.
    """
    if not names:
        raise UserError("the list of labels is empty: name at least one")
    named = []
    for found, scores_L in zip(masks, scores_PL, strict=True):
        best = int(scores_L.argmax())
        score = float(scores_L[best])
        label = best if score >= least else None
        named.append(NamedMask(found, label, None if label is None else shown(names[label]), score))
    return named


def semantic_map(named: Sequence[NamedMask], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(classes_HW uint16, scores_HW float32): smaller masks lie on top of larger ones.

    A pixel is UNNAMED (65535) where no mask with a name lies.
    """
    classes_HW = np.full(size, UNNAMED, np.uint16)
    scores_HW = np.zeros(size, np.float32)
    for one in sorted(named, key=lambda one: -one.found.area):
        if one.label is not None:
            classes_HW[one.found.mask_HW] = one.label
            scores_HW[one.found.mask_HW] = one.score
    return classes_HW, scores_HW
