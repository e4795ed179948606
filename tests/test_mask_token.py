"""A token whose hidden state draws a mask: nothing else changes, everything trains where it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import asking
import pytest
import tiny
import torch
from forks import write

from vlm_adapt.config.load import validate
from vlm_adapt.data.collate import collate
from vlm_adapt.data.problems import Account
from vlm_adapt.errors import UserError
from vlm_adapt.export.merge import merge_checkpoint
from vlm_adapt.language.language import Generation
from vlm_adapt.language.token_row import TokenRow
from vlm_adapt.models.build import build
from vlm_adapt.models.check import check_run
from vlm_adapt.models.mask_answer import Watch, answer
from vlm_adapt.models.objectives.masks import mask_losses, mean_of_texts
from vlm_adapt.models.restore import restore

# Sums of float32 taken in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def assembled_of(tree: dict[str, Any], adapt: bool = True) -> Any:
    run = validate(tree, "x")
    made = build(run.model, torch.float32, run.seed)
    if adapt:
        made.adapt([run.adapt])
        made.model.objective = "masks"
    return made


def rows_of(made: Any, tree: dict[str, Any], count: int = 6) -> list[Any]:
    run = validate(tree, "x")
    reader = made.reader(run.data.train, 0, run.data)
    return [row for number in range(count) for row in reader.training(number, 0, number, Account())]


@pytest.fixture(scope="module", params=[True, False], ids=["own", "shared"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return asking.run_tree(tmp_path_factory.mktemp("parts"), own=request.param)


@pytest.fixture
def made(tree: dict[str, Any]) -> Any:
    return assembled_of(tree)


def test_a_row_beside_a_table_of_any_length() -> None:
    """The token's number may be within the table, its end, or beyond it; other words keep their bits."""
    hidden_ND, logits_NV = torch.randn(3, 4), torch.randn(3, 6)
    for token in (2, 6, 9):
        row = TokenRow(token, 4)
        row.begin(torch.arange(4.0), torch.ones(4))
        found = row.score(hidden_ND, logits_NV)
        assert found.shape == (3, max(6, token + 1))
        torch.testing.assert_close(found[:, token], hidden_ND.sum(1))
        kept = [word for word in range(6) if word != token]
        assert torch.equal(found[:, kept], logits_NV[:, kept])
        assert (found[:, 6:token] < -1e30).all()
        embeds = row.embed(torch.tensor([0, token]), torch.zeros(2, 4))
        assert embeds.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]


def test_without_the_token_nothing_changes(tree: dict[str, Any], made: Any) -> None:
    """Logits of all other words, and the frozen weights, bit for bit those of a model without masks."""
    bare = json.loads(json.dumps(tree))
    del bare["model"]["masks"]
    bare["adapt"] = bare["adapt"][:2]
    plain = assembled_of(bare, adapt=False)
    base = assembled_of(tree, adapt=False)
    rows = [row for row in rows_of(made, tree) if not row.masks.starts]
    assert rows
    token = made.masks.token
    wanted = plain.model.logits(collate(rows, **plain.collate_options))
    found = base.model.logits(collate(rows, **base.collate_options))
    words = [word for word in range(wanted.shape[-1]) if word != token]
    assert torch.equal(found[..., words], wanted[..., words])
    mine = dict(base.model.named_parameters())
    assert all(torch.equal(mine[name], value) for name, value in plain.model.named_parameters())
    assert base.base["language"] == plain.base["language"] and "masks" in base.base


def test_gradients_go_where_they_belong(tree: dict[str, Any], made: Any) -> None:
    model = made.model
    loss, losses_N = model(collate(rows_of(made, tree), **made.collate_options))
    assert float(losses_N.sum()) == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    trained = {id(p) for item in made.plan.attached for p in item.method.parameters.values()}
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        waits = "lora_A" in name  # for B, which is 0
        assert moved or waits if id(parameter) in trained else parameter.grad is None, name
    row = model.masks.row
    assert id(row.embedding.weight) in trained and id(row.head.weight) in trained
    table = model.language.model.get_input_embeddings().weight
    assert not table.requires_grad and not any("row" in name for name, _ in model.language.named_parameters())


def test_a_cast_rounds_nothing(made: Any) -> None:
    """What draws masks stays as it is in float32 when a model is brought to bfloat16."""
    before = {name: value.clone() for name, value in made.model.masks.state_dict().items()}
    made.model.masks.to(torch.bfloat16)
    after = made.model.masks.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_mask_losses_by_hand() -> None:
    logits = torch.tensor([[[2.0, -1.0], [0.5, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    targets = torch.tensor([[[1, 0], [1, 255]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    bce_M, dice_M = mask_losses(logits, targets)
    chance = torch.sigmoid(torch.tensor([2.0, -1.0, 0.5]))
    wanted = -(chance[0].log() + (1 - chance[1]).log() + chance[2].log()) / 3
    torch.testing.assert_close(bce_M, torch.stack([wanted, torch.tensor(0.0)]))
    both, every = chance[0] + chance[2], chance.sum() + 2
    torch.testing.assert_close(dice_M, torch.stack([1 - (2 * both + 1) / (every + 1), torch.tensor(0.0)]))
    texts_M, texts_N = torch.tensor([0, 2, 2]), torch.tensor([0, 0, 1, 2])
    found = mean_of_texts(torch.tensor([5.0, 1.0, 3.0]), texts_M, texts_N)
    assert found.tolist() == [5, 5, 0, 2]


def test_a_loss_does_not_depend_on_how_texts_are_put_together(tree: dict[str, Any], made: Any) -> None:
    """In one batch, in two, in one packed row, or each question in a row of its own."""
    rows, model, options = rows_of(made, tree), made.model, made.collate_options
    assert any(row.branches.max() > 1 for row in rows)
    whole = model(collate(rows, **options))[0]
    halves = sum(model(collate(part, **options))[0] for part in (rows[:2], rows[2:]))
    packed = model(collate([rows[:3], rows[3:]], **options))[0]
    torch.testing.assert_close(halves, whole, **CLOSE)
    torch.testing.assert_close(packed, whole, **CLOSE)
    made.encoder.max_length = 512
    run = validate(tree, "x")
    reader = made.reader(run.data.train, 0, run.data)
    reader.phrasings = [replace(one, branches=False) for one in reader.phrasings]
    alone = [row for number in range(6) for row in reader.training(number, 0, number, Account())]
    assert len(alone) > len(rows)
    torch.testing.assert_close(model(collate(alone, **options))[0], whole, **CLOSE)


def test_a_batch_without_masks_or_without_texts_runs_every_part(tree: dict[str, Any], made: Any) -> None:
    plain = [row for row in rows_of(made, tree) if not row.masks.starts]
    for rows in (plain, []):
        made.model.zero_grad()
        loss, losses_N = made.model(collate(rows, **made.collate_options))
        loss.backward()
        missing = [name for name, p in made.model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing and len(losses_N) == sum(len(row.targets) for row in rows)


def prompts_of(made: Any, tree: dict[str, Any], count: int = 4) -> list[Any]:
    run = validate(tree, "x")
    reader = made.reader(run.data.train, 0, run.data)
    return [prompt.row for number in range(count) for prompt in reader.prompts(*reader.sample(number))]


def test_generation_equals_teacher_forcing(tree: dict[str, Any], made: Any) -> None:
    """Written with a cache and many at a time, branches and all, or read at once: same words, same masks."""
    model, token, settings = made.model.eval(), made.masks.token, Generation(6)
    rows = prompts_of(made, tree)
    batch = collate(rows, **made.collate_options)
    with torch.no_grad():  # a head that writes the token now and then
        first = model.language.hidden(model.inputs(batch)).flatten(0, 1)
        model.masks.row.head.weight.copy_(first[:40].mean(0, keepdim=True) * 0.6)
        written, masks = answer(model, batch, settings, made.stop_ids)
        assert 0 < sum(ids.count(token) for ids in written) < sum(map(len, written))
        number = 0
        for row in rows:
            for end in row.ends():
                ids, drawn = written[number], masks[number]
                branch = row.branches[end]
                keep = (row.branches == 0) | (row.branches == branch)
                prompt = replace(
                    row,
                    **{name: getattr(row, name)[keep] for name in ("ids", "blocks", "branches", "positions")},
                )
                length = len(prompt)
                more = torch.tensor(ids).numpy()
                text = replace(
                    prompt,
                    ids=torch.cat([torch.from_numpy(prompt.ids), torch.tensor(ids)]).numpy(),
                    blocks=torch.arange(1, length + len(ids) + 1).numpy(),
                    branches=torch.zeros(length + len(ids), dtype=torch.int64).numpy(),
                    positions=torch.arange(length + len(ids)).numpy(),
                )
                one = collate([text], **made.collate_options)
                hidden = model.language.hidden(model.inputs(one))[0]
                scores = model.language.logits(hidden)[length - 1 : -1]
                assert scores.argmax(1).tolist() == more.tolist()
                places = [length + place for place, word in enumerate(ids) if word == token]
                assert len(places) == len(drawn)
                features = model.mask_features(one, model.seen(one.images))
                for place, mask in zip(places, drawn, strict=True):
                    wanted = model.masks(features, hidden[place][None], torch.tensor([0]))[0]
                    torch.testing.assert_close(mask, wanted, rtol=1e-4, atol=1e-4)  # logits of about 10
                number += 1
        assert number == len(written)


def test_a_token_at_the_very_end_has_its_mask(tree: dict[str, Any], made: Any) -> None:
    model = made.model.eval()
    batch = collate(prompts_of(made, tree, 1)[:1], **made.collate_options)
    with torch.no_grad():
        hidden = model.language.hidden(model.inputs(batch))[0]
        model.masks.row.head.weight.copy_(hidden[batch.writers_BW[0]].mean(0, keepdim=True) * 100)
    watch = Watch(model, batch)
    written = model.generate(batch, Generation(1, on_states=watch), made.stop_ids)
    assert written[0] == [made.masks.token] and watch.masks(written)[0][0] is not None


def test_a_run_is_restored_and_scored(server: Any, tmp_path: Path) -> None:
    """Saved as two rows and a decoder; restored with the same loss of words and masks."""
    tree = asking.run_tree(
        tmp_path,
        data__evaluate=[{"shards": str(tmp_path / "masks-test.tar")}],
        train__max_steps=4,
        train__cache_features=30,
        evaluate__max_new_tokens=4,
    )
    server.run(["train", write(tree)])
    folder = Path(tree["output_dir"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["gIoU"] <= 1 and 0 <= metrics["cIoU"] <= 1 and metrics["masks"] >= 8
    assert metrics["masks_missing"] <= metrics["masks"]
    made, run, checkpoint = restore(folder)
    assert (checkpoint / "masks-full" / "model.safetensors").is_file()
    assert made.tokenizer.convert_tokens_to_ids("<seg>") == made.masks.token
    fresh = assembled_of(tree)
    moved = made.model.masks.row.embedding.weight != fresh.model.masks.row.embedding.weight
    assert moved.any() and not made.model.masks.row.embedding.weight.requires_grad
    again, _, _ = restore(folder)
    rows = rows_of(made, tree)
    made.model.objective = again.model.objective = "masks"
    first, second = (one.model(collate(rows, **one.collate_options))[0] for one in (made, again))
    assert torch.equal(first, second)
    receipt = merge_checkpoint(folder, tmp_path / "merged")
    assert receipt.kept == ["masks-full"] and "language-lora" in receipt.folded
    merged, _, _ = restore(tmp_path / "merged")
    merged.model.objective = "masks"
    torch.testing.assert_close(merged.model(collate(rows, **merged.collate_options))[0], first, **CLOSE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model__masks__token": "two words"}, "is 2 tokens|without spaces|tokens of this"),
        ({"model__masks__tokn": "<seg>"}, "unknown setting 'tokn'"),
        ({"model__masks__decoder": {"weights": "random:", "wdth": 32}}, "did you mean 'width'"),
        ({"model__masks__vision__layers": [0, 1]}, "one layer"),
    ],
)
def test_settings_that_cannot_work(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    tree = asking.run_tree(tmp_path, **change)
    with pytest.raises(UserError, match=says) as caught:
        assembled_of(tree)
    tiny.sentence(caught)


def test_models_that_cannot_have_masks(tmp_path: Path) -> None:
    tree = asking.run_tree(tmp_path)
    tiny.t5(tmp_path / "t5")
    other = json.loads(json.dumps(tree))
    other["model"]["language"]["model"] = str(tmp_path / "t5")
    with pytest.raises(UserError, match="causal language"):
        assembled_of(other)
    bare = json.loads(json.dumps(tree))
    del bare["model"]["masks"]
    bare["adapt"] = bare["adapt"][:2]
    with pytest.raises(UserError, match=r"give model\.masks"):
        check_run(validate(bare, "x"))
