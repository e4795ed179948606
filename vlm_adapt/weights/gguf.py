"""Reads a GGUF file: its metadata, and its tensors as float32.

Knows the container (version 2 and 3, little endian) and the tensor types F32, F16, Q8_0 and Q4_1; does
not know any model's names. Layout after the format's description in ggml's `docs/gguf.md`. Reading
the metadata of a 49,000-token vocabulary this way takes 0.2 s; the general `gguf` package takes 2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_adapt.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def _plain(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: blocks.view(kind).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """34 bytes: a float16 scale and 32 int8."""
    scale = blocks[:, :2].view("<f2").astype(np.float32)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * scale


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    """20 bytes: float16 scale and offset, then 32 nibbles, the low ones of all bytes first."""
    scale_offset = blocks[:, :4].view("<f2").astype(np.float32)
    packed, values = blocks[:, 4:], np.empty((len(blocks), 32), np.float32)
    values[:, :16], values[:, 16:] = packed & 15, packed >> 4
    values *= scale_offset[:, :1]
    values += scale_offset[:, 1:]
    return values


# type number -> (name, elements a block, bytes a block, reader of blocks as rows of uint8)
_TYPES = {
    0: ("F32", 1, 4, _plain("<f4")),
    1: ("F16", 1, 2, _plain("<f2")),
    3: ("Q4_1", 32, 20, _q4_1),
    8: ("Q8_0", 32, 34, _q8_0),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies; `shape` is row-major, as torch and numpy write it."""

    shape: tuple[int, ...]
    type: int
    start: int


class Gguf:
    """A GGUF file held in memory.

    Args:
        data: the whole file.
        where: its name, for messages.

    Attributes:
        metadata: key -> number, string, bool, or a list of these.
        tensors: name -> TensorInfo.

    Raises:
        UserError: if it is no GGUF file, is cut off, or holds a tensor type that is not read here.
    """

    def __init__(self, data: bytes, where: str = "the GGUF file"):
        self.data, self.where, self.metadata = data, where, dict[str, Any]()
        self._at = 0
        try:
            self.tensors = self._header()
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise UserError(f"{where} is cut off or damaged in its header ({error})") from error

    def _take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._take("Q")
        self._at += size
        return self.data[self._at - size : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])
        inner, count = self._take("I"), self._take("Q")
        if inner in (_STRING, _ARRAY):
            return [self._value(inner) for _ in range(count)]
        code = f"<{count}{_SCALARS[inner]}"
        values = list(struct.unpack_from(code, self.data, self._at))
        self._at += struct.calcsize(code)
        return values

    def _header(self) -> dict[str, TensorInfo]:
        if self.data[:4] != b"GGUF":
            raise UserError(f"{self.where} is not a GGUF file")
        self._at = 4
        version, tensor_count, key_count = self._take("I"), self._take("Q"), self._take("Q")
        if version not in (2, 3):
            raise UserError(f"{self.where} is GGUF version {version}; 2 and 3 are read")
        for _ in range(key_count):
            key = self._string()
            self.metadata[key] = self._value(self._take("I"))
        found = {}
        for _ in range(tensor_count):
            name, axes = self._string(), self._take("I")
            shape = tuple(self._take("Q") for _ in range(axes))[::-1]
            kind, offset = self._take("I"), self._take("Q")
            if kind not in _TYPES:
                known = ", ".join(entry[0] for entry in _TYPES.values())
                raise UserError(f"{self.where}: tensor '{name}' has type {kind}; read are {known}")
            found[name] = (shape, kind, offset)
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        return {name: TensorInfo(shape, kind, start + at) for name, (shape, kind, at) in found.items()}

    def rows(self, name: str) -> np.ndarray:
        """A tensor as stored: uint8 of shape (rows, bytes a row); rows may be reordered before `decode`."""
        info = self.tensors[name]
        _, per_block, size, _ = _TYPES[info.type]
        columns, rows = info.shape[-1], int(np.prod(info.shape[:-1], dtype=np.int64))
        length = rows * columns // per_block * size
        if columns % per_block or info.start + length > len(self.data):
            raise UserError(f"{self.where} is cut off or damaged at tensor '{name}'")
        return np.frombuffer(self.data, np.uint8, length, info.start).reshape(rows, -1)

    def decode(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of `rows(name)` as float32 of shape (rows, columns)."""
        info = self.tensors[name]
        _, _, size, read = _TYPES[info.type]
        return read(np.ascontiguousarray(rows).reshape(-1, size)).reshape(len(rows), info.shape[-1])
