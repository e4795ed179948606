"""Back Razor in whole languages and in plans: bytes of all layers, what it leaves alone, its company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rows
import test_packing
import tiny
import tiny_languages
import torch
import transformers
from torch import Tensor, nn

from vlm_adapt.adapt.back_razor import BackRazor, attention_kind
from vlm_adapt.adapt.plan import apply_plan
from vlm_adapt.adapt.saved_memory import saved_bytes
from vlm_adapt.adapt.sparse_saved import Keeper, kept_of
from vlm_adapt.attention import register
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage
from vlm_adapt.language.language import LanguageInput
from vlm_adapt.language.layout import Layout

torch.set_num_threads(1)
EXACT = {"atol": 0.0, "rtol": 0.0}


def language_of(family: str, attention: str = "ours", seed: int = 0, **more: Any) -> CausalLanguage:
    model = tiny_languages.model(family, seed) if not more else bigger(more)
    model.set_attn_implementation(register() if attention == "ours" else attention)
    return CausalLanguage(model).eval()


def bigger(more: dict[str, Any]) -> Any:
    config = transformers.LlamaConfig(**tiny_languages.BASE | more)
    return tiny.seeded(transformers.LlamaForCausalLM, config)


def states(language: CausalLanguage, rows_: int = 2, length: int = 12) -> Tensor:
    ids_BT = torch.randint(3, 90, (rows_, length), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.arange(length).expand(rows_, length)
    ones = torch.ones_like(ids_BT)
    layout = Layout(ones, positions_BT + 1, ones * 0, positions_BT, plain=True)
    return language.hidden(LanguageInput(language.embed(ids_BT), ones > 0, layout=layout))


def planned(language: CausalLanguage, *lines: dict[str, Any]) -> Any:
    every = [Adapt.model_validate({"where": "language", **one}) for one in lines]
    return apply_plan({"language": language}, [every])


def gradients(language: CausalLanguage) -> dict[str, Tensor]:
    states(language).pow(2).sum().backward()
    return {name: p.grad for name, p in language.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi", "qwen3"])
@pytest.mark.parametrize("attention", ["ours", "eager", "sdpa"])
def test_families(family: str, attention: str) -> None:
    """Nothing dropped: the exact gradients. A third dropped: near them, so nothing vital was touched."""
    found = []
    for sparsity in (None, 0.0, 0.3):
        language = language_of(family, attention)
        lines = [{"method": "full"}, {"method": "back_razor", "sparsity": sparsity}]
        planned(language, *(lines if sparsity is not None else lines[:1]))
        found.append(gradients(language))
    for name, exact in found[0].items():
        torch.testing.assert_close(found[1][name], exact, **EXACT)
        if exact.ndim == 2 and exact.norm() > 1e-3:
            cosine = torch.cosine_similarity(found[2][name].flatten(), exact.flatten(), 0)
            # The smallest third carries little: angles masked by mistake leave about 0.5 here.
            assert cosine > 0.9, name


@pytest.mark.parametrize("attention", ["ours", "eager"])
def test_bytes_of_a_language(attention: str) -> None:
    """Within 5 % of what the formula gives for every tensor that its layers keep without it."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 2}
    want, got = 0, 0
    for razor in (False, True):
        language = language_of("llama", attention, **sizes)
        language.model.model.norm = nn.Identity()  # it lies behind the blocks
        lines = [{"method": "full"}, {"method": "back_razor", "sparsity": 0.9}]
        planned(language, *(lines if razor else lines[:1]))
        told: list[Tensor] = []
        language.model.model.rotary_emb.register_forward_hook(lambda m, a, out, told=told: told.extend(out))
        with saved_bytes(language) as saved:
            total = states(language, 2, 48).sum()
        angles = {tensor.untyped_storage()._cdata for tensor in told}
        layers = [t for t in saved.tensors if t.untyped_storage()._cdata not in angles]
        if razor:
            got = saved.sparse + sum(t.untyped_storage().nbytes() for t in layers)
        else:
            counts = [t.untyped_storage().nbytes() // 4 for t in layers]
            want = sum(-(-n // 8) + kept_of(n, 0.9) * 4 for n in counts)
        total.backward()
    assert got == pytest.approx(want, rel=0.05)


def test_what_is_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, rotary angles, statistics of norms; and under autocast the weights' copies in bf16."""
    kept: list[Tensor] = []
    monkeypatch.setattr(Keeper, "keep", lambda self, tensor, *more: kept.append(tensor) or tensor)
    language = language_of("llama", "eager")
    planned(language, {"method": "full"}, {"method": "back_razor"})
    told: list[Tensor] = []
    rotary: Any = language.model.model.rotary_emb
    rotary.register_forward_hook(lambda module, args, output: told.extend(output))
    with torch.autocast("cpu", torch.bfloat16):
        states(language).float().sum().backward()
    assert len(kept) > 10 and told
    memory = {tensor.untyped_storage()._cdata for tensor in kept}
    assert not memory & {tensor.untyped_storage()._cdata for tensor in (*told, *language.parameters())}
    weights = [p.to(torch.bfloat16) for p in language.parameters() if p.ndim == 2]
    for tensor in kept:
        same = [w for w in weights if w.shape in (tensor.shape, tensor.mT.shape)]
        assert not any(torch.equal(tensor, w) or torch.equal(tensor.mT, w) for w in same)
        assert tensor.shape[-1] > 1


def test_fused_attention_is_left_alone() -> None:
    """It would compute its probabilities again from what is left of queries and keys."""
    attention: Any = language_of("llama", "sdpa").blocks[0].self_attn
    assert attention_kind(attention, torch.zeros(1, 4, 32), {}) == "fused"
    attention.config._attn_implementation = register()
    assert attention_kind(attention, torch.zeros(1, 4, 32), {}) == "by text"
    assert attention_kind(attention, torch.zeros(1, 4000, 32), {}) == "fused"  # longer than what is kept
    assert (
        attention_kind(attention, torch.zeros(1, 4000, 32), {"attention_mask": torch.zeros(1)}) == "separate"
    )
    assert attention_kind(nn.MultiheadAttention(8, 2), None, {}) == "fused"
    assert attention_kind(nn.Linear(2, 2), None, {}) == ""


# In a plan ---------------------------------------------------------------------------------------


def test_it_only_goes_with_others(tmp_path: Path) -> None:
    """No parameters of its own; alone there is nothing to train, which is said."""
    ours = rows.assemble(tiny.vit(tmp_path / "vit"), tiny.llama(tmp_path / "llama"))
    razor = {"method": "back_razor", "where": "language"}
    with pytest.raises(UserError, match="nothing would train") as caught:
        ours.adapt([[Adapt.model_validate(razor)]])
    tiny.sentence(caught)
    lora = {"method": "lora", "where": "language", "r": 4}
    plan = ours.adapt([[Adapt.model_validate(one) for one in (razor, lora)]])
    row = {line["part"]: line for line in plan.table()}["language"]
    assert row["method"] == "lora, back_razor" and row["bytes"] == plan.attached[0].method.bytes_stored()
    assert plan.attached[1].method.parameters == {} and plan.attached[1].method.bytes_stored() == 0


@pytest.mark.parametrize("sparsity", [1, -0.1, "much", True])
def test_refused(sparsity: Any) -> None:
    with pytest.raises(UserError, match="a sparsity from 0 to below 1") as caught:
        BackRazor(sparsity)
    tiny.sentence(caught)


def test_rows_and_texts_make_no_difference(tmp_path: Path) -> None:
    """Each text keeps its own values, whatever lies beside it: packed, in a batch, or alone."""
    ours = rows.assemble(tiny.vit(tmp_path / "vit"), tiny.llama(tmp_path / "llama"))
    lines = [{"method": "full", "where": "language"}, {"method": "back_razor", "where": "language"}]
    ours.adapt([[Adapt.model_validate(one) for one in lines]])
    made = test_packing.texts(ours)
    want = test_packing.alone(ours, made)
    for packed in ([made], made, [made[:2], made[2:]]):
        losses_N, found = test_packing.run(ours, packed)
        torch.testing.assert_close(losses_N, want[0], **test_packing.NEAR)
        test_packing.same(found, want[1])
