"""What converters share: the record of a conversion, finding image files, reading JSON.

Knows files and folders; knows nothing about any one dataset.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.errors import UserError

LOST = "__lost__"
MISSING = "image file is missing"
# What the bytes of an image begin with, and the extension that goes with them.
_DIGITS = re.compile(r"(\d+)(?:\.[^./]*)?$")  # the last of a file's name
_SIGNATURES = ((b"\xff\xd8", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))


@dataclass
class Conversion:
    """What a converter tells while it runs: how many samples to expect, and what it had to leave out.

    Attributes:
        total: entries to expect, None if the converter does not know.
        account: what was left out and why.
        shuffled: entries will be written in another order. Where reading one entry is only cheap after
            its neighbour, a converter had better yield whole samples then, not recipes.
    """

    total: int | None = None
    shuffled: bool = False
    account: Account = field(default_factory=Account)

    def lose(self, key: str, reason: str | BadSample) -> None:
        """One entry of the source makes no sample, and why."""
        self.account.lose(key, reason)


@dataclass(frozen=True)
class Recipe:
    """A sample yet to be made, cheap to send to a writer process: `function(*arguments)` gives its members.

    Attributes:
        key: the sample's key.
        function: of a module's top level; returns `{extension: content}`, or raises BadSample, which
            is entered in the account under the key. Under `LOST` it may return what it left out of a
            sample that is good otherwise, as `(part, reason)`: "an answer", "empty answer".
        arguments: paths, numbers and records; no file contents.
    """

    key: str
    function: Callable[..., Mapping[str, Any]]
    arguments: tuple[Any, ...] = ()


def image_extension(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the content; None for anything else."""
    for signature, extension in _SIGNATURES:
        if data.startswith(signature):
            return extension
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def checked_image(data: bytes, where: str) -> tuple[str, bytes]:
    """`(extension, data)`, not decoded. Raises BadSample if it is no image of a shard."""
    extension = image_extension(data)
    if extension is None:
        raise BadSample("not a JPEG, PNG or WebP image", where)
    return extension, data


def read_image(path: str | Path) -> tuple[str, bytes]:
    """`(extension, bytes)` of an image file, not decoded. Raises BadSample if missing or no image."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise BadSample(MISSING, str(path)) from error
    except OSError as error:
        raise BadSample("image file cannot be read", f"{path}: {error.strerror}") from error
    return checked_image(data, str(path))


def read_first(places: Sequence[str]) -> tuple[str, bytes]:
    """`read_image` of the first place that has a file. BadSample names the first place if none has."""
    for place in places[:-1]:
        if os.path.isfile(place):
            return read_image(place)
    try:
        return read_image(places[-1])
    except BadSample as error:
        raise BadSample(MISSING, places[0]) if error.reason == MISSING else error from error


def image_sample(images: Sequence[Sequence[str]], record: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a sample with these images, each the first of its places that has a file. A recipe."""
    return {**image_members([read_first(places) for places in images]), "json": record}


def image_members(files: list[tuple[str, bytes]]) -> dict[str, bytes]:
    """Members of the schema: `jpg` for one image, `0.jpg`, `1.jpg`, ... for several."""
    if len(files) == 1:
        return {files[0][0]: files[0][1]}
    return {f"{number}.{extension}": data for number, (extension, data) in enumerate(files)}


def existing(path: str, what: str) -> Path:
    """The path, or UserError saying what was looked for where."""
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"{what} {path} does not exist")
    return found


def several(paths: str) -> list[str]:
    """Paths joined by `::`."""
    return [path for path in paths.split("::") if path]


def read_json(path: str, what: str) -> Any:
    """A JSON file, or UserError."""
    file = existing(path, what)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path} is not readable JSON: {error}") from error


def safe_key(text: str) -> str:
    """A text as a key: dots and whatever upsets file names become `_`."""
    return re.sub(r"[^\w\-]+", "_", text).strip("_") or "sample"


class ImageFolders:
    """Images by file name or by COCO number, in several folders and below them, the first to have one.

    COCO writes the number of an image as the last digits of its name, with and without a prefix
    (`000000000139.jpg`, `COCO_val2014_000000000139.jpg`).
    """

    def __init__(self, folders: str):
        self.folders = [existing(folder, "image folder") for folder in several(folders)]
        if not self.folders:
            raise UserError("no image folder was named")
        self._numbers: dict[int, str] | None = None

    def named(self, name: str) -> Path:
        """Where the image of this relative name is (in the first folder, if nowhere)."""
        for folder in self.folders:
            if (folder / name).is_file():
                return folder / name
        return self.folders[0] / name

    def places(self, name: str) -> tuple[str, ...]:
        """Where the image of this relative name may be: for a recipe, which looks when it is cooked."""
        return tuple(os.path.join(folder, name) for folder in self.folders)

    def numbered(self, number: int) -> Path:
        """Where the image of this COCO number is; BadSample if nowhere."""
        if self._numbers is None:
            self._numbers = {}
            for folder in self.folders:
                for path in sorted(
                    os.path.join(place, name) for place, _, names in os.walk(folder) for name in names
                ):
                    digits = _DIGITS.search(path)
                    if digits:
                        self._numbers.setdefault(int(digits.group(1)), path)
        if number not in self._numbers:
            raise BadSample(MISSING, f"number {number} in {self.folders[0]}")
        return Path(self._numbers[number])
