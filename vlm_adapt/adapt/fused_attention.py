"""LoRA on torch's fused `nn.MultiheadAttention`, as open_clip's towers have it.

Knows peft's layer for it, whose parameters and files it keeps, and computes the same without touching the
base: peft's own takes the base's weights out and puts new ones back around every forward, which moves frozen
weights by rounding and loses their place under ZeRO-3. peft 0.21 also adds out_proj's update twice; here it
is added once, as the formula says, so its logits for such a file are others. Knows nothing about parts.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F


class FusedAttention(MultiheadAttention):
    """in_proj and out_proj with a low-rank update each: (W + (alpha / r) B A) x, in two products."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`, for batches: [B, T, D], or [T, B, D] without `batch_first`."""
        base: Any = self.base_layer
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not adapters:
            plain: tuple[Tensor, Tensor | None] = base(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
            return plain
        if base.bias_k is not None or base.add_zero_attn:
            raise ValueError("a fused attention with bias_k or add_zero_attn is not adapted")
        same = query is key and key is value
        inputs = [query] if same else [query, key, value]
        if not base.batch_first:
            inputs = [tensor.transpose(0, 1) for tensor in inputs]
        q_BTD, k_BSD, v_BSD = self._project(inputs, adapters)
        q_BHTK, k_BHSK, v_BHSK = (
            tensor.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for tensor in (q_BTD, k_BSD, v_BSD)
        )
        mask = _mask(attn_mask, key_padding_mask, q_BHTK)
        dropout = base.dropout if base.training else 0.0
        weights_BHTS = None
        if need_weights:
            scores = q_BHTK @ k_BHSK.transpose(-1, -2) * q_BHTK.shape[-1] ** -0.5
            weights_BHTS = (scores if mask is None else scores + mask).softmax(-1).to(v_BHSK.dtype)
            mixed_BHTK = F.dropout(weights_BHTS, dropout) @ v_BHSK
            if average_attn_weights:
                weights_BHTS = weights_BHTS.mean(1)
        else:
            mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, mask, dropout)
        output_BTD = base.out_proj(mixed_BHTK.transpose(1, 2).flatten(-2))
        return output_BTD if base.batch_first else output_BTD.transpose(0, 1), weights_BHTS

    def _project(self, inputs: list[Tensor], adapters: list[str]) -> list[Tensor]:
        """q, k and v, each of its own input or all of one."""
        base: Any = self.base_layer
        weight, bias = base.in_proj_weight, base.in_proj_bias
        if len(inputs) == 1:
            return list((F.linear(inputs[0], weight, bias) + self._low(inputs[0], adapters)).chunk(3, -1))
        biases = [None] * 3 if bias is None else bias.chunk(3)
        return [
            F.linear(tensor, rows, shift) + self._low(tensor, adapters).chunk(3, -1)[number]
            for number, (tensor, rows, shift) in enumerate(zip(inputs, weight.chunk(3), biases, strict=True))
        ]

    def _low(self, tensor_BTD: Tensor, adapters: list[str]) -> Tensor:
        total: Any = 0
        for name in adapters:
            narrow: Any = self.lora_A[name]
            dropped = self.lora_dropout[name](self._cast_input_dtype(tensor_BTD, narrow.weight.dtype))
            total = total + self.lora_B[name](narrow(dropped)) * self.scaling[name]
        result: Tensor = total.to(tensor_BTD.dtype)
        return result

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to in_proj in place; `out_proj` is a layer of peft's itself and merges itself."""
        for name in adapter_names or self.active_adapters:
            self.base_layer.in_proj_weight += self.get_delta_weight(name).to(
                self.base_layer.in_proj_weight.dtype
            )
            self.merged_adapters.append(name)

    # peft's own register the base's weights anew whenever somebody looks at the module.
    state_dict = nn.Module.state_dict
    named_modules = nn.Module.named_modules


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, like_BHTK: Tensor) -> Tensor | None:
    """One mask to add to the scores, of torch's two; True in them is a place not looked at."""
    found: Tensor | None = None
    for mask, is_padding in ((attn_mask, False), (key_padding_mask, True)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=like_BHTK.dtype).masked_fill(mask, float("-inf"))
        if is_padding:
            mask = mask[:, None, None, :]
        elif mask.dim() == 3:
            mask = mask.unflatten(0, (like_BHTK.shape[0], -1))
        mask = mask.to(like_BHTK.dtype)
        found = mask if found is None else found + mask
    return found
