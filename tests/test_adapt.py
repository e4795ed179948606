"""The adaptation plan: what is counted, what trains, what is saved, and that peft itself reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rows
import tiny
import tiny_languages
import torch
import transformers

from vlm_adapt.adapt.full import Full
from vlm_adapt.adapt.lora import Lora
from vlm_adapt.adapt.method import read_tensors
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.tuner_targets import choose_layers
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage

torch.set_num_threads(1)
# Llama of tiny.py: width 32, 4 heads, 2 groups, inner width 64, 2 blocks.
SHAPES = {
    "q_proj": (32, 32),
    "k_proj": (32, 16),
    "v_proj": (32, 16),
    "o_proj": (32, 32),
    "gate_proj": (32, 64),
    "up_proj": (32, 64),
    "down_proj": (64, 32),
}
LORA = {"method": "lora", "where": "language", "r": 4}
FULL = {"method": "full", "where": "connector"}


@pytest.fixture
def ours(tmp_path: Path) -> Any:
    return rows.assemble(tiny.vit(tmp_path / "vit"), tiny.llama(tmp_path / "llama"), layers=[-2])


def lines(*plain: dict[str, Any]) -> list[Adapt]:
    return [Adapt.model_validate(line) for line in plain]


def a_batch(ours: Any) -> Any:
    talks = [["<image>what color is the shape?", "red"], ["no", "yes"]]
    return rows.batch(ours, [rows.conversation(ours, *talk, seed=i) for i, talk in enumerate(talks)])


def move(plan: Any, seed: int = 1) -> None:
    """Give every attached parameter another value, B too, so that updates are felt."""
    torch.manual_seed(seed)
    for item in plan.attached:
        for parameter in item.method.parameters.values():
            parameter.data.normal_(0, 0.1)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj", ["q_proj", "down_proj"], "layers.1.mlp.up_proj"])
def test_counts(ours: Any, targets: Any) -> None:
    """r (in + out) for each layer chosen, of two blocks; the head is no part of the blocks."""
    plan = ours.adapt([lines(LORA | {"target_modules": targets})])
    names = list(SHAPES) if targets == "all-linear" else [targets] if isinstance(targets, str) else targets
    blocks = 1 if "." in names[0] else 2
    want = blocks * sum(4 * sum(SHAPES[name.rpartition(".")[2]]) for name in names)
    row = {line["part"]: line for line in plan.table()}["language"]
    assert row["trainable"] == want and row["method"] == "lora"
    trainable = [p for p in ours.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == want
    assert {id(p) for _, _, group in plan.groups(1.0) for _, p in group} == {id(p) for p in trainable}


@pytest.mark.parametrize("where", ["vision", "connector", "language"])
def test_identity_at_the_start(ours: Any, where: str) -> None:
    """B is zero: the logits are the same to the bit until something has moved."""
    batch = a_batch(ours)
    before = ours.model.logits(batch)
    plan = ours.adapt([lines(LORA | {"where": where})])
    assert torch.equal(ours.model.logits(batch), before)
    move(plan)
    assert not torch.allclose(ours.model.logits(batch), before, atol=1e-3)


def test_misspelt_target(ours: Any) -> None:
    with pytest.raises(UserError, match="'q_porj' matches no layer, did you mean 'q_proj'?"):
        ours.adapt([lines(LORA | {"target_modules": ["k_proj", "q_porj"]})])
    with pytest.raises(UserError, match="'xyz' matches no layer: there are down_proj, gate_proj"):
        ours.adapt([lines(LORA | {"target_modules": "xyz"})])
    assert not [p for n, p in ours.model.named_parameters() if "lora" in n]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (LORA | {"rank": 4}, "method 'lora' has no setting 'rank'"),
        (LORA | {"lora_alhpa": 4}, "has no setting 'lora_alhpa', did you mean 'lora_alpha'?"),
        (LORA | {"r": 0}, "r is a whole number from 1, not 0"),
        (LORA | {"method": "lorra"}, "unknown adaptation method 'lorra', did you mean 'lora'?"),
        (FULL | {"r": 3}, "method 'full' has no setting 'r'"),
    ],
)
def test_bad_settings(ours: Any, line: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        ours.adapt([lines(line)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_unused_blocks_are_left_alone(ours: Any, method: str) -> None:
    """With layers [-2] of two, the last block and the final norm get no gradient: nothing there trains."""
    plan = ours.adapt([lines({"method": method, "where": "vision"})])
    names = list(plan.attached[0].method.parameters)
    assert names and any("layers.0." in name for name in names)
    assert not [name for name in names if "layers.1." in name or "layernorm." in name.split("layers")[0]]
    ours.model(a_batch(ours))[0].backward()
    still = [n for n, p in plan.attached[0].method.parameters.items() if p.grad is None]
    assert not still


def test_full_and_others_do_not_mix(ours: Any) -> None:
    with pytest.raises(UserError, match="'connector' has 'full' and 'lora' together"):
        ours.adapt([lines(FULL, LORA | {"where": "connector"})])
    with pytest.raises(UserError, match="nothing would train"):
        ours.adapt([[]])


def test_stages_add_up(ours: Any) -> None:
    """What an earlier stage trained stays attached, frozen, and acts; the same line goes on."""
    align, tune = lines(FULL), lines(FULL | {"learning_rate": 1e-5}, LORA)
    plan = ours.adapt([align, lines(LORA), lines(LORA | {"r": 2}, LORA | {"where": "vision"})])
    assert [(i.label, i.trains) for i in plan.attached] == [
        ("connector-full", False),
        ("language-lora", False),
        ("language-lora-2", True),
        ("vision-lora", True),
    ]
    trainable = {id(p) for p in ours.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for i in plan.attached if i.trains for p in i.method.parameters.values()}
    batch = a_batch(ours)
    move(plan)
    both = ours.model.logits(batch)
    for item in plan.attached[1:3]:  # each of the two adapters of one layer is felt
        kept = {key: p.data.clone() for key, p in item.method.parameters.items()}
        for parameter in item.method.parameters.values():
            parameter.data.zero_()
        assert not torch.allclose(ours.model.logits(batch), both, atol=1e-3)
        for key, parameter in item.method.parameters.items():
            parameter.data.copy_(kept[key])
    assert torch.equal(ours.model.logits(batch), both)
    assert {key for item in plan.attached[1:3] for key in item.method.parameters} == set(
        plan.attached[1].method.parameters
    )
    assert align[0].options == tune[0].options  # another rate is the same method


def test_a_rate_of_its_own(tmp_path: Path, ours: Any) -> None:
    plan = ours.adapt([lines(FULL), lines(FULL | {"learning_rate": 1e-5}, LORA)])
    assert [(i.label, i.trains) for i in plan.attached] == [("connector-full", True), ("language-lora", True)]
    assert [(part, rate) for part, rate, _ in plan.groups(3e-4)] == [("connector", 1e-5), ("language", 3e-4)]


def saved(plan: Any, folder: Path) -> Path:
    item = plan.attached[0]
    item.method.save(folder, {key: p.detach().cpu() for key, p in item.method.parameters.items()})
    return folder


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "target_modules": "q_proj"}, {"use_dora": True}])
def test_peft_reads_what_we_save(ours: Any, tmp_path: Path, more: dict[str, Any]) -> None:
    """peft's own loader on the base model of transformers gives our logits.

    1e-5: attention and the update are summed in another order; a wrong alpha or r is off by 1e-2."""
    from peft import PeftModel

    plan = ours.adapt([lines(LORA | {"lora_alpha": 6} | more)])
    move(plan)
    folder = saved(plan, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, folder).eval()
    batch = rows.batch(ours, [rows.conversation(ours, "no", "yes")])
    with torch.no_grad():
        want = theirs(input_ids=batch.ids_BT).logits
    torch.testing.assert_close(ours.model.logits(batch), want, atol=1e-5, rtol=0)
    tensors = plan.attached[0].method.read(folder)
    assert all(torch.equal(tensors[k], p) for k, p in plan.attached[0].method.parameters.items())


def test_files_that_cannot_be_read(ours: Any, tmp_path: Path) -> None:
    method = ours.adapt([lines(LORA)]).attached[0].method
    folder = saved(ours.plan, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    with pytest.raises(UserError, match="is not complete"):
        method.read(tmp_path)
    with pytest.raises(UserError, match="lacks 1 and has 0 unknown tensors .new.: it belongs to another"):
        read_tensors(path, {**method.parameters, "new": torch.zeros(1)})
    with pytest.raises(UserError, match=f"lacks 0 and has {len(method.parameters) - 1} unknown tensors"):
        read_tensors(path, dict(list(method.parameters.items())[:1]))
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:5], b"", b"not tensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is cut off or is no safetensors file") as caught:
            method.read(folder)
        assert "\n" not in str(caught.value)


def test_bf16_base_float32_adapters(ours: Any) -> None:
    """Frozen weights stay in bf16, what trains is float32; autocast joins them, gradients are float32."""
    ours.model.to(torch.bfloat16)
    ours.model.compute_dtype = torch.bfloat16
    plan = ours.adapt([lines(LORA, LORA | {"where": "vision"}, FULL)])
    batch = a_batch(ours)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = ours.model(batch)
    total.backward()
    assert total.dtype == torch.float32
    for name, parameter in ours.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert any(p.grad.any() for p in plan.attached[0].method.parameters.values())


def test_conv1d_of_gpt2() -> None:
    """GPT-2 keeps its linear layers transposed; LoRA's counts are the same."""
    language = CausalLanguage(tiny_languages.model("gpt2"))
    ids_BT = torch.tensor([[5, 6, 7]])
    before = language.model(input_ids=ids_BT).logits
    method = Lora(r=2)
    method.attach(Place("language", language))
    shapes = [(32, 96), (32, 32), (32, 128), (128, 32)]
    assert sum(p.numel() for p in method.parameters.values()) == 2 * sum(2 * (i + o) for i, o in shapes)
    assert torch.equal(language.model(input_ids=ids_BT).logits, before)


def test_full_trains_a_head_of_its_own() -> None:
    language = CausalLanguage(tiny_languages.model("llama"))
    method = Full()
    method.attach(Place("language", language))
    assert set(method.parameters) == {name for name, _ in language.named_parameters()}
    assert choose_layers(Place("language", language), "o_proj", ("linear",)) == [
        f"model.layers.{block}.self_attn.o_proj" for block in range(2)
    ]


@pytest.mark.parametrize(("settings", "scale"), [({}, 2.0), ({"lora_alpha": 6}, 1.5)])
def test_the_update_is_alpha_over_r_times_ba(settings: dict[str, float], scale: float) -> None:
    """W x + (lora_alpha / r) B A x, with lora_alpha twice r by default."""
    language = CausalLanguage(tiny_languages.model("llama"))
    layer = language.model.model.layers[0].self_attn.q_proj
    x_D = torch.randn(32, generator=torch.Generator().manual_seed(0))
    before = layer(x_D)
    method = Lora(r=4, target_modules="layers.0.self_attn.q_proj", **settings)
    method.attach(Place("language", language))
    a_RD, b_DR = (parameter.data.normal_() for parameter in method.parameters.values())
    assert a_RD.shape == (4, 32) and b_DR.shape == (32, 4)
    after = language.model.model.layers[0].self_attn.q_proj(x_D)
    torch.testing.assert_close(after, before + scale * b_DR @ (a_RD @ x_D), atol=1e-4, rtol=1e-5)
