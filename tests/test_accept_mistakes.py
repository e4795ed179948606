"""Mistakes that must cost nothing: they are told before anything is loaded, cleared or written."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from vlm_adapt import folders
from vlm_adapt.config.load import load_run, validate
from vlm_adapt.data.problems import Account, Problem
from vlm_adapt.errors import UserError
from vlm_adapt.models.check import check_run
from vlm_adapt.quiet import quiet
from vlm_adapt.train import lock as lock_room
from vlm_adapt.train import run as run_room
from vlm_adapt.train.run import train


def run_of(parts: Path, output: Path, **changes: Any) -> Any:
    return validate(tiny.run_tree(parts, **changes) | {"output_dir": str(output)}, "test")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("adapt__1__r", -1, "r is a whole number from 1, not -1"),
        ("adapt__1__r", "eight", "r is a whole number from 1, not 'eight'"),
        ("train__deepspeed", "zero4", "zero4.*did you mean 'zero"),
    ],
)
def test_settings_are_checked_before_any_part_is_loaded(parts, tmp_path, monkeypatch, key, value, match):
    def built(*_: Any) -> None:
        raise AssertionError("a part was loaded")

    monkeypatch.setattr(run_room, "build", built)
    tree = tiny.run_tree(parts)
    tree["output_dir"] = str(tmp_path / "out")
    if key.startswith("adapt"):
        tree["adapt"][1]["r"] = value
    else:
        tree["train"]["deepspeed"] = value
    with pytest.raises(UserError, match=match):
        train(validate(tree, "test"))
    assert not (tmp_path / "out").exists()


def test_a_stage_to_come_is_checked_before_the_first(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(run_room, "build", lambda *_: pytest.fail("a part was loaded"))
    second = {"name": "tune", "adapt": [{"method": "lora", "where": "language", "r": 0}]}
    run = run_of(parts, tmp_path / "out", stages=[{"name": "align"}, second])
    with pytest.raises(UserError, match="whole number from 1, not 0"):
        train(run)


def test_fresh_clears_nothing_when_the_new_run_cannot_be_built(parts, tmp_path):
    output = tmp_path / "out"
    assert train(run_of(parts, output, train__max_steps=1)) == 0
    before = sorted(path.relative_to(output) for path in output.rglob("*"))
    tree = tiny.run_tree(parts) | {"output_dir": str(output)}
    tree["model"]["vision"]["layers"] = [9]
    with pytest.raises(UserError, match="layer 9 does not exist"):
        train(validate(tree, "test"), fresh=True)
    assert sorted(path.relative_to(output) for path in output.rglob("*")) == before
    with pytest.raises(UserError, match="layer 9 does not exist"):
        train(validate(tree | {"output_dir": str(tmp_path / "new")}, "test"))
    assert not (tmp_path / "new").exists()


def test_an_archive_that_is_none_is_named(parts, tmp_path):
    (tmp_path / "x.tar").write_text("no archive " * 200, encoding="utf-8")
    run = run_of(parts, tmp_path / "out", data__train=[{"shards": str(tmp_path / "x.tar")}])
    with pytest.raises(UserError, match=r"data\.train: .*x\.tar: .*not a tar archive"):
        train(run)


def test_scoring_wants_no_training_shards(parts, tmp_path):
    gone = [{"shards": str(tmp_path / "gone.tar")}]
    run = run_of(parts, tmp_path / "out", data__train=gone)
    check_run(run, train=False)
    with pytest.raises(UserError, match="gone.tar"):
        check_run(run)
    with pytest.raises(UserError, match="gone.tar"):
        check_run(run_of(parts, tmp_path / "out", data__evaluate=gone), train=False)


def test_refused_samples_are_named():
    account = Account()
    account.refuse("s1", "not an image")
    account.lose_all([Problem("a.tar", "", "damaged at byte 512: cut off")])
    assert account.named() == (
        "1 x not an image: s1; 1 x damaged at byte N: cut off: a.tar (damaged at byte 512: cut off)"
    )


def test_a_silent_hub_is_told_once(caplog):
    tries = logging.getLogger("huggingface_hub.utils._http")
    level = tries.level
    with quiet():
        assert not tries.isEnabledFor(logging.WARNING)
    assert tries.level == level


def test_an_output_folder_is_one_runs_at_a_time(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.3)
    output = tmp_path / "out"
    output.mkdir()
    other = lock_room.OutputLock(output)
    other.take()
    with pytest.raises(UserError, match="another process is training into"):
        train(run_of(parts, output, train__max_steps=1))
    assert not list(output.iterdir())
    other.release()
    assert train(run_of(parts, output, train__max_steps=1)) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a signal that Linux alone has")
def test_workers_die_with_their_launcher(tmp_path):
    """A launcher that is killed hard leaves nobody training behind."""
    worker = "import os, time; from vlm_adapt import dist; dist.follow_launcher(); " + (
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    launcher = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}], start_new_session=True)"
    )
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", launcher], env=environment)
    until = time.monotonic() + 30
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    while alive(child):
        assert time.monotonic() < until, "the worker lives on"
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether it runs; a zombie, whom nobody has buried yet, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_value_that_ends_with_a_colon_is_a_word(parts, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.run_tree(parts)), encoding="utf-8")
    run = load_run(path, ["model.vision.weights=random:", "model.connector={name: linear}"])
    assert run.model.vision.weights == "random:" and run.model.connector.name == "linear"
