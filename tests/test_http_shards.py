"""Shards over HTTP: equal to the files; faults of the server are mended, or named in time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from shard_server import Server, drip, hang_up, members, reset, serving, short, stall, status, write_tar

from vlm_adapt.data.index import write_sidecar
from vlm_adapt.data.shards import ShardSet, expand
from vlm_adapt.data.storage import Settings, notes
from vlm_adapt.data.storage.blocks import _blocks
from vlm_adapt.data.write import ShardWriter, write_json
from vlm_adapt.errors import UserError

BLOCK = 16 << 10


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    write_tar(folder / "s.tar", members(20))
    notes.forget()
    with serving(folder) as one:
        yield one


@pytest.fixture
def local(server: Server) -> list[Any]:
    return list(ShardSet(server.folder / "s.tar"))


def settings(tmp_path: Path, **more: Any) -> Settings:
    quick = {"retry_seconds": 20.0, "stall_seconds": 0.3, "block_bytes": BLOCK}
    return Settings(**{"cache": str(tmp_path / "cache"), **quick, **more})


def empty(cache: Path) -> None:
    """As after an eviction, and in another thread."""
    for path in (cache / "entries").rglob("*/*"):
        path.unlink()
    _blocks.clear()


def test_equal_to_the_file_and_fetched_once(server, local, tmp_path):
    shards = ShardSet(server.address("s.tar"), settings=settings(tmp_path))
    assert list(shards) == local and not shards.problems
    blocks = [span for _, span in server.asked if span and span != "bytes=0-0"]
    assert len(blocks) == len(set(blocks)) == -(-(server.folder / "s.tar").stat().st_size // BLOCK)
    assert len(server.clients) == 1  # one connection for all of it
    server.asked.clear()
    again = ShardSet(server.address("s.tar"), settings=settings(tmp_path))
    assert list(again) == local
    assert server.asked == [("/s.tar", "bytes=0-0")]  # index and blocks were kept


def test_patterns_and_folders(server, tmp_path):
    written = server.folder / "set"
    with ShardWriter(written, max_count=5) as writer:
        for number in range(12):
            writer.write({"__key__": f"{number:03d}", "json": {"caption": "x"}})
    address = server.address("set/")
    with pytest.raises(UserError, match="has no dataset.json"):
        expand(address, settings(tmp_path))
    write_json(written / "dataset.unfinished.json", {})
    with pytest.raises(UserError, match="not all written"):
        expand(address, settings(tmp_path))
    write_json(written / "dataset.json", {"shards": writer.shards})
    names = [f"{address}{number:06d}.tar" for number in range(3)]
    assert expand(address, settings(tmp_path)) == names == expand(address + "{000000..000002}.tar")
    assert expand(f"{names[2]}::{names[0]}") == [names[2], names[0]]
    (written / "dataset.unfinished.json").unlink()
    mixed = ShardSet([address, str(written)], settings=settings(tmp_path))
    assert mixed.counts == (5, 5, 2, 5, 5, 2)
    write_json(written / "dataset.json", {"shards": "none"})
    with pytest.raises(UserError, match="does not name shards"):
        expand(address, settings(tmp_path))
    for wrong, words in [("http://", "not an address"), ("https://h/a-*.tar", "do not match"),
                         ("s3://bucket/a.tar", "'s3' is not read")]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            expand(wrong)


@pytest.mark.parametrize(
    "faults",
    [
        [status(500), status(503, Retry_After="0")],
        [None, status(502)],
        [stall],
        [None, None, stall],
        [None, None, reset(0), reset(5000), reset(5000)],
        [None, None, short(100), short(10**9)],
        [None, None, status(200)],
    ],
    ids=["500", "502", "stall first", "stall later", "reset", "short", "no range once"],
)
def test_a_server_that_errs_sometimes(server, local, tmp_path, faults, capsys):
    server.faults += faults
    shards = ShardSet(server.address("s.tar"), settings=settings(tmp_path))
    assert list(shards) == local
    assert not server.faults  # they happened
    ((problem, count),) = [one for one in shards.notes if "repeated" in one[0].reason]
    assert count == sum(fault is not None for fault in faults) and "s.tar" in problem.shard
    assert capsys.readouterr().err.count("a request was repeated") == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(500), "answered 500"),
        (stall, "nothing came for"),
        (reset(10), "hung up|cut short"),
        (short(1000), "cut short"),
        (drip, "too slow"),
    ],
    ids=["500", "stall", "reset", "short", "drip"],
)
def test_a_server_that_errs_always_is_named_in_time(server, tmp_path, fault, words):
    limits = settings(tmp_path, retry_seconds=0.7)
    shards = ShardSet(server.address("s.tar"), settings=limits)
    server.always = fault
    empty(tmp_path / "cache")
    started = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        for number in range(20):
            shards.read(number)
    if fault is not drip:
        with pytest.raises(UserError, match=words):
            ShardSet(server.address("s.tar"), settings=limits)
    assert "127.0.0.1" in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - started < 8  # two limits, and what a slow machine adds


def test_refusals_are_not_repeated(server, tmp_path):
    started = time.monotonic()
    with pytest.raises(UserError, match="gone.tar: the server answered 404"):
        ShardSet(server.address("gone.tar"), settings=settings(tmp_path))
    server.always = status(403)
    with pytest.raises(UserError, match="answered 403"):
        ShardSet(server.address("s.tar"), settings=settings(tmp_path))
    with pytest.raises(UserError, match="not known"):
        ShardSet("http://no-such-host.invalid/s.tar", settings=settings(tmp_path))
    assert time.monotonic() - started < 10


def test_a_server_without_ranges_is_read_whole(server, local, tmp_path):
    server.ranges = False
    shards = ShardSet(server.address("s.tar"), settings=settings(tmp_path))
    assert list(shards) == local
    server.asked.clear()
    assert list(ShardSet(server.address("s.tar"), settings=settings(tmp_path))) == local
    assert len(server.asked) == 1
    # A copy that broke off is taken up again, by reading what was there before.
    server.faults += [None, reset(20_000), reset(40_000)]
    assert list(ShardSet(server.address("s.tar"), settings=settings(tmp_path / "b"))) == local
    # Without an ETag nothing tells one content from another, but the bytes that had come before.
    server.etag = None

    def another(handler: Any, body: bytes) -> bool:
        handler.answer(200, write_tar(server.folder / "t.tar", members(20, prefix="x")).read_bytes())
        return True

    server.faults += [None, hang_up(80_000), another]
    with pytest.raises(UserError, match="changed while in use"):
        ShardSet(server.address("s.tar"), settings=settings(tmp_path / "c"))


@pytest.mark.parametrize("change", ["etag", "size", "shorter"])
def test_a_shard_that_changes_while_in_use(server, tmp_path, change):
    shards = ShardSet(server.address("s.tar"), settings=settings(tmp_path))
    empty(tmp_path / "cache")
    if change == "etag":
        server.etag = '"two"'
    else:
        server.etag = '"one"'
        write_tar(server.folder / "s.tar", members(30 if change == "size" else 1, size=100))
    with pytest.raises(UserError, match="changed while in use"):
        for number in range(20):
            shards.read(number)
    if change == "etag":
        assert len(ShardSet(server.address("s.tar"), settings=settings(tmp_path))) == 20


def test_a_sidecar_saves_the_scan_and_is_checked(server, local, tmp_path):
    write_sidecar(server.folder / "s.tar")
    shards = ShardSet(server.address("s.tar"), settings=settings(tmp_path))
    assert len(server.asked) == 4  # the shard's facts, the sidecar, its last header, what follows
    assert list(shards) == local
    assert not shards.notes
    names = [(f"1{name[1:]}", data) for name, data in members(20)]
    write_tar(server.folder / "s.tar", names)  # the same sizes everywhere
    server.etag = '"two"'
    shards = ShardSet(server.address("s.tar"), settings=settings(tmp_path))
    assert [key for key, _ in shards] == [f"1{key[1:]}" for key, _ in local]
    assert any("does not fit" in problem.reason for problem, _ in shards.notes)
    (server.folder / "s.tar.index.npz").write_bytes(b"no index")
    assert len(ShardSet(server.address("s.tar"), settings=settings(tmp_path / "b"))) == 20
    assert any("not one of this version" in problem.reason for problem, _ in shards.notes)


def test_threads_and_forked_processes_share_the_cache(server, local, tmp_path):
    shards = ShardSet(server.address("s.tar"), settings=settings(tmp_path))
    empty(tmp_path / "cache")
    server.asked.clear()
    shards.read(0)  # a connection and a block that children inherit
    server.clients.clear()

    def all_of(numbers: range) -> bool:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(shards.read, numbers)) == [local[number] for number in numbers]

    def child(queue: Any, numbers: range) -> None:
        queue.put(all_of(numbers))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    orders = [range(20), range(19, -1, -1), range(0, 20, 3)]
    children = [context.Process(target=child, args=(queue, order)) for order in orders]
    for one in children:
        one.start()
    assert all_of(range(5, 20)) and [queue.get(timeout=30) for _ in children] == [True] * 3
    for one in children:
        one.join()
    blocks = [span for _, span in server.asked]
    assert len(blocks) == len(set(blocks)) == 6  # the seventh holds no sample
    empty(tmp_path / "cache")
    shards.read(0)
    mine = set(server.clients)
    alone = context.Process(target=shards.read, args=(19,))
    alone.start()
    alone.join()
    assert not alone.exitcode and server.clients > mine  # it did not speak through its parent's connection
