"""Masks that tokens of a text ask for: which mask each token means, where it lies, and on which image.

Knows positions, mask files and how an image is brought to a tower's size; knows nothing about models or
wording. A mask is of the image that was shown last before its token.

An answer says what its tokens mean by references, in the order of the tokens:

    {"mask": 3}          the binary mask file number 3
    {"label": "sky"}     the pixels of the semantic mask that have this label
    {"label": "sky", "empty": true}     nothing: the image has no such pixel

    M masks, h x w target size, J images for the masks' own tower, W writers of answers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_adapt.data.masks import ignored_value, read_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.image_spec import ImageSpec

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_adapt.data.sample import Sample

IGNORED = 255  # in a target: pixels of which nothing is known
SAMPLES = 4  # of a mask along each side of a target's pixel


@dataclass(frozen=True)
class MaskSpec:
    """What a model wants of masks.

    Attributes:
        token: the number of the token.
        size: (height, width) of targets.
        image_spec: of the tower on whose features masks are drawn.
        own: whether that tower is one for masks alone, which gets images of its own.
    """

    token: int
    size: tuple[int, int]
    image_spec: ImageSpec
    own: bool


@dataclass
class RowMasks:
    """What an Encoded row knows of its masks.

    Attributes:
        starts: where the tokens are, ascending; `references` what each means.
        targets: [h, w] uint8 each: 1 inside, 0 outside, IGNORED; filled where the sample is read.
        scenes: the sample's images for the masks' own tower, [C, H, W] uint8.
        asked: whether the row is a prompt, whose answer may ask for masks.
    """

    starts: list[int] = field(default_factory=list)
    references: list[Mapping[str, Any]] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    scenes: list[np.ndarray] = field(default_factory=list)
    asked: bool = False

    def note(
        self, tokens: Sequence[int], start: int, token: int | None, masks: Sequence[Any], learn: bool
    ) -> None:
        """Note the tokens of a learned text that begins at `start`.

        Args:
            token: the model's token for masks; None if it has none.
            masks: what the text's tokens mean.
            learn: whether the text is learned, so that all must fit.

        Raises:
            BadSample: tokens and masks differ in number, or the model has no such token.
        """
        if token is None:
            if masks and learn:
                raise BadSample("its answer means a mask, and the model has none: set model.masks")
            return
        found = [start + place for place, one in enumerate(tokens) if one == token]
        if learn and len(found) != len(masks):
            raise BadSample(
                "mask tokens and masks of an answer differ in number", f"{len(found)} and {len(masks)}"
            )
        if masks:
            self.starts += found
            self.references += masks


def mask_of(sample: Sample, reference: Mapping[str, Any]) -> np.ndarray:
    """What a reference means: mask_HW uint8 of 0, 1 and IGNORED, of the image's size.

    Raises:
        BadSample: the sample has no such mask or label, or the file cannot be read.
    """
    if "mask" in reference:
        if reference["mask"] not in sample.masks:
            raise BadSample("an answer means a mask that is not there", f"mask.{reference['mask']}.png")
        return (read_mask(sample.masks[reference["mask"]]) > 0).astype(np.uint8)
    if "label" not in reference:
        raise BadSample("an answer's mask is named by no mask and no label", str(dict(reference)))
    if sample.mask is None:
        raise BadSample("an answer means a label and the sample has no semantic mask", reference["label"])
    names = [str(name).strip() for name in sample.record.get("labels", ())]
    values = [value for value, name in enumerate(names) if name == reference["label"]]
    if not values and not reference.get("empty"):
        raise BadSample("an answer means a label that the sample does not list", reference["label"])
    mask_HW = read_mask(sample.mask)
    found_HW = np.isin(mask_HW, values).astype(np.uint8)
    found_HW[mask_HW == ignored_value(mask_HW)] = IGNORED
    return found_HW


def frame(height: int, width: int, spec: ImageSpec) -> tuple[int, int, int, int]:
    """(height, width, top, left) of an image of this size inside a tower's; negative where it is cropped.

    The rules and roundings are those of `data.images.resize`.
    """
    tall, wide = spec.size
    if spec.resize == "crop":
        if height * wide <= width * tall:
            inner = tall, max(wide, int(tall * width / height))
        else:
            inner = max(tall, int(wide * height / width)), wide
        return *inner, -round((inner[0] - tall) / 2), -round((inner[1] - wide) / 2)
    if spec.resize == "pad":
        scale = min(tall / height, wide / width)
        inner = min(tall, max(1, round(height * scale))), min(wide, max(1, round(width * scale)))
        return *inner, (tall - inner[0]) // 2, (wide - inner[1]) // 2
    return tall, wide, 0, 0


def target_of(mask_HW: np.ndarray, spec: MaskSpec) -> np.ndarray:
    """A mask as the tower sees its image, at the size of targets: most of a pixel's samples decide.

    Returns:
        [h, w] uint8 of 0, 1 and IGNORED, which is also what lies outside of the image.
    """
    height, width = mask_HW.shape
    tall, wide, top, left = frame(height, width, spec.image_spec)
    (down, across), (rows_out, columns_out) = spec.image_spec.size, spec.size
    rows = _sampled(height, tall, top, down, rows_out)
    columns = _sampled(width, wide, left, across, columns_out)
    outside = ((rows < 0) | (rows >= height))[:, None] | ((columns < 0) | (columns >= width))[None]
    drawn = mask_HW[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    drawn[outside] = IGNORED
    cells = drawn.reshape(spec.size[0], SAMPLES, spec.size[1], SAMPLES).transpose(0, 2, 1, 3)
    cells = cells.reshape(*spec.size, SAMPLES**2)
    known = (cells != IGNORED).sum(2)
    inside = ((cells == 1).sum(2) * 2 > known).astype(np.uint8)
    inside[known * 2 < SAMPLES**2] = IGNORED
    return inside


def _sampled(length: int, inner: int, first: int, whole: int, count: int) -> np.ndarray:
    """Which row (or column) of `length` each sample of a target falls on.

    Args:
        inner, first, whole: pixels that the rows take before the tower, where they begin, and of all.
        count: rows of the target.
    """
    seen = (np.arange(count * SAMPLES) + 0.5) / (count * SAMPLES) * whole
    return np.floor((seen - first) / inner * length).astype(np.int64)


@dataclass
class TokenMasks:
    """The masks of a batch.

    Attributes:
        positions_M: flat positions in [B*T] of the tokens.
        targets_Mhw: uint8: 1 inside, 0 outside, IGNORED.
        images_M: which image each is on: of `scenes_JCHW`, or of the batch's own where the tower is shared.
        scenes_JCHW: uint8 for the masks' own tower, ONE zero image when there is none; empty if shared.
        writers_W: the image of each answer that will be written, in the order of writers; -1 for none.
    """

    positions_M: Tensor
    targets_Mhw: Tensor
    images_M: Tensor
    scenes_JCHW: Tensor
    writers_W: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> TokenMasks:
        """The same with changed tensors (moved, pinned)."""
        return replace(self, **{name: change(value) for name, value in vars(self).items()})


def together(placed: Sequence[tuple[Any, int, int]], spec: MaskSpec) -> TokenMasks:
    """Put the masks of a batch's texts together.

    Args:
        placed: (Encoded text, flat place of its first token, images of the batch before its own).
    """
    import torch

    positions: list[int] = []
    targets: list[np.ndarray] = []
    images: list[int] = []
    writers: list[int] = []
    scenes: list[np.ndarray] = []

    def image_before(text: Any, place: int, before: int) -> int:
        """The last image shown before a place of a text, in the numbers of the batch."""
        shown = int(np.searchsorted(text.image_starts, place)) - 1
        if shown < 0:
            return -1
        if not spec.own:
            return before + shown
        if not text.masks.scenes:  # an image of another sample stands here for the blind score
            return -1
        scene = text.masks.scenes[text.image_order[shown]]
        known = next((number for number, one in enumerate(scenes) if one is scene), None)
        if known is None:
            scenes.append(scene)
            return len(scenes) - 1
        return known

    for text, start, before in placed:
        for place, target in zip(text.masks.starts, text.masks.targets, strict=True):
            positions.append(start + place)
            targets.append(target)
            images.append(image_before(text, place, before))
        if text.masks.asked:
            writers += [image_before(text, place, before) for place in text.ends()]
    if spec.own and not scenes:
        scenes.append(np.zeros((3, *spec.image_spec.size), np.uint8))
    shape = (0, 3, *spec.image_spec.size)
    return TokenMasks(
        positions_M=torch.tensor(positions, dtype=torch.int64),
        targets_Mhw=torch.from_numpy(np.stack(targets) if targets else np.zeros((0, *spec.size), np.uint8)),
        images_M=torch.tensor(images, dtype=torch.int64),
        scenes_JCHW=torch.from_numpy(np.stack(scenes) if scenes else np.zeros(shape, np.uint8)),
        writers_W=torch.tensor(writers, dtype=torch.int64),
    )
