"""Our LoRA step against peft's own: outputs, gradients, what is kept for backward, and the exceptions."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_languages
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm_adapt.adapt import fast_lora
from vlm_adapt.adapt.fast_lora import FastLinear, LowRankLinear, speed_up
from vlm_adapt.adapt.lora import Lora
from vlm_adapt.adapt.place import Place
from vlm_adapt.language.causal import CausalLanguage

torch.set_num_threads(1)
CLOSE = {"atol": 1e-6, "rtol": 1e-6}  # float32, sums of 24 terms


def pair(adapters: int = 1, bias: bool = True, **more: Any) -> tuple[Any, Any]:
    """(peft's model, the same with our forward), B away from zero."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(24, 40, bias), nn.GELU(), nn.Linear(40, 24, bias)).requires_grad_(False)
    for number in range(adapters):
        options = {"r": 3 + number, "lora_alpha": 5} | more
        peft.inject_adapter_in_model(
            peft.LoraConfig(target_modules=["0", "2"], **options), theirs, f"a{number}"
        )
    for name, parameter in theirs.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(0, 0.1)
    for layer in (theirs[0], theirs[2]):
        layer.set_adapter([f"a{number}" for number in range(adapters)])
    ours = copy.deepcopy(theirs)
    assert speed_up(ours) == 2 and speed_up(ours) == 0
    assert type(theirs[0]) is PeftLinear and type(ours[0]) is FastLinear
    return theirs, ours


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each use of our function."""
    found: list[int] = []

    class Counted:
        @staticmethod
        def apply(*given: Any) -> Tensor:
            found.append(1)
            return LowRankLinear.apply(*given)

    monkeypatch.setattr(fast_lora, "LowRankLinear", Counted)
    return found


def results(model: Any, x: Tensor, run: Any = None) -> dict[str, Tensor]:
    """Output, gradient of the input, and gradients of what trains."""
    x = x.clone().requires_grad_(True)
    model.zero_grad()
    found = run(model, x) if run else model(x)
    found.float().square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert x.grad is not None and grads and None not in grads.values()
    return {"out": found.detach(), "x": x.grad} | grads


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert list(ours) == list(theirs)
    for name, want in theirs.items():
        assert ours[name].dtype == want.dtype and ours[name].shape == want.shape
        torch.testing.assert_close(ours[name], want, **(tolerance or CLOSE), msg=name)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (0, 24)])
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_as_peft(calls: list[int], shape: tuple[int, ...], adapters: int, bias: bool) -> None:
    theirs, ours = pair(adapters, bias)
    if not shape[0]:
        x = torch.randn(shape)
        assert ours(x).shape == theirs(x).shape == (0, 24)
        return
    x = torch.randn(shape)
    same(results(ours, x), results(theirs, x))
    assert calls == [1, 1]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_zero_changes_no_bit() -> None:
    theirs, ours = pair()
    for layer in (ours[0], ours[2]):
        layer.lora_B["a0"].weight.data.zero_()
    base = nn.Sequential(theirs[0].base_layer, nn.GELU(), theirs[2].base_layer)
    x = torch.randn(2, 5, 24)
    assert torch.equal(ours(x), base(x))


def test_rs_lora_and_pissa(calls: list[int]) -> None:
    for more in ({"use_rslora": True}, {"init_lora_weights": "pissa"}):
        theirs, ours = pair(**more)
        x = torch.randn(5, 24)
        same(results(ours, x), results(theirs, x))
    assert len(calls) == 4


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_other_kinds_go_pefts_way(calls: list[int], more: dict[str, Any]) -> None:
    theirs, ours = pair(**more)
    x = torch.randn(5, 24)
    torch.manual_seed(1)
    want = results(theirs.train(), x)
    torch.manual_seed(1)
    same(results(ours.train(), x), want)
    assert not calls
    if "lora_dropout" in more:  # nothing is dropped outside of training
        same(results(ours.eval(), x), results(theirs.eval(), x))
        assert calls == [1, 1]


def test_what_else_looks_into_a_layer(calls: list[int]) -> None:
    """Hooks, weights that ZeRO-3 gathers or that train, changed layers, switched-off and merged adapters."""
    theirs, ours = pair()
    x = torch.randn(5, 24)
    layer = ours[0]
    ours[2].merge()
    ours[2].unmerge()
    seen: list[int] = []
    for inside in (layer.base_layer, layer.lora_A["a0"], layer.lora_B["a0"]):
        hook = inside.register_forward_hook(lambda *_: seen.append(1))
        ours[:1](x)
        hook.remove()
        inside.weight.ds_id = 0  # what DeepSpeed's ZeRO-3 leaves on a parameter
        ours[:1](x)
        del inside.weight.ds_id
    assert seen == [1] * 3
    for parameter in layer.base_layer.parameters():
        parameter.requires_grad_(True)
        ours[:1](x).sum().backward()
        assert parameter.grad is not None
        parameter.requires_grad_(False)
    layer.enable_adapters(False)
    torch.testing.assert_close(ours[:1](x), theirs[0].base_layer(x), **CLOSE)
    layer.enable_adapters(True)
    layer.merge()
    ours[:1](x)
    layer.unmerge()

    class Other(nn.Linear):
        pass

    layer.base_layer.__class__ = Other
    ours[:1](x)
    layer.base_layer.__class__ = nn.Linear
    assert not calls
    ours[:1](x)
    assert calls == [1]


def test_autocast_in_bf16(calls: list[int]) -> None:
    """A bf16 base, float32 factors and gradients: as near to float32 as peft's own."""
    theirs, ours = pair()
    x = torch.randn(2, 5, 24)
    exact = results(theirs, x)
    models = []
    for model in (ours, theirs):
        for layer in (model[0], model[2]):
            layer.base_layer.bfloat16()
            layer.cast_input_dtype_enabled = False
        models.append(model)

    def run(model: Any, given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(given)

    for given in (x, x.bfloat16()):
        found = [results(model, given, run) for model in models]
        assert found[0]["out"].dtype == found[1]["out"].dtype == torch.bfloat16
        assert found[0]["x"].dtype == given.dtype
        for name, want in exact.items():
            errors = [(one[name].float() - want).norm() / want.norm() for one in found]
            # bf16 keeps 8 bits, 0.4 %; some sums and products on top. Ours rounds less often.
            assert errors[0] < 0.03 and errors[0] < 1.5 * errors[1] + 0.002, name
    assert len(calls) == 4


def test_without_autocast_in_bf16(calls: list[int]) -> None:
    theirs, ours = pair()
    want = theirs(torch.ones(2, 24))
    for layer in (ours[0], ours[2]):
        layer.base_layer.bfloat16()
    found = results(ours, torch.ones(2, 24).bfloat16())
    assert found["0.lora_A.a0.weight"].dtype == torch.float32
    torch.testing.assert_close(found["out"].float(), want, atol=0.05, rtol=0.05)  # 8 bits
    assert len(calls) == 2


def test_what_is_kept() -> None:
    """The input, the few numbers of A x, and A and B; of peft's: an output-sized tensor more or none less."""
    theirs, ours = pair(bias=False)
    x = torch.randn(100, 24, requires_grad=True)
    kept = []
    for model in (ours, theirs):
        tensors: dict[int, int] = {}

        def keep(tensor: Tensor, tensors: dict[int, int] = tensors) -> Tensor:
            tensors[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = model[:1](x)
        kept.append(sorted(count for place, count in tensors.items() if place not in own))
        assert found.shape == (100, 40)
    assert kept[0] == sorted([100 * 24, 100 * 3, 40 * 3])  # x, A x, and B with its scale
    assert sum(kept[0]) <= sum(kept[1]) + 40 * 3


def test_checkpointing() -> None:
    theirs, ours = pair()
    x = torch.randn(5, 24)
    recomputed = results(ours, x, lambda model, given: checkpoint(model, given, use_reentrant=False))
    same(recomputed, results(theirs, x))


def test_inputs_without_a_gradient() -> None:
    """The first layer's: no gradient is computed for them, and what trains gets its own."""
    theirs, ours = pair()
    x = torch.randn(5, 24)
    for model in (theirs, ours):
        model.zero_grad()
        model(x).square().mean().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad, **CLOSE, msg=name)


def test_a_plan_takes_it(calls: list[int]) -> None:
    """LoRA's layers of a language; GPT-2's transposed ones stay peft's."""
    for family, fast in (("llama", 14), ("gpt2", 0)):
        language = CausalLanguage(tiny_languages.model(family))
        Lora(r=2).attach(Place("language", language))
        calls.clear()
        language.model(input_ids=torch.tensor([[5, 6, 7]]))
        assert len(calls) == fast


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """Both sides from one model; losses that agree, and two steps that moved them."""
    path = Path(__file__).parents[1] / "scripts" / "bench" / "lora_step.py"
    spec = importlib.util.spec_from_file_location("lora_step", path)
    assert spec and spec.loader
    bench: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.measure(str(tiny.llama(tmp_path / "llama")), 4, 2, 12, 2)
    assert set(found["sides"]) == {"ours", "peft", "peft_cast"} and found["layers"] == 14
    assert found["loss_difference"] < bench.LOSS_TOLERANCE and found["sides"]["ours"]["over_ours"] == 1
    assert all(side["seconds"] > 0 and len(side["losses"]) == 2 for side in found["sides"].values())
