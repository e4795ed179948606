"""peft's LoRA on linear layers, computed as one step of the graph.

peft multiplies by W, A and B, scales and adds one after the other, and autograd keeps what lies between.
Here the low-rank product is added in the pass that multiplies by B, and the backward pass computes what is
needed of a frozen W: x and A x are kept, nothing else. The layer stays peft's own in everything but its
forward: parameters, names, files, merging, switching. Whatever is more than plain LoRA on a frozen nn.Linear
goes peft's own way. Knows peft's layers; knows nothing about plans.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LowRankLinear(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, of frozen W and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """x [..., in], in any floating dtype; weight [out, in] and bias in the dtype to compute in;
        a [r, in] and b [out, r], cast to it here."""
        dtype = weight.dtype
        x_TI = x.to(dtype).reshape(-1, x.shape[-1])
        a_RI, b_OR = a.to(dtype), (b * scale).to(dtype)
        y_TO = F.linear(x_TI, weight, bias)
        h_TR = x_TI @ a_RI.t()
        y_TO.addmm_(h_TR, b_OR.t())
        ctx.save_for_backward(x_TI, h_TR, weight, a_RI, b_OR)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, a.dtype, b.dtype)
        return y_TO.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, A and B."""
        x_TI, h_TR, weight, a_RI, b_OR = ctx.saved_tensors
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        g_TO = grad.reshape(-1, grad.shape[-1])
        g_TR = g_TO @ b_OR
        dx = da = db = None
        if needs_x:
            dx_TI = g_TO @ weight
            dx_TI.addmm_(g_TR, a_RI)
            dx = dx_TI.view(ctx.shape).to(x_dtype)
        # The few rows first, and laid out as rows: a processor's product of a tall transposed one takes
        # twice as long.
        if needs_a:
            da = (g_TR.t().contiguous() @ x_TI).to(a_dtype)
        if needs_b:
            db = ((h_TR.t().contiguous() @ g_TO).to(b_dtype) * ctx.scale).t()
        return dx, None, None, da, db, None


class FastLinear(PeftLinear):
    """peft's layer with the forward above, where it applies."""

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """As peft's own."""
        base: Any = self.base_layer
        if arguments or options or self._disable_adapters or self.merged_adapters or not _is_plain(base):
            return super().forward(x, *arguments, **options)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        names = [name for name in self.active_adapters if name in self.lora_A]
        pairs = [(self.lora_A[name], self.lora_B[name], self.scaling[name]) for name in names]
        if base.weight.dtype != dtype or not names or not all(self._is_simple(name) for name in names):
            return super().forward(x)
        if len(pairs) == 1:
            (first, second, scale) = pairs[0]
            a, b = first.weight, second.weight
        else:  # several adapters are one of the ranks' sum
            scale = 1.0
            a = torch.cat([first.weight for first, _, _ in pairs])
            b = torch.cat([second.weight * one for _, second, one in pairs], 1)
        made: Tensor = LowRankLinear.apply(x, base.weight, base.bias, a, b, scale)
        return made

    def _is_simple(self, name: str) -> bool:
        """No variant, no bias, no dropout to draw, no hooks, and weights that are here (not under ZeRO-3)."""
        dropout = self.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        first, second = self.lora_A[name], self.lora_B[name]
        return (
            not drops
            and name not in self.lora_variant
            and second.bias is None
            and type(first) is nn.Linear
            and type(second) is nn.Linear
            and not _is_watched(first)
            and not _is_watched(second)
        )


def speed_up(model: nn.Module) -> int:
    """Let peft's LoRA layers below `model` compute this way; returns how many there are.

    Layers that another method changes, quantised ones, and variants such as DoRA stay right: they are
    asked at every call.
    """
    layers: list[Any] = [module for module in model.modules() if type(module) is PeftLinear]
    for layer in layers:
        layer.__class__ = FastLinear
    return len(layers)


def _is_plain(base: Any) -> bool:
    """A frozen linear layer that nothing else looks into."""
    return (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
        and not _is_watched(base)
    )


def _is_watched(layer: nn.Module) -> bool:
    """Whether calling a layer does more than multiply: hooks, or weights that ZeRO-3 gathers then."""
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    ) or hasattr(layer.weight, "ds_id")
