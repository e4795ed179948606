"""Where attention and feed-forward are, in the blocks of every family of towers and languages we name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_languages
import torch
from torch import nn

from vlm_adapt.adapt.anatomy import Anatomy, anatomies, anatomy, width_of
from vlm_adapt.connectors import build_connector
from vlm_adapt.vision import build_tower

PLACES = ("attention", "attention_norm", "attention_end", "mlp", "mlp_norm", "mlp_start", "mlp_end")


def said(block: nn.Module, found: Anatomy, *more: str) -> dict[str, str | None]:
    """The names, below the block, of the places found."""
    names = {id(module): name for name, module in block.named_modules()}
    return {place: names.get(id(getattr(found, place))) for place in (*PLACES, *more)}


def want(
    attention: str | None,
    attention_norm: str | None,
    mlp: str | None,
    mlp_norm: str | None,
    attention_end: str | None = None,
    mlp_end: str | None = None,
    mlp_start: str | None = None,
) -> dict[str, str | None]:
    return {
        "attention": attention,
        "attention_norm": attention_norm,
        "attention_end": attention_end or attention,
        "mlp": mlp,
        "mlp_norm": mlp_norm,
        "mlp_start": mlp_start or mlp,
        "mlp_end": mlp_end or mlp,
    }


def check_residual(blocks: list[nn.Module], run: Any) -> None:
    """With nothing coming out of a block's ends, the block gives back what it was given."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((given, output[0] if isinstance(output, tuple) else output))

    for block in blocks:
        found = anatomy(block)
        for end in (found.attention_end, found.cross_attention_end, found.mlp_end):
            if end is not None:
                end.register_forward_hook(nothing)
        block.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        run()
    assert len(seen) == len(blocks)
    for given, got in seen:
        assert given.abs().max() > 0 and torch.equal(given, got)


LLAMA = want("self_attn", "input_layernorm", "mlp", "post_attention_layernorm")
GEMMA2 = want(
    "self_attn",
    "input_layernorm",
    "mlp",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)
PARALLEL = want("self_attn", "input_layernorm", "mlp", "input_layernorm")
LANGUAGES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    "phi": PARALLEL,
    "phi3": LLAMA,
    "granite": LLAMA,
    "hyperclovax": LLAMA,
    "cohere": PARALLEL,
    "cohere2": PARALLEL,
    "smollm3": LLAMA,
    "olmo2": want("self_attn", None, "mlp", None, "post_attention_layernorm", "post_feedforward_layernorm"),
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
    "gpt2": want("attn", "ln_1", "mlp", "ln_2"),
    "gpt_neox": want("attention", "input_layernorm", "mlp", "post_attention_layernorm"),
    "opt": want("self_attn", "self_attn_layer_norm", "fc2", "final_layer_norm", mlp_start="fc1"),
    "opt_projected": want("self_attn", None, "fc2", None, mlp_start="fc1"),
}


def language_blocks(model: Any) -> list[nn.Module]:
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


@pytest.mark.parametrize("family", LANGUAGES)
def test_languages(family: str) -> None:
    model = tiny_languages.model(family)
    blocks = language_blocks(model)
    for block in blocks:
        found = anatomy(block)
        assert found and said(block, found) == LANGUAGES[family]
        assert found.width == 32 and found.cross_attention is None and not found.channels_first
    if family != "opt_projected":  # whose norms follow the sums
        check_residual(blocks, lambda: model(torch.tensor([[5, 6, 7]])))


def test_t5(tmp_path: Path) -> None:
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(tiny.t5(tmp_path))
    for stack, last in ((model.encoder, 1), (model.decoder, 2)):
        for block in stack.block:
            found = anatomy(block)
            assert said(block, found) == want(
                "layer.0.SelfAttention",
                "layer.0.layer_norm",
                f"layer.{last}.DenseReluDense",
                f"layer.{last}.layer_norm",
            )
            cross = said(block, found, "cross_attention", "cross_attention_end", "cross_attention_norm")
            names = [cross[key] for key in list(cross)[-3:]]
            assert names == (
                ["layer.1.EncDecAttention"] * 2 + ["layer.1.layer_norm"] if last == 2 else [None] * 3
            )
            assert found.width == 32
    ids = torch.tensor([[5, 6, 7]])
    check_residual([*model.encoder.block, *model.decoder.block], lambda: model(ids, decoder_input_ids=ids))


NORMS = want("attention", "norm1", "mlp", "norm2", "layer_scale1", "layer_scale2")
CLIP = want("self_attn", "layer_norm1", "mlp", "layer_norm2")
HF = {
    "ViT": want("attention", "layernorm_before", "mlp", "layernorm_after"),
    "CLIPVision": CLIP,
    "SiglipVision": CLIP,
    "Siglip2Vision": CLIP,
    "Dinov2": NORMS,
    "DINOv3ViT": NORMS,
}


@pytest.mark.parametrize("family", HF)
def test_towers_of_transformers(family: str) -> None:
    import transformers

    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 8,
    }
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}Model")(config).eval()
    blocks = language_blocks(model)
    for block in blocks:
        found = anatomy(block)
        assert said(block, found) == HF[family] and found.width == 32
    if family != "Siglip2Vision":  # its input is made of patches; its block is SigLIP's
        check_residual(blocks, lambda: model(torch.randn(1, 3, 16, 16)))


PLAIN = want("attn", "norm1", "mlp", "norm2")
SCALED = want("attn", "norm1", "mlp", "norm2", "ls1", "ls2")
TIMM = {
    "vit_tiny_patch16_224": SCALED,
    "vit_small_patch14_reg4_dinov2": SCALED,
    "eva02_tiny_patch14_224": PLAIN,
    "swin_tiny_patch4_window7_224": PLAIN,
    "swinv2_cr_tiny_224": want("attn", None, "mlp", None, "norm1", "norm2"),
    "swinv2_tiny_window8_256": want("attn", None, "mlp", None, "norm1", "norm2"),
    "convnext_tiny": want(None, None, "mlp", "norm"),
    "convnext_pico": want(None, None, "mlp", "norm"),
}


@pytest.mark.parametrize("name", TIMM)
def test_towers_of_timm(name: str) -> None:
    """Of shapes alone; every block of the trunk that `Tower.blocks` would name."""
    import timm

    from vlm_adapt.vision.timm import _find_blocks

    with torch.device("meta"):
        trunk: Any = timm.create_model(name, num_classes=0)
    info = [dict(entry) for entry in trunk.feature_info]
    names, _, _ = _find_blocks(trunk, [entry["module"] for entry in info])
    assert names
    for block in map(trunk.get_submodule, names):
        found = anatomy(block)
        assert said(block, found) == TIMM[name]
        assert found.width == width_of(block.get_submodule("norm" if "convnext" in name else "norm1"))
        assert found.channels_first == (name == "convnext_pico")


def test_tiny_vit_has_its_norm_in_the_feed_forward() -> None:
    import timm

    with torch.device("meta"):
        trunk: Any = timm.create_model("tiny_vit_5m_224", num_classes=0)
    assert not anatomy(trunk.stages[0].blocks[0])  # convolutions only
    block = trunk.stages[1].blocks[0]
    found = anatomy(block)
    assert said(block, found) == want("attn", None, "mlp", "mlp.norm", mlp_start="mlp.fc1")
    assert found.width == 128


def test_nothing_is_known_of_convolutions() -> None:
    import timm

    with torch.device("meta"):
        trunk: Any = timm.create_model("efficientnet_b0", num_classes=0)
    assert not any(anatomy(block) for stage in trunk.blocks for block in stage)
    assert not list(anatomies(trunk.blocks))


def test_open_clip_and_navit() -> None:
    with torch.device("meta"):
        clip = build_tower("open_clip:ViT-S-32-alt", "random:")
    assert said(clip.blocks[0], anatomy(clip.blocks[0])) == want(
        "attn", "ln_1", "mlp", "ln_2", "ls_1", "ls_2"
    )
    ours = build_tower("navit:tiny", "random:", options={"width": 32, "depth": 1, "heads": 4})
    found = anatomy(ours.blocks[0])
    assert said(ours.blocks[0], found) == want("attention", "norm1", "mlp", "norm2") and found.width == 32


def test_connectors() -> None:
    resampler: Any = build_connector("resampler", [32], [(2, 2)], 32, depth=1, heads=2, head_width=8)
    block = resampler.blocks[0]
    assert said(block, anatomy(block)) == want(
        "to_out", "norm_latents", "feed_forward", "feed_forward.0", mlp_start="feed_forward.1"
    )
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    qformer: Any = build_connector("qformer", [32], [(2, 2)], 32, config=small)
    layers = dict(anatomies(qformer, "connector"))
    assert list(layers) == [f"connector.qformer.encoder.layer.{number}" for number in (0, 1)]
    block = qformer.qformer.encoder.layer[0]
    assert said(block, anatomy(block), "cross_attention", "cross_attention_end") == want(
        "attention",
        None,
        "output_query.dense",
        None,
        "attention.output.dense",
        mlp_start="intermediate_query",
    ) | {"cross_attention": "crossattention", "cross_attention_end": "crossattention.output.dense"}
    assert not list(anatomies(build_connector("mlp", [32], [(2, 2)], 32)))
