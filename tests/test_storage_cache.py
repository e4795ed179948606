"""The cache of shards: whole entries only, bounded, shared, and no reason to fail when its disk is full."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from shard_server import Server, members, serving, write_tar

from vlm_adapt.data.shards import ShardSet
from vlm_adapt.data.storage import Settings, notes
from vlm_adapt.data.storage import cache as cache_file
from vlm_adapt.data.storage.blocks import _blocks
from vlm_adapt.data.storage.cache import Cache, NoRoom, locked

ENDING = 400  # more than the facts at the end of an entry


@pytest.fixture(autouse=True)
def fresh() -> None:
    notes.forget()
    cache_file._checked.clear()


def put(cache: Cache, key: str, data: bytes) -> None:
    os.close(cache.write(key, [data[: len(data) // 2], data[len(data) // 2 :]]).fd)


def held(folder: Path) -> int:
    total = 0
    for path in (folder / "entries").rglob("*"):
        with suppress(FileNotFoundError):  # renamed or removed by a process meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def test_an_entry_is_what_was_written_or_nothing(tmp_path):
    cache, data = Cache(tmp_path, 10**9), random.Random(1).randbytes(5000)
    assert cache.read("a") is None
    put(cache, "a", data)
    put(cache, "empty", b"")
    assert cache.read("a") == data and cache.read("empty") == b"" and cache.read("b") is None
    whole = cache.path("a").read_bytes()
    damages = [whole[:cut] for cut in (0, 1, 11, 4999, 5000, len(whole) - 1)]
    damages += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
                for place in (0, 2500, 4999, len(whole) - 9, len(whole) - 1)]  # fmt: skip
    for damaged in damages:
        cache.path("a").write_bytes(damaged)
        assert cache.read("a") is None and not cache.path("a").exists()
    assert notes.noted()[0][1] == len(damages)
    put(cache, "a", data)
    assert cache.read("a") == data


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def broken() -> Iterator[bytes]:
        yield b"x" * 1000
        raise RuntimeError("the source fails")

    cache = Cache(tmp_path, 10**6)
    with pytest.raises(RuntimeError):
        cache.write("a", broken())
    assert not held(tmp_path) and int((tmp_path / "total").read_text()) == 0


def test_the_least_recently_used_go_first(tmp_path):
    cache = Cache(tmp_path, 100_000)
    for number in range(8):
        put(cache, f"{number}", bytes(10_000))
        os.utime(cache.path(f"{number}"), (1000 + number, 1000 + number))
    assert cache.read("0")  # this is a use
    for number in range(8, 11):
        put(cache, f"{number}", bytes(10_000))
    left = [number for number in range(11) if cache.path(f"{number}").exists()]
    assert 0 in left and 1 not in left and {8, 9, 10} <= set(left)
    assert left[1:] == list(range(left[1], 11)), left
    assert held(tmp_path) <= 100_000
    with pytest.raises(NoRoom):
        put(cache, "large", bytes(100_001))
    assert cache.read("10") is not None or held(tmp_path) == 0
    assert not list(tmp_path.rglob("*.part"))


def test_an_evicted_entry_stays_readable_to_who_holds_it(tmp_path):
    cache = Cache(tmp_path, 50_000)
    entry = cache.write("a", [b"a" * 30_000])
    put(cache, "b", bytes(30_000))
    assert cache.read("a") is None and os.pread(entry.fd, 3, 29_997) == b"aaa"
    os.close(entry.fd)


def _fill(folder: Path, who: int, most: Any) -> None:
    cache = Cache(folder, 300_000)
    for number in range(40):
        put(cache, f"{who} {number}", random.Random(number).randbytes(8000))
        most.value = max(most.value, held(folder))


def test_the_limit_holds_for_all_processes_together(tmp_path):
    context = multiprocessing.get_context("fork")
    most = context.Value("l", 0)
    writers = [context.Process(target=_fill, args=(tmp_path, who, most)) for who in range(3)]
    for one in writers:
        one.start()
    for one in writers:
        one.join(60)
        assert one.exitcode == 0
    # A scan cannot see what others have counted and not written yet: one entry each, at most.
    assert 200_000 < most.value <= 300_000 + 3 * (8000 + ENDING)
    (tmp_path / "total").write_text("nonsense")  # is counted anew
    put(Cache(tmp_path, 300_000), "z", bytes(8000))
    assert int((tmp_path / "total").read_text()) == held(tmp_path) <= 300_000


def test_what_dead_writers_left_is_removed(tmp_path):
    cache = Cache(tmp_path, 17_000)
    put(cache, "a", bytes(8000))
    old, new = (cache.path("a").with_name(f"{name}.part") for name in ("old", "new"))
    old.write_bytes(bytes(5000)), new.write_bytes(bytes(100))
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    put(cache, "b", bytes(9000))
    assert not old.exists() and new.exists()


def test_a_lock_is_waited_for_no_longer_than_told(tmp_path):
    with locked(tmp_path / "x", 1) as first:
        started = time.monotonic()
        with locked(tmp_path / "x", 0.1) as second:
            assert first and not second and time.monotonic() - started < 2
    with locked(tmp_path / "x", 0.1) as third:
        assert third


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    write_tar(tmp_path / "served" / "s.tar", members(60, size=12_000))
    with serving(tmp_path / "served") as one:
        yield one


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 kB, where one may mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def read_twice(server: Server, cache: Path) -> list[tuple[Any, int]]:
    local = list(ShardSet(server.folder / "s.tar"))
    settings = Settings(cache=str(cache), block_bytes=16 << 10, retry_seconds=5)
    for _ in range(2):
        shards = ShardSet(server.address("s.tar"), settings=settings)
        assert list(shards) == local
        _blocks.clear()
    return [one for one in shards.notes if "cannot be written" in one[0].reason]


def test_a_really_full_disk_makes_room_from_what_is_its_own(server, small_disk, capsys):
    """The limit is 50 GB, the disk has less: older blocks go, and reading goes on."""
    assert not read_twice(server, small_disk / "cache")
    assert 200_000 < held(small_disk / "cache") < 600_000 < (server.folder / "s.tar").stat().st_size


def test_a_disk_filled_by_others(server, small_disk, capsys):
    (small_disk / "cache" / "entries").mkdir(parents=True)
    (small_disk / "locks").mkdir()
    with open(small_disk / "other", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(512))
    ((problem, count),) = read_twice(server, small_disk / "cache")
    assert "No space left" in problem.reason and count > 2
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch, capsys):
    ((problem, count),) = read_twice(server, Path("/proc/no/such/place"))
    assert "what is read is not kept" in problem.reason and count > 2
    assert capsys.readouterr().err.count("cannot be written") == 1

    def full(*words: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    notes.forget()
    monkeypatch.setattr(os, "pwrite", full)
    ((problem, _),) = read_twice(server, tmp_path / "cache")
    assert "No space left" in problem.reason
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_damaged_blocks_are_fetched_again(server, tmp_path):
    settings = Settings(cache=str(tmp_path / "cache"), block_bytes=16 << 10)
    shards = ShardSet(server.address("s.tar"), settings=settings)
    local = list(shards)
    source = random.Random(2)
    paths = [path for path in (tmp_path / "cache" / "entries").rglob("*/*") if path.stat().st_size > 9000]
    for path in paths:
        data = bytearray(path.read_bytes())
        data[source.randrange(len(data))] ^= 255
        path.write_bytes(data if source.random() < 0.5 else data[: source.randrange(len(data))])
    cache_file._checked.clear(), _blocks.clear(), server.asked.clear()
    assert list(shards) == local and len(server.asked) == len(paths) > 10


def test_a_limit_of_nothing_is_no_trouble(server, tmp_path):
    """Whoever sets `data.cache_gb` to 0 need not be told that nothing is kept."""
    local = list(ShardSet(server.folder / "s.tar"))
    settings = Settings(cache=str(tmp_path / "cache"), limit_bytes=0)
    shards = ShardSet(server.address("s.tar"), settings=settings)
    assert list(shards) == local and not shards.notes and not held(tmp_path / "cache")
