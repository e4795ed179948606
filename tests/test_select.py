"""Which samples stay: by quantile, matched by shard and key, whatever the order of anything."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from vlm_adapt.config.schema import Source
from vlm_adapt.data import score_file as room
from vlm_adapt.data.score_file import Group, ScoreFile, check_output, read_score_file
from vlm_adapt.data.select import select, selection
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError


def shard(path: Path, keys: Sequence[str]) -> Path:
    return tiny.shard(path, [(key, {"json": b'{"caption": "x"}'}) for key in keys])


def written(
    path: Path, shards: Sequence[Path], rows: Sequence[tuple[int, str, float]], sources: Any = None
) -> Path:
    """A file of scores with (shard, key, score) rows."""
    file = ScoreFile(
        keys=[key.encode() for _, key, _ in rows],
        group=np.array([group for group, _, _ in rows]),
        groups=[Group(n if sources else 0, str(one), os.path.getsize(one)) for n, one in enumerate(shards)],
        scores={
            "el2n": np.array([score for _, _, score in rows]),
            "loss": -np.array([score for _, _, score in rows]),
        },
        sources=sources or [{"prompt": "Describe the image.", "task": None}],
        made={"checkpoints": ["somewhere"]},
    )
    file.write(path)
    return path


def source(shards: Any, scores: Path, **keep: Any) -> Source:
    names = [str(one) for one in shards] if isinstance(shards, list) else str(shards)
    return Source(shards=names, keep={"scores": str(scores), **keep})


@pytest.fixture
def ten(tmp_path: Path) -> tuple[list[Path], list[tuple[int, str, float]]]:
    """Ten samples in two shards; the key says the score."""
    one = shard(tmp_path / "000000.tar", [f"k{n}" for n in (3, 1, 4, 0, 9)])
    two = shard(tmp_path / "000001.tar", [f"k{n}" for n in (2, 6, 5, 8, 7)])
    rows = [(0, f"k{n}", n / 10) for n in (3, 1, 4, 0, 9)] + [(1, f"k{n}", n / 10) for n in (2, 6, 5, 8, 7)]
    return [one, two], rows


def kept(given: Source) -> list[str]:
    shards = ShardSet(given.shards)
    numbers = select(given, shards)
    assert numbers is not None and numbers.dtype == np.int64 and (np.diff(numbers) > 0).all()
    return [shards.ref(int(number)).key for number in numbers]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({"highest": 0.3}, {0, 1, 2}),
        ({"lowest": 0.7}, {7, 8, 9}),
        ({"lowest": 0.2, "highest": 0.5}, {2, 3, 4}),
        ({"lowest": 0.7, "by": "loss"}, {0, 1, 2}),
        ({"lowest": 0.94}, {9}),
    ],
)
def test_between_quantiles(ten, tmp_path, keep, expected):
    shards, rows = ten
    path = written(tmp_path / "s.safetensors", shards, rows)
    assert set(kept(source(shards, path, **keep))) == {f"k{n}" for n in expected}


def test_everything_stays(ten, tmp_path):
    shards, rows = ten
    path = written(tmp_path / "s.safetensors", shards, rows)
    given = source(shards, path)
    assert select(given, ShardSet(given.shards)) is None
    assert select(Source(shards=str(shards[0])), ShardSet(shards[0])) is None


def test_order_of_lines_and_shards_does_not_matter(tmp_path):
    """Even with equal scores everywhere; and ranges that meet share nothing."""
    shards = [shard(tmp_path / f"{n:06d}.tar", [f"k{n}{i:02d}" for i in range(20)]) for n in range(3)]
    rows = [(n, f"k{n}{i:02d}", 0.5) for n in range(3) for i in range(20)]
    path = written(tmp_path / "a.safetensors", shards, rows)
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    other = written(tmp_path / "b.safetensors", shards, mixed)
    low = kept(source(shards, path, highest=0.4))
    assert len(low) == 24
    assert kept(source(shards, other, highest=0.4)) == low
    assert set(kept(source(shards[::-1], other, highest=0.4))) == set(low)
    assert not set(low) & set(kept(source(shards, path, lowest=0.4)))
    assert {key[1] for key in low} == {"0", "1", "2"}  # a tie favours no shard


def test_quantiles_are_of_the_source(ten, tmp_path):
    """The file may hold more shards than the source has."""
    shards, rows = ten
    path = written(tmp_path / "s.safetensors", shards, rows)
    assert set(kept(source(shards[0], path, lowest=0.6))) == {"k4", "k9"}


def test_samples_without_a_score_stay_and_are_counted(ten, tmp_path):
    shards, rows = ten
    rows = [row for row in rows if row[1] != "k0"]
    rows = [(g, k, float("nan") if k == "k1" else s) for g, k, s in rows]
    given = source(shards, written(tmp_path / "s.safetensors", shards, rows), lowest=0.75)
    found = selection(given, ShardSet(given.shards))
    assert set(kept(given)) == {"k0", "k1", "k8", "k9"}  # the upper quarter of eight, and the two
    assert (found.missing, found.refused, found.left_out) == (1, 1, 6)
    assert found.examples == ("'k0' of 000000.tar",) and "'k0' of 000000.tar" in str(found)
    assert (found.lowest, found.highest) == (pytest.approx(0.8), pytest.approx(0.9))
    assert json.loads(json.dumps(found.to_dict()))["kept"] == 4


def test_other_shards(ten, tmp_path):
    shards, rows = ten
    path = written(tmp_path / "s.safetensors", shards, rows)
    strange = shard(tmp_path / "x" / "train-0.tar", ["k1", "k2"])
    with pytest.raises(UserError, match="no scores of 2 of 2 samples: it belongs to other shards") as caught:
        kept(source(strange, path))
    tiny.sentence(caught)
    words = json.dumps({"caption": "x" * 20_000}).encode()
    longer = tiny.shard(tmp_path / "y" / "000000.tar", [(key, {"json": words}) for _, key, _ in rows[:5]])
    with pytest.raises(UserError, match="10,240 bytes when it was scored and 112,640 now"):
        kept(source(longer, path))  # its keys are the same
    few = written(tmp_path / "few.safetensors", shards, rows[:3])
    with pytest.raises(UserError, match="7 of 10 samples: it was written with a limit"):
        kept(source(shards, few))


def test_moved_shards_keep_their_scores(ten, tmp_path):
    shards, rows = ten
    path = written(tmp_path / "s.safetensors", shards, rows)
    (tmp_path / "elsewhere").mkdir()
    moved = [one.rename(tmp_path / "elsewhere" / one.name) for one in shards]
    assert set(kept(source(moved, path, lowest=0.8))) == {"k8", "k9"}


def test_shards_of_one_name_are_told_apart(tmp_path):
    """By their path, by what is asked of them, or not at all: then the user is told."""
    one = shard(tmp_path / "captions" / "train" / "000000.tar", ["k1", "k2"])
    two = shard(tmp_path / "questions" / "train" / "000000.tar", ["k1", "k2"])
    rows = [(0, "k1", 0.1), (0, "k2", 0.2), (1, "k1", 0.9), (1, "k2", 0.8)]
    path = written(tmp_path / "s.safetensors", [one, two], rows)
    assert kept(source(one, path, lowest=0.5)) == ["k2"] and kept(source(two, path, lowest=0.5)) == ["k1"]
    (tmp_path / "away").mkdir()
    moved = two.rename(tmp_path / "away" / two.name)
    with pytest.raises(UserError, match="could be either") as caught:
        kept(source(moved, path, lowest=0.5))
    tiny.sentence(caught)
    asked = [{"prompt": "Describe the image.", "task": None}, {"prompt": "What is it?", "task": None}]
    moved.rename(two)
    path = written(tmp_path / "t.safetensors", [one, one], rows, asked)
    given = source(one, path, lowest=0.5)
    assert kept(given) == ["k2"] and kept(given.model_copy(update={"prompt": "What is it?"})) == ["k1"]


def test_what_cannot_be_kept(ten, tmp_path):
    shards, rows = ten
    path = written(tmp_path / "s.safetensors", shards, rows)
    for keep, match in [
        ({"by": "eln2"}, "has no score 'eln2', did you mean 'el2n'"),
        ({"lowest": 0.5, "highest": 0.51}, "none lies between the quantiles 0.5 and 0.51"),
    ]:
        with pytest.raises(UserError, match=match) as caught:
            kept(source(shards, path, **keep))
        tiny.sentence(caught)


def test_files_that_are_no_scores(ten, tmp_path):
    shards, rows = ten
    path = written(tmp_path / "s.safetensors", shards, rows)
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):  # cut off anywhere
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut off or is no file of scores") as caught:
            read_score_file(path)
        tiny.sentence(caught)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(UserError, match="no file of scores of this version"):
        read_score_file(path)
    with pytest.raises(UserError, match="no file of scores"):
        check_output(path)  # a model's weights are not overwritten
    path.write_bytes(whole)
    check_output(path)
    header = {"format": room.FORMAT, "words": json.dumps({"groups": [], "sources": [], "made": {}})}
    save_file(load_file(path), path, header)
    with pytest.raises(UserError, match="damaged file of scores"):
        read_score_file(path)
    with pytest.raises(UserError, match="there is no file of scores"):
        read_score_file(tmp_path / "none.safetensors")
    for wrong, match in [(tmp_path, "is a folder"), (tmp_path / "s.npz", "ends in .safetensors")]:
        with pytest.raises(UserError, match=match):
            check_output(wrong)


def test_written_whole_or_not_at_all(ten, tmp_path, monkeypatch):
    shards, rows = ten
    path = written(tmp_path / "s.safetensors", shards, rows)
    before = path.read_bytes()

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        written(path, shards, rows[:4])
    assert path.read_bytes() == before
    assert {one.name for one in tmp_path.iterdir()} == {"000000.tar", "000001.tar", "s.safetensors"}
