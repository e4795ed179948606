"""One adapted linear layer as one step of autograd: x W' + s (x A') B', without passes in between.

Knows peft's Linear, whose modules and names it leaves as they are; knows nothing about configurations.
peft's own forward adds, scales and keeps an output-sized tensor each for the update, forward and
backward; here the update is added by the multiplication itself (measured in docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class _Adapted(torch.autograd.Function):
    """base [T, F] = x W' + b, plus scale * (x A') B'. W and b are frozen; A [r, D] and B [F, r] train."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None, a_RD: Tensor, b_FR: Tensor, scale: float
    ) -> Tensor:
        # One cast each, kept for the backward pass: they are small, and x is what is wide.
        a_low, b_low = a_RD.to(x_TD.dtype), b_FR.to(x_TD.dtype)
        h_TR = x_TD @ a_low.T
        y_TF = nn.functional.linear(x_TD, w_FD, bias_F).addmm_(h_TR, b_low.T, alpha=scale)
        ctx.save_for_backward(x_TD, w_FD, a_low, b_low, h_TR)
        ctx.scale, ctx.dtypes = scale, (a_RD.dtype, b_FR.dtype)
        return y_TF

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TD, w_FD, a_RD, b_FR, h_TR = ctx.saved_tensors
        of_x, _, _, of_a, of_b, _ = ctx.needs_input_grad
        dh_TR = (grad_TF @ b_FR).mul_(ctx.scale) if of_x or of_a else None
        dx_TD = da_RD = db_FR = None
        if of_x:
            dx_TD = (grad_TF @ w_FD).addmm_(dh_TR, a_RD)
        if of_a:
            assert dh_TR is not None
            da_RD = (dh_TR.T @ x_TD).to(ctx.dtypes[0])
        if of_b:
            db_FR = (grad_TF.T @ h_TR).to(ctx.dtypes[1]).mul_(ctx.scale)
        return dx_TD, None, None, da_RD, db_FR, None


class FusedLinear(Linear):
    """peft's Linear with the forward pass above wherever that is the whole of what it would compute."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., D] to [..., F], as peft's."""
        adapter = None if args or kwargs or x.ndim < 2 else self._plain_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        base = self.base_layer
        if base.weight.dtype != dtype:
            return super().forward(x)
        y_TF = _Adapted.apply(
            x.to(dtype).flatten(0, -2),
            base.weight,
            base.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
        )
        return y_TF.view(*x.shape[:-1], -1)

    def _plain_adapter(self) -> str | None:
        """The one active adapter, when it is plain LoRA on a plain frozen layer; otherwise None.

        Not so under ZeRO-3, where a weight is whole only while its own module is called, and where
        anyone watches one of the modules by a hook.
        """
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant:
            return None
        dropout = self.lora_dropout[active[0]]
        if self.training and not isinstance(dropout, nn.Identity):
            return None
        modules = (self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]])
        for module in modules:
            if type(module) is not nn.Linear or hasattr(module.weight, "ds_id"):
                return None
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                return None
        base, first, second = modules
        if first.bias is not None or second.bias is not None:
            return None
        frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
        return active[0] if frozen else None


def fuse(module: nn.Module) -> None:
    """Give every plain peft Linear in a module the forward pass above; weights and names stay."""
    for layer in module.modules():
        if type(layer) is Linear:
            layer.__class__ = FusedLinear
