"""Bottleneck adapters: counts of the papers, a formula written out, together, switched, refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_parts import (
    T5_BASE,
    Part,
    attach,
    blocks_of,
    count,
    meta,
    shake,
    t5_base,
    tiny_vit,
    vit_base,
    written_out,
)
from tiny import sentence
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.adapt.bottleneck import AdaptFormer, Houlsby, ParallelAdapter, Pfeiffer
from vlm_adapt.connectors import build_connector
from vlm_adapt.errors import UserError

torch.set_num_threads(1)
KINDS = {
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "parallel_adapter": ParallelAdapter,
    "adaptformer": AdaptFormer,
}


def test_counts_of_the_papers() -> None:
    """AdaptFormer on ViT-B, and Houlsby on T5-base as Karimi Mahabadi et al. 2021 count it."""
    d, b = 768, 64
    assert count(attach(AdaptFormer(), vit_base())) == 12 * (2 * d * b + b + d) == 1_189_632
    assert count(attach(Houlsby(bottleneck=64), vit_base())) == 2 * 1_189_632
    assert count(attach(Pfeiffer(bottleneck=64), vit_base())) == 1_189_632
    assert count(attach(ParallelAdapter(bottleneck=64), vit_base())) == 1_189_632
    houlsby = attach(Houlsby(bottleneck=24, layer_norms=True), t5_base(), "language")
    assert round(100 * count(houlsby) / T5_BASE, 3) == 0.832
    assert count(houlsby) == 48 * (2 * d * 24 + 24 + d) + 62 * d
    assert count(attach(AdaptFormer(), vit_base(), chosen="-3:")) == 3 * (2 * d * b + b + d)


def test_keys_are_the_librarys_names() -> None:
    keys = list(attach(Houlsby(bottleneck=4), vit_base(), chosen=3).parameters)
    ends = ["down.weight", "down.bias", "up.weight", "up.bias"]
    assert keys == [f"layers.3.houlsby.{place}.{end}" for place in ("attention", "mlp") for end in ends]


@pytest.mark.parametrize("name", KINDS)
def test_a_block_written_out(name: str) -> None:
    """One block of a ViT, formula by formula. 1e-6: float32 rounds 7 digits, values are about 1."""
    part = tiny_vit()
    block: Any = part.blocks[1]
    method = attach(KINDS[name](bottleneck=5), part)
    shake(method)
    x = torch.randn(2, 5, 32)

    def adapter(place: str, of: Tensor) -> Tensor:
        act = {"houlsby": functional.gelu}.get(name, torch.relu)
        scale = {"parallel_adapter": 4.0, "adaptformer": 0.1}.get(name, 1.0)
        return written_out(method, f"layers.1.{name}.{place}", of, act, scale)

    with torch.no_grad():
        got = block(x)
        method.set_active(False)
        attended = block.attention(block.layernorm_before(x))[0]
        if name == "houlsby":
            attended = attended + adapter("attention", attended)
        middle = x + attended
        normed = block.layernorm_after(middle)
        fed = block.mlp(normed)
        read = {"parallel_adapter": normed, "adaptformer": middle}.get(name, fed)
        want = middle + fed + adapter("mlp", read)
        torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), atol=1e-6, rtol=0)


def test_layer_norms_follow() -> None:
    """`layer_norms` trains them too, within the blocks that are meant, and switches them as well."""
    part, run, _ = blocks_of("llama")
    method = attach(Houlsby(bottleneck=5, layer_norms=True), part, "language", chosen=1)
    norms = [key for key in method.parameters if "norm" in key]
    assert norms == [f"model.model.layers.1.{n}_layernorm.weight" for n in ("input", "post_attention")]
    with torch.no_grad():
        before = run()
        shake(method)
        after = run()
        method.set_active(False)
        assert torch.equal(run(), before)
        method.set_active(True)
        assert torch.equal(run(), after)


def test_two_on_one_side_and_copies() -> None:
    """Adapters add up, each under its own name; a copy of a block calls its own adapters."""
    part, run, blocks = blocks_of("llama")
    first, second = (attach(Pfeiffer(bottleneck=size), part, "language") for size in (3, 5))
    parallel = attach(ParallelAdapter(bottleneck=2), part, "language")
    assert [n for n, _ in blocks[0].named_children()][-3:] == ["pfeiffer", "pfeiffer_2", "parallel_adapter"]
    outputs = []
    with torch.no_grad():
        for method in (first, second, parallel):
            outputs.append(run())
            shake(method)
        outputs.append(run())
        assert len({float(output.sum()) for output in outputs}) == 4
        x, norm = torch.randn(1, 3, 32), nn.Identity()
        copied: Any = copy.deepcopy(blocks[0])
        want = copied.mlp(norm(x))
        for parameter in first.parameters.values():
            parameter.zero_()
        assert torch.equal(copied.mlp(norm(x)), want)


def test_a_connector_within_others() -> None:
    """State vectors make the connector a ModuleDict: the adapters are in the model itself."""
    connector, run, blocks = blocks_of("resampler")
    both = nn.ModuleDict({"connector": connector, "state_projector": nn.Linear(2, 2)})
    method = attach(Pfeiffer(bottleneck=3), both, "connector")
    assert list(method.parameters)[0] == "connector.blocks.0.pfeiffer.mlp.down.weight"
    assert {id(p) for p in method.parameters.values()} <= {id(p) for p in connector.parameters()}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bottleneck": 0}, "houlsby's bottleneck is a whole number from 1, not 0"),
        ({"activation": "geluu"}, "no activation 'geluu', did you mean 'gelu'?"),
        ({"scale": 0}, "scale is a number that is not 0"),
        ({"dropout": 1.0}, "dropout is from 0 to below 1, not 1.0"),
        ({"layer_norms": "yes"}, "layer_norms is true or false, not 'yes'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("?", r"\?")) as caught:
        Houlsby(**settings)
    sentence(caught)


def test_nowhere_to_go() -> None:
    mlp = build_connector("mlp", [32], [(2, 2)], 32)
    with pytest.raises(
        UserError, match="'adaptformer' finds no block with feed-forward in 'connector'"
    ) as caught:
        attach(AdaptFormer(), mlp, "connector")
    sentence(caught)
    import timm

    trunk: Any = meta(lambda: timm.create_model("tiny_vit_5m_224", num_classes=0))
    blocks = [block for stage in trunk.stages for block in stage.blocks]
    with pytest.raises(UserError, match=r"no attention and feed-forward in block 0 of 'vision' \(MBConv\)"):
        attach(Houlsby(), Part(trunk, blocks), chosen=[0, 3])
    assert not [name for name, _ in trunk.named_parameters() if "houlsby" in name]
    assert count(attach(AdaptFormer(), Part(trunk, blocks))) == sum(
        depth * (128 * width + 64 + width) for depth, width in ((2, 128), (6, 160), (2, 320))
    )
