"""Biases, norms and batch norms alone: counts, what stays frozen, and the switch between two values."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from small_parts import Part, attach, blocks_of, count, meta, shake, t5_base, tiny_vit, vit_base
from tiny import sentence
from torch import nn

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.selective import BatchNorm, BitFit, NormTuning
from vlm_adapt.errors import UserError
from vlm_adapt.vision import build_tower

torch.set_num_threads(1)
KINDS = {"bitfit": BitFit, "norm_tuning": NormTuning, "batch_norm": BatchNorm}


def test_counts() -> None:
    """ViT-B without head, of both libraries: 12 (9 + 2) 768 + 2 * 768 biases; 25 LayerNorms."""
    trunk: Any = meta(lambda: timm.create_model("vit_base_patch16_224", num_classes=0))
    for part in (vit_base(), Part(trunk, list(trunk.blocks))):
        assert count(attach(BitFit(), part)) == 12 * 11 * 768 + 2 * 768 == 102_912
        assert count(attach(NormTuning(), part)) == 25 * 2 * 768 == 38_400
    assert count(attach(NormTuning(), t5_base(), "language")) == 62 * 768  # RMS norms have no bias
    assert count(attach(BitFit(), vit_base(), chosen=[0, -1])) == 2 * 11 * 768
    assert count(attach(NormTuning(), vit_base(), chosen="-1:")) == 2 * 2 * 768


def test_the_same_as_pefts_ln_tuning() -> None:
    """peft unfreezes what it is given names of: the same tensors when it is given all norms."""
    from peft import LNTuningConfig, get_peft_model

    ours, theirs = tiny_vit(), tiny_vit()
    method = attach(NormTuning(), ours)
    config = LNTuningConfig(target_modules=["layernorm", "layernorm_before", "layernorm_after"])
    model: Any = get_peft_model(theirs.model, config)  # type: ignore[arg-type]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    cleaned = {
        name.replace("base_model.model.", "model.").replace(".ln_tuning_layers.default", "") for name in names
    }
    assert set(method.parameters) == cleaned and len(cleaned) == 2 * (2 * 2 + 1)


def test_what_is_a_bias() -> None:
    """Fused attention's too; position tables are none."""
    clip: Any = meta(lambda: build_tower("open_clip:ViT-S-32-alt", "random:"))
    keys = list(attach(BitFit(), clip).parameters)
    assert any(key.endswith("attn.in_proj_bias") for key in keys)
    trunk: Any = meta(lambda: timm.create_model("tiny_vit_5m_224", num_classes=0))
    blocks = [block for stage in trunk.stages for block in stage.blocks]
    keys = list(attach(BitFit(), Part(trunk, blocks)).parameters)
    assert keys and not [key for key in keys if "attention_biases" in key]
    assert all(key.endswith(".bias") for key in keys)


def test_batch_norm_statistics_stay() -> None:
    """Weights and biases of every batch norm move; statistics and all else do not, in training mode too."""
    tower: Any = build_tower("timm:efficientnet_lite0", "random:", image_size=32)
    place = Place("vision", tower)
    method = BatchNorm()
    method.attach(place)
    norms = [m for m in tower.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(method.parameters) == 2 * len(norms) > 50
    tower.requires_grad_(False)
    for parameter in method.parameters.values():
        parameter.requires_grad_(True)
    tower.train()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    optimizer = torch.optim.SGD(method.parameters.values(), lr=0.1)
    tower(torch.randn(2, 3, 32, 32))[0].square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in tower.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(method.parameters)


@pytest.mark.parametrize("name", ["bitfit", "norm_tuning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switch_and_merge(name: str, dtype: torch.dtype) -> None:
    """Off is the base to the bit, on what was trained; merging takes nothing away."""
    part = tiny_vit().to(dtype)
    model: Any = part.model
    pixels = torch.randn(1, 3, 16, 16, dtype=dtype)

    @torch.no_grad()
    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(pixels).last_hidden_state

    before = run()
    method = attach(KINDS[name](), part)
    for parameter in method.parameters.values():
        parameter.data = parameter.data.float()  # as the plan does
    torch.testing.assert_close(run(), before, atol=2e-2 if dtype == torch.bfloat16 else 0, rtol=0)
    base = run()
    shake(method)
    after = run()
    assert not torch.allclose(after, before, atol=0.1)
    method.set_active(False)
    method.set_active(False)
    assert torch.equal(run(), base)
    method.set_active(True)
    assert torch.equal(run(), after)
    method.set_active(False)
    method.merge()
    assert torch.equal(run(), after) and not method.parameters
    method.set_active(False)  # there is no other value any more
    assert torch.equal(run(), after)


def test_unused_is_left_out() -> None:
    part = tiny_vit()
    method = NormTuning()
    method.attach(Place("vision", part, {"model.layers.1", "model.layernorm"}))
    assert {key.split(".layernorm")[0] for key in method.parameters} == {"model.layers.0"}


@pytest.mark.parametrize(
    ("kind", "family", "said"),
    [
        (BitFit, "llama", "'bitfit' on 'language': LlamaForCausalLM has no biases: take norm_tuning or lora"),
        (BatchNorm, "llama", "'batch_norm' on 'language': LlamaForCausalLM has no batch norms"),
        (NormTuning, "convnext_conv", None),
    ],
)
def test_nothing_to_train(kind: Any, family: str, said: str | None) -> None:
    part, _, _ = blocks_of(family)
    if said is None:  # timm's LayerNorm2d is one
        assert len(attach(kind(), part).parameters) == 2
        return
    with pytest.raises(UserError, match=said) as caught:
        attach(kind(), part, "language")
    sentence(caught)
    with pytest.raises(UserError, match="in the blocks chosen"):
        attach(kind(), part, "language", chosen=0)
