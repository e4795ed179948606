"""One of two processes with a batch norm that they share. Imports little: it is started anew each time."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vlm_adapt.heads.batch_norm import SharedBatchNorm


def maps_of_all() -> Tensor:
    """Three images' maps, the same in every process."""
    return 3 + torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def run(rank: int, port: int, folder: str, shares: list[list[int]]) -> None:
    """This rank's images through a norm and a loss, for each way to share them; what came of it to a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for number, share in enumerate(shares):
        first = sum(share[:rank])
        maps_NChw = maps_of_all()[first : first + share[rank]]
        norm = SharedBatchNorm(3)
        norm.counts = bool(share[rank])
        if not share[rank]:
            maps_NChw = torch.full((1, 3, 4, 5), 7.0)
        maps_NChw.requires_grad_()
        out_NChw = norm(maps_NChw)
        (out_NChw.pow(3).sum() * float(norm.counts)).backward()
        assert norm.weight.grad is not None
        torch.distributed.all_reduce(norm.weight.grad)
        found = [out_NChw.detach(), maps_NChw.grad, norm.weight.grad, norm.running_mean, norm.running_var]
        torch.save(found, f"{folder}/{number}-{rank}")
    torch.distributed.destroy_process_group()
