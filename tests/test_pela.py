"""PELA: a base of low rank, equal to the truncated singular value decomposition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rows
import tiny
import tiny_languages
import torch
from forks import write
from torch import nn

from vlm_adapt.adapt.pela import LowRankLinear, can_split, rank_of
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.plan import apply_plan, make_line
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage
from vlm_adapt.train.journal import read_journal

torch.set_num_threads(1)
FULL = {"method": "full", "where": "connector"}
# Llama of tiny.py, out x in of a block's layers.
SHAPES = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]


@pytest.fixture
def ours(parts: Path) -> Any:
    return rows.assemble(parts / "vit", parts / "llama")


def pela(**more: Any) -> Adapt:
    return Adapt.model_validate({"method": "pela", "where": "language"} | more)


def a_batch(ours: Any) -> Any:
    talks = [["<image>what color is the shape?", "red"], ["no", "yes"]]
    return rows.batch(ours, [rows.conversation(ours, *talk, seed=i) for i, talk in enumerate(talks)])


@pytest.mark.parametrize("ratio", [1.5, 3, 100])
def test_is_the_truncated_svd(ratio: float) -> None:
    """sqrt(S) in both factors, and the error of the best approximation: the tail of singular values."""
    torch.manual_seed(0)
    dense = nn.Linear(48, 20)
    rank = rank_of(20, 48, ratio)
    assert rank == max(1, int(np.floor(20 * 48 / (ratio * 68))))
    layer = LowRankLinear(dense, rank)
    weight = dense.weight.detach().double().numpy()
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    product = (layer.up.weight @ layer.down.weight).detach().double().numpy()
    best = left[:, :rank] * values[:rank] @ right[:rank]
    # Products of float32 factors of a decomposition in float32: a few of its last places (1.2e-7).
    np.testing.assert_allclose(product, best, atol=2e-6)
    tail = np.sqrt((values[rank:] ** 2).sum())
    np.testing.assert_allclose(np.linalg.norm(weight - product), tail, rtol=1e-5)
    for factor, shown in ((layer.up.weight, left.T), (layer.down.weight.T, right)):
        made = factor.detach().double().numpy()
        np.testing.assert_allclose(np.linalg.norm(made, axis=0), np.sqrt(values[:rank]), rtol=1e-5)
        cosines = (made / np.linalg.norm(made, axis=0) * shown[:rank].T).sum(0)
        np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-5)
    x = torch.randn(3, 5, 48)
    want = x @ torch.from_numpy(best).float().T + dense.bias
    torch.testing.assert_close(layer(x), want, atol=5e-6, rtol=0)
    assert sum(p.numel() for p in (layer.up.weight, layer.down.weight)) == rank * (20 + 48)


def test_whole_rank_is_the_layer() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    torch.testing.assert_close(LowRankLinear(dense, 8)(x), dense(x), atol=2e-6, rtol=0)


@pytest.mark.parametrize("ratio", [3, 1.2])
def test_counts(ours: Any, ratio: float) -> None:
    """r (in + out) of each layer trains; the dense weights are gone from the model."""
    before = sum(p.numel() for p in ours.model.language.parameters())
    plan = ours.adapt([[pela(ratio=ratio)]])
    want = 2 * sum(max(1, int(o * i / (ratio * (o + i)))) * (o + i) for o, i in SHAPES)
    row = {line["part"]: line for line in plan.table()}["language"]
    assert row["trainable"] == want
    assert row["frozen"] == before - 2 * sum(o * i for o, i in SHAPES)
    assert want < 2 * sum(o * i for o, i in SHAPES) / ratio + 2 * 7 * 96  # at most one rank from rounding


def test_counts_of_a_real_tower_without_weights() -> None:
    """ViT-B/16: four layers of a block, 768 wide; nothing is decomposed on meta."""
    import timm

    with torch.device("meta"):
        trunk = timm.create_model("vit_base_patch16_224", num_classes=0)
    part = nn.Module()
    part.model = trunk
    part.blocks = list(trunk.blocks)
    method = make_line(pela(where="vision"))
    method.attach(Place("vision", part))
    widths = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    ranks = [192, 128, 204, 204]  # floor(768 * 2304 / (3 * 3072)) = 192, …
    assert [rank_of(o, i, 3) for o, i in widths] == ranks
    want = 12 * sum(r * (o + i) for r, (o, i) in zip(ranks, widths, strict=True))
    assert want == 28_237_824  # of 84,934,656 dense
    assert sum(p.numel() for p in method.parameters.values()) == want
    assert all(p.is_meta for p in method.parameters.values())
    assert method.bytes_stored() == 4 * want


def test_switches_merges_and_starts_as_the_product(ours: Any) -> None:
    batch = a_batch(ours)
    dense = ours.model.logits(batch)
    names = {name for name, _ in ours.model.named_parameters()}
    twin = {
        name: module.weight.detach().clone()
        for name, module in ours.model.language.named_modules()
        if isinstance(module, nn.Linear) and "layers." in name
    }
    plan = ours.adapt([[pela()]])
    low = ours.model.logits(batch)
    assert not torch.allclose(low, dense, atol=1e-2)
    method = plan.attached[0].method
    method.set_active(False)
    assert torch.equal(ours.model.logits(batch), dense)
    method.set_active(True)
    assert torch.equal(ours.model.logits(batch), low)
    with torch.no_grad():
        for parameter in method.parameters.values():
            parameter.add_(0.01)
    moved = ours.model.logits(batch)
    method.merge()
    torch.testing.assert_close(ours.model.logits(batch), moved, atol=1e-4, rtol=1e-4)
    assert {name for name, _ in ours.model.named_parameters()} == names
    merged = {name: ours.model.language.get_submodule(name).weight for name in twin}
    assert all(torch.linalg.matrix_rank(merged[name].float()) < min(twin[name].shape) for name in twin)


@pytest.mark.parametrize("first", ["pela", "lora"])
def test_frozen_base_under_lora(ours: Any, first: str) -> None:
    """LoRA finds the factors in whatever order the plan names both; the base is not saved."""
    batch = a_batch(ours)
    lora = Adapt.model_validate(
        {"method": "lora", "where": "language", "r": 2, "target_modules": ["q_proj.up", "down"]}
    )
    lines = [pela(frozen=True), lora]
    plan = ours.adapt([lines if first == "pela" else lines[::-1]])
    assert [item.label for item in plan.attached] == ["language-pela", "language-lora"]
    factors = {id(f.weight) for layer in plan.attached[0].method.layers.values() for f in (layer.up,)}
    assert not [p for p in ours.model.parameters() if id(p) in factors and p.requires_grad]
    assert not plan.attached[0].method.parameters
    ours.model(batch)[0].backward()
    reached = [p for p in plan.attached[1].method.parameters.values() if p.grad is not None]
    assert len(reached) == len(plan.attached[1].method.parameters) == 2 * 2 * (1 + 7)
    with pytest.raises(UserError, match="another method sits on") as caught:
        plan.attached[0].method.merge()
    tiny.sentence(caught)
    with torch.no_grad():
        for parameter in plan.attached[1].method.parameters.values():
            parameter.add_(0.02)
    moved = ours.model.logits(batch)
    for item in reversed(plan.attached):
        item.method.merge()
    torch.testing.assert_close(ours.model.logits(batch), moved, atol=1e-4, rtol=1e-4)
    assert type(ours.model.language.blocks[0].self_attn.q_proj) is nn.Linear


def test_frozen_base_is_made_again(parts: Path, tmp_path: Path) -> None:
    """From the base's weights, to the bit, signs too: its folder holds no tensors."""
    logits = []
    for _ in range(2):
        ours = rows.assemble(parts / "vit", parts / "llama")
        plan = ours.adapt([[pela(frozen=True), Adapt.model_validate(FULL)]])
        method = plan.attached[0].method
        method.save(tmp_path, {})
        assert method.read(tmp_path) == {} and method.bytes_stored() == 0
        logits.append(ours.model.logits(a_batch(ours)))
    assert torch.equal(*logits)
    layer = next(iter(method.layers.values()))
    top = layer.down.weight.gather(1, layer.down.weight.abs().argmax(1, keepdim=True))
    assert (top > 0).all()


def test_conv1d() -> None:
    """GPT-2's layers lie the other way round, and merge back so."""
    language = CausalLanguage(tiny_languages.model("gpt2"))
    ids = torch.arange(1, 9)[None]
    dense = language.model(input_ids=ids).logits
    plan = apply_plan({"language": language}, [[pela(ratio=1)]])
    low = language.model(input_ids=ids).logits
    assert low.shape == dense.shape and not torch.equal(low, dense)
    plan.attached[0].method.set_active(False)
    assert torch.equal(language.model(input_ids=ids).logits, dense)
    plan.attached[0].method.set_active(True)
    plan.attached[0].method.merge()
    torch.testing.assert_close(language.model(input_ids=ids).logits, low, atol=1e-5, rtol=1e-5)
    assert type(language.model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


def test_t5_asks_a_layer_for_its_dtype(parts: Path, tmp_path: Path) -> None:
    ours = rows.assemble(parts / "vit", tiny.t5(tmp_path / "t5"))
    batch = rows.batch(ours, [rows.conversation(ours, "<image>no", "yes")])
    dense = ours.model.logits(batch)
    plan = ours.adapt([[pela(ratio=1)]])
    assert not torch.equal(ours.model.logits(batch), dense)
    plan.attached[0].method.set_active(False)
    assert torch.equal(ours.model.logits(batch), dense)


def test_layers_whose_weight_is_read_stay() -> None:
    attention = nn.Module()
    attention.attn = nn.MultiheadAttention(8, 2)
    attention.beit = nn.Module()
    attention.beit.qkv, attention.beit.q_bias = nn.Linear(8, 24, bias=False), nn.Parameter(torch.zeros(8))
    attention.fc = nn.Linear(8, 8)
    found = {name: can_split(attention, name) for name in ("attn.out_proj", "beit.qkv", "fc")}
    assert found == {"attn.out_proj": False, "beit.qkv": False, "fc": True}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"ratio": 0.5}, "ratio is a number from 1, not 0.5"),
        ({"frozen": "yes"}, "frozen is true or false, not 'yes'"),
        ({"ratoi": 2}, "has no setting 'ratoi', did you mean 'ratio'?"),
        ({"target_modules": "q_porj"}, "'q_porj' matches no layer, did you mean 'q_proj'?"),
        ({"where": "connector"}, "for vision and language, not for 'connector'"),
    ],
)
def test_refuses(ours: Any, line: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_plan(ours.model.parts(), [[pela(**line)]])
    assert said in tiny.sentence(caught)


@pytest.mark.slow
def test_sharded_factors_learn_the_same(parts: Path, tmp_path: Path, server: Any) -> None:
    """Two processes under ZeRO-3, biases and frozen factors too: the curve of one process."""
    whole = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": whole}))
    lines = [
        {"method": "pela", "where": "vision", "learning_rate": 1e-3},
        {"method": "pela", "where": "language", "frozen": True},
        {"method": "lora", "where": "language", "r": 4, "learning_rate": 1e-3},
    ]
    curves = []
    for ranks, size, engine in ((1, 8, "zero0"), (2, 4, str(tmp_path / "zero3.json"))):
        tree = tiny.run_tree(
            parts,
            str(tmp_path / f"{ranks}"),
            adapt=lines,
            train__max_steps=4,
            train__save_steps=0,
            train__per_device_train_batch_size=size,
            train__deepspeed=engine,
        )
        server.run(["train", write(tree)], ranks=ranks)
        curves.append([line["loss"] for line in read_journal(tmp_path / f"{ranks}") if "event" not in line])
    # Sums in another order, as in test_world.py.
    assert curves[0] == pytest.approx(curves[1], rel=3e-6) and len(curves[0]) == 4
