"""Small parts of many families for tests of methods that reach into blocks, and how to run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tiny_languages
import torch
from torch import Tensor, nn

from vlm_adapt.adapt.anatomy import anatomies
from vlm_adapt.adapt.place import Place
from vlm_adapt.connectors import build_connector

T5_BASE = 222_903_552


class Part(nn.Module):
    """A part of the least kind: the library's model, and its blocks."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.model, self.blocks = model, list(blocks)


def meta(build: Any) -> Any:
    with torch.device("meta"):
        return build()


def count(method: Any) -> int:
    assert all(p.device.type == "meta" for p in method.parameters.values())
    return sum(p.numel() for p in method.parameters.values())


def attach(method: Any, part: nn.Module, where: str = "vision", chosen: Any = None) -> Any:
    method.attach(Place(where, part, set(), chosen))
    return method


def shake(method: Any) -> None:
    """Give every parameter another value."""
    torch.manual_seed(7)
    for parameter in method.parameters.values():
        parameter.data.normal_(0, 0.3)


def blocks_of(family: str) -> tuple[Part, Any, list[nn.Module]]:
    """A small part of a family, how to run it, and its blocks."""
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 5]])
    if family == "t5":
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
        )
        t5: Any = T5ForConditionalGeneration(config).eval()
        return (
            (part := Part(t5, [*t5.encoder.block, *t5.decoder.block])),
            lambda: t5(ids, decoder_input_ids=ids, use_cache=False).logits,
            part.blocks,
        )
    if family in ("tiny_vit", "swin", "convnext", "convnext_conv"):
        from timm.models.convnext import ConvNeXtBlock
        from timm.models.swin_transformer import SwinTransformerBlock
        from timm.models.tiny_vit import TinyVitBlock

        made: dict[str, Any] = {
            "tiny_vit": lambda: TinyVitBlock(32, 4, 2),
            "swin": lambda: SwinTransformerBlock(32, (4, 4), 4, window_size=2, shift_size=1),
            "convnext": lambda: ConvNeXtBlock(32, ls_init_value=None),
            "convnext_conv": lambda: ConvNeXtBlock(32, ls_init_value=None, conv_mlp=True),
        }
        block = made[family]().eval()
        x = torch.randn(2, 32, 4, 4) if "convnext" in family else torch.randn(2, 4, 4, 32)
        return Part(block, [block]), lambda: block(x), [block]
    if family in ("resampler", "qformer"):
        small: Any = {"depth": 1, "heads": 2, "head_width": 8}
        if family == "qformer":
            sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
            small = {"queries": 3, "config": sizes | {"num_hidden_layers": 2}}
        connector: Any = build_connector(family, [32], [(2, 2)], 32, **small).eval()
        x = torch.randn(2, 4, 32)
        blocks = (
            [connector.get_submodule(name) for name, _ in anatomies(connector)]
            if family == "qformer"
            else None
        )
        return connector, lambda: connector([x]), blocks or list(connector.blocks)
    model = tiny_languages.model(family)
    blocks = next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    return Part(model, blocks), lambda: model(ids, use_cache=False).logits, blocks


def vit_base() -> Part:
    from transformers import ViTConfig, ViTModel

    model: Any = meta(lambda: ViTModel(ViTConfig(), add_pooling_layer=False))
    return Part(model, model.layers)


def t5_base() -> Part:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    model: Any = meta(lambda: T5ForConditionalGeneration(config))
    assert sum(p.numel() for p in model.parameters()) == T5_BASE
    return Part(model, [*model.encoder.block, *model.decoder.block])


def tiny_vit() -> Part:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model: Any = ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
            initializer_range=0.2,
        ),
        add_pooling_layer=False,
    )
    return Part(model.eval(), model.layers)


def written_out(method: Any, prefix: str, x: Tensor, act: Any, scale: float) -> Tensor:
    """The paper's formula on a file's tensors."""
    down, down_bias, up, up_bias = (
        method.parameters[f"{prefix}.{leaf}"] for leaf in ("down.weight", "down.bias", "up.weight", "up.bias")
    )
    return scale * (act(x @ down.T + down_bias) @ up.T + up_bias)
