"""Learning from a teacher: the formulas, who is moved and who is not, and what cannot teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny
import torch
from forks import write
from safetensors.torch import load_file
from teaching import ALL, DISTIL, LORA, student, trained

from vlm_adapt.config.load import validate
from vlm_adapt.config.schema import Run
from vlm_adapt.errors import UserError
from vlm_adapt.models.objectives import distillation as objective
from vlm_adapt.models.objectives.distillation import divergence
from vlm_adapt.train.journal import read_journal
from vlm_adapt.train.run import train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(parts, tmp_path_factory.mktemp("distil") / "teacher")


def a_batch(ours: Any, which: tuple[int, ...] = (0, 1, 2)) -> Any:
    talks = [["<image>what color is the shape?", "red"], ["no", "yes"], ["is<image>it<image>red?", "a photo"]]
    made = [rows.conversation(ours, *talk, seed=i) for i, talk in enumerate(talks)]
    return rows.batch(ours, [made[i] for i in which])


def written_out(ours: Any, batch: Any, features: str) -> torch.Tensor:
    """The loss of each target, straight from the formula, a row of the batch at a time."""
    model, its, settings = ours.model, ours.model.teacher.model, ours.model.teacher.settings
    logits, targets = [], batch.targets_N
    for one in (model, its):
        with torch.no_grad():
            whole = one.language.logits(one.language.hidden(one.inputs(batch)))
        logits.append(whole.flatten(0, 1)[batch.predict_from_N].double())
    z, y = logits
    T = settings.temperature
    p, q = (y / T).softmax(1), (z / T).softmax(1)
    ce = -z.log_softmax(1)[torch.arange(len(targets)), targets]
    kl = T**2 * (p * (p.log() - q.log())).sum(1)
    with torch.no_grad():
        if features == "connector":
            mine, other = model.image_tokens(batch.images), its.image_tokens(batch.images)
        else:
            mine, other = model.features(batch.images)[0], its.features(batch.images)[0]
    square = ((mine - other) ** 2).flatten(1).mean(1).double()
    of_row = torch.stack([square[0], torch.zeros(()).double(), square[1:3].mean()])
    mse = of_row[batch.predict_from_N // batch.ids_BT.shape[1]]
    return settings.language_weight * ce + settings.distill_weight * kl + settings.feature_weight * mse


@pytest.mark.parametrize("features", ["connector", "vision"])
def test_is_the_formula(parts: Path, teacher: Path, features: str) -> None:
    more = {"train__temperature": 3.0, "train__language_weight": 0.5, "train__distill_weight": 0.7}
    ours = student(parts, teacher, **more, train__feature_weight=1.5, train__distill_features=features)
    batch = a_batch(ours)
    total, losses_N = ours.model(batch)
    want_N = written_out(ours, batch, features)
    # Float32 sums over 300 words against float64.
    torch.testing.assert_close(losses_N.double(), want_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total.double(), want_N.sum(), atol=1e-4, rtol=1e-5)
    # Each of the terms is felt.
    for weight in ("language", "distill", "feature"):
        other = student(
            parts, teacher, **(more | {f"train__{weight}_weight": 0.1}), train__distill_features=features
        )
        assert abs(float((other.model(batch)[0] - total).detach())) > 1e-3, weight


def test_gradient_of_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd on the formula in float64, rows in pieces; a table padded further counts the same."""
    monkeypatch.setattr(objective, "VALUES_AT_ONCE", {"cpu": 100})
    torch.manual_seed(0)
    z, y, weights = torch.randn(7, 33) * 3, torch.randn(7, 40) * 3, torch.rand(7)
    for temperature in (1.0, 2.0, 5.0):
        ours = z.clone().requires_grad_()
        found = divergence(ours, y, temperature)
        (found * weights).sum().backward()
        plain = z.double().requires_grad_()
        p = (y[:, :33].double() / temperature).softmax(1)
        want = temperature**2 * (p * (p.log() - (plain / temperature).log_softmax(1))).sum(1)
        (want * weights).sum().backward()
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.grad.double(), plain.grad, atol=2e-6, rtol=1e-5)
    y[:, 5] = -torch.inf
    assert torch.isfinite(divergence(z, y, 2.0)).all()


def test_its_own_teacher_teaches_nothing(parts: Path, teacher: Path, tmp_path: Path) -> None:
    """A student that is its teacher: KL and features are 0, and so is every gradient."""
    ours = student(parts, teacher, train__language_weight=0.0)
    for item in ours.plan.attached:
        (file,) = (teacher / "checkpoint-3" / item.label).glob("*.safetensors")
        tensors = load_file(file)
        with torch.no_grad():
            for key, parameter in item.method.parameters.items():
                parameter.copy_(tensors[key])
    total, losses_N = ours.model(a_batch(ours))
    total.backward()
    grads = [p.grad for item in ours.plan.attached for p in item.method.parameters.values()]
    assert float(total.detach()) == 0 and not losses_N.any()
    assert all(grad is not None and not grad.any() for grad in grads)


def test_a_batch_is_the_sum_of_its_rows(parts: Path, teacher: Path) -> None:
    """However texts are spread over microbatches and ranks; rows without images or targets run too."""
    ours = student(parts, teacher)
    whole = ours.model(a_batch(ours))[0]
    apart = [ours.model(a_batch(ours, (i,)))[0] for i in range(3)]
    torch.testing.assert_close(sum(apart), whole, atol=1e-4, rtol=1e-5)
    nothing, losses_N = ours.model(a_batch(ours, ()))
    nothing.backward()
    assert float(nothing) == 0 and len(losses_N) == 0
    assert all(p.grad is not None for i in ours.plan.attached for p in i.method.parameters.values())


def test_many_targets_are_recomputed(parts: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (4096, 2):
        monkeypatch.setattr(objective, "LOGIT_ROWS_AT_ONCE", most)
        ours = student(parts, teacher)
        ours.model(a_batch(ours))[0].backward()
        found.append([p.grad for i in ours.plan.attached for p in i.method.parameters.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_trains_towards_its_teacher(parts: Path, teacher: Path, tmp_path: Path, capsys: Any) -> None:
    """From the command's road: the divergence falls, the teacher stays, and it is no part of the student."""
    changes = DISTIL | {"train__teacher": str(teacher), "train__language_weight": 0.0, "adapt": ALL}
    run = tiny.run_of(parts, tmp_path / "out", **changes, train__max_steps=24, train__save_steps=12)
    assert train(run) == 0
    told = capsys.readouterr().err
    assert f"teacher {teacher}: logits at temperature 2 and features of 'connector'" in told
    lines = [line for line in read_journal(tmp_path / "out") if "event" not in line]
    first, last = (sum(line["loss"] for line in some) / 6 for some in (lines[:6], lines[-6:]))
    assert last < 0.7 * first
    held = load_file(tmp_path / "out" / "checkpoint-24" / "language-lora" / "adapter_model.safetensors")
    assert not [key for key in held if "teacher" in key]
    (tmp_path / "out" / "latest").write_text("checkpoint-12")
    assert train(run) == 0  # and goes on with it
    again = load_file(tmp_path / "out" / "checkpoint-24" / "language-lora" / "adapter_model.safetensors")
    assert all(torch.equal(held[key], again[key]) for key in held)


def test_the_base_teaches_its_low_rank_self(parts: Path, tmp_path: Path) -> None:
    """`base`: towers see the same images, languages the student's own image tokens."""
    pela = [{"method": "pela", "where": where, "learning_rate": 3e-3} for where in ("vision", "language")]
    ours = student(parts, "base", adapt=pela, train__language_weight=0.0)
    told = ours.model.teacher
    assert told.compares == "vision" and not told.own_tokens
    batch = a_batch(ours)
    assert float(ours.model(batch)[0].detach()) > 1
    for item in ours.plan.attached:
        item.method.set_active(False)
    assert float(ours.model(batch)[0].detach()) == 0  # dense again, it is the base
    changes = DISTIL | {"train__teacher": "base", "train__language_weight": 0.0, "adapt": pela}
    assert (
        train(tiny.run_of(parts, tmp_path / "out", **changes, train__max_steps=24, train__save_steps=0)) == 0
    )
    lines = [line for line in read_journal(tmp_path / "out") if "event" not in line]
    first, last = (sum(line["loss"] for line in some) / 6 for some in (lines[:6], lines[-6:]))
    assert last < 0.8 * first


def test_features_alone(parts: Path, teacher: Path) -> None:
    """Without words the language does not run."""
    more = {"train__language_weight": 0.0, "train__distill_weight": 0.0, "adapt": ALL[:2]}
    ours = student(parts, teacher, **more)
    ours.model.language.hidden = None
    total, losses_N = ours.model(a_batch(ours))
    total.backward()
    assert losses_N.sum() > 0
    assert all(p.grad is not None for i in ours.plan.attached for p in i.method.parameters.values())


def test_other_shapes_are_noted(parts: Path, teacher: Path, tmp_path: Path) -> None:
    """Logits are taught all the same; with nothing left to teach it is an error."""
    wide = tiny.llama(tmp_path / "wide", width=48)
    more = {"model__language": {"model": str(wide)}}
    ours = student(parts, teacher, **more)
    assert ours.model.teacher.compares == ""
    assert ours.model.teacher.notes[1].startswith("features are not compared: the teacher's 'connector'")
    assert "(4, 32) and ours (4, 48)" in ours.model.teacher.notes[1]
    ours.model(a_batch(ours))[0].backward()
    with pytest.raises(UserError, match="teaches nothing") as caught:
        student(parts, teacher, **more, train__distill_weight=0.0)
    tiny.sentence(caught)
    frozen = student(parts, teacher, adapt=[LORA])
    assert "nothing before 'connector' features trains" in frozen.model.teacher.notes[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_learn_the_same(
    parts: Path, teacher: Path, tmp_path: Path, server: Any, stage: str
) -> None:
    """The curve of one process; the teacher is whole on every rank, and ZeRO-3 shards the student alone."""
    whole = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": whole}))
    curves = []
    for ranks, size, engine in ((1, 8, "zero0"), (2, 4, stage)):
        tree = tiny.run_tree(
            parts,
            str(tmp_path / f"{ranks}"),
            adapt=ALL,
            **DISTIL,
            train__teacher=str(teacher),
            train__max_steps=4,
            train__save_steps=0,
            train__per_device_train_batch_size=size,
            train__deepspeed=str(tmp_path / "zero3.json") if engine == "zero3" else engine,
        )
        assert isinstance(validate(tree, "x"), Run)
        server.run(["train", write(tree)], ranks=ranks)
        curves.append([line["loss"] for line in read_journal(tmp_path / f"{ranks}") if "event" not in line])
    # Sums in another order, as in test_world.py.
    assert curves[0] == pytest.approx(curves[1], rel=3e-6) and len(curves[0]) == 4
