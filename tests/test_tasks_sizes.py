"""The size of an image as it is seen is that of its pixels, whatever way its file turns it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vlm_adapt.data import sizes
from vlm_adapt.data.images import decode
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.sizes import seen_size


def picture(kind: str, orientation: int | None) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(buffer, kind, **({"exif": exif} if orientation else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
def test_as_decoded(kind: str, orientation: int | None) -> None:
    data = picture(kind, orientation)
    height, width = decode(data).shape[:2]
    assert seen_size(data) == (width, height)
    assert (width, height) == ((20, 30) if (orientation or 1) >= 5 else (30, 20))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_upright_images_are_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "decode", lambda *_: np.zeros((1, 1, 3)))
    assert seen_size(picture(kind, None)) == (30, 20)


def test_refusals() -> None:
    with pytest.raises(BadSample, match="image too large"):
        seen_size(picture("PNG", None), max_pixels=599)
    with pytest.raises(BadSample, match="empty image file"):
        seen_size(b"")
