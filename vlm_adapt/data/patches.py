"""Images of native aspect ratio and resolution: planned from their headers, cut into patches, put together.

Knows files, plans and patches; knows nothing about towers or tokens of a text. What an image becomes is
decided from its header's size and the sample's draws, before a pixel is decoded, and is the same when it
is decoded. For towers whose images have one size these are the functions of `images`.

    P patches of an image, T of all images, V = patch * patch * 3 values: row, column, channel
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_adapt.data.images import MAX_PIXELS, decode, load_image, resize
from vlm_adapt.data.sizes import seen_size
from vlm_adapt.image_spec import ImagePlan, ImageSpec, Native

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImagePatches:
    """One image as patches.

    Attributes:
        patches_PV: uint8, those that are kept.
        places_P: each one's number in the grid, row by row, ascending.
        grid: (rows, columns) of the whole image.
        tokens: what the connector makes of it.
    """

    patches_PV: np.ndarray
    places_P: np.ndarray
    grid: tuple[int, int]
    tokens: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the whole image, as an array of pixels would have them."""
        side = round((self.patches_PV.shape[1] / 3) ** 0.5)
        return 3, self.grid[0] * side, self.grid[1] * side


def plans(
    images: Sequence[bytes],
    native: Native,
    max_pixels: int = MAX_PIXELS,
    draws: np.random.Generator | None = None,
) -> list[ImagePlan]:
    """What becomes of each image of a sample. The same draws give the same plans: they are not used up.

    Raises:
        BadSample: a header that cannot be read, or too large an image.
    """
    draws = copy.deepcopy(draws)
    return [native.plan(*seen_size(data, max_pixels), draws) for data in images]


def image_tokens(
    images: Sequence[bytes],
    spec: ImageSpec,
    tokens_per_image: int,
    max_pixels: int = MAX_PIXELS,
    draws: np.random.Generator | None = None,
) -> list[int]:
    """How many tokens each image of a sample takes, by its header.

    Args:
        tokens_per_image: of towers whose images have one size.
        draws: for training; None draws nothing and drops nothing.
    """
    if spec.native is None:
        return [tokens_per_image] * len(images)
    return [_tokens(spec.native, plan) for plan in plans(images, spec.native, max_pixels, draws)]


def _tokens(native: Native, plan: ImagePlan) -> int:
    return native.tokens(1, 1) if native.pooled else native.tokens(plan.rows, plan.columns, plan.kept)


def load_images(
    images: Sequence[bytes],
    spec: ImageSpec,
    max_pixels: int = MAX_PIXELS,
    draws: np.random.Generator | None = None,
    like: Sequence[Any] | None = None,
) -> list[Any]:
    """The images of a sample as a batch takes them: ImagePatches, or pixels_CHW of one size.

    Args:
        like: loaded images whose grids these get instead of their own, so that they take as many tokens.
    """
    if spec.native is None:
        return [load_image(data, spec, max_pixels) for data in images]
    if like is not None:
        grids = [one.grid for one in like]
        return [
            _cut(data, spec, max_pixels, grid, np.arange(grid[0] * grid[1]))
            for data, grid in zip(images, grids, strict=True)
        ]
    made = []
    for data, plan in zip(images, plans(images, spec.native, max_pixels, draws), strict=True):
        places_P = np.arange(plan.rows * plan.columns)
        if plan.seed is not None:
            generator = np.random.Generator(np.random.Philox(plan.seed))
            places_P = np.sort(generator.permutation(places_P)[: plan.kept])
        made.append(_cut(data, spec, max_pixels, (plan.rows, plan.columns), places_P))
    return made


def load(data: bytes, spec: ImageSpec, max_pixels: int = MAX_PIXELS) -> Any:
    """One image without draws; see `load_images`. Raises BadSample."""
    return load_images([data], spec, max_pixels)[0]


def _cut(
    data: bytes, spec: ImageSpec, max_pixels: int, grid: tuple[int, int], places_P: np.ndarray
) -> ImagePatches:
    assert spec.native is not None
    side = spec.native.patch
    size = (grid[0] * side, grid[1] * side)
    pixels_CHW = resize(decode(data, max_pixels), replace(spec, size=size, resize="squash"))
    cut = pixels_CHW.reshape(-1, grid[0], side, grid[1], side).transpose(1, 3, 2, 4, 0)
    patches_PV = cut.reshape(grid[0] * grid[1], -1)[places_P]
    plan = ImagePlan(*grid, len(places_P))
    return ImagePatches(patches_PV, places_P, grid, _tokens(spec.native, plan))


def picture(image: ImagePatches, patch: int) -> np.ndarray:
    """pixels_HWC of an image as its patches hold it; grey where they were dropped. For looking at."""
    rows, columns = image.grid
    whole = np.full((rows * columns, image.patches_PV.shape[1]), 128, np.uint8)
    whole[image.places_P] = image.patches_PV
    cut = whole.reshape(rows, columns, patch, patch, -1).transpose(0, 2, 1, 3, 4)
    return cut.reshape(rows * patch, columns * patch, -1)


def stand_in(native: Native) -> ImagePatches:
    """The smallest black image, for a microbatch without any: every rank then runs its tower."""
    side = native.multiple
    patches_PV = np.zeros((side * side, 3 * native.patch**2), np.uint8)
    plan = ImagePlan(side, side, side * side)
    return ImagePatches(patches_PV, np.arange(side * side), (side, side), _tokens(native, plan))


@dataclass(frozen=True)
class Patches:
    """The images of a microbatch, one after another.

    Attributes:
        pixels_TV: uint8.
        places_T: each patch's number in its image's grid.
        grids: (rows, columns) of each image; on the host, where loops over images run.
        lengths: patches of each image.
    """

    pixels_TV: Tensor
    places_T: Tensor
    grids: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]

    def each(self, change: Callable[[Tensor], Tensor]) -> Patches:
        """The same with changed tensors (moved, pinned)."""
        return replace(self, pixels_TV=change(self.pixels_TV), places_T=change(self.places_T))

    def to(self, device: Any) -> Patches:
        """The same on a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def __len__(self) -> int:
        return len(self.grids)

    def select(self, images: Sequence[int]) -> Patches:
        """Some of the images, in the order given."""
        import torch

        pixels = self.pixels_TV.split(list(self.lengths))
        places = self.places_T.split(list(self.lengths))
        return Patches(
            torch.cat([pixels[image] for image in images]),
            torch.cat([places[image] for image in images]),
            tuple(self.grids[image] for image in images),
            tuple(self.lengths[image] for image in images),
        )

    def names(self) -> list[bytes]:
        """A digest of each image: what it shows, where, and in which grid."""
        names = []
        pixels, places = self.pixels_TV.cpu().split(list(self.lengths)), self.places_T.cpu()
        for grid, one, where in zip(self.grids, pixels, places.split(list(self.lengths)), strict=True):
            digest = hashlib.blake2b(repr(grid).encode(), digest_size=16)
            digest.update(where.numpy().tobytes())
            digest.update(one.numpy().tobytes())
            names.append(digest.digest())
        return names


def tokens_of(images: Sequence[Any], tokens_per_image: int) -> list[int]:
    """How many tokens each loaded image takes.

    Args:
        tokens_per_image: of those that have one size.
    """
    return [one.tokens if isinstance(one, ImagePatches) else tokens_per_image for one in images]


def together(images: Sequence[Any]) -> Any:
    """Loaded images as a batch takes them: Patches, or pixels_NCHW of images of one size."""
    import torch

    if not isinstance(images[0], ImagePatches):
        stacked_NHWC = np.stack([one.transpose(1, 2, 0) for one in images])  # as they lie in memory
        return torch.from_numpy(stacked_NHWC).permute(0, 3, 1, 2)
    return Patches(
        torch.from_numpy(np.concatenate([one.patches_PV for one in images])),
        torch.from_numpy(np.concatenate([one.places_P for one in images]).astype(np.int64)),
        tuple(one.grid for one in images),
        tuple(len(one.places_P) for one in images),
    )
