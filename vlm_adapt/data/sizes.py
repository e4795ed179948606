"""The size of an image as it is seen, mostly without decoding it.

Knows which formats say how an image is to be turned, and where; knows nothing about boxes or masks, whose
pixels are those of the image as it is seen.
"""

from __future__ import annotations

from vlm_adapt.data.images import MAX_PIXELS, _orientation, decode, image_size

_PNG, _WEBP = (b"\x89PNG", b"eXIf"), (b"RIFF", b"EXIF")  # how a file begins, and the name of its chunk


def seen_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of an image file, turned as EXIF says: those of what `decode` returns.

    Raises:
        BadSample: as `decode`, or as far as the header tells.
    """
    if data.startswith(b"\xff\xd8"):
        width, height = image_size(data, max_pixels)
        return (height, width) if _orientation(data) >= 5 else (width, height)
    if any(data.startswith(begin) and chunk not in data for begin, chunk in (_PNG, _WEBP)):
        return image_size(data, max_pixels)
    rows, columns = decode(data, max_pixels).shape[:2]
    return columns, rows
