"""Fine-tuning of promptable models: losses by formula, best of three masks, batches cut anyhow, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_masks
import tiny_prompts
import torch

from vlm_adapt.config.load import validate
from vlm_adapt.config.schema import Adapt
from vlm_adapt.data.prompt_batch import collate_prompts
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.promptable import evaluate, figures
from vlm_adapt.models.build import build
from vlm_adapt.models.objectives.promptable import (
    dice,
    focal,
    intersection_over_union,
    predict,
    prompt_losses,
)

CLOSE = 1e-5  # float32 sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts and shards."""
    made = tmp_path_factory.mktemp("prompts")
    tiny_prompts.run_tree(made)
    tiny_masks.bert(made / "bert")
    return made


def assembled_of(folder: Path, text: bool = False, **changes: Any) -> tuple[Any, Any]:
    """(assembled model with its plan, run)."""
    if text:
        changes = {"model__text": {"model": str(folder / "bert")}} | changes
    run = validate(tiny_prompts.run_tree(folder, text=text, **changes), "x")
    assembled = build(run.model, torch.float32, seed=1)
    assembled.adapt([run.adapt])
    return assembled, run


def rows_of(assembled: Any, run: Any, count: int = 4) -> list[Any]:
    reader = assembled.reader(run.data.train, 0, run.data)
    return [reader.row(number, 0, number) for number in range(count)]


def drawn(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits, inside, known = torch.randn(shape) * 3, torch.rand(shape) < 0.4, torch.rand(shape) < 0.8
    return logits, inside & known, known


def test_focal_by_formula() -> None:
    logits, inside, known = drawn(3, 50)
    for place in range(3):
        total = 0.0
        for x, t, k in zip(
            logits[place].tolist(), inside[place].tolist(), known[place].tolist(), strict=True
        ):
            p = 1 / (1 + np.exp(-x))
            q, a = (p, 0.25) if t else (1 - p, 0.75)
            total += -a * (1 - q) ** 2 * np.log(q) * k
        want = total / known[place].sum().item()
        assert focal(logits, inside, known)[place].item() == pytest.approx(want, rel=CLOSE)


def test_dice_and_iou_by_formula() -> None:
    logits, inside, known = drawn(3, 50)
    for place in range(3):
        kept = known[place]
        p, t = logits[place][kept].sigmoid(), inside[place][kept].float()
        want = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        assert dice(logits, inside, known)[place].item() == pytest.approx(want.item(), rel=CLOSE)
        shown, truth = (
            set((logits[place][kept] > 0).nonzero().flatten().tolist()),
            set(t.nonzero().flatten().tolist()),
        )
        iou = len(shown & truth) / len(shown | truth)
        found = intersection_over_union(logits > 0, inside, known)[place].item()
        assert found == pytest.approx(iou, rel=CLOSE)
    nothing = torch.zeros(4, dtype=torch.bool)
    assert intersection_over_union(nothing, nothing, ~nothing).item() == 0


def test_loss_of_a_prompt() -> None:
    torch.manual_seed(0)
    logits, iou = torch.randn(1, 2, 3, 4, 4) * 3, torch.rand(1, 2, 3)
    target = (torch.rand(1, 2, 4, 4) < 0.5).to(torch.uint8)
    target[0, 0, 0] = 255
    for prompt in range(2):
        known = target[0, prompt].flatten() != 255
        inside = target[0, prompt].flatten() == 1
        flat = logits[0, prompt].flatten(1)
        masks = [20 * focal(one, inside, known) + dice(one, inside, known) for one in flat]
        true = [intersection_over_union(one > 0, inside, known) for one in flat]
        squares = [(iou[0, prompt, place] - true[place]) ** 2 for place in range(3)]
        want = min(masks) + sum(squares) / 3
        assert prompt_losses(logits, iou, target)[0, prompt].item() == pytest.approx(want.item(), rel=CLOSE)


def test_the_gradient_goes_to_the_best_mask_alone() -> None:
    target = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    target[..., :2] = 1
    near = torch.where(target[0, 0] == 1, 1.0, -1.0)
    logits = torch.stack([-near, near, 0 * near])[None, None].requires_grad_()
    iou = torch.tensor([[[0.5, 0.5, 0.5]]], requires_grad=True)
    prompt_losses(logits, iou, target).sum().backward()
    assert logits.grad is not None and iou.grad is not None
    touched = [bool(logits.grad[0, 0, mask].any()) for mask in range(3)]
    assert touched == [False, True, False]
    # (0.5 - IoU) * 2 / 3: the masks have IoU 0, 1 and 0, and logits of 0 are outside
    assert iou.grad.flatten().tolist() == pytest.approx([1 / 3, -1 / 3, 1 / 3])


def test_logits_of_another_size_are_brought_to_the_target() -> None:
    target = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    target[..., :4] = 1
    logits = torch.full((1, 1, 1, 4, 4), -9.0)
    logits[..., :2] = 9
    loss = prompt_losses(logits, torch.ones(1, 1, 1), target)
    assert loss.item() < 0.1


@pytest.mark.parametrize("text", [False, True])
def test_one_batch_or_several(folder: Path, text: bool) -> None:
    """Sum, count and gradients are the same however samples are cut into batches, one of them empty."""
    assembled, run = assembled_of(folder, text)
    rows, found = rows_of(assembled, run), []
    for cut in ([rows], [rows[:1], [], rows[1:]], [[row] for row in rows]):
        assembled.model.zero_grad()
        total, losses, learned = 0.0, [], 0
        for part in cut:
            batch = collate_prompts(part, image_size=(64, 64))
            loss, losses_T = assembled.model(batch)
            loss.backward()
            assert len(losses_T) == batch.learned and losses_T.sum().item() == pytest.approx(
                loss.item(), rel=CLOSE
            )
            total, learned, losses = total + loss.item(), learned + batch.learned, losses + losses_T.tolist()
        gradients = {
            name: p.grad.clone() for name, p in assembled.model.named_parameters() if p.grad is not None
        }
        found.append((total, learned, sorted(losses), gradients))
    total, learned, losses, gradients = found[0]
    assert learned == len(losses) > 8
    trained = {name for name, p in assembled.model.named_parameters() if p.requires_grad}
    for other in found[1:]:
        assert other[0] == pytest.approx(total, rel=CLOSE) and other[1] == learned
        assert other[2] == pytest.approx(losses, rel=1e-4)  # masks of other batch shapes, by matrix products
        assert set(other[3]) == set(gradients) == trained
        largest = max(gradient.abs().max() for gradient in gradients.values())
        assert max((other[3][n] - g).abs().max() for n, g in gradients.items()) < 1e-4 * largest


def test_prompts_that_are_not_there_weigh_nothing(folder: Path) -> None:
    assembled, run = assembled_of(folder)
    loss, losses_T = assembled.model(collate_prompts([], image_size=(64, 64)))
    assert loss.item() == 0 and len(losses_T) == 0
    loss.backward()
    trained = [p for p in assembled.model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_training_lowers_the_loss_and_masks_get_better(folder: Path) -> None:
    assembled, run = assembled_of(
        folder,
        adapt=[{"method": "full", "where": "connector"}, {"method": "lora", "where": "vision", "r": 4}],
    )
    batch = collate_prompts(rows_of(assembled, run), image_size=(64, 64))
    optimizer = torch.optim.Adam([p for p in assembled.model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss, _ = assembled.model(batch)
        (loss / batch.learned).backward()
        optimizer.step()
        losses.append(loss.item() / batch.learned)
    assert losses[-1] < 0.6 * losses[0]


def test_words_prompt_only_models_that_read_them(folder: Path) -> None:
    without, run = assembled_of(folder)
    reading, text_run = assembled_of(folder, text=True)
    batch = collate_prompts(rows_of(reading, text_run), image_size=(64, 64))
    assert batch.groups["text"].there_NP.any()
    with pytest.raises(UserError, match="no text encoder"):
        without.model(batch)
    assert set(predict(without.model, collate_prompts([], image_size=(64, 64)))) == {
        "point", "points", "box", "mask",
    }  # fmt: skip
    words = reading.model.connector.words
    with torch.no_grad():  # a rank that has met no words yet runs along with one that has
        assert "text" in predict(reading.model, collate_prompts([], image_size=(64, 64)))
    reading.model(collate_prompts([], image_size=(64, 64)))
    assert not words.trained  # a stand-in is no training
    reading.model(batch)
    assert words.trained
    assert reading.model.labels.encoded == len({"ground", "box", "square", "disc", "other"})


def test_the_text_encoder_can_train(folder: Path) -> None:
    assembled, run = assembled_of(
        folder,
        text=True,
        adapt=[{"method": "full", "where": "connector"}, {"method": "lora", "where": "language", "r": 2}],
    )
    loss, _ = assembled.model(collate_prompts(rows_of(assembled, run), image_size=(64, 64)))
    loss.backward()
    own = [p for p in assembled.model.labels.encoder.parameters() if p.requires_grad]
    assert own and any(p.grad is not None and p.grad.any() for p in own)
    assembled.model.labels.encoder.notes.append("a layer is left out")
    assert "a layer is left out" in assembled.notes  # for the journal


def test_scores(folder: Path) -> None:
    assembled, run = assembled_of(folder, text=True)
    words: Any = assembled.model.connector.words
    words.steps += 1
    scores = evaluate(assembled, run.data, run.evaluate)
    again = evaluate(assembled, run.data, run.evaluate, limit=2)
    metrics = scores.metrics
    assert metrics["samples"] == metrics["samples_available"] == 3 and again.metrics["samples"] == 2
    kinds = {row["kind"] for row in scores.predictions}
    assert kinds == {"point", "points", "box", "text"}
    assert metrics["masks"]["point"] == metrics["masks"]["box"] > 3
    same = {(row["key"], row["kind"], row["words"]): row["iou"] for row in scores.predictions}
    for row in again.predictions:
        assert row["iou"] <= row["best"] and (row["key"], row["kind"], row["words"]) in same
    assert scores.value("miou_point_best") >= scores.value("miou_point")
    assert scores.value(run.evaluate.best_metric) is not None and "miou_text" in scores.line()


def test_figures() -> None:
    rows = [
        {"kind": "point", "iou": 0.2, "best": 0.6, "believed": 0.5, "loss": 1.0},
        {"kind": "point", "iou": 0.4, "best": 0.4, "believed": 0.4, "loss": 2.0},
        {"kind": "box", "iou": 0.9, "best": 0.9, "believed": 0.8, "loss": 3.0},
        {"kind": "text", "iou": 0.1, "best": 0.1, "believed": 0.1, "loss": 2.0},
    ]
    found = figures(rows)
    assert found["miou_point"] == pytest.approx(0.3) and found["miou_point_best"] == pytest.approx(0.5)
    assert found["miou"] == pytest.approx((0.3 + 0.9) / 2) and found["miou_text"] == pytest.approx(0.1)
    assert found["iou_error"] == pytest.approx(0.1) and found["loss"] == pytest.approx(2.0)
    assert found["masks"] == {"point": 2, "box": 1, "text": 1}


def test_a_perfect_model_scores_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that are right in the square are right at the image's own size, but for their borders."""
    assembled, run = assembled_of(folder)

    def perfect(model: Any, batch: Any) -> dict[str, Any]:
        found = {}
        for kind, group in batch.groups.items():
            if kind != "text":
                logits_NPhw = (group.targets_NPhw == 1).float() * 2 - 1
                found[kind] = logits_NPhw.unsqueeze(2), torch.ones(*group.there_NP.shape, 1)
        return found

    monkeypatch.setattr("vlm_adapt.evaluate.promptable.predict", perfect)
    scores = evaluate(assembled, run.data, run.evaluate)
    assert scores.metrics["miou"] > 0.75  # targets of 16 x 16 draw things of 4 to 8 pixels roughly


def test_nothing_to_score(folder: Path, tmp_path: Path) -> None:
    assembled, run = assembled_of(folder)
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(assembled, run.data.model_copy(update={"evaluate": ()}), run.evaluate)
    tiny.questions_shard(tmp_path / "words.tar", 2)
    _, other = assembled_of(folder, data__evaluate=[{"shards": str(tmp_path / "words.tar")}])
    with pytest.raises(UserError, match="none of 2 held-out samples .* no mask to prompt for") as caught:
        evaluate(assembled, other.data, other.evaluate)
    tiny.sentence(caught)


def test_methods_find_the_parts(folder: Path) -> None:
    assembled, run = assembled_of(folder)
    with pytest.raises(UserError, match="no 'language'"):
        assembled.adapt([[Adapt(method="full", where="language")]])
