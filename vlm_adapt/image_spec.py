"""What a tower wants its images to look like.

Knows sizes, statistics and the way of resizing; knows nothing about decoding, tensors or models, so
that data workers can prepare images without importing torch. An `ImageSpec` is of one size for every
image, or has a `Native`, which gives each image its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

RESIZES = ("squash", "crop", "pad")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class TokenCount:
    """How many tokens a connector makes of an image of rows x columns patches.

    Args:
        fixed: so many whatever the image; None for a token a group of patches.
        group: patches of a group along each side.
    """

    fixed: int | None = None
    group: int = 1

    def __call__(self, rows: int, columns: int, kept: int | None = None) -> int:
        """Tokens of an image of which `kept` patches are left (None: all)."""
        if self.fixed is not None:
            return self.fixed
        return (rows * columns if kept is None else kept) // self.group**2


@dataclass(frozen=True)
class ImagePlan:
    """What becomes of one image: its grid in patches, how many stay, and the seed that says which."""

    rows: int
    columns: int
    kept: int
    seed: int | None = None


@dataclass(frozen=True)
class Native:
    """Images of native aspect ratio and resolution (NaViT, Dehghani et al. 2023, arXiv 2307.06304).

    Decides, from an image's width and height alone, how many patches it is resized to and how many of
    them the tower sees. The aspect ratio stays, up to rounding to whole patches and the bounds below.

    Args:
        patch: side of a patch in pixels.
        max_patches, min_patches: of one image, before dropping. A strip longer than `max_patches`
            patches (or than `max_side`) is squashed along its length.
        resolution: `own` (the image's own size), `fill` (the largest that max_patches allow, each side
            rounded up: SigLIP 2's rule), a number S (resized to an area of S x S pixels), or (low, high):
            S is drawn for every image, uniformly over side lengths as in the paper; where nothing may be
            drawn (evaluation, chat) S is high.
        drop: share of each image's patches that is left out in training; or {mean, deviation} of a Beta
            distribution from which each image's share is drawn.
        max_side: patches along a side, where the tower has no positions beyond.
        sequence: tokens of a packed sequence; None is the longest image's.
        attention: see `vision.packing.BACKENDS`.
        multiple: both sides of the grid are multiples of this (the connector's wish).
        pooled: the tower gives one feature an image.
        tokens: what the connector makes of an image.

    Raises:
        UserError: a value that cannot work.
    """

    patch: int
    max_patches: int = 256
    min_patches: int = 1
    resolution: Any = "own"
    drop: Any = 0.0
    max_side: int | None = None
    sequence: int | None = None
    attention: str = "auto"
    multiple: int = 1
    pooled: bool = False
    tokens: TokenCount = TokenCount()

    def __post_init__(self) -> None:
        for name in ("patch", "max_patches", "min_patches", "max_side", "sequence"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UserError(f"native {name} is a whole number from 1, not {value!r}")
        if self.min_patches > self.max_patches:
            raise UserError(
                f"native min_patches {self.min_patches} is above max_patches {self.max_patches}: swap them"
            )
        if self.max_patches < self.multiple**2:
            raise UserError(
                f"native max_patches {self.max_patches} leaves no grid whose sides {self.multiple} divides: "
                f"the connector needs at least {self.multiple**2}"
            )
        resolution = self.resolution
        if isinstance(resolution, list | tuple):
            resolution = tuple(resolution)
            object.__setattr__(self, "resolution", resolution)
            good = (
                len(resolution) == 2 and all(map(_number, resolution)) and 0 < resolution[0] <= resolution[1]
            )
        else:
            good = resolution in ("own", "fill") or (_number(resolution) and resolution > 0)
        if not good:
            raise UserError(
                f"native resolution {self.resolution!r} is none of 'own', 'fill', a side in pixels, "
                "or [low, high] sides in pixels"
            )
        drop = self.drop
        if isinstance(drop, Mapping):
            if set(drop) != {"mean", "deviation"} or not all(map(_number, drop.values())):
                raise UserError(
                    f"native drop {dict(drop)} is no share, and not {{mean, deviation}} of shares"
                )
            mean, deviation = drop["mean"], drop["deviation"]
            if not 0 < mean < 1 or not 0 < deviation**2 < mean * (1 - mean):
                raise UserError(
                    f"native drop: no Beta distribution has mean {mean} and deviation {deviation}: "
                    "the mean is between 0 and 1, the deviation below the root of mean * (1 - mean)"
                )
        elif not _number(drop) or not 0 <= drop < 1:
            raise UserError(f"native drop is a share from 0 to below 1, not {drop!r}")

    @classmethod
    def parse(cls, settings: Any, **given: Any) -> Native:
        """From what a configuration says under `native`, and what the tower says itself.

        Raises:
            UserError: no mapping, an unknown key, or a value that cannot work.
        """
        known = ("max_patches", "min_patches", "resolution", "drop", "sequence", "attention")
        if settings is True:
            settings = {}
        if not isinstance(settings, Mapping):
            raise UserError(f"native is a mapping of settings ({', '.join(known)}), not {settings!r}")
        for key in settings:
            if key not in known:
                raise UserError(
                    f"unknown setting '{key}' of native{nearest(key, known) or ':'} "
                    f"known are {', '.join(known)}"
                )
        return cls(**{**given, **settings})

    @property
    def drops(self) -> bool:
        """Whether patches are left out in training."""
        return isinstance(self.drop, Mapping) or self.drop > 0

    def plan(self, width: int, height: int, generator: Any = None) -> ImagePlan:
        """What becomes of an image of this size in pixels.

        Args:
            generator: numpy's, for training; None draws nothing and drops nothing.
        """
        side, share, seed = self.resolution, 0.0, None
        if isinstance(side, tuple):
            side = side[1] if generator is None else float(generator.uniform(*side))
        if generator is not None and self.drops:
            share = self._share(generator)
            seed = int(generator.integers(2**62))
        rows, columns = self.grid(width, height, side)
        kept = max(1, round(rows * columns * (1 - share)))
        return ImagePlan(rows, columns, kept, seed if kept < rows * columns else None)

    def _share(self, generator: Any) -> float:
        if not isinstance(self.drop, Mapping):
            return float(self.drop)
        mean = self.drop["mean"]
        strength = mean * (1 - mean) / self.drop["deviation"] ** 2 - 1
        return float(generator.beta(mean * strength, (1 - mean) * strength))

    def grid(self, width: int, height: int, side: float | str | None = None) -> tuple[int, int]:
        """(rows, columns) in patches of an image resized to an area of side^2 pixels, `own` or `fill`."""
        side = self.resolution if side is None else side
        unit = self.patch * self.multiple
        most = self.max_patches // self.multiple**2
        cap = most if self.max_side is None else max(1, min(most, self.max_side // self.multiple))
        least = -(-self.min_patches // self.multiple**2)

        def at(scale: float) -> tuple[int, int]:
            sides = (height * scale / unit, width * scale / unit)
            whole = [math.ceil(one) if side == "fill" else math.floor(one + 0.5) for one in sides]
            return min(cap, max(1, whole[0])), min(cap, max(1, whole[1]))

        def turn(low: float, high: float, most: int) -> tuple[float, float]:
            """Scales just below and above the one at which a grid gets more than `most` units."""
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if math.prod(at(middle)) <= most else (low, middle)
            return low, high

        # No grid has changed below the first scale, and none changes above the second.
        first, last = unit / (4 * max(width, height)), unit * (cap + 1) / min(width, height)
        scale = last if side == "fill" else 1.0 if side == "own" else float(side) / math.sqrt(width * height)
        if math.prod(at(scale)) < least:
            scale = turn(first, last, least - 1)[1]
        if math.prod(at(scale)) > most:
            scale = turn(first, scale, most)[0]
        rows, columns = at(scale)
        return rows * self.multiple, columns * self.multiple


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class ImageSpec:
    """Size, statistics and resizing of a tower's images.

    Args:
        size: (height, width) in pixels.
        mean, std: a channel each, of pixel values in 0..1.
        resize: `squash` (to the size, whatever the aspect), `crop` (shortest side to the size, then
            the centre) or `pad` (longest side to the size, centred, filled with the mean). The margin
            that classifiers cut off before the centre crop (timm's crop_pct) is not cut: a sentence
            may speak of anything in the image.
        interpolation: `bicubic`, `bilinear` or `lanczos`.
        native: images keep their own aspect; `size` and `resize` then say nothing.

    Raises:
        UserError: an unknown way of resizing or interpolating, or a size below one pixel.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: str = "squash"
    interpolation: str = "bicubic"
    native: Native | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(int(side) for side in self.size))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if len(self.size) != 2 or min(self.size) < 1:
            raise UserError(f"an image size is (height, width) of at least one pixel, not {self.size}")
        if self.resize not in RESIZES:
            raise UserError(f"unknown resize '{self.resize}': choose {', '.join(RESIZES)}")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise UserError(f"unknown interpolation '{self.interpolation}': choose {known}")

    def with_size(self, image_size: int | tuple[int, int] | None) -> ImageSpec:
        """The same with another size: (height, width), a square's side, or itself for None."""
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        return self if size is None else replace(self, size=size)
