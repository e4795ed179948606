"""What goes wrong in a run: full disks, bad samples, exploding losses. One sentence each."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import tiny
from forks import write
from tiny import run_of, sentence

from vlm_adapt.errors import UserError
from vlm_adapt.models.restore import restore
from vlm_adapt.models.vlm import VisionLanguageModel
from vlm_adapt.train import run as run_room
from vlm_adapt.train.journal import Journal, read_journal
from vlm_adapt.train.run import train

# Full disks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["optimizer.safetensors", "model.safetensors", "state.json"])
def test_a_full_disk_leaves_earlier_checkpoints(parts, tmp_path, monkeypatch, file):
    """Whatever file it is that no longer fits."""
    write_tensors, write_text = safetensors.torch.save_file, Path.write_text

    def full(path: Path) -> None:
        if Path(path).name == file and ".checkpoint-3" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_file(tensors, path, *more):
        full(path)
        return write_tensors(tensors, path, *more)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **b: (full(self), write_text(self, *a, **b))[1])
    run, output = run_of(parts, tmp_path / "out"), tmp_path / "out"
    with pytest.raises(UserError, match="checkpoint-3' cannot be written .No space left on device") as caught:
        train(run)
    assert "earlier checkpoints are as they were" in sentence(caught)
    assert (output / "latest").read_text() == "checkpoint-2"
    assert {path.name for path in output.glob("*checkpoint*")} == {"checkpoint-1", "checkpoint-2"}
    restore(output)
    monkeypatch.undo()
    assert train(run) == 0 and (output / "latest").read_text() == "checkpoint-4"
    assert [line["step"] for line in read_journal(output) if "event" not in line] == [1, 2, 3, 4]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 300 kB, where one may mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_really_full_disk(parts, small_disk):
    run, output = run_of(parts, small_disk / "out", train__save_total_limit=9), small_disk / "out"
    with pytest.raises(UserError, match="No space left|os error 28") as caught:
        train(run)
    assert "start again to go on" in sentence(caught)
    kept = sorted(path.name for path in output.glob("*checkpoint*"))
    assert kept and kept[-1] == (output / "latest").read_text() == f"checkpoint-{len(kept)}"
    restore(output)


def test_two_ranks_end_on_a_full_disk(parts, server, tmp_path):
    """The main rank may not write large files any more; neither rank waits for ever."""
    tree = tiny.run_tree(parts, str(tmp_path / "out"), train__save_steps=2, train__deepspeed="zero2")
    tree["train"]["max_steps"] = 200
    started = server.start(["train", write(tree)], ranks=2)
    latest = tmp_path / "out" / "latest"
    started.until(latest.is_file)
    for pid in started.pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert started.wait(60) == [2, 2], started.text()
    assert "cannot be written" in started.text() and "Traceback" not in started.text()
    output = tmp_path / "out"
    assert not list(output.glob(".checkpoint-*"))
    restore(output / latest.read_text())


def test_no_room_for_the_journal(parts, tmp_path, monkeypatch):
    """/dev/full is a disk without a free byte."""
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path, main=True)
    journal.open()
    with pytest.raises(UserError, match="journal.*No space left") as caught:
        journal.step({"step": 1})
    sentence(caught)
    journal.close()  # says nothing more

    def rewind(folder: Path, step: int) -> int:
        (folder / "journal.jsonl").symlink_to("/dev/full")
        return 0

    monkeypatch.setattr(run_room, "rewind", rewind)
    with pytest.raises(UserError, match="journal.*No space left"):
        train(run_of(parts, tmp_path / "out"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be"):
        train(run_of(parts, tmp_path / "file"))


# Bad samples -----------------------------------------------------------------------------------------


def bad_samples() -> list[tuple[str, dict[str, bytes]]]:
    """One of each kind of trouble."""
    good = json.dumps({"question": "what?", "answer": "red"}).encode()
    size = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    header = b"\x89PNG\r\n\x1a\n\0\0\0\r" + size + zlib.crc32(size).to_bytes(4, "big")
    header += b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    two = [{"role": "user", "content": "<image><image> what?"}, {"role": "assistant", "content": "red"}]
    return [
        ("text", {"json": good, "jpg": b"this is no picture"}),
        ("torn", {"json": good, "jpg": tiny.image(1, 64, 64, "JPEG")[:500]}),
        ("huge", {"json": good, "png": header}),
        ("two", {"json": json.dumps({"messages": two}).encode(), "png": tiny.image(2)}),
        ("empty", {"json": json.dumps({"question": "what?", "answer": " "}).encode(), "png": tiny.image(3)}),
        ("broken", {"json": b"{", "png": tiny.image(4)}),
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    """Good shards, one of bad samples, and one that is cut off."""
    folder = tmp_path_factory.mktemp("shards")
    tiny.questions_shard(folder / "good.tar", 20)
    cut = tiny.questions_shard(folder / "cut.tar", 4, first=50)
    cut.write_bytes(cut.read_bytes()[: 512 * 13 + 100])
    tiny.shard(folder / "bad.tar", bad_samples())
    return {name: str(folder / f"{name}.tar") for name in ("good", "cut", "bad")}


def test_bad_samples_are_counted_and_left_out(parts, tmp_path, shards, capsys):
    data = {"data__train": [shards["good"], shards["bad"], shards["cut"]], "data__max_refused": 0.5}
    output = tmp_path / "out"
    run = run_of(parts, output, train__max_steps=0, train__num_train_epochs=2, train__save_steps=3, **data)
    assert train(run) == 0
    account = next(line["account"] for line in read_journal(output) if line.get("event") == "finish")
    cut_off = [reason for reason in account["refused"] if "damaged" in reason and "shard" in reason]
    per_epoch = {reason: count for reason, count in account["refused"].items() if count == 2}
    assert len(per_epoch) == 6 and cut_off, account["refused"]
    shown = json.dumps(account["examples"])
    assert all(key in shown for key, _ in bad_samples()) and "50000" in shown.replace(",", "")
    used = [line["samples"] for line in read_journal(output) if "event" not in line][-1]
    assert account["used"] == used == account["read"] - 12
    assert (
        account
        == json.loads((output / (output / "latest").read_text() / "state.json").read_text())["account"]
    )
    assert "refused" in capsys.readouterr().err


def test_too_many_bad_samples_stop_both_ranks(parts, server, tmp_path, shards):
    """The bad ones may all have come to one rank: they decide together."""
    tree = tiny.run_tree(parts, str(tmp_path / "out"), data__train=[shards["good"], shards["bad"]])
    tree["train"] |= {"max_steps": 100, "deepspeed": "zero1"}
    started = server.start(["train", write(tree)], ranks=2)
    assert started.wait(60) == [2, 2], started.text()
    said = r"vlm-adapt: \d+ of \d+ samples \(data.max_refused 0.1\) were refused: \d+ x .*refused.jsonl"
    assert re.search(said, started.text())


def test_nothing_usable_is_no_success(parts, tmp_path, shards):
    """Fewer samples than are judged by their share."""
    with pytest.raises(
        UserError, match=r"6 of 6 samples were refused, so nothing was learned: 1 x .*refused.jsonl"
    ) as caught:
        train(
            run_of(
                parts,
                tmp_path / "out",
                train__max_steps=2,
                data__train=[shards["bad"]],
                data__max_refused=1.0,
            )
        )
    sentence(caught)
    with pytest.raises(UserError, match="nothing to train on: give data.train shards"):
        train(run_of(parts, tmp_path / "none", data__train=[]))


# Numbers ---------------------------------------------------------------------------------------------


def test_a_loss_that_explodes_stops(parts, tmp_path):
    adapt = [{"method": "full", "where": "language", "learning_rate": 1e30}]
    with pytest.raises(UserError, match=r"the (loss|gradient norm) became \S+ at step 2") as caught:
        train(run_of(parts, tmp_path / "out", adapt=adapt, train__max_grad_norm=0, train__warmup_steps=0))
    assert "lower the learning rate" in sentence(caught)


def test_a_gradient_that_is_no_number_is_not_saved(parts, tmp_path, monkeypatch):
    forward, calls = VisionLanguageModel.forward, []

    def poisoned(self, batch):
        loss, losses = forward(self, batch)
        calls.append(1)
        if len(calls) == 2:
            weight = next(p for p in self.connector.parameters() if p.requires_grad)
            loss = loss + (weight - weight.detach()).abs().sum().sqrt()  # 0, with a gradient of 0 / 0
        return loss, losses

    monkeypatch.setattr(VisionLanguageModel, "forward", poisoned)
    with pytest.raises(UserError, match="the gradient norm became nan at step 2"):
        train(run_of(parts, tmp_path / "out"))
    assert (tmp_path / "out" / "latest").read_text() == "checkpoint-1"
