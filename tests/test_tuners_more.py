"""LoRA's variants, AdaLoRA's allocation, KronA, IA3 and rows of the embedding, by their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_languages
import torch
import transformers

from vlm_adapt.adapt import METHODS
from vlm_adapt.adapt.method import make_method
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage

torch.set_num_threads(1)
IDS_BT = torch.tensor([[5, 2, 7, 9, 3, 40]])


def put(part: Any, name: str, where: str = "language", move: float = 0.05, **settings: Any) -> Any:
    torch.manual_seed(1)
    method = make_method(METHODS, name, settings)
    method.attach(Place(where, part))
    for parameter in method.parameters.values():
        parameter.data += move * torch.randn(parameter.shape)
    return method


def language(family: str = "llama") -> CausalLanguage:
    return CausalLanguage(tiny_languages.model(family)).eval()


def logits(part: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = part.model(input_ids=IDS_BT).logits
    return found


VARIANTS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_rslora": True},
    *(
        {"init_lora_weights": start}
        for start in ("gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal")
    ),
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(map(str, [*s, *s.values()][:2])))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_variants_of_lora(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    """Each starts as the base (LoftQ near it), is switched off to the bit, merges, and is read by peft."""
    start = settings.get("init_lora_weights")
    if start == "loftq":
        for package in ("scipy", "bitsandbytes"):  # peft quantises by them
            pytest.importorskip(package)
    if family == "gpt2" and start in ("olora", "loftq"):
        with pytest.raises(UserError, match="whose weight lies the other way round"):
            put(language(family), "lora", r=4, **settings)
        return
    from peft import PeftModel

    part = language(family)
    base = logits(part)
    method = put(part, "lora", move=0, r=4, **settings)
    if start != "loftq":
        # Starts that take B A out of W add it again in another order.
        torch.testing.assert_close(logits(part), base, atol=1e-4, rtol=0)
    for parameter in method.parameters.values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    want = logits(part)
    assert (want - base).abs().max() > 1e-3
    method.set_active(False)
    torch.testing.assert_close(logits(part), base, atol=0, rtol=0)
    method.set_active(True)
    torch.testing.assert_close(logits(part), want, atol=0, rtol=0)
    method.save(tmp_path, {key: p.detach().clone() for key, p in method.parameters.items()})
    if start != "pissa_niter_4":  # its random projection is not the file's: peft converts such files first
        theirs = PeftModel.from_pretrained(tiny_languages.model(family), tmp_path).eval()
        with torch.no_grad():
            found = theirs(input_ids=IDS_BT).logits
        torch.testing.assert_close(found, want, atol=1e-4, rtol=0)
    method.merge()
    torch.testing.assert_close(logits(part), want, atol=2e-4, rtol=0)


def test_lokr_of_full_rank_is_krona() -> None:
    """W x + (A kron B) x, with both factors whole (Edalati et al. 2022)."""
    part = language()
    layer = part.model.model.layers[0].self_attn.q_proj
    x_D = torch.randn(32, generator=torch.Generator().manual_seed(0))
    before = layer(x_D)
    method = put(part, "lokr", r=64, alpha=64, target_modules="layers.0.self_attn.q_proj")
    factors = {key.rpartition(".")[2]: p.detach() for key, p in method.parameters.items()}
    assert sorted(factors) == ["lokr_w1", "lokr_w2"]
    a, b = factors["lokr_w1"], factors["lokr_w2"]
    assert a.shape[0] * b.shape[0] == a.shape[1] * b.shape[1] == 32
    after = part.model.model.layers[0].self_attn.q_proj(x_D)
    torch.testing.assert_close(after, before + torch.kron(a, b) @ x_D, atol=1e-5, rtol=0)


def test_ia3_scales_keys_values_and_inner_activations() -> None:
    """l * (W x), and W (l * x) in the feed-forward's second layer (Liu et al. 2022, section 3.3)."""
    part = language()
    block = part.model.model.layers[0]
    x_D, x_F = torch.randn(32), torch.randn(block.mlp.down_proj.in_features)
    before = block.self_attn.k_proj(x_D), block.mlp.down_proj(x_F)
    method = put(part, "ia3", target_modules=["k_proj", "v_proj", "down_proj"])
    scales = {key: p.detach().flatten() for key, p in method.parameters.items() if ".layers.0." in key}
    key_scale = next(p for key, p in scales.items() if "k_proj" in key)
    inner = next(p for key, p in scales.items() if "down_proj" in key)
    torch.testing.assert_close(block.self_attn.k_proj(x_D), before[0] * key_scale, atol=1e-5, rtol=0)
    plain = block.mlp.down_proj.get_base_layer()
    torch.testing.assert_close(block.mlp.down_proj(x_F), plain(inner * x_F), atol=1e-5, rtol=0)


def test_adalora_allocates_as_peft_does(tmp_path: Path) -> None:
    """Losses with the penalty and ranks over all steps, against peft's own update_and_allocate."""
    from peft import AdaLoraConfig, get_peft_model, set_peft_model_state_dict

    steps, settings = 8, {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "orth_reg_weight": 0.3}
    part = language()
    method = put(part, "adalora", move=0.05, **settings)
    # peft adds the penalty for a task that it knows.
    names = list(method.names)
    config = AdaLoraConfig(task_type="CAUSAL_LM", total_step=steps, target_modules=names, **settings)
    theirs: Any = get_peft_model(tiny_languages.model("llama").eval(), config)
    set_peft_model_state_dict(theirs, {key: p.detach().clone() for key, p in method.parameters.items()})
    part.requires_grad_(False)
    mine = list(method.parameters.values())
    for parameter in mine:
        parameter.requires_grad_(True)
    ours = torch.optim.AdamW(mine, lr=1e-2)
    others = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        loss = part.model(input_ids=IDS_BT, labels=IDS_BT).loss + method.penalty()
        want = theirs(input_ids=IDS_BT, labels=IDS_BT).loss
        torch.testing.assert_close(loss, want, atol=1e-5, rtol=0)
        loss.backward()
        want.backward()
        method.before_step(step, steps, lambda p: p.grad)
        ours.step()
        others.step()
        theirs.base_model.update_and_allocate(step + 1)
        ours.zero_grad()
        others.zero_grad()
        method.after_step(step, steps)
    kept = sum(int((p != 0).sum()) for key, p in method.parameters.items() if key.endswith("lora_E"))
    assert kept == settings["target_r"] * len(method.names)
    named = {key: p for key, p in theirs.named_parameters() if "lora_E" in key}
    for key, parameter in method.parameters.items():
        if key.endswith("lora_E"):
            torch.testing.assert_close(parameter, named[f"{key}.default"], atol=1e-5, rtol=0)
    tensors = {key: p.detach().clone() for key, p in method.parameters.items()}
    method.save(tmp_path, tensors)
    method.save_latent(tmp_path, tensors)
    again = put(language(), "adalora", **settings)
    again.read(tmp_path)
    assert again.config.rank_pattern == method.config.rank_pattern
    for name, average in method.allocator.exp_avg_ipt.items():
        assert torch.equal(again.allocator.exp_avg_ipt[name], average)


def test_adalora_without_room_says_so() -> None:
    method = put(language(), "adalora", init_r=4, target_r=2, tinit=5, tfinal=5)
    with pytest.raises(UserError, match="no step left to allocate ranks: tinit 5 and tfinal 5") as caught:
        method.before_step(0, 10, lambda p: p.grad)
    tiny.sentence(caught)


def test_trainable_tokens_follow_a_tied_head() -> None:
    """One row of the embedding, which is the head's too: both move, nothing else does."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    part = CausalLanguage(tiny.seeded(transformers.LlamaForCausalLM, config))
    weight = part.model.get_input_embeddings().weight
    before, kept = logits(part), weight.detach().clone()
    method = put(part, "trainable_tokens", token_indices=[8], move=0.5)
    after = logits(part)  # 8 is not among the ids: only its own logit moves
    assert (after - before)[..., 8].abs().max() > 1e-3
    others = [token for token in range(50) if token != 8]
    torch.testing.assert_close(after[..., others], before[..., others], atol=1e-6, rtol=0)
    assert torch.equal(part.model.get_input_embeddings().base_layer.weight, kept)
    method.merge()
    torch.testing.assert_close(logits(part), after, atol=1e-6, rtol=0)
