"""Mask files of every kind, and samples with them, for tests of the masks' road."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from vlm_adapt.config.schema import Data, Source, Task
from vlm_adapt.data.mask_reader import MaskReader
from vlm_adapt.data.masks import encode_mask
from vlm_adapt.image_spec import ImageSpec

SPEC = ImageSpec((16, 24))
WHOLE = Data(augment=None)
LABELS = ["red", "green", "", "blue"]


def png(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, kind, **more)
    return buffer.getvalue()


def members(mask: bytes | None, labels: Any = LABELS, **more: Any) -> dict[str, bytes]:
    """A sample with an image of 24 x 16."""
    record = {"labels": labels} if labels is not None else {"text": "a"}
    made = {"png": tiny.image(1, 24, 16), "json": json.dumps(record | more).encode()}
    return made if mask is None else made | {"mask.png": mask}


def reader(path: Path, samples: list[tuple[str, dict[str, bytes]]], **settings: Any) -> MaskReader:
    task = Task(name="masks", **settings) if settings else None
    return MaskReader([Source(shards=str(tiny.shard(path / "s.tar", samples)), task=task)], SPEC, 0, WHOLE)


VALUES = np.repeat(np.array([[0, 1, 3, 255]], np.uint8), 6, 1).repeat(16, 0)  # columns of 6 pixels each
CLASSES = np.repeat(np.array([[0, 1, 2, -1]], np.int16), 6, 1).repeat(16, 0)


def palette(values: np.ndarray, **more: Any) -> bytes:
    image = Image.fromarray(values)
    image.putpalette([7] * 768)  # colours say nothing
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **more)
    return buffer.getvalue()


def grey_of(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, which PIL does not write: values packed by hand."""
    lines = b""
    for row in values:
        digits = "".join(format(int(value), f"0{bits}b") for value in row)
        digits += "0" * (-len(digits) % 8)
        lines += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


GOOD = encode_mask(VALUES)
