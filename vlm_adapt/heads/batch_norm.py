"""Batch normalisation over the images of all ranks, so that any number of processes trains one model.

LSeg trains with it (its residual units; Ioffe and Szegedy 2015, arXiv 1502.03167). Each rank's own
statistics would make every rank another model, with running statistics of its own to be evaluated by. Knows
ranks; knows nothing about heads.

    N images a rank, C channels, h x w pixels
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from vlm_adapt import dist


class _Total(torch.autograd.Function):
    """The sum over ranks; backward, the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        distributed.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad)
        return grad


class SharedBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, of which three things differ.

    While it trains, mean and variance are those of all ranks' images (two sums over ranks each way, in the
    order of the calls, which is every rank's), and so are the running ones. It trains only where its weight
    does: in a frozen head it stays with the running statistics, as in evaluation. And images may be left out
    of the statistics.

    Attributes:
        counts: whether the images to come are any; one that stands in for none (a rank that ran out of them)
            has no part in the statistics.
    """

    counts = True

    def forward(self, maps_NChw: Tensor) -> Tensor:
        """maps_NChw to maps_NChw, in their own dtype."""
        if not (self.training and self.weight.requires_grad):
            return self._settled(maps_NChw)
        if dist.world_size() == 1 or not distributed.is_initialized():
            return super().forward(maps_NChw) if self.counts else self._settled(maps_NChw)
        return self._over_ranks(maps_NChw)

    def _settled(self, maps_NChw: Tensor) -> Tensor:
        """By the running statistics."""
        return nn.functional.batch_norm(
            maps_NChw, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def _over_ranks(self, maps_NChw: Tensor) -> Tensor:
        with torch.autocast(maps_NChw.device.type, enabled=False):
            values_NChw = maps_NChw.float()
            share = float(self.counts)
            count = values_NChw.new_tensor([share * values_NChw.numel() / self.num_features])
            # Centred sums: of squares alone, float32 would lose what a large mean hides.
            total = _Total.apply(torch.cat([share * values_NChw.sum((0, 2, 3)), count]))
            number = total[-1].detach().clamp(min=1)
            mean_C = total[:-1] / number
            centred_NChw = values_NChw - mean_C[:, None, None]
            variance_C = _Total.apply(share * centred_NChw.square().sum((0, 2, 3))) / number
            with torch.no_grad():
                self._remember(mean_C, variance_C * number / (number - 1).clamp(min=1))
            scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
            normed_NChw = centred_NChw * scale_C[:, None, None] + self.bias[:, None, None]
            return normed_NChw.to(maps_NChw.dtype)

    def _remember(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C, self.momentum)
