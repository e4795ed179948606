"""Every tuner of peft that the table has: peft reads what we save, several act together, and settings.

Generated from the table. What a tuner computes is peft's own; that ours is the same is proven by peft's
loader on the plain model of transformers. Steps, resuming, bf16 and merging alone are the grid's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_languages
import torch
import transformers

from vlm_adapt.adapt import METHODS
from vlm_adapt.adapt.lora import Lora
from vlm_adapt.adapt.method import make_method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.tuner import Tuner
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage

torch.set_num_threads(1)
NAMES = [name for name, path in METHODS.items() if issubclass(METHODS.load(name), Tuner)]
FEW = ("lora", "adalora", "ia3", "oft", "vera", "lokr", "trainable_tokens")
SOME = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
IDS_BT = torch.tensor([[5, 2, 7, 9, 3, 40]])
# Sums of merged weights are taken in another order: seen up to 6e-5 on logits of about 10.
CLOSE = {"atol": 2e-4, "rtol": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama") / "llama")


def plain(folder: Path, **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", **more
    ).eval()


def language() -> CausalLanguage:
    return CausalLanguage(tiny_languages.model("llama")).eval()


def put(part: CausalLanguage, name: str, seed: int = 1, move: bool = True, **more: Any) -> Any:
    """A tuner on a language, moved away from its start."""
    torch.manual_seed(seed)
    if name == "trainable_tokens":
        more = {"token_indices": [2, 3], **more}
    method = make_method(METHODS, name, {**METHODS.load(name).example, **more})
    method.attach(Place("language", part))
    for parameter in method.parameters.values() if move else ():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return method


def logits(part: CausalLanguage) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = part.model(input_ids=IDS_BT).logits
    return found


@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_what_we_save(folder: Path, tmp_path: Path, name: str) -> None:
    """peft's own loader on the plain model gives our logits; so do we, from another seed.

    1e-5: the same operations, in peft's dtype handling."""
    from peft import PeftModel

    ours = CausalLanguage(plain(folder))
    before = logits(ours)
    method = put(ours, name)
    want = logits(ours)
    assert (want - before).abs().max() > 1e-3
    trained = {key: parameter.detach().clone() for key, parameter in method.parameters.items()}
    method.save(tmp_path, trained)
    theirs = PeftModel.from_pretrained(plain(folder), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS_BT).logits, want, atol=1e-5, rtol=0)
    again = CausalLanguage(plain(folder))
    other = put(again, name, seed=2)
    tensors = other.read(tmp_path)
    assert set(tensors) == set(other.parameters)
    for key, parameter in other.parameters.items():
        parameter.data.copy_(tensors[key])
    torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=0)
    size = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert method.bytes_stored() < size  # and a header


@pytest.mark.parametrize("name", SOME)
def test_two_of_a_kind(name: str) -> None:
    """Each of two adapters of one layer acts, alone or together, switched in any order; or one sentence."""
    part = language()
    base = logits(part)
    first = put(part, name)
    alone = logits(part)
    more = {"token_indices": [5, 7]} if name == "trainable_tokens" else {}
    if not type(first).stacks:
        with pytest.raises(UserError, match="twice, and peft lets one act"):
            put(part, name, seed=2)
        return
    second = put(part, name, seed=2, **more)
    both = logits(part)
    assert (both - alone).abs().max() > 1e-3
    first.set_active(False)
    assert (logits(part) - both).abs().max() > 1e-3
    second.set_active(False)
    torch.testing.assert_close(logits(part), base, atol=0, rtol=0)
    first.set_active(True)
    torch.testing.assert_close(logits(part), alone, atol=0, rtol=0)
    second.set_active(True)
    torch.testing.assert_close(logits(part), both, atol=0, rtol=0)


@pytest.mark.parametrize("name", [one for one in SOME if one not in ("lora", "trainable_tokens")])
def test_around_lora(name: str) -> None:
    """Put around another tuner, it leaves that one in effect, merged or not; or one sentence."""
    part = language()
    inner = put(part, "lora")
    if not METHODS.load(name).nests:
        with pytest.raises(UserError, match=f"put '{name}' first in the list"):
            put(part, name, seed=2)
        return
    outer = put(part, name, seed=2)
    both = logits(part)
    inner.set_active(False)
    assert (logits(part) - both).abs().max() > 1e-3
    inner.set_active(True)
    if not outer.additive:
        with pytest.raises(UserError, match="cannot be merged"):
            outer.merge()
        torch.testing.assert_close(logits(part), both, atol=0, rtol=0)
    inner.merge()
    torch.testing.assert_close(logits(part), both, **CLOSE)
    if outer.mergeable:
        outer.merge()
        torch.testing.assert_close(logits(part), both, **CLOSE)


@pytest.mark.parametrize("name", [one for one in SOME if one not in ("lora", "trainable_tokens")])
def test_lora_around_it(name: str) -> None:
    """LoRA goes around every tuner; it merges first where both only add, else it says which is first."""
    part = language()
    inner = put(part, name)
    outer = put(part, "lora", seed=2)
    both = logits(part)
    if inner.additive:
        outer.merge()
    else:
        with pytest.raises(UserError, match=f"merge '{name}' first"):
            outer.merge()
    torch.testing.assert_close(logits(part), both, **CLOSE)
    if inner.mergeable:
        inner.merge()
        torch.testing.assert_close(logits(part), both, **CLOSE)
        if not inner.additive:
            outer.merge()
            torch.testing.assert_close(logits(part), both, **CLOSE)
        assert {n for n, _ in part.named_parameters()} == {n for n, _ in language().named_parameters()}


@pytest.mark.parametrize("name", SOME)
def test_on_meta(name: str) -> None:
    """Counts without weights are the counts with them, and nothing is made for real."""
    want = {key: p.shape for key, p in put(language(), name).parameters.items()}
    with torch.device("meta"):
        empty = CausalLanguage(tiny_languages.model("llama"))
    method = put(empty.to("meta"), name, move=False)
    assert {key: p.shape for key, p in method.parameters.items()} == want
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("name", SOME)
def test_same_seed_same_start(name: str) -> None:
    first, second = (put(language(), name, move=False) for _ in range(2))
    for key, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[key]) and parameter.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("loha", {"rnk": 4}, "method 'loha' has no setting 'rnk'"),
        ("vera", {"d_intial": 0.1}, "has no setting 'd_intial', did you mean 'd_initial'?"),
        ("oft", {"r": 8, "oft_block_size": 8}, "peft refuses these settings of 'oft': "),
        ("gralora", {"r": -1}, "r of 'gralora' is a whole number, not -1"),
        ("hra", {"bias": "all"}, "'hra' trains no biases: add a second line with method 'bitfit'"),
        ("boft", {"layers_to_transform": [0]}, "takes no 'layers_to_transform' here: choose blocks with"),
        ("lora", {"modules_to_save": ["lm_head"]}, "train whole modules by a second line"),
        ("lora", {"init_lora_weights": "corda"}, "'corda' needs peft's preprocess_corda before"),
        ("adalora", {"total_step": 5}, "takes its total_step from the run"),
        ("adalora", {"use_dora": True}, "peft refuses these settings of 'adalora': .*DoRA"),
        ("trainable_tokens", {"token_indices": [3, 3]}, "a list of different ids from 0"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], said: str) -> None:
    """Told before a model is loaded, in one sentence."""
    with pytest.raises(UserError, match=said) as caught:
        make_method(METHODS, name, settings)
    tiny.sentence(caught)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("vblora", {"vector_length": 7}, "peft cannot attach 'vblora' here: "),
        ("vblora", {"save_only_topk_weights": True}, "peft's file would not hold all that trains"),
        ("lora", {"init_lora_weights": "wrong"}, "Unknown initialization"),
        ("trainable_tokens", {"token_indices": [9999]}, "has id 9999, and there are"),
        ("ia3", {"feedforward_modules": "up_proj", "target_modules": "q_proj"}, "name it in both"),
        ("lora", {"target_modules": "embed_tokens"}, "matches no layer"),
    ],
)
def test_settings_that_do_not_fit(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        put(language(), name, **settings)
    tiny.sentence(caught)


def test_lora_of_gpt3_has_the_papers_count() -> None:
    """r = 1 on q and v of 96 layers of width 12288: 4,718,592 (Hu et al. 2021, table 5)."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=12288,
        intermediate_size=64,
        num_hidden_layers=96,
        num_attention_heads=96,
        num_key_value_heads=96,
    )
    with torch.device("meta"):
        part = CausalLanguage(transformers.LlamaForCausalLM(config))
    method = Lora(r=1, target_modules=["q_proj", "v_proj"])
    method.attach(Place("language", part))
    assert sum(p.numel() for p in method.parameters.values()) == 4_718_592 == 96 * 2 * 2 * 12288


def test_what_does_not_train_is_read_too(tmp_path: Path) -> None:
    """VeRA's projections come from the file, whatever they were when it was attached."""
    part, other = language(), language()
    method = put(part, "vera", projection_prng_key=5)
    method.save(tmp_path, {key: p.detach().clone() for key, p in method.parameters.items()})
    again = put(other, "vera", projection_prng_key=6)
    for key, tensor in again.read(tmp_path).items():
        again.parameters[key].data.copy_(tensor)
    torch.testing.assert_close(logits(other), logits(part), atol=1e-6, rtol=0)
