"""Side networks: their counts, blocks that compute what theirs do, and the largest weights where pruned."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import timm
import tiny_languages
import torch
import transformers
from small_parts import meta
from torch import Tensor, nn

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.plan import apply_plan
from vlm_adapt.adapt.prune import magnitude, top, width_importance
from vlm_adapt.adapt.side_blocks import canonical, language_block, vision_block
from vlm_adapt.adapt.side_tuning import SideTuning
from vlm_adapt.config.schema import Adapt
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.language.causal import CausalLanguage
from vlm_adapt.language.language import Generation, LanguageInput
from vlm_adapt.vision.hf import FAMILIES, HFTower

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_count_on_smollm2() -> None:
    """30 rungs: a block of width 72, one head of 64, 192 inner units; a Down and a gate; start and Up."""
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    language = CausalLanguage(meta(lambda: transformers.LlamaForCausalLM(config)))
    method = SideTuning(r=8)
    method.attach(Place("language", language))
    d, s, head, inner = 576, 72, 64, 192
    block = 4 * s * head + 3 * s * inner + 2 * s
    assert sum(p.numel() for p in method.parameters.values()) == 30 * (block + d * s + 1) + 2 * d * s
    assert sum(p.numel() for p in method.parameters.values()) == 3_128_574
    assert all(p.device.type == "meta" for p in method.parameters.values())


def test_count_on_vit_base() -> None:
    """About L 12 (d/r)^2 + L d^2 / r, as the paper has it: here its 12 heads become one of 64, not of 96."""
    config = transformers.ViTConfig()
    model = meta(lambda: transformers.ViTModel(config, add_pooling_layer=False))
    tower = HFTower(model, FAMILIES["vit"], ImageSpec((224, 224)))
    method = SideTuning(r=8)
    method.attach(Place("vision", tower))
    d, s, head, inner = 768, 96, 64, 384
    block = 4 * s * head + 3 * head + s + 2 * s * inner + inner + s + 4 * s
    want = 12 * (block + d * s + 1) + 2 * d * s
    assert sum(p.numel() for p in method.parameters.values()) == want
    about = 12 * 12 * s**2 + 12 * d * s
    assert abs(want / about - 1) < 0.02
    assert "layers.11.side.down.weight" in "".join(method.parameters)


def plain_blocks() -> dict[str, nn.Module]:
    """Blocks of plain ViTs of every library, with every weight random."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    t: Any = transformers
    made: dict[str, nn.Module] = {
        "vit": t.ViTModel(t.ViTConfig(**sizes)).layers[0],
        "clip": t.CLIPVisionModel(t.CLIPVisionConfig(**sizes)).encoder.layers[0],
        "siglip": t.SiglipVisionModel(t.SiglipVisionConfig(**sizes)).encoder.layers[0],
        "dinov2": t.Dinov2Model(t.Dinov2Config(**{**sizes, "mlp_ratio": 2})).encoder.layer[0],
        "timm": timm.models.vision_transformer.Block(32, 4, qkv_bias=True, init_values=0.5),
        "open_clip": open_clip.transformer.ResidualAttentionBlock(32, 4, ls_init_value=0.5),
    }
    torch.manual_seed(3)
    for block in made.values():
        for parameter in block.parameters():
            parameter.data.normal_(0, 0.3)
    return made


@pytest.mark.parametrize("family", ["vit", "clip", "siglip", "dinov2", "timm", "open_clip"])
def test_a_block_of_our_own_computes_what_theirs_does(family: str) -> None:
    block = plain_blocks()[family].eval()
    hidden_NTD = torch.randn(2, 5, 32)
    arguments = {"attention_mask": None} if family in ("clip", "siglip") else {}
    output = block(hidden_NTD, **arguments)
    want = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(canonical(block, CPU)(hidden_NTD), want, atol=1e-4, rtol=1e-5)
    side = vision_block(block, 1, CPU)  # nothing pruned: the same block
    side.prune(torch.arange(32))
    torch.testing.assert_close(side.module(hidden_NTD), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gpt_neox", "olmo2", "gemma3"])
def test_pruned_of_nothing_a_languages_block_is_itself(family: str) -> None:
    block = CausalLanguage(tiny_languages.model(family)).blocks[1]
    for parameter in block.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    side = language_block(block, 1, 3, 1, CPU)
    side.prune(torch.arange(32))
    own = dict(block.named_parameters())
    assert own.keys() == dict(side.module.named_parameters()).keys()
    assert all(torch.equal(p, own[name]) for name, p in side.module.named_parameters())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_the_largest_weights_are_kept(family: str) -> None:
    """Channels and inner units whose weights are ten times as large: the side block is made of them."""
    language = CausalLanguage(tiny_languages.model(family))
    block = language.blocks[0]
    width, inner = 32, {"gpt2": 128}.get(family, 48)
    channels, units = torch.arange(1, 32, 2), torch.arange(0, inner, 2)
    mlp = {"llama": ("up_proj", "down_proj"), "phi3": ("gate_up_proj", "down_proj")}.get(
        family, ("dense_h_to_4h", "dense_4h_to_h") if family == "gpt_neox" else ("c_fc", "c_proj")
    )
    layers = {n.rpartition(".")[2]: m for n, m in block.named_modules() if "mlp" in n}
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(0.01)
        first, last = (layers[name].weight for name in mlp)
        rows_of_first, columns_of_last = (first.T, last.T) if family == "gpt2" else (first, last)
        rows_of_first[units] = 0.1
        columns_of_last[:, units] = 0.1
        rows_of_first[:, channels] *= 10
    side = language_block(block, 0, 2, 2, CPU)
    side.prune(top(importance(block, width), 16))
    made = {n.rpartition(".")[2]: m for n, m in side.module.named_modules() if "mlp" in n}
    got = made[mlp[0]].weight.T if family == "gpt2" else made[mlp[0]].weight
    kept = got[: inner // 2]
    torch.testing.assert_close(kept, torch.ones_like(kept))  # a large row and a large column meet
    assert importance(block, width).topk(16).indices.sort().values.tolist() == channels.tolist()


def importance(block: nn.Module, width: int) -> Tensor:
    return width_importance([block], width)


def test_the_same_start_from_any_dtype() -> None:
    """Which rows are kept does not depend on how the base was loaded: T5's distances go by head."""
    weight = torch.randn(64, 64)
    assert torch.equal(magnitude(weight), magnitude(weight.to(torch.bfloat16)))
    assert top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "gpt_neox", "olmo2", "qwen2_sliding"])
def test_other_families_generate_as_they_read(family: str) -> None:
    language = CausalLanguage(tiny_languages.model(family)).eval()
    apply_plan(
        {"language": language},
        [[Adapt.model_validate({"method": "side_tuning", "where": "language", "r": 2})]],
    )
    ids_BT = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    lengths = [9, 6]
    valid_BT = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    answers = language.generate(LanguageInput(language.embed(ids_BT), valid_BT), Generation(5), set())
    for ids_T, length, answer in zip(ids_BT, lengths, answers, strict=True):
        whole = torch.cat([ids_T[:length], torch.tensor(answer)])[None]
        inputs = LanguageInput(language.embed(whole), torch.ones_like(whole, dtype=torch.bool))
        logits_TV = language.logits(language.hidden(inputs))[0]
        assert logits_TV[length - 1 : -1].argmax(-1).tolist() == answer
