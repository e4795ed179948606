"""Where queries, keys and values lie: LoRA on chosen ones in every fused layout that is known."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import tiny
import tiny_languages
import torch
import transformers
from projecting import CLOSE, Part, on, update
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.qkv_lora import QkvLora
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}


def test_head_by_head() -> None:
    """TinyViT's own split: only queries and values change, by their heads' rows."""
    attention = timm.models.tiny_vit.Attention(32, key_dim=4, num_heads=4, attn_ratio=2, resolution=(2, 2))
    x_NTD = torch.randn(2, 4, 32)

    def split() -> tuple[Tensor, ...]:
        return attention.qkv(x_NTD).view(2, 4, 4, -1).split([4, 4, 8], 3)

    base = split()
    method = on(Part(attention))
    q, k, v = split()
    torch.testing.assert_close(q, base[0] + update(method, "attn.qkv.q", x_NTD).view(2, 4, 4, 4), **CLOSE)
    torch.testing.assert_close(v, base[2] + update(method, "attn.qkv.v", x_NTD).view(2, 4, 4, 8), **CLOSE)
    assert torch.equal(k, base[1])
    method.merge()
    for got, want in zip(split(), (q, k, v), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_heads_first() -> None:
    """MaxViT's."""
    attention = timm.models.maxxvit.AttentionCl(32, dim_head=8, head_first=True)
    x_NTD = torch.randn(2, 4, 32)
    base = attention.qkv(x_NTD).view(2, 4, 4, 24).chunk(3, -1)
    method = on(Part(attention), projections="k")
    found = attention.qkv(x_NTD).view(2, 4, 4, 24).chunk(3, -1)
    want = base[1] + update(method, "attn.qkv.k", x_NTD).view(2, 4, 4, 8)
    torch.testing.assert_close(found[1], want, **CLOSE)
    assert torch.equal(found[0], base[0]) and torch.equal(found[2], base[2])


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox", "falcon", "falcon_new", "bloom", "llama"])
def test_languages(family: str) -> None:
    """Values alone leave the first block's attention as it was; queries or keys alone change it."""
    if family in ("falcon", "falcon_new"):
        groups = {"multi_query": True} if family == "falcon" else {"new_decoder_architecture": True}
        config: Any = transformers.FalconConfig(**SIZES, **groups, num_kv_heads=2)
        model = tiny.seeded(transformers.AutoModelForCausalLM.from_config, config)
    elif family == "bloom":
        config = transformers.BloomConfig(**SIZES, n_head=4, n_layer=2)
        model = tiny.seeded(transformers.AutoModelForCausalLM.from_config, config)
    else:
        model = tiny_languages.model(family)
    model.set_attn_implementation("eager")
    language = CausalLanguage(model)
    ids_BT = torch.tensor([[5, 6, 7, 8, 9]])

    def attention() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids_BT, output_attentions=True).attentions[0]

    base = attention()
    with torch.no_grad():
        logits = model(input_ids=ids_BT).logits
    for letter in "qkv":
        method = on(language, "language", projections=[letter], r=2)
        assert torch.equal(attention(), base) == (letter == "v")
        with torch.no_grad():
            changed = model(input_ids=ids_BT).logits
        assert not torch.allclose(changed, logits, atol=1e-3)
        method.merge()
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids_BT).logits, changed, atol=2e-4, rtol=1e-4)
        base, logits = attention(), changed


def test_groups_of_phi3() -> None:
    """Fewer keys and values than queries: 2 groups of 8 for 4 heads."""
    model = tiny_languages.model("phi3")
    method = on(CausalLanguage(model), "language")
    shapes = {
        key.split("qkv_proj.")[1]: tuple(p.shape) for key, p in method.parameters.items() if ".0." in key
    }
    assert shapes == {"q.lora_A": (4, 32), "q.lora_B": (32, 4), "v.lora_A": (4, 32), "v.lora_B": (16, 4)}
    layer = model.model.layers[0].self_attn.qkv_proj
    x_TD = torch.randn(3, 32)
    base = F.linear(x_TD, layer.weight)
    q, k, v = layer(x_TD).split([32, 16, 16], -1)
    key = "model.layers.0.self_attn.qkv_proj"
    torch.testing.assert_close(q, base[:, :32] + update(method, f"{key}.q", x_TD), **CLOSE)
    torch.testing.assert_close(v, base[:, 48:] + update(method, f"{key}.v", x_TD), **CLOSE)
    assert torch.equal(k, base[:, 32:48])


def test_weights_that_are_read() -> None:
    """BEiT multiplies by `qkv.weight` itself: a hook would never run there."""
    trunk: Any = timm.models.beit.Beit(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    attention = tiny.seeded(lambda _: trunk, None).blocks[0].attn
    weight = attention.qkv.weight.detach().clone()
    x_NTD = torch.randn(2, 5, 32)
    method = on(Part(attention))
    got = attention(x_NTD)
    method.merge()
    assert not torch.equal(attention.qkv.weight[:32], weight[:32])
    assert torch.equal(attention.qkv.weight[32:64], weight[32:64])
    torch.testing.assert_close(attention(x_NTD), got, **CLOSE)
    with pytest.raises(UserError, match="'attn.qkv' is multiplied by its whole weight at once"):
        QkvLora(lora_dropout=0.1).attach(Place("vision", Part(attention)))


def test_layouts_that_are_not_known() -> None:
    """Refused before anything is changed."""
    codegen = transformers.CodeGenConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    language = CausalLanguage(tiny.seeded(transformers.AutoModelForCausalLM.from_config, codegen))
    with pytest.raises(
        UserError, match="cannot tell where q, k and v lie in 'transformer.h.0.attn.qkv_proj'"
    ):
        QkvLora().attach(Place("language", language))
    assert not [name for name, _ in language.named_parameters() if "lora" in name]
    with pytest.raises(UserError, match="finds no query, key or value projection in 'connector'"):
        QkvLora().attach(Place("connector", nn.Sequential(nn.Linear(4, 4))))
