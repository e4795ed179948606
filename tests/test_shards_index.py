"""Indexes of many shards: beside them, from the cache, small in memory, and read side by side."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from shard_server import members, serving, write_tar

from vlm_adapt.data import index as index_file
from vlm_adapt.data.index import build_index, load_index, write_sidecar
from vlm_adapt.data.indexing import write_sidecars
from vlm_adapt.data.shard_index import from_bytes
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.data.storage import Settings, notes
from vlm_adapt.errors import UserError


@pytest.fixture(autouse=True)
def fresh() -> None:
    notes.forget()


def equal(one, other) -> bool:
    return (
        len(one) == len(other)
        and one.problems == other.problems
        and all(one.key(i) == other.key(i) and one.members(i) == other.members(i) for i in range(len(one)))
    )


def test_a_sidecar_is_used_in_place_of_a_scan(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", [*members(12), ("x.json", b"1"), ("x.json", b"2")])
    built = build_index(path)
    place = write_sidecar(path)
    first = place.read_bytes()
    assert place == tmp_path / "s.tar.index.npz" and write_sidecar(path).read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == ["s.tar", "s.tar.index.npz"]
    os.utime(path, (1, 1))  # a copy: other times, the same content
    with monkeypatch.context() as patch:
        patch.setattr(index_file, "build_index", None)
        loaded = load_index(path)
    assert equal(loaded, built) and built.problems
    assert list(ShardSet(tmp_path)) == list(ShardSet(tmp_path)) and not notes.noted()


@pytest.mark.parametrize(
    "change", ["other sizes", "same size", "cut index", "other shard's", "lies", "not one"]
)
def test_a_sidecar_that_does_not_fit_is_not_used(tmp_path, change):
    path = write_tar(tmp_path / "s.tar", members(12))
    place = write_sidecar(path)
    if change == "other sizes":
        write_tar(path, members(13))
    elif change == "same size":  # of the archive, with members elsewhere
        parts = list(members(12))
        size = path.stat().st_size
        write_tar(path, [*parts[:6], *[(name.replace("json", "text"), data) for name, data in parts[6:]]])
        assert path.stat().st_size == size
        data = bytearray(path.read_bytes())
        path.write_bytes(data)
    elif change == "cut index":
        place.write_bytes(place.read_bytes()[:300])
    elif change == "other shard's":
        place.write_bytes(write_sidecar(write_tar(tmp_path / "t.tar", members(12, size=2999))).read_bytes())
        (tmp_path / "t.tar").unlink()
    elif change == "lies":  # whole and of this version, and leads out of the shard
        with np.load(place) as file:
            arrays = {name: file[name] for name in file}
        arrays["size"] = arrays["size"] + np.uint32(10**9)
        np.savez(place, **arrays)
        assert from_bytes(place.read_bytes(), "s.tar") is None
    else:
        place.write_bytes(random.Random(1).randbytes(1000))
    assert equal(load_index(path), build_index(path))
    assert len(notes.noted()) == 1 and "is not used" in notes.noted()[0][0].reason


def test_fuzzed_sidecars_never_break_a_reader(tmp_path):
    path = write_tar(tmp_path / "s.tar", members(12, size=50))
    place, expected, source = write_sidecar(path), list(ShardSet(path)), random.Random(3)
    whole = place.read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(source.randint(1, 3)):
            data[source.randrange(len(data))] = source.randrange(256)
        place.write_bytes(data[: source.choice([len(data), source.randrange(len(data))])])
        assert list(ShardSet(path)) == expected


def test_sidecars_of_what_cannot_have_one(tmp_path):
    with pytest.raises(UserError, match="local shards only"):
        write_sidecar("http://host/s.tar")
    with pytest.raises(UserError, match="cannot open"):
        write_sidecar(tmp_path / "no.tar")
    with pytest.raises(UserError, match="local shards only"):
        write_sidecars(["pipe:cat x"])
    path = write_tar(tmp_path / "s.tar", members(2))
    (tmp_path / "s.tar.index.npz").mkdir()
    with pytest.raises(UserError, match="cannot write .*index.npz"):
        write_sidecar(path)
    assert sorted(os.listdir(tmp_path)) == ["s.tar", "s.tar.index.npz"]


def test_sidecars_of_many_shards(tmp_path):
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", members(4, prefix=f"{number}"))
    (tmp_path / "3.tar").write_bytes((tmp_path / "3.tar").read_bytes()[:9000])
    done: list[int] = []
    shards, samples, problems = write_sidecars(tmp_path, workers=2, tick=done.append)
    assert (shards, samples) == (5, sum(ShardSet(tmp_path).counts)) and done == [1, 2, 3, 4, 5]
    assert {Path(problem.shard).name for problem in problems} == {"3.tar"}
    assert len(list(tmp_path.glob("*.index.npz"))) == 5


def test_indexes_of_small_local_shards_are_not_kept_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_ADAPT_CACHE", str(tmp_path / "home"))
    path = write_tar(tmp_path / "s.tar", members(12, size=10))
    load_index(path)
    assert not (tmp_path / "home").exists()
    monkeypatch.setattr(index_file, "WORTH_KEEPING", 20)
    load_index(path)
    (kept,) = (tmp_path / "home" / "shards" / "entries").rglob("*/*")
    monkeypatch.setattr(index_file, "build_index", None)
    assert len(load_index(path)) == 12 and kept.is_file()


def test_remote_indexes_are_read_side_by_side(tmp_path):
    """Every server waits until four have asked: one after the other would never end."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(4):
        write_tar(folder / f"{number}.tar", members(2))
        write_sidecar(folder / f"{number}.tar")
    barrier = threading.Barrier(4)

    def wait(handler, body):
        if handler.headers.get("Range") == "bytes=0-0":
            barrier.wait(10)
        return False

    with serving(folder) as server:
        server.always = wait
        shards = ShardSet(
            server.address("{0..3}.tar"), settings=Settings(cache=str(tmp_path / "cache"), retry_seconds=15)
        )
        assert shards.counts == (2, 2, 2, 2)
        missing = server.address("{0..7}.tar")
        server.always = None
        with pytest.raises(UserError, match="/4.tar: the server answered 404"):  # the first in order
            ShardSet(missing, cache=tmp_path / "cache")


MEMORY = """
import gc, os, random, resource, sys
from vlm_adapt.data.shards import ShardSet
def resident():
    gc.collect()
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
before = resident()
shards = ShardSet(sys.argv[1])
indexed = resident()
order = list(range(len(shards)))
random.Random(1).shuffle(order)
seen = []
for done, number in enumerate(order, 1):
    shards.read(number)
    if done % (len(order) // 4) == 0:
        seen.append(resident())
print(len(shards.indexes), len(shards), indexed - before, seen[-1] - seen[0])
"""


@pytest.mark.parametrize("shards", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_is_flat(tmp_path, shards):
    """Over 1,000 shards and 100,000 samples, read in a shuffled order (and a tenth of that)."""
    write_tar(tmp_path / "0000.tar", members(100, size=200))
    for number in range(1, shards):
        shutil.copyfile(tmp_path / "0000.tar", tmp_path / f"{number:04d}.tar")
    words = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    count, samples, indexes, growth = map(int, done.stdout.split())
    assert (count, samples) == (shards, shards * 100)
    # Of a sample: two members of 9 bytes, two ends of 2, a key of 4; of a shard about 3 kB of objects.
    assert indexes < shards * 10_000 + 2_000_000
    assert growth < 1_000_000  # from a quarter of the samples to all of them: nothing but an arena or two


def test_the_verb(tmp_path, capsys):
    from vlm_adapt import cli

    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", members(3, prefix=f"{number}"))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:9000])
    assert cli.main(["shards", "index", str(tmp_path / "0.tar"), f"{tmp_path}/1.*", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "4 samples in 2 shard(s) indexed" in out.splitlines()[-1] and "1.tar: (no key): damaged" in out
    assert cli.main(["shards", "index", "http://127.0.0.1/a.tar"]) == 2
    assert "local shards only" in capsys.readouterr().err
