"""Bottleneck adapters in blocks of many families: what they read, where they add, recomputed and in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_parts import attach, blocks_of, shake, written_out
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.adapt.adapters import Inserted
from vlm_adapt.adapt.anatomy import anatomy
from vlm_adapt.adapt.bottleneck import AdaptFormer, Houlsby, ParallelAdapter, Pfeiffer
from vlm_adapt.errors import UserError

torch.set_num_threads(1)
KINDS = {
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "parallel_adapter": ParallelAdapter,
    "adaptformer": AdaptFormer,
}


FAMILIES = [
    *("llama", "gemma2", "phi", "gpt2", "gpt_neox", "opt", "opt_projected", "olmo2", "t5"),
    *("tiny_vit", "swin", "convnext", "convnext_conv", "resampler", "qformer"),
]
# The module whose input is the residual stream that the feed-forward's norm reads; "" is the block. Of the
# others it is the block's input and what attention added to it.
STREAM = {
    "phi": "",
    "gpt_neox": "",
    "opt_projected": "fc1",
    "olmo2": "mlp",
    "tiny_vit": "mlp",
    "swin": "norm2",
    "convnext": "norm",
    "convnext_conv": "norm",
    "qformer": "intermediate_query",
}


class Notes:
    """What goes into and comes out of layers, by own hooks."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, str], Tensor] = {}

    def input_of(self, module: nn.Module, number: int, place: str, argument: int = 0) -> None:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            self.seen[number, place] = args[argument] if args else next(iter(kwargs.values()))

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def output_of(self, module: nn.Module | None, number: int, place: str) -> None:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            self.seen[number, place] = output[0] if isinstance(output, tuple) else output

        if module is not None:
            module.register_forward_hook(hook)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", KINDS)
def test_families(family: str, name: str) -> None:
    """Identity at the start to the bit; then what is added is the formula of what is read; then off again."""
    part, run, blocks = blocks_of(family)
    with torch.no_grad():
        before = run()
    if name == "houlsby" and "convnext" in family:
        with pytest.raises(UserError, match="finds no block with attention and feed-forward"):
            attach(KINDS[name](bottleneck=5), part)
        return
    notes = Notes()
    for number, block in enumerate(blocks):
        found = anatomy(block)
        assert found.mlp_start is not None
        notes.input_of(block, number, "block", int(family == "resampler"))  # features come first there
        notes.input_of(found.mlp_start, number, "start")
        t5: Any = block
        stream = t5.layer[-1] if family == "t5" else block.get_submodule(STREAM.get(family, ""))
        notes.input_of(stream, number, "stream", int(family == "resampler"))
        notes.output_of(found.attention_end, number, "attention raw")
        notes.output_of(found.mlp_end, number, "mlp raw")
    method = attach(KINDS[name](bottleneck=5), part, "language")
    for number, block in enumerate(blocks):
        found = anatomy(block)
        notes.output_of(found.attention_end, number, "attention")
        notes.output_of(found.mlp_end, number, "mlp")
    with torch.no_grad():
        assert torch.equal(run(), before)
        shake(method)
        after = run()
        assert not torch.allclose(after, before, atol=1e-3)
        prefixes = list(dict.fromkeys(key.rsplit(".", 3)[0] for key in method.parameters))
        assert len(prefixes) == len(blocks)
        for number, prefix in enumerate(prefixes):
            seen = {place: tensor for (block, place), tensor in notes.seen.items() if block == number}
            if family not in STREAM and family != "t5":
                seen["stream"] = seen["block"] + seen["attention"]
            for place in ("attention", "mlp") if name == "houlsby" else ("mlp",):
                raw = seen[f"{place} raw"]
                read = {"parallel_adapter": seen["start"], "adaptformer": seen["stream"]}.get(name, raw)
                act = functional.gelu if name == "houlsby" else torch.relu
                scale = {"parallel_adapter": 4.0, "adaptformer": 0.1}.get(name, 1.0)
                last = -1 if family != "convnext_conv" else 1
                want = written_out(method, f"{prefix}.{place}", read.movedim(last, -1), act, scale)
                want = want.movedim(-1, last).reshape(raw.shape)
                # Values differ in size by family; float32 rounds their sum.
                size = raw.abs().max() + want.abs().max()
                torch.testing.assert_close((seen[place] - raw) / size, want / size, atol=1e-6, rtol=0)
        method.set_active(False)
        assert torch.equal(run(), before)
        method.set_active(True)
        assert torch.equal(run(), after)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", ["opt", "gemma2", "t5"])
def test_recomputed(family: str, name: str) -> None:
    """The same gradients when blocks run again in the backward pass, and nothing is held after it."""
    found = []
    for again in (False, True):
        part, run, blocks = blocks_of(family)
        method = attach(KINDS[name](bottleneck=5), part, "language")
        shake(method)
        if again:
            part.train()
            block: Any
            for block in blocks:
                block.dropout = 0.0  # OPT's own
            part.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        run().square().mean().backward()
        found.append({key: p.grad for key, p in method.parameters.items()})
        assert not any(m._taken is not None for m in part.modules() if isinstance(m, Inserted))
    for key, grad in found[0].items():
        assert grad is not None and grad.abs().max() > 0
        torch.testing.assert_close(found[1][key], grad, atol=1e-5, rtol=1e-4)  # sums in another order


@pytest.mark.parametrize("name", KINDS)
def test_bf16(name: str) -> None:
    """A bf16 base with float32 adapters gives bf16, with and without autocast; the two differ by rounding."""
    part, run, _ = blocks_of("llama")
    part.to(torch.bfloat16)
    method = attach(KINDS[name](bottleneck=5), part, "language")
    shake(method)
    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert plain.dtype == torch.bfloat16
    assert (plain - cast).float().norm() < 0.05 * cast.float().norm()  # 8 bits of mantissa, two blocks
    cast.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters.values())
