"""Worker processes that die: named, replaced once, and never a batch lost or out of order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
from tiny import sentence
from torch.utils.data import Dataset

from vlm_adapt.data.workers import Ahead, Workers, tell_what_is_read
from vlm_adapt.errors import UserError


class Keys:
    def place(self, number):
        return f"'key{number}' of shard.tar"


class Jobs(Dataset):
    """Job n gives a tensor of n; some jobs kill their worker, the first time or every time."""

    def __init__(self, folder, deadly=(), always=()):
        self.folder, self.deadly, self.always = folder, deadly, always

    def __getitem__(self, job):
        tell_what_is_read(Keys(), job)
        mark = self.folder / str(job)
        if job in self.always or (job in self.deadly and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3,), job)


def made(workers, jobs):
    with Ahead(iter(jobs), 4 * workers.count) as ahead:
        return [int(tensor[0]) for tensor in workers.run(ahead)]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_batches_come_in_order(tmp_path, count):
    assert made(Workers(Jobs(tmp_path), count), range(25)) == list(range(25))


def test_a_killed_worker_is_named_and_replaced(tmp_path, capfd):
    started = time.monotonic()
    assert made(Workers(Jobs(tmp_path, deadly={7}), 2), range(20)) == list(range(20))
    said = capfd.readouterr().err
    assert "data worker 1" in said and "killed by SIGKILL" in said and "'key7' of shard.tar" in said
    assert time.monotonic() - started < 45  # the loader looks for the dead every 5 s


def test_a_sample_that_kills_again_ends_the_run(tmp_path):
    with pytest.raises(UserError) as caught:
        made(Workers(Jobs(tmp_path, always={4}), 2), range(20))
    assert "'key4' of shard.tar" in sentence(caught) and "second time" in sentence(caught)


def test_an_error_in_a_worker_is_raised_as_it_is(tmp_path):
    class Broken(Jobs):
        def __getitem__(self, job):
            if job == 3:
                raise UserError("shard s.tar was changed while in use")
            return super().__getitem__(job)

    for count in (0, 2):
        with pytest.raises(UserError) as caught:
            made(Workers(Broken(tmp_path), count), range(6))
        assert sentence(caught) == "shard s.tar was changed while in use"
        assert not [child for child in multiprocessing.active_children() if child.daemon]


def test_ahead_hands_on_errors_and_ends_once():
    def items():
        yield 1
        raise UserError("no more")

    for size in (0, 3):
        with Ahead(items(), size) as ahead:
            assert next(ahead) == 1
            with pytest.raises(UserError, match="no more"):
                next(ahead)
        with Ahead(iter([1]), size) as ahead:
            assert list(ahead) == [1] and next(ahead, None) is None and next(ahead, None) is None
