"""Who this process is among many. Knows ranks, devices and totals; knows nothing about models.

Imports torch only when a process group is wanted, so that `vlm-adapt --help` does without it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any


def rank() -> int:
    """This process's number over all nodes, from the launcher's environment; 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are over all nodes; 1 when alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process speaks for the run."""
    return rank() == 0


def device() -> Any:
    """The torch device of this process: its own GPU, or the CPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def follow_launcher() -> None:
    """End when the launcher is killed: torchrun starts its workers in sessions of their own, and after
    a `kill -9` of it they would train on, unseen, beside the run that is started next. Linux only."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def start() -> None:
    """Join (or, alone, make) the process group. Safe to call twice.

    The time-out turns a rank that waits for ever into an error (VLM_ADAPT_TIMEOUT_MINUTES, 30 by
    default); gloo serves CPUs, nccl GPUs.
    """
    import torch
    import torch.distributed as distributed

    if distributed.is_initialized():
        return
    if "RANK" not in os.environ or os.environ.get("MASTER_PORT") == "0":  # alone, or started by one alone
        # DeepSpeed reads the environment even when it is handed a process group.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = "0"
        store = distributed.HashStore()
        distributed.init_process_group(_backend(torch), store=store, rank=0, world_size=1)
        return
    minutes = float(os.environ.get("VLM_ADAPT_TIMEOUT_MINUTES", "30"))
    distributed.init_process_group(_backend(torch), timeout=timedelta(minutes=minutes))


def _backend(torch: Any) -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def stop() -> None:
    """Leave the process group, if there is one."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def total(values: Sequence[float]) -> list[float]:
    """Sum each number over all ranks (float64, so counts stay exact)."""
    import torch
    import torch.distributed as distributed

    if world_size() == 1 or not distributed.is_initialized():
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    distributed.all_reduce(tensor)
    return tensor.tolist()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank (plain Python values)."""
    import torch.distributed as distributed

    if world_size() == 1 or not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    import torch.distributed as distributed

    if world_size() > 1 and distributed.is_initialized():
        distributed.barrier()
