"""From the bytes of an image file to uint8 pixels of the size that a tower wants.

Knows formats, orientation, transparency and resizing; knows nothing about samples or devices. Pixels
stay uint8 until they are on the device (a quarter of float's traffic); the tower normalises them.

A file is judged by its content, never by its name, and its size by its header before a byte is
decoded. JPEG goes through libjpeg-turbo in strict mode, which raises where PIL, OpenCV and torchvision
return noise. Resizing is torch's antialiased uint8 kernel on the interleaved layout that decoders
produce (what torchvision calls, without its 7 CPU-seconds of import), within one grey level of PIL.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from vlm_adapt.data.problems import BadSample
from vlm_adapt.image_spec import ImageSpec

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 100_000_000
# What a photograph may come in; not the whole of PIL, whose rarer parsers call other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "MPO")
_ORIENTATION = 0x0112  # the EXIF tag


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        detail = f"{width:,} x {height:,} pixels, the limit is {max_pixels:,} in all (data.max_pixels)"
        raise BadSample("image too large", detail)
    if width < 1 or height < 1:
        raise BadSample("image has no pixels", f"{width} x {height}")


def _flatten(image: PILImage.Image) -> PILImage.Image:
    """Any mode to RGB: transparency on white, 16 bits to their high 8."""
    if image.mode.startswith("I"):  # 16-bit grey; 32-bit where PIL widened it
        values = np.asarray(image)
        wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
        values = values.clip(0, 65535) >> 8 if wide else values.clip(0, 255)
        return PILImage.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        return PILImage.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of PIL reads."""
    PILImage.init()
    return tuple(name for name in FORMATS if name in PILImage.OPEN)


def _open(data: bytes, max_pixels: int) -> PILImage.Image:
    """PIL's lazy image: header read, size checked, nothing decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own warning on size, and on odd EXIF
            image = PILImage.open(io.BytesIO(data), formats=_formats())
    except PILImage.DecompressionBombError as error:
        raise BadSample("image too large", str(error)) from error
    except PILImage.UnidentifiedImageError as error:
        start = data[:16].decode("ascii", "replace")
        raise BadSample("not an image", f"the file begins with {start!r}") from error
    except Exception as error:  # hostile headers make PIL's parsers raise almost anything
        raise BadSample("damaged image", f"{type(error).__name__}: {error}") from error
    _check_size(*image.size, max_pixels)
    return image


def _by_pil(data: bytes, max_pixels: int) -> np.ndarray:
    image = _open(data, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return np.array(_flatten(ImageOps.exif_transpose(image)))
    except Exception as error:  # as above
        raise BadSample(f"damaged {image.format} image", f"{type(error).__name__}: {error}") from error


def _has_exif(data: bytes) -> bool:
    """Whether a segment before the picture is EXIF. Walks the segments: a search would read on."""
    position = 2
    while data[position : position + 1] == b"\xff" and len(data) > position + 10:
        marker = data[position + 1]
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return True
        if marker == 0xDA:  # the picture begins
            return False
        # Fill bytes and markers without a length are stepped over.
        alone = marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8
        step = 1 if marker == 0xFF else 2
        position += step if alone else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 to 8 (1 is upright)."""
    if not _has_exif(data):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = PILImage.open(io.BytesIO(data), formats=("JPEG",)).getexif()
            return int(exif.get(_ORIENTATION, 1))
    except Exception:
        return 1  # unreadable EXIF says nothing about the pixels; every viewer shows them as they lie


def _turn(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as EXIF says they are to be seen (1 upright, 3 upside down, 6 and 8 on a side; even or
    5, 7: mirrored)."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    return np.ascontiguousarray(pixels_HWC)


_SCRATCH = 8 << 20  # bytes; a photograph of 2.7 megapixels
_own = threading.local()


def _scratch(size: int) -> np.ndarray | None:
    """Memory of this thread to decode into. Fresh memory for each image costs a tenth of its decoding."""
    if size > _SCRATCH:
        return None
    held: np.ndarray | None = getattr(_own, "bytes", None)
    if held is None or len(held) < size:
        held = _own.bytes = np.empty(max(size, 1 << 20), np.uint8)
    return held


def decode(data: bytes, max_pixels: int = MAX_PIXELS, *, passing: bool = False) -> np.ndarray:
    """Decode an image file to RGB, upright.

    Args:
        data: the file. JPEG, PNG, WebP, BMP, GIF (first frame), TIFF, PPM, JPEG 2000.
        max_pixels: refuse an image with more, by its header.
        passing: the pixels may lie in memory that this thread's next call overwrites.

    Returns:
        pixels_HWC, uint8.

    Raises:
        BadSample: empty, not an image, damaged, or too large.
    """
    if not data:
        raise BadSample("empty image file")
    if not data.startswith(b"\xff\xd8"):
        return _by_pil(data, max_pixels)
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _by_pil(data, max_pixels)  # rare chroma layouts that the binding refuses and PIL reads
    _check_size(width, height, max_pixels)
    if colours in ("CMYK", "YCCK"):
        return _by_pil(data, max_pixels)  # PIL knows Adobe's inverted inks
    try:
        into = _scratch(3 * width * height) if passing else None
        pixels_HWC = simplejpeg.decode_jpeg(data, "RGB", buffer=into)
    except ValueError as error:
        raise BadSample("damaged JPEG image", str(error)) from error
    orientation = _orientation(data)
    return pixels_HWC if orientation <= 1 else _turn(pixels_HWC, orientation)


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) as they lie in the file, by its header alone. Raises BadSample as `decode` does."""
    if not data:
        raise BadSample("empty image file")
    return _open(data, max_pixels).size


def _scale(
    pixels_HWC: np.ndarray,
    height: int,
    width: int,
    interpolation: str,
    needed: tuple[int, int] | None = None,
) -> np.ndarray:
    """Pixels scaled to `height` and `width`; what lies behind the `needed` rows and columns may miss."""
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    if interpolation == "lanczos":  # torch has it from 2.14 only
        resized = PILImage.fromarray(pixels_HWC).resize((width, height), PILImage.Resampling.LANCZOS)
        return np.asarray(resized)
    old_height, old_width = pixels_HWC.shape[:2]
    if old_height - height > max(0, 2 * (old_width - width)) and old_width != width:
        # Values are cut to 0..255 between the two passes, so their order shows at hard edges (5 grey levels
        # in a value of 15,000). PIL begins with the height where that shrinks by far the most, since 13.
        pixels_HWC = _interpolated(pixels_HWC, (height, old_width), interpolation)
    return _interpolated(pixels_HWC, (height, width), interpolation, needed)


def _interpolated(
    pixels_HWC: np.ndarray, size: tuple[int, int], interpolation: str, needed: tuple[int, int] | None = None
) -> np.ndarray:
    import torch

    if not pixels_HWC.flags.writeable:  # torch warns of tensors on read-only memory
        pixels_HWC = pixels_HWC.copy()
    scales = [new / old for new, old in zip(size, pixels_HWC.shape, strict=False)]
    kept = list(needed or size)
    # Rows behind those that the last needed one is made of: two pixels of the coarser side.
    last = math.ceil(kept[0] / scales[0] + 2 * max(1.0, 1 / scales[0])) + 1
    pixels_HWC = pixels_HWC[:last]
    for axis in (0, 1):  # the kernel takes equal lengths for nothing to do: one more is asked for
        kept[axis] += kept[axis] == pixels_HWC.shape[axis] and kept[axis] < size[axis]
    image: torch.Tensor = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)
    # A batch of one has no stride of its own; with the stride of channels_last, the kernel works on
    # interleaved pixels and returns them so: 1.4x as fast as unset, 3x to 4x as fast as planar.
    image = image.as_strided((1, *image.shape), (image.numel(), *image.stride()))
    kernel = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa").default
    image = kernel(image, kept, False, *scales)  # False: corners are not aligned
    return image[0].permute(1, 2, 0).numpy()


def resize(pixels_HWC: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Bring an image to the size of `spec`: squashed, cropped or padded, antialiased.

    Args:
        pixels_HWC: uint8, any size.

    Returns:
        pixels_CHW, uint8, of `spec.size`, interleaved in memory as the decoder left them: turning planes out
        of every image costs a twelfth of the whole road, and the cast on the device does it in passing.
    """
    height, width = spec.size
    old_height, old_width = pixels_HWC.shape[:2]
    if spec.resize == "crop":
        # Rounding as CLIP's preprocessing does: the long side is cut to a whole pixel.
        if old_height * width <= old_width * height:  # too wide
            scaled_height, scaled_width = height, max(width, int(height * old_width / old_height))
        else:
            scaled_height, scaled_width = max(height, int(width * old_height / old_width)), width
        top, left = round((scaled_height - height) / 2), round((scaled_width - width) / 2)
        # A strip of 10 x 100,000 would grow without bound: cut what the crop drops, then scale.
        if scaled_height * scaled_width > 64 * height * width:
            pixels_HWC = _strip(pixels_HWC, height / width)
            scaled_height, scaled_width, top, left = height, width, 0, 0
        needed = (top + height, left + width)
        scaled = _scale(pixels_HWC, scaled_height, scaled_width, spec.interpolation, needed)
        scaled = scaled[top : top + height, left : left + width]
    elif spec.resize == "pad":
        scale = min(height / old_height, width / old_width)
        inner_height = min(height, max(1, round(old_height * scale)))
        inner_width = min(width, max(1, round(old_width * scale)))
        fill = np.array([round(255 * value) for value in spec.mean], dtype=np.uint8)
        scaled = np.empty((height, width, 3), dtype=np.uint8)
        scaled[:] = fill
        top, left = (height - inner_height) // 2, (width - inner_width) // 2
        inner = _scale(pixels_HWC, inner_height, inner_width, spec.interpolation)
        scaled[top : top + inner_height, left : left + inner_width] = inner
    else:
        scaled = _scale(pixels_HWC, height, width, spec.interpolation)
    return np.ascontiguousarray(scaled).transpose(2, 0, 1)


def _strip(pixels_HWC: np.ndarray, aspect: float) -> np.ndarray:
    """The centre of an image, of the given height per width."""
    height, width = pixels_HWC.shape[:2]
    new_height = min(height, max(1, round(width * aspect)))
    new_width = min(width, max(1, round(height / aspect)))
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return np.ascontiguousarray(pixels_HWC[top : top + new_height, left : left + new_width])


def load_image(data: bytes, spec: ImageSpec, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode and resize: the bytes of a file to pixels_CHW, uint8 of `spec.size`. Raises BadSample."""
    pixels_HWC = decode(data, max_pixels, passing=True)
    resized_CHW = resize(pixels_HWC, spec)
    # Nothing to resize: the pixels are still where they were decoded.
    return resized_CHW.copy(order="K") if np.may_share_memory(pixels_HWC, resized_CHW) else resized_CHW
