"""The index of a tar shard: which samples it holds, and where each of their members lies.

Knows how webdataset groups members in samples (adjacent members, key up to the first dot of the base
name) and does the same; knows nothing about what members mean. A sample that cannot be whole is left
out and named: beside damage, with members that are not adjacent, with two members of one name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlm_adapt.data.problems import Problem
from vlm_adapt.data.tar import Damage, Member, scan
from vlm_adapt.errors import UserError

FORMAT = 1  # part of the cache key: raise it whenever an index would come out differently
_METADATA = re.compile(r"__[^/]*__($|/)")  # webdataset's own members, not samples


def split_name(name: str) -> tuple[str, str] | None:
    """`"dir/a.0.jpg" -> ("dir/a", "0.jpg")`: key and extension, as webdataset cuts them; None if neither.

    A base name that begins with a dot borrows its folder (`"dir/.x" -> ("dir/", "x")`), unless the
    folder's name has a dot itself: webdataset's pattern does so, and an index must agree with it.
    """
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot < 0 or dot == 0:
        return None
    if dot == start and "." in name[name.rfind("/", 0, start - 1) + 1 : start]:
        return None
    return name[:dot], name[dot + 1 :]


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    Sample `i` is made of members `first[i]` to `first[i + 1]` (exclusive); member `m` is
    `size[m]` bytes at `offset[m]`, called `extensions[extension[m]]`.
    """

    path: str
    file_bytes: int
    mtime_ns: int
    first: np.ndarray  # int64 [samples + 1]
    offset: np.ndarray  # int64 [members]
    size: np.ndarray  # int64 [members]
    extension: np.ndarray  # int32 [members]
    extensions: tuple[str, ...]
    key_end: np.ndarray  # int64 [samples], into key_text
    key_text: bytes
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, sample: int) -> str:
        """The key of a sample of this shard."""
        start = self.key_end[sample - 1] if sample else 0
        return self.key_text[start : self.key_end[sample]].decode("utf-8", "surrogateescape")

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """`(extension, offset, size)` of each member of a sample, in the order of the shard."""
        span = slice(int(self.first[sample]), int(self.first[sample + 1]))
        codes, offsets, sizes = self.extension[span], self.offset[span], self.size[span]
        names = self.extensions
        return [
            (names[code], offset, size)
            for code, offset, size in zip(codes.tolist(), offsets.tolist(), sizes.tolist(), strict=True)
        ]


@dataclass
class _Group:
    key: str
    members: list[tuple[str, int, int]] = field(default_factory=list)
    fault: str = ""


def _group(path: str, fd: int, length: int) -> tuple[list[_Group], list[Problem]]:
    """Members gathered in samples as webdataset gathers them, and what is lost."""
    groups: list[_Group] = []
    problems: list[Problem] = []
    current: _Group | None = None
    suspect = ""
    for event in scan(fd, length):
        if isinstance(event, Damage):
            suspect = f"incomplete: the shard is damaged here, {event.reason}"
            problems.append(Problem(path, "", f"damaged at byte {event.offset:,}: {event.reason}"))
            cut = split_name(event.name)
            if cut and (current is None or current.key != cut[0]):  # the sample before was complete
                current = _Group(cut[0])
                groups.append(current)
            if current:
                current.fault = suspect
            current = None
            continue
        if _METADATA.match(event.name):
            continue
        parts = split_name(event.name)
        if parts is None:
            problems.append(Problem(path, event.name, "a member without an extension belongs to no sample"))
            continue
        key, extension = parts[0], parts[1].lower()
        if current is None or current.key != key:
            current = _Group(key, fault=suspect)
            suspect = ""
            groups.append(current)
        if not isinstance(event, Member):
            current.fault = event.reason
        elif any(extension == known for known, _, _ in current.members):
            current.fault = f"two members are called '{extension}'"
        else:
            current.members.append((extension, event.offset, event.size))
    by_key: dict[str, list[_Group]] = {}
    for group in groups:
        by_key.setdefault(group.key, []).append(group)
    for key, pieces in by_key.items():
        fault = next((piece.fault for piece in pieces if piece.fault), "")
        if len(pieces) > 1 and not fault:
            fault = "members of this key are not adjacent: sort the archive by name"
        if fault:
            problems.append(Problem(path, key, fault))
            for piece in pieces:
                piece.fault = fault
    return [group for group in groups if not group.fault], problems


def build_index(path: str | os.PathLike[str]) -> ShardIndex:
    """Scan the headers of a tar shard. Reads no member's data.

    Raises UserError if the file cannot be opened or is compressed; any damage becomes `problems`.
    """
    path = os.fspath(path)
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UserError(f"cannot open shard {path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        magic = os.pread(fd, 6, 0)
        if magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise UserError(f"shard {path} is compressed: unpack it to a plain .tar first")
        groups, problems = _group(path, fd, status.st_size)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    names: dict[str, int] = {}
    codes = [names.setdefault(member[0], len(names)) for group in groups for member in group.members]
    keys = [group.key.encode("utf-8", "surrogateescape") for group in groups]
    return ShardIndex(
        path=path,
        file_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        first=np.cumsum([0, *(len(group.members) for group in groups)], dtype=np.int64),
        offset=np.array([member[1] for group in groups for member in group.members], dtype=np.int64),
        size=np.array([member[2] for group in groups for member in group.members], dtype=np.int64),
        extension=np.array(codes, dtype=np.int32),
        extensions=tuple(names),
        key_end=np.cumsum([len(key) for key in keys], dtype=np.int64),
        key_text=b"".join(keys),
        problems=tuple(problems),
    )


_ARRAYS = ("first", "offset", "size", "extension", "key_end")


def _save(index: ShardIndex, target: Path) -> None:
    """Write the index beside others, atomically; an unwritable or full cache is no reason to fail."""
    words = {"extensions": index.extensions, "problems": [[p.key, p.reason] for p in index.problems]}
    text = json.dumps(words).encode()
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    arrays["key_text"] = np.frombuffer(index.key_text, dtype=np.uint8)
    arrays["words"] = np.frombuffer(text, dtype=np.uint8)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            np.savez(file, **arrays)
        os.replace(temporary, target)
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _load(target: Path, path: str, status: os.stat_result) -> ShardIndex | None:
    """An index from the cache, or None if it is not there or not whole."""
    try:
        with open(target, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
            words = json.loads(file["words"].tobytes())
            key_text = file["key_text"].tobytes()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    problems = tuple(Problem(path, key, reason) for key, reason in words["problems"])
    extensions = tuple(words["extensions"])
    return ShardIndex(
        path, status.st_size, status.st_mtime_ns, extensions=extensions, key_text=key_text,
        problems=problems, **arrays,
    )  # fmt: skip


def load_index(path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> ShardIndex:
    """The index of a shard, from the folder `cache` if the same file was indexed before, else built.

    "The same file" is its absolute path, size and time of change, so a rewritten shard is read anew.
    """
    path = os.fspath(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot open shard {path}: {error.strerror}") from error
    if cache is None:
        return build_index(path)
    name = f"{FORMAT} {os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
    target = Path(cache) / f"{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
    index = _load(target, path, status)
    if index is None:
        index = build_index(path)
        _save(index, target)
    return index
