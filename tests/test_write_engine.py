"""The engine of conversions: balanced, bounded, the same for any number of writers, and never half."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset
import write_rows

from vlm_adapt import folders
from vlm_adapt.data.convert import CONVERTERS
from vlm_adapt.data.convert import hold as holding
from vlm_adapt.data.convert.run import write_dataset
from vlm_adapt.data.write import SUMMARY, UNFINISHED, Shard
from vlm_adapt.errors import UserError


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setitem(CONVERTERS.table, "rows", "write_rows:convert")


def write(folder, workers=0, **more):
    names = ("sizes", "delay", "special", "start", "keys")
    options = {name: more.pop(name) for name in names if name in more}
    return write_dataset("rows", folder, options, workers=workers, progress=False, **more)


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def keys(folder: Path) -> list[str]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]


def left_over(folder: Path) -> list[str]:
    """What should not be there when nothing runs."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_no_shard_is_a_tiny_rest(tmp_path):
    done = write(tmp_path / "o", sizes="10x101", max_count=50)
    assert [shard["samples"] for shard in done["shards"]] == [33, 34, 34]
    assert list(tars(tmp_path / "o")) == ["000000.tar", "000001.tar", "000002.tar"]
    assert keys(tmp_path / "o") == [f"{number:05d}" for number in range(101)]
    assert not left_over(tmp_path / "o")


def test_bounded_in_bytes(tmp_path):
    done = write(tmp_path / "o", sizes="5000x100", max_bytes=100_000)
    counts = [shard["samples"] for shard in done["shards"]]
    assert max(counts) - min(counts) <= 1 and not any("_" in shard["name"] for shard in done["shards"])
    assert all(shard["bytes"] <= 100_000 + 10_240 for shard in done["shards"])  # the end of a tar is padded


def test_a_shard_that_grows_too_large_goes_on_in_another(tmp_path):
    """All large samples come last, so a plan by their mean cannot fit them."""
    done = write(tmp_path / "o", sizes="100x2000,20000x30", max_bytes=300_000)
    names = [shard["name"] for shard in done["shards"]]
    assert any("_001.tar" in name for name in names) and names == sorted(names)
    assert all(shard["bytes"] <= 300_000 + 10_240 for shard in done["shards"])
    assert keys(tmp_path / "o") == [f"{number:05d}" for number in range(2030)]


def test_the_number_of_writers_does_not_show(tmp_path):
    what = {"sizes": "300x200,9000x20", "max_count": 80, "max_bytes": 150_000, "shuffle": True, "seed": 3}
    what |= {"special": "5=bad,77=bad,203=bad", "keys": "9=00004"}
    first = write(tmp_path / "0", 0, **what)
    assert first["samples"] == 216 and len(first["shards"]) > 4
    assert first["refused"] == {"marked as bad": 3, "another entry before it has this key": 1}
    assert first["examples"]["another entry before it has this key"] == ["00004"]
    assert write(tmp_path / "3", 3, **what) == first
    assert tars(tmp_path / "3") == tars(tmp_path / "0") and not left_over(tmp_path / "3")


def test_shuffled_by_a_seed(tmp_path):
    orders = {}
    for name, more in {"plain": {}, "a": {"seed": 1}, "again": {"seed": 1}, "b": {"seed": 2}}.items():
        write(tmp_path / name, sizes="10x60", max_count=20, shuffle="seed" in more, **more)
        orders[name] = keys(tmp_path / name)
    assert orders["a"] == orders["again"] != orders["b"] and orders["a"] != orders["plain"]
    assert sorted(orders["a"]) == sorted(orders["b"]) == orders["plain"]
    assert sorted(orders["a"][:20]) != orders["plain"][:20]  # shards are mixed, not only shuffled within


def test_a_stopped_conversion_goes_on(tmp_path, monkeypatch):
    what = {"sizes": "200x100", "special": "3=bad,95=bad", "max_count": 10}
    whole = write(tmp_path / "whole", **what)
    assert whole["refused"] == {"marked as bad": 2} and len(whole["examples"]["marked as bad"]) == 2
    finish, finished = Shard.finish, []

    def interrupted(self):
        finished.append(self.path.name)
        if len(finished) == 5:
            raise KeyboardInterrupt
        return finish(self)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Shard, "finish", interrupted)
        write(out, **what)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(before) == 4 and (out / UNFINISHED).exists() and not list(out.glob(".*.part"))
    (out / "000002.tar").write_bytes(b"somebody cut it off")
    assert write(out, **what) == whole  # the refused samples of the kept shards are counted, too
    assert tars(out) == tars(tmp_path / "whole") and not left_over(out)
    kept = {name for name, time in before.items() if (out / name).stat().st_mtime_ns == time}
    assert kept == {"000000.tar", "000001.tar", "000003.tar"}


def test_what_was_stopped_is_not_mixed_with_something_else(tmp_path, monkeypatch):
    out, finish = tmp_path / "out", Shard.finish
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Shard, "finish", lambda self: finish(self) if "003" not in self.path.name else stop())
        write(out, sizes="200x50", max_count=10)
    with pytest.raises(UserError, match="already holds 3 shard"):
        write(out, sizes="300x50", max_count=10)
    write(out, sizes="300x50", max_count=10, overwrite=True)
    write(tmp_path / "clean", sizes="300x50", max_count=10)
    assert tars(out) == tars(tmp_path / "clean")


def stop():
    raise KeyboardInterrupt


def started(out: Path, workers: int, options: dict) -> subprocess.Popen:
    """A conversion in a process of its own, once its first shard is there."""
    code = (
        "import sys, json, write_rows; from vlm_adapt.data.convert.run import write_dataset; "
        "write_rows.register(); out, options, workers = sys.argv[1:]; write_dataset('rows', out, "
        "json.loads(options), max_count=10, workers=int(workers), progress=False)"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out), json.dumps(options), str(workers)],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore the interrupt, and their children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while len(list(out.glob(".*.done.json"))) < 2:
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(0.02)
    return process


def writers_of(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again(tmp_path, number):
    options = {"sizes": "2000x80", "delay": "0.02", "special": "1=bad"}
    out = tmp_path / "out"
    process = started(out, 2, options)
    writers = writers_of(process.pid)
    process.send_signal(number)
    assert process.wait(10) != 0
    process.stderr.close()
    whole = write(tmp_path / "whole", max_count=10, **options)
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in writers):
        assert time.monotonic() < until, "a writer outlives its conversion"
        time.sleep(0.02)
    before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert 2 <= len(before) < 8 and not list(out.glob(".*.tar.part"))
    assert {name: tars(out)[name] for name in before} == {
        name: tars(tmp_path / "whole")[name] for name in before
    }
    assert write(out, max_count=10, **options) == whole
    assert tars(out) == tars(tmp_path / "whole") and not left_over(out)
    recorded = sum(out.joinpath(name).stat().st_ino == inode for name, inode in before.items())
    assert recorded >= 2  # those with a record were kept


def test_a_writer_that_dies_ends_the_conversion(tmp_path):
    options = {"sizes": "2000x400", "max_count": 50}
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"signal 9 \(SIGKILL\) while it wrote shard 000003.*start again"):
        # 180 is none of the few entries that are looked at beforehand, in the main process
        write(out, 2, special="180=die", delay="0.001", **options)
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in writers_of(os.getpid())]
    assert not [command for command in commands if b"serve" in command]  # the other one has ended as well
    assert not list(out.glob(".*.part")) and (out / UNFINISHED).exists()
    assert len(list(out.glob("*.tar"))) >= 2 and not (out / "000003.tar").exists()
    write(out, overwrite=True, **options)


def test_a_bug_of_a_converter_keeps_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="in row(.|\n)*ZeroDivisionError: a bug of the converter"):
        write(tmp_path / "o", 2, sizes="10x500", special="320=bug", max_count=100)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_in_a_writer(tmp_path, workers):
    """A limit on the size of files stands for the disk."""
    what = {"sizes": "100x300,50000x20", "max_count": 40}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
        with pytest.raises(UserError, match="no space left to write .*tar"):
            write(tmp_path / "o", workers, **what)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "o").glob("*.tar")) and not list((tmp_path / "o").glob(".*.part"))
    assert write(tmp_path / "o", **what)["samples"] == 320


def test_no_usable_sample_costs_nothing(tmp_path):
    out = tmp_path / "o"
    write(out, sizes="10x5")
    before = tars(out)
    with pytest.raises(UserError, match=r"no usable sample \(3 x marked as bad: 00000 \(0\), 00001 \(1\)"):
        write(out, sizes="10x3", special="0=bad,1=bad,2=bad", overwrite=True)
    assert tars(out) == before and (out / SUMMARY).exists() and not left_over(out)
    with pytest.raises(UserError, match="no usable sample"):
        write(tmp_path / "new", sizes="10x1", special="0=bad")
    assert not (tmp_path / "new").exists()


def test_one_conversion_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    with holding.hold(tmp_path), pytest.raises(UserError, match="another process is writing shards into"):
        write(tmp_path, sizes="10x3")
    assert write(tmp_path, sizes="10x3")["samples"] == 3


def test_skip_and_limit_count_entries(tmp_path):
    done = write(tmp_path / "o", sizes="10x20", skip=3, limit=4, special="4=bad")
    assert keys(tmp_path / "o") == ["00003", "00005", "00006"] and done["refused"] == {"marked as bad": 1}


def test_registered():
    write_rows.register()
    assert callable(CONVERTERS.load("rows"))
