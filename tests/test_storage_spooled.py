"""Compressed shards and commands: unpacked once, the same bytes again, and one sentence when they fail."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shard_server import members, reset, serving, write_tar

from vlm_adapt.data.shards import ShardSet, expand
from vlm_adapt.data.storage import Settings, notes
from vlm_adapt.data.storage.unpack import unpacked
from vlm_adapt.errors import UserError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    notes.forget()
    return write_tar(tmp_path / "s.tar", members(30, size=400))


def settings(tmp_path: Path, **more: Any) -> Settings:
    return Settings(**{"cache": str(tmp_path / "cache"), "retry_seconds": 5.0, "stall_seconds": 0.5, **more})


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "entries").rglob("*/*"))


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_shards(tar, tmp_path, ending):
    """Here and at an address; two streams joined are one."""
    data = tar.read_bytes()
    packed = tmp_path / "packed" / f"s{ending}"
    packed.parent.mkdir()
    pack = PACKERS[ending]
    packed.write_bytes(pack(data[:10_000]) + pack(data[10_000:]))
    local = list(ShardSet(tar))
    shards = ShardSet(packed.parent, settings=settings(tmp_path))
    assert list(shards) == local and not shards.problems
    before = {path: path.stat().st_mtime_ns for path in entries(tmp_path)}
    assert list(ShardSet(packed, settings=settings(tmp_path))) == local
    assert before == {path: path.stat().st_mtime_ns for path in entries(tmp_path)}
    with serving(packed.parent) as server:
        server.faults += [None, reset(3000)]
        assert list(ShardSet(server.address(packed.name), settings=settings(tmp_path))) == local


def test_a_compressed_shard_with_a_plain_name(tar, tmp_path):
    local = list(ShardSet(tar))
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    assert list(ShardSet(tar, settings=settings(tmp_path))) == local


def test_zstd_is_named(tmp_path):
    (tmp_path / "s.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(UserError, match="zstd -dc"):
        ShardSet(tmp_path / "s.tar.zst", settings=settings(tmp_path))


def test_a_shard_twice_in_a_folder(tar, tmp_path):
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(UserError, match="twice, plain and compressed"):
        expand(tmp_path)


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_cut_and_damaged_compressed_shards_lose_nothing_silently(tar, tmp_path, ending):
    local = dict(ShardSet(tar))
    whole = PACKERS[ending](tar.read_bytes())
    path = tmp_path / f"d{ending}"
    for place in [0, 5, 20, *range(100, len(whole), len(whole) // 7), len(whole) - 4, len(whole) - 1]:
        path.write_bytes(whole[:place])
        assert place == 0 or ShardSet(path, settings=settings(tmp_path)).problems, place
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            shards = ShardSet(path, settings=settings(tmp_path))
            found = dict(shards)
            assert shards.problems or found == local
            # A flipped byte may unpack to other bytes before the checksum tells: then that is told.
            if any(local[key] != value for key, value in found.items()):
                assert any("file is damaged" in problem.reason for problem in shards.problems)


def test_what_unpacks_to_gigabytes_does_so_in_pieces():
    """A megabyte at a time, whatever comes in."""
    bomb = gzip.compress(bytes(300 << 20), 1)
    sizes = [len(piece) for piece in unpacked("bomb.tar.gz", [bomb], {})]
    assert sum(sizes) == 300 << 20 and max(sizes) <= 1 << 20


def test_an_evicted_shard_is_made_again_and_must_be_the_same(tar, tmp_path):
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    local = list(ShardSet(tar))
    for name in (f"pipe:cat {tmp_path}/s.tar.gz", str(tmp_path / "s.tar.gz")):
        shards = ShardSet(name, settings=settings(tmp_path))
        for path in entries(tmp_path):
            path.unlink()
        assert list(shards) == local
    shards = ShardSet(f"pipe:cat {tmp_path}/s.tar.gz", settings=settings(tmp_path / "b"))
    for path in entries(tmp_path / "b"):
        if path.stat().st_size > 20_000:  # the shard, not its index
            path.unlink()
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(write_tar(tar, members(31, 400)).read_bytes()))
    for _ in range(64):  # as in another process: this one may hold the shard open
        ShardSet(write_tar(tmp_path / f"{_}.tar", members(1)), settings=settings(tmp_path)).read(0)
    with pytest.raises(UserError, match="changed while in use: start again"):
        shards.read(0)
    assert len(ShardSet(f"pipe:cat {tmp_path}/s.tar.gz", settings=settings(tmp_path / "b"))) == 31


def test_commands(tar, tmp_path):
    local = list(ShardSet(tar))
    write_tar(tmp_path / "t-00.tar", members(3, prefix="a"))
    write_tar(tmp_path / "t-01.tar", members(4, prefix="b"))
    log = tmp_path / "log"
    shards = ShardSet(f"pipe:echo ran >> {log}; cat {tar}", settings=settings(tmp_path))
    assert list(shards) == local
    assert list(ShardSet(f"pipe:echo ran >> {log}; cat {tar}", settings=settings(tmp_path))) == local
    assert log.read_text() == "ran\n"  # once, for all
    two = ShardSet(f"pipe:cat {tmp_path}/t-{{00..01}}.tar::{tar}", settings=settings(tmp_path))
    assert two.counts == (3, 4, 30)
    assert len(ShardSet(f"pipe:cat {tar} | (head -c 30000; cat >/dev/null)", settings=settings(tmp_path)))


def test_names_of_commands():
    assert expand("pipe:ssh host cat a::b/{0..1}.tar::pipe:x") == [
        "pipe:ssh host cat a::b/0.tar",
        "pipe:ssh host cat a::b/1.tar",
        "pipe:x",
    ]
    assert expand("pipe:a::http://h/b.tar") == ["pipe:a", "http://h/b.tar"]
    kept = "pipe:awk '{print $1,$2}' ${x,y} {a, b}"
    assert expand(kept) == [kept]
    with pytest.raises(UserError, match="without a command"):
        expand("pipe: ")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("echo one >&2; echo 'no such key' >&2; exit 3", "exit code 3: no such key"),
        ("cat {tar}; exit 1", "exit code 1"),
        ("(cat {tar}; exit 2) | cat", "exit code 2"),
        ("no-such-command-here", "exit code 127"),
        ("true", "wrote nothing"),
        ("echo waiting >&2; head -c 9000 {tar}; sleep 60", "wrote nothing for .*: waiting"),
        ("cat {tar}; exec 1>&-; sleep 60", "did not end"),
        ("kill -9 $$", "signal 9|exit code 137"),
    ],
)
def test_commands_that_fail(tar, tmp_path, command, words):
    started = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        ShardSet(f"pipe:{command.format(tar=tar)}", settings=settings(tmp_path, pipe_silence=0.4))
    assert "the command" in str(caught.value) and time.monotonic() - started < 10
    assert not entries(tmp_path)


def test_no_room_to_unpack(tar, tmp_path, monkeypatch):
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    local = list(ShardSet(tar))
    small = ShardSet(tmp_path / "s.tar.gz", settings=settings(tmp_path, limit_bytes=10_000))
    assert list(small) == local  # in a file without a name
    assert any("cannot be written" in problem.reason for problem, _ in small.notes)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "wb"))
    with pytest.raises(UserError, match="no room for it") as caught:
        ShardSet(tmp_path / "s.tar.gz", settings=settings(tmp_path / "c", limit_bytes=10_000))
    assert "No space left" in str(caught.value)
    assert os.listdir(tmp_path / "c" / "cache")
