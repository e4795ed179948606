"""Mask files: single-channel PNGs whose values are class numbers, read and written without loss.

Knows the PNG header, palettes, bit depths and which value is ignored; knows nothing about where masks
come from or what is learned from them.

A palette PNG is read by index, never by colour. PIL widens grey of 2 and 4 bits to 0..255; here the
values come back as they were written.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage

from vlm_adapt.data.problems import BadSample

MAX_PIXELS = 100_000_000
IGNORED_8, IGNORED_16 = 255, 65535
GREY, PALETTE = 0, 3  # colour types of PNG
_COLOURS = {2: "RGB", 4: "grey with transparency", 6: "RGB with transparency"}
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class MaskHeader(NamedTuple):
    """What the first bytes of a PNG say: size in pixels, bits a channel, PNG's colour type."""

    width: int
    height: int
    bits: int
    colour: int


def mask_header(data: bytes) -> MaskHeader:
    """Read a mask's header, decoding nothing. Raises BadSample: no PNG, empty, or too large."""
    if not data:
        raise BadSample("empty mask file")
    if data.startswith(b"\xff\xd8"):
        raise BadSample("mask is a JPEG, which changes values: store masks as PNG")
    if not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 26:
        raise BadSample("mask is not a PNG", f"the file begins with {data[:16].decode('ascii', 'replace')!r}")
    header = MaskHeader(*struct.unpack(">IIBB", data[16:26]))
    if header.width < 1 or header.height < 1:
        raise BadSample("mask has no pixels", f"{header.width} x {header.height}")
    if header.width * header.height > MAX_PIXELS:
        detail = f"{header.width:,} x {header.height:,} pixels, the limit is {MAX_PIXELS:,} in all"
        raise BadSample("mask too large", detail)
    return header


def open_mask(data: bytes) -> PILImage.Image:
    """A PNG decoded by PIL in the mode it has. Raises BadSample: damaged, and as `mask_header` does."""
    mask_header(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = PILImage.open(io.BytesIO(data), formats=("PNG",))
            image.load()
    except Exception as error:  # hostile chunks make PIL's parser raise almost anything
        raise BadSample("damaged mask", f"{type(error).__name__}: {error}") from error
    return image


def read_mask(data: bytes) -> np.ndarray:
    """Decode a mask to its values.

    Args:
        data: a PNG of grey (1, 2, 4, 8 or 16 bits) or of a palette.

    Returns:
        mask_HW, uint8, or uint16 where the file has 16 bits; `ignored_value(mask)` is what to leave out.

    Raises:
        BadSample: empty, no PNG, damaged, too large, or of several channels.
    """
    header = mask_header(data)
    if header.colour not in (GREY, PALETTE):
        kind = _COLOURS.get(header.colour, f"of colour type {header.colour}")
        raise BadSample(f"mask is {kind}, it should have one channel whose values are class numbers")
    mask_HW = np.asarray(open_mask(data))
    if header.bits == 16:
        return mask_HW.astype(np.uint16)
    if header.colour == GREY and header.bits in (2, 4):
        mask_HW = mask_HW // (255 // (2**header.bits - 1))
    return mask_HW.astype(np.uint8)


def ignored_value(mask_HW: np.ndarray) -> int:
    """The value that says "ignore this pixel": 255, or 65535 in a mask of 16 bits."""
    return IGNORED_8 if mask_HW.dtype.itemsize == 1 else IGNORED_16


def depth_for(labels: int) -> type[np.unsignedinteger]:
    """The type of a mask with so many labels: uint8 up to 255 of them, else uint16. Raises BadSample."""
    if labels > IGNORED_16:
        raise BadSample(f"{labels} labels do not fit into a mask of 16 bits")
    return np.uint8 if labels <= IGNORED_8 else np.uint16


def encode_mask(mask_HW: np.ndarray, labels: int = 2) -> bytes:
    """A mask as a grey PNG of 8 bits, or of 16 where there are more than 255 labels.

    Args:
        mask_HW: any integer or boolean type, values below `labels` or the ignored one of that depth.
        labels: how many there are.
    """
    kind = depth_for(labels)
    height, width = mask_HW.shape
    size = np.dtype(kind).itemsize
    rows_HB = np.ascontiguousarray(mask_HW, kind).astype(f">u{size}").view(np.uint8).reshape(height, -1)
    # Each row as its difference to the one above (PNG's filter 2), then runs alone: a third of the time
    # of PIL's writer, at about its size, because masks are flat.
    lines_HB = np.full((height, 1 + width * size), 2, np.uint8)
    lines_HB[0, 1:] = rows_HB[0]
    np.subtract(rows_HB[1:], rows_HB[:-1], out=lines_HB[1:, 1:])
    packer = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8 * size, GREY, 0, 0, 0)
    packed = packer.compress(lines_HB.data) + packer.flush()
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(content, zlib.crc32(name))
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def count_values(mask_HW: np.ndarray) -> np.ndarray:
    """How many pixels have each value: 256 counts, or 65536 for a mask of 16 bits."""
    if mask_HW.dtype == np.uint8:  # numpy would widen every pixel to 64 bits first
        return np.array(PILImage.fromarray(mask_HW).histogram())
    return np.bincount(mask_HW.reshape(-1), minlength=IGNORED_16 + 1)


def check_size(mask_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Both are (width, height) in pixels. Raises BadSample if they differ."""
    if tuple(mask_size) != tuple(image_size):
        mask, image = (f"{width} x {height}" for width, height in (mask_size, image_size))
        raise BadSample("mask and image differ in size", f"mask {mask}, image {image}")


def check_values(mask_HW: np.ndarray, labels: Sequence[str]) -> None:
    """Every value has a label or is the ignored one, and some are not. Raises BadSample naming the value.

    Args:
        mask_HW: uint8 or uint16, as `read_mask` returns it.
        labels: index = value; "" marks a value that must not occur.
    """
    counts = count_values(mask_HW)
    counts[ignored_value(mask_HW)] = 0
    found = np.flatnonzero(counts)
    if not found.size:
        raise BadSample("all pixels of the mask are ignored")
    for value in found.tolist():
        if value >= len(labels) or not labels[value]:
            pixels = f"value {value} ({counts[value]:,} pixels)"
            raise BadSample("mask has a value without a label", f"{pixels}, there are {len(labels)} labels")


def empty_synonym(labels: Iterable[str]) -> str | None:
    """The first label with nothing between two of its bars, as "car|", or None."""
    return next((name for name in labels if "|" in name and not all(map(str.strip, name.split("|")))), None)


def check_names(labels: Iterable[str]) -> None:
    """Refuse a label of which a synonym is empty: no text encoder could read it. Raises BadSample."""
    wrong = empty_synonym(labels)
    if wrong is not None:
        raise BadSample(
            "label has an empty synonym", f"'{wrong}': names stand between bars, as in 'car|automobile'"
        )


def check_mask(data: bytes, image_size: tuple[int, int], labels: Sequence[str] | None = None) -> None:
    """Check a mask file against its image.

    Args:
        data: the mask.
        image_size: (width, height) of the image as it is seen, turned by EXIF.
        labels: check the values too, for which the mask is decoded; without them its header is enough.

    Raises:
        BadSample: "mask and image differ in size"; a value without a label; all ignored; unreadable.
    """
    header = mask_header(data)
    check_size((header.width, header.height), image_size)
    if labels is not None:
        check_names(labels)
        check_values(read_mask(data), labels)
