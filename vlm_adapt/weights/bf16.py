"""Writes float32 arrays as a bfloat16 safetensors file, a piece at a time and without torch.

Knows rounding and the file format (8 bytes of header length, a JSON header, the tensors); knows
nothing about models. numpy has no bfloat16, and importing torch only to round costs more than rounding.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits (uint16) of finite float32 values as bfloat16: to nearest, ties to even, as torch rounds."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    return np.ascontiguousarray(rounded.view(np.uint16)[..., 1::2])  # the upper half, little endian


def write_safetensors_bf16(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Write a safetensors file of bfloat16 tensors.

    Args:
        path: the file.
        shapes: tensor names and shapes, in the order in which they are written.
        pieces: for a name, float32 arrays which one after the other make up the tensor, row-major.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        before = out.tell()
        for name in shapes:
            for piece in pieces(name):
                out.write(round_to_bf16(piece).data)
        if out.tell() - before != end:
            raise ValueError(f"{path}: the tensors' pieces do not add up to their shapes")
