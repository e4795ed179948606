"""What a tower wants its images to look like.

Knows sizes, statistics and the way of resizing; knows nothing about decoding, tensors or models, so
that data workers can prepare images without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlm_adapt.errors import UserError

RESIZES = ("squash", "crop", "pad")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


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

    Raises:
        UserError: an unknown way of resizing or interpolating, or a size below one pixel.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: str = "squash"
    interpolation: str = "bicubic"

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

    def with_size(self, image_size: int | None) -> ImageSpec:
        """The same with a square of `image_size` pixels, or itself for None."""
        return self if image_size is None else replace(self, size=(image_size, image_size))
