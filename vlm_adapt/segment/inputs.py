"""What is to be segmented: files, folders, animations and videos, each with the name its results get.

Knows names of files and what they are by their first bytes; decoding pictures is data/images.py's, films are
animation.py's and video.py's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_adapt.data.images import image_size
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.segment.animation import frames_of

IMAGES = ".jpg .jpeg .png .apng .webp .bmp .gif .tif .tiff .ppm .jp2 .mpo".split()
VIDEOS = ".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv .flv .ogv".split()
RESULT = re.compile(r"-(mask|overlay)\.(png|webp|mp4)$")
ANIMATED = (".gif", ".webp", ".png", ".apng")


@dataclass(frozen=True)
class Input:
    """One thing to segment.

    Args:
        path: the file. name: below the folder of results, without an ending ("street/0001").
        kind: image, animation or video. frames: how many; of a video, None until it is read.
    """

    path: Path
    name: str
    kind: str = "image"
    frames: int | None = 1


@dataclass
class Found:
    """All inputs, and what of the folders was left out and why."""

    inputs: list[Input]
    left_out: Counter[str]


def find(given: Sequence[str | Path], output: Path) -> Found:
    """Files and what lies below folders, in the order given, folders in the order of numbers and letters.

    Args:
        output: where results go. Those of an earlier run are no inputs.

    Raises:
        UserError: there is no such file, nothing to segment, or a result would replace an input.
    """
    paths: list[tuple[Path, str]] = []
    left_out: Counter[str] = Counter()
    for word in given:
        path = Path(word).expanduser()
        if path.is_dir():
            found = sorted((one for one in path.rglob("*") if one.is_file()), key=_natural)
            for one in found:
                relative = one.relative_to(path)
                inside = output.resolve() != path.resolve() and one.resolve().is_relative_to(output.resolve())
                if any(part.startswith(".") for part in relative.parts):
                    left_out["hidden"] += 1
                elif RESULT.search(one.name) or inside or relative.parent.name.endswith("-masks"):
                    left_out["results of an earlier run"] += 1
                elif one.suffix.lower() not in (*IMAGES, *VIDEOS):
                    left_out["neither image nor video by their name"] += 1
                else:
                    paths.append((one, relative.as_posix()))
        elif path.is_file():
            paths.append((path, path.name))
        else:
            raise UserError(f"there is no image '{word}'")
    if not paths:
        where = ", ".join(f"'{one}'" for one in given)
        raise UserError(f"there is nothing to segment in {where}: no image or video by its name")
    return Found(_named(paths, output), left_out)


def _named(paths: Sequence[tuple[Path, str]], output: Path) -> list[Input]:
    stems = Counter(str(Path(name).with_suffix("")) for _, name in paths)
    inputs, seen = [], dict[str, Path]()
    for path, name in paths:
        stem = str(Path(name).with_suffix(""))
        chosen = stem if stems[stem] == 1 else name  # a.jpg beside a.png: a.jpg-mask.png
        if chosen in seen:
            raise UserError(f"'{seen[chosen]}' and '{path}' would have the same results: segment them apart")
        seen[chosen] = path
        inputs.append(_judged(path, chosen))
    own = {path.resolve() for path, _ in paths}
    for one in inputs:
        for target in (output / f"{one.name}-mask.png", output / f"{one.name}-overlay.png"):
            if target.resolve() in own:
                raise UserError(
                    f"the results of '{one.path}' would replace '{target}': choose another --output"
                )
    return inputs


def _judged(path: Path, name: str) -> Input:
    if path.suffix.lower() in VIDEOS:
        return Input(path, name, "video", None)
    if path.suffix.lower() in ANIMATED:
        frames = frames_of(path)
        if frames > 1:
            return Input(path, name, "animation", frames)
    return Input(path, name)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """frame2 before frame10."""
    pieces: Iterable[str] = re.split(r"(\d+)", str(path))
    return [(0, int(one), "") if one.isdecimal() else (1, 0, one) for one in pieces]


def read(path: Path, max_pixels: int) -> bytes:
    """The bytes of an image file whose header is sound. Raises BadSample."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadSample("file cannot be read", error.strerror or str(error)) from error
    image_size(data, max_pixels)
    return data
