"""The segmenter: its road by formulas, its plan, its checkpoints, and batches cut in any way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_masks
import torch
from torch.nn import functional

from vlm_adapt.config.load import validate
from vlm_adapt.data.problems import Account
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import build
from vlm_adapt.models.check import check_run
from vlm_adapt.models.restore import restore_any
from vlm_adapt.train.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts and shards."""
    made = tmp_path_factory.mktemp("segmenter")
    tiny_masks.run_tree(made)
    return made


def made(folder: Path, **changes: Any) -> Any:
    """An adapted tiny segmenter with its reader."""
    run = validate(tiny_masks.run_tree(folder, **changes), "x")
    assembled = build(run.model, torch.float32, 0)
    assembled.adapt([run.adapt])
    return assembled, assembled.reader(run.data.train, 0, run.data)


def rows_of(reader: Any, count: int = 6) -> list[Any]:
    """Some rows of both sources."""
    account = Account()
    numbers = [*range(count // 2), *range(21, 21 + count - count // 2)]
    return [row for place, n in enumerate(numbers) for row in reader.training(n, 0, place, account)]


def test_the_loss_is_the_papers(folder: Path) -> None:
    """Cosines times 1 / 0.07, raised to the image's size, mean cross-entropy over valid pixels."""
    assembled, reader = made(folder)
    model, rows = assembled.model.eval(), rows_of(reader)
    batch = assembled.collate(rows, **assembled.collate_options)
    total, losses_V = model(batch)
    want = []
    with torch.no_grad():
        features = model.vision(model.vision.normalise(batch.pixels_NCHW), (0, 1, 2, 3), class_token=True)
        maps_NEhw = model.connector.head(features)
        maps_NEhw = maps_NEhw / maps_NEhw.norm(dim=1, keepdim=True)
        for map_Ehw, mask_HW, labels in zip(maps_NEhw, batch.masks_NHW, batch.labels, strict=True):
            vectors_LE = torch.cat([model.labels.encoder([name]) for name in labels])
            logits_Lhw = torch.einsum("ehw,le->lhw", map_Ehw, vectors_LE) / 0.07
            logits_LHW = functional.interpolate(
                logits_Lhw[None], mask_HW.shape, mode="bilinear", align_corners=True
            )[0]
            keep_HW = mask_HW >= 0
            want.append(
                functional.cross_entropy(logits_LHW[:, keep_HW].T, mask_HW[keep_HW].long(), reduction="none")
            )
    # Sums of float32 in another order.
    torch.testing.assert_close(losses_V, torch.cat(want), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total.detach(), torch.cat(want).sum(), rtol=1e-5, atol=1e-3)
    assert batch.learned == len(losses_V) and len(set(batch.labels)) == 2


def test_a_learned_temperature_begins_where_lsegs_is(folder: Path) -> None:
    """Also where the head is in bfloat16, whose nearest number to its logarithm gives 14.24."""
    run = validate(tiny_masks.run_tree(folder, model__temperature="learned"), "x")
    model = build(run.model, torch.bfloat16, 0).model
    with torch.no_grad():
        found = model.connector.temperature(torch.zeros(1))
    assert found.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert model.connector.head.out.weight.dtype == torch.bfloat16


def test_batches_may_be_cut_in_any_way(folder: Path) -> None:
    """The loss and the gradients of six images are those of one and five, without batch norms."""
    assembled, reader = made(folder, model__head={"channels": 16, "norm": "none"})
    model, rows = assembled.model.train(), rows_of(reader)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(cuts: list[list[Any]]) -> list[torch.Tensor]:
        model.zero_grad()
        for cut in cuts:
            model(assembled.collate(cut, **assembled.collate_options))[0].backward()
        return [p.grad.clone() for p in trained if p.grad is not None]

    whole, cut = gradients([rows]), gradients([rows[:1], rows[1:]])
    assert len(whole) == len(trained)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5 * float(one.abs().max()) + 1e-6)


def test_labels_are_encoded_once(folder: Path) -> None:
    assembled, reader = made(folder)
    batch = assembled.collate(rows_of(reader), **assembled.collate_options)
    for _ in range(3):
        assembled.model(batch)
    assert assembled.model.labels.encoded == 4
    assert not any(name.startswith("language") for name, _ in assembled.model.named_parameters())


def test_no_image_still_runs_everything(folder: Path) -> None:
    """A rank without a sample has a gradient for every parameter, and it is zero."""
    head = {"channels": 16, "regularisation": "depthwise"}
    assembled, _ = made(folder, model__temperature="learned", model__head=head)
    batch = assembled.collate([], **assembled.collate_options)
    total, losses_V = assembled.model(batch)
    total.backward()
    assert batch.learned == 0 == len(losses_V) and float(total) == 0
    for name, parameter in assembled.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_trains_saves_goes_on_and_comes_back(folder: Path, tmp_path: Path) -> None:
    """The loss falls; a run that was stopped ends bit by bit as one that was not; the checkpoint answers."""
    changes = {"train__max_steps": 12, "train__learning_rate": 5e-3, "train__save_steps": 6}
    tree = tiny_masks.run_tree(folder, str(tmp_path / "whole"), **changes)
    assert train(validate(copy.deepcopy(tree), "x")) == 0
    whole, _, last = restore_any(tmp_path / "whole")
    assert last.name == "checkpoint-12"
    tree["output_dir"] = str(tmp_path / "again")
    assert train(validate(copy.deepcopy(tree), "x")) == 0
    import shutil

    shutil.rmtree(tmp_path / "again" / "checkpoint-12")
    (tmp_path / "again" / "latest").write_text("checkpoint-6")
    assert train(validate(copy.deepcopy(tree), "x")) == 0
    again, _, _ = restore_any(tmp_path / "again")
    for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    journal = (tmp_path / "whole" / "journal.jsonl").read_text()
    import json

    losses = [json.loads(line)["loss"] for line in journal.splitlines() if '"loss"' in line]
    assert losses[-1] < 0.8 * losses[0]


def test_any_size_of_prompt(folder: Path) -> None:
    """Any words, any number, in any order: a pixel's label does not depend on what else is asked."""
    assembled, reader = made(folder)
    model = assembled.model.eval()
    batch = assembled.collate(rows_of(reader, 2), **assembled.collate_options)
    with torch.no_grad():
        embeddings = model.embed(batch.pixels_NCHW)
        few = model.label_logits(embeddings, ["red", "a cat"], (20, 24))
        many = model.label_logits(embeddings, ["grass", "a cat", "blue", "red"], (20, 24))
        classes, scores = model.classes(embeddings, ["grass", "a cat", "blue", "red"], (20, 24))
    torch.testing.assert_close(few, many[:, [3, 1]])
    assert torch.equal(classes.long(), many.argmax(1))
    assert few.shape == (2, 2, 20, 24) and scores.shape == (2, 20, 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__vision__layers": [0, 1]}, "reads four"),
        ({"model__head": {"chanels": 16}}, "did you mean 'channels'"),
        ({"model__head": {"name": "dtp"}}, "did you mean 'dpt'"),
        ({"model__text": {"model": "package:minilm"}}, "did you mean"),
        ({"model__text": {"model": "hf:x", "templates": ["a photo"]}}, "has no {}"),
        ({"train__objective": "distillation"}, "leave them out"),
        ({"model__head__embedding_size": 7}, "has no setting 'embedding_size'"),
        ({"model__head__class_token": True}, "has no setting 'class_token'"),
        ({"model__temperature": float("inf")}, "a number above 0, or `learned`"),
        ({"evaluate": {"scales": [0]}}, "evaluate.scales"),
        ({"evaluate": {"scales": [float("nan")]}}, "evaluate.scales"),
        ({"evaluate": {"blind": True}}, "evaluate.blind is for models that answer in words"),
    ],
)
def test_mistakes_are_told_at_once(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("{", r"\{")):
        check_run(validate(tiny_masks.run_tree(folder, **changes), "x"))


def test_packing_and_missing_parts_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="take 'padded'"):
        train(validate(tiny_masks.run_tree(folder, str(tmp_path / "a"), data__batching="packed"), "x"))
    lines = [{"method": "full", "where": "masks"}]
    with pytest.raises(UserError, match="has no 'masks'"):
        train(validate(tiny_masks.run_tree(folder, str(tmp_path / "b"), adapt=lines), "x"))
