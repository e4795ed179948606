"""The sidecar of scores: what `vlm-adapt scores` found of every sample, in one safetensors file.

Knows keys, shards and columns of numbers; knows nothing about models or about what a score means. No
pickles: a file of scores may have been sent by anyone.

    key_text, key_end   keys, one after another, in UTF-8, and where each ends
    group               which line of the table of shards a sample belongs to
    score.NAME          float32, NaN where the pass refused the sample

and in the header, as JSON: the shards (path, bytes, which source), the sources, and what made the file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt.errors import UserError

FORMAT = "vlm-adapt scores 1"
PREFIX = "score."
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Group:
    """The samples of one shard, as one source phrased them.

    Attributes:
        source: its number in the table of sources.
        shard: the path or address at which it was read, without password or query.
        file_bytes: its size; a shard of another size is another shard.
    """

    source: int
    shard: str
    file_bytes: int


@dataclass(frozen=True)
class ScoreFile:
    """Scores of samples.

    Attributes:
        keys: [N] as they stand in the shards, UTF-8.
        group: [N] int32, places in `groups`.
        scores: name -> float32 [N]; NaN where a sample could not be scored.
        sources: words and settings of each source.
        made: checkpoints, settings and account of the pass.
    """

    keys: Sequence[bytes]
    group: np.ndarray
    groups: Sequence[Group]
    scores: Mapping[str, np.ndarray]
    sources: Sequence[Mapping[str, Any]]
    made: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write the file; it appears under its name when it is whole.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {
            "key_text": np.frombuffer(b"".join(self.keys), np.uint8),
            "key_end": np.cumsum([len(key) for key in self.keys], dtype=np.int64),
            "group": self.group.astype(np.int32),
        }
        tensors |= {PREFIX + name: values.astype(np.float32) for name, values in self.scores.items()}
        words = {
            "groups": [[one.source, one.shard, one.file_bytes] for one in self.groups],
            "sources": list(self.sources),
            "made": dict(self.made),
        }
        header = {"format": FORMAT, "words": json.dumps(words, ensure_ascii=True)}
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
            os.close(handle)
            save_file(tensors, temporary, header)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's own is for its owner alone
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the scores cannot be written to '{path}': {error}") from error
        finally:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)


def check_output(path: Path) -> None:
    """Whether a file of scores can be written there, before a long pass begins.

    Raises:
        UserError: the path is a folder, another kind of file, or in a place that cannot be written.
    """
    if path.is_dir():
        raise UserError(f"'{path}' is a folder: name the file that the scores are to be written to")
    if path.suffix != SUFFIX:
        raise UserError(f"a file of scores ends in {SUFFIX}, and '{path}' does not")
    if path.exists():
        read_score_file(path)  # scores of an earlier pass are replaced, a model's weights are not
    there = next(one for one in (path.absolute().parent, *path.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"the scores cannot be written to '{path}': there is no permission in '{there}'")


def read_score_file(path: Path) -> ScoreFile:
    """Read a file of scores.

    Raises:
        UserError: it is missing, cut off, or something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no file of scores '{path}': `vlm-adapt scores CHECKPOINT` writes one")
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is cut off or is no file of scores ({error})") from error
    if header.get("format") != FORMAT:
        found = f" (it says '{header['format']}')" if "format" in header else ""
        raise UserError(f"'{path}' is no file of scores of this version{found}: write one anew")
    try:
        words = json.loads(header["words"])
        groups = [Group(int(source), str(shard), int(size)) for source, shard, size in words["groups"]]
        text, ends = tensors["key_text"].tobytes(), tensors["key_end"].tolist()
        keys = [text[first:last] for first, last in zip([0, *ends[:-1]], ends, strict=bool(ends))]
        scores = {n.removeprefix(PREFIX): v for n, v in tensors.items() if n.startswith(PREFIX)}
        made = ScoreFile(keys, tensors["group"], groups, scores, words["sources"], words["made"])
        lengths = {len(made.group), *(len(values) for values in scores.values())}
        whole = lengths == {len(keys)} and set(np.unique(made.group).tolist()) <= set(range(len(groups)))
        whole = whole and {one.source for one in groups} <= set(range(len(made.sources)))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' is a damaged file of scores ({error}): write it anew") from error
    if not whole:
        raise UserError(f"'{path}' is a damaged file of scores (its columns do not fit): write it anew")
    return made


def _umask() -> int:
    """The process's mask for new files; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
