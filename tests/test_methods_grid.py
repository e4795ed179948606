"""Every method of the table on every side it is for: train, save, load, go on, generate, switch, merge.

Generated from the table of methods: a new method joins it by its line there. What each method computes is
proven in a test of its own.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import rows
import tiny
import torch
from grid import (
    ABOUT,
    GRID,
    LENGTH,
    METHODS,
    batch_of,
    beside,
    built,
    forced,
    item_of,
    learn,
    marks,
    plain,
    trains,
)

from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.language.language import Generation
from vlm_adapt.train.contract import checksum


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of all three libraries' smallest kinds, and shards."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.vit(folder / "vit")
    tiny.llama(folder / "llama")
    return folder


@pytest.mark.parametrize(("method", "side"), GRID)
def test_trains_what_it_declares(parts: Path, method: str, side: str) -> None:
    """declared = requires_grad = what gets a gradient; everything else is the same to the bit."""
    ours = built(parts, method, side)
    declared = {id(p): f"{i.label}/{k}" for i in ours.plan.attached for k, p in i.method.parameters.items()}
    assert declared and (item_of(ours, method).method.parameters or not trains(method))
    asked = {id(p) for p in ours.model.parameters() if p.requires_grad}
    assert asked == set(declared)
    assert all(p.dtype == torch.float32 for p in ours.model.parameters() if p.requires_grad)
    ours.model.train()
    ours.model(batch_of(ours))[0].backward()
    without = [declared[id(p)] for p in ours.model.parameters() if p.requires_grad and p.grad is None]
    assert not without
    ours.model.zero_grad()
    # A batch without any image reaches every parameter too: ZeRO's ranks wait for one another.
    text = rows.batch(ours, [rows.conversation(ours, "no", "yes")])
    ours.model(text)[0].backward()
    without = [declared[id(p)] for p in ours.model.parameters() if p.requires_grad and p.grad is None]
    assert not without
    ours.model.zero_grad()
    frozen = {n: checksum(p) for n, p in ours.model.named_parameters() if id(p) not in declared}
    before = [p.detach().clone() for p in ours.model.parameters() if id(p) in declared]
    learn(ours, 3)
    assert {n: checksum(p) for n, p in ours.model.named_parameters() if id(p) not in declared} == frozen
    after = [p for p in ours.model.parameters() if id(p) in declared]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(("method", "side"), GRID)
def test_starts_as_it_says_and_switches_off(parts: Path, method: str, side: str) -> None:
    """The identity where the paper has it; switched off, the base's own logits to the bit."""
    ours = built(parts, method, side)
    base = plain(parts, ours)
    item = item_of(ours, method)
    batch = batch_of(base)
    want = base.model.logits(batch)
    mine = batch if not getattr(item.method, "virtual_tokens", 0) else batch_of(ours)
    if ABOUT[method]["identity"] and mine is batch:
        torch.testing.assert_close(ours.model.logits(batch), want, atol=1e-5, rtol=0)
    if not trains(method):
        return
    learn(ours, 2)
    changed = ours.model.logits(batch_of(ours))
    if changed.shape == want.shape:
        assert (changed - want).abs().max() > 1e-4
    for other in ours.plan.attached:
        other.method.set_active(False)
    off = ours.model.logits(batch_of(ours))
    if off.shape == want.shape:
        # 1e-5: a layer split in two (PiSSA, low-rank bases) adds its parts in another order.
        torch.testing.assert_close(off, want, atol=1e-5, rtol=0)
    for other in ours.plan.attached:
        other.method.set_active(True)
    assert torch.equal(ours.model.logits(batch_of(ours)), changed)


@pytest.mark.parametrize(("method", "side"), GRID)
def test_saves_loads_and_goes_on(parts: Path, tmp_path: Path, method: str, side: str) -> None:
    """From the files alone: the same logits; and the same steps after it as without the pause."""
    ours = built(parts, method, side)
    optimizer = learn(ours, 2)
    states = copy.deepcopy(optimizer.state_dict())  # loading would share its tensors
    for item in ours.plan.attached:
        tensors = {key: p.detach().clone() for key, p in item.method.parameters.items()}
        item.method.save(tmp_path / item.label, tensors)
        item.method.save_latent(tmp_path / item.label, tensors)
    stored = sum(p.stat().st_size for p in (tmp_path / item_of(ours, method).label).glob("*.safetensors"))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))
    if trains(method):
        assert stored >= item_of(ours, method).method.bytes_stored() > 0
    again = built(parts, method, side, seed=1)
    for item in again.plan.attached:
        tensors = item.method.read(tmp_path / item.label)
        assert set(tensors) == set(item.method.parameters)
        with torch.no_grad():
            for key, parameter in item.method.parameters.items():
                assert tensors[key].shape == parameter.shape, key
                parameter.copy_(tensors[key])
    torch.testing.assert_close(
        again.model.logits(batch_of(again)), ours.model.logits(batch_of(ours)), atol=1e-5, rtol=0
    )
    parameters = [p for item in again.plan.attached for p in item.method.parameters.values()]
    fresh = torch.optim.AdamW(parameters, lr=2e-2)
    fresh.load_state_dict(states)
    learn(ours, 1, optimizer)
    learn(again, 1, fresh)
    torch.testing.assert_close(
        again.model.logits(batch_of(again)), ours.model.logits(batch_of(ours)), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("method", "side"), GRID)
def test_generation_is_teacher_forcing(parts: Path, method: str, side: str) -> None:
    """A batch of unequal prompts, with and without images, with the key-value cache."""
    ours = built(parts, method, side)
    learn(ours, 2)
    questions = ["what color is the shape?", "<image>is the circle red?", "no", "<image>two<image>cats yes"]
    sentences = [ours.template.conversation(rows.chat(question)) for question in questions]
    encoded = [rows.row(ours, sentence, seed, learn=False) for seed, sentence in enumerate(sentences)]
    answers = ours.model.generate(rows.batch(ours, encoded), Generation(LENGTH), set())
    for seed, (sentence, answer) in enumerate(zip(sentences, answers, strict=True)):
        assert answer == forced(ours, sentence, seed, answer)


@pytest.mark.parametrize(("method", "side"), GRID)
def test_checkpointed_activations_change_nothing(parts: Path, method: str, side: str) -> None:
    """The same loss and gradients when blocks are run again in the backward pass."""
    found = []
    for checkpointing in (False, True):
        ours = built(parts, method, side)
        if checkpointing:
            ours.model.set_activation_checkpointing(True)
        ours.model.train()
        total, _ = ours.model(batch_of(ours))
        total.backward()
        grads = {
            f"{item.label}/{key}": p.grad
            for item in ours.plan.attached
            for key, p in item.method.parameters.items()
        }
        found.append((total.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-5)
    for key, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], grad, atol=1e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize(("method", "side"), [one for one in GRID if ABOUT[one.values[0]]["mergeable"]])
def test_merged_is_unmerged(parts: Path, method: str, side: str) -> None:
    """Folded into the base's weights: the same logits, and nothing of the method left."""
    ours = built(parts, method, side)
    learn(ours, 2)
    batch = batch_of(ours)
    before = ours.model.logits(batch)
    names = set(dict(plain(parts, ours).model.named_parameters()))
    item_of(ours, method).method.merge()
    after = ours.model.logits(batch)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)  # one product in place of two or three
    assert {name for name, _ in ours.model.named_parameters()} == names


@pytest.mark.parametrize(
    "method", [pytest.param(n, marks=marks(n)) for n in METHODS if not ABOUT[n]["mergeable"]]
)
def test_what_cannot_be_merged_says_so(parts: Path, method: str) -> None:
    side = ABOUT[method]["sides"][-1]
    ours = built(parts, method, side)
    if method in ("full", "last_blocks"):
        return  # they are the base's own weights: there is nothing to fold
    with pytest.raises(UserError, match="merge"):
        item_of(ours, method).method.merge()


@pytest.mark.parametrize(("method", "side"), GRID)
def test_bf16_base(parts: Path, method: str, side: str) -> None:
    """A bf16 base with float32 trainables: under autocast, and without as in a plain forward."""
    ours = rows.assemble(parts / "vit", parts / "llama", template="bare")
    ours.model.to(torch.bfloat16)
    ours.model.compute_dtype = torch.bfloat16
    line = {"method": method, "where": side, **ABOUT[method]["example"]}
    try:
        ours.adapt([[Adapt.model_validate(line), *beside(method, side)]])
    except UserError as error:
        pytest.skip(f"refused in one sentence: {error}")
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = ours.model(batch_of(ours))
        total.backward()
        ours.model.eval()
        assert torch.isfinite(ours.model.logits(batch_of(ours))).all()
    assert total.dtype == torch.float32 and torch.isfinite(total)
    for item in ours.plan.attached:
        for key, parameter in item.method.parameters.items():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key


@pytest.mark.parametrize(("method", "side"), GRID)
def test_counts_need_no_weights(parts: Path, method: str, side: str) -> None:
    """On the meta device: the same keys, shapes and bytes as on real weights."""
    from vlm_adapt.config.schema import Model
    from vlm_adapt.models.build import build

    real = built(parts, method, side)
    tree = {
        "vision": {"model": str(parts / "vit")},
        "connector": {"name": real.config.connector.name},
        "language": {"model": str(parts / "llama"), "template": "bare"},
    }
    empty = build(Model.model_validate(tree), torch.float32, empty=True)
    line = {"method": method, "where": side, **ABOUT[method]["example"]}
    plan = empty.adapt([[Adapt.model_validate(line), *beside(method, side)]])
    assert {p.device.type for p in empty.model.parameters()} == {"meta"}
    for mine, theirs in zip(plan.attached, real.plan.attached, strict=True):
        shapes = {key: tuple(p.shape) for key, p in mine.method.parameters.items()}
        assert shapes == {key: tuple(p.shape) for key, p in theirs.method.parameters.items()}
        assert mine.method.bytes_stored() == theirs.method.bytes_stored()
