"""Branches over one prefix read exactly as separate conversations do: ids, logits, losses, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rows
import tiny
import tiny_languages
import torch
import transformers

torch.set_num_threads(1)
# Sums of different lengths are added in different orders: float32 rounds logits of size 10 at 1e-6.
NEAR = {"atol": 1e-5, "rtol": 0.0}
PAIRS = [
    ("what color is the shape?", "red"),
    ("is the circle red?", "yes"),
    (" what", "a photo of two cats"),
    ("circle", "no no no"),
]
LANGUAGES = ["llama", "gpt2", "opt", "gemma3", "mistral"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.vit(folder / "vit")
    for family in LANGUAGES:
        tokenizer = tiny.tokenizer(folder / family, bos=family == "gemma3")
        name, settings = tiny_languages.FAMILIES[family]
        long = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
        more = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        config = getattr(transformers, f"{name}Config")(**settings | more | long)
        tiny.seeded(transformers.AutoModelForCausalLM.from_config, config).save_pretrained(folder / family)
    return folder


def together(ours: Any, pairs: Any, images: int, seed: int) -> Any:
    """A row of branches."""
    return rows.row(ours, ours.template.questions(pairs, images), seed)


def alone(ours: Any, pairs: Any, images: int, seed: int) -> list[Any]:
    """The same questions, a conversation each."""
    opening = "<image>" * images + ("\n" if images else "")
    return [rows.conversation(ours, opening + question, answer, seed=seed) for question, answer in pairs]


@pytest.mark.parametrize("template", ["tokenizer", "plain", "bare"])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_ids(parts: Path, template: str, images: int) -> None:
    """Prefix and branch hold the conversation's own ids, positions and targets."""
    for language in ("llama", "gemma3"):
        ours = rows.assemble(parts / "vit", parts / language, template=template)
        row = together(ours, PAIRS, images, 0)
        for number, single in enumerate(alone(ours, PAIRS, images, 0), start=1):
            mine = (row.branches == 0) | (row.branches == number)
            np.testing.assert_array_equal(row.ids[mine], single.ids)
            np.testing.assert_array_equal(row.positions[mine], single.positions)
            places = np.flatnonzero(mine)
            of_branch = [i for i, place in enumerate(row.predict_from) if _target_branch(row, i) == number]
            np.testing.assert_array_equal(row.targets[of_branch], single.targets)
            np.testing.assert_array_equal(row.predict_from[of_branch], places[single.predict_from])
            assert len(of_branch) > 1


def _target_branch(row: Any, target: int) -> int:
    """The branch of a target: its predicting token is the branch's own (a question comes before)."""
    return int(row.branches[row.predict_from[target]])


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("images", [0, 2])
def test_logits_losses_gradients(parts: Path, language: str, images: int) -> None:
    """A padded batch of rows with branches, against all their conversations in another padded batch."""
    ours = rows.assemble(parts / "vit", parts / language, template="tokenizer")
    groups = [PAIRS, PAIRS[:1], PAIRS[1:3]]
    branched = [together(ours, group, images, seed) for seed, group in enumerate(groups)]
    singles = [alone(ours, group, images, seed) for seed, group in enumerate(groups)]
    batch, batch_alone = rows.batch(ours, branched), rows.batch(ours, [s for group in singles for s in group])
    assert not batch.plain and batch_alone.plain
    assert len(batch.ids_BT) == 3 and len(batch_alone.ids_BT) == 7

    logits_BTV, logits_alone = ours.model.logits(batch), iter(ours.model.logits(batch_alone))
    for number, row in enumerate(branched):
        for branch, single in enumerate(singles[number], start=1):
            mine = torch.from_numpy((row.branches == 0) | (row.branches == branch))
            got = logits_BTV[number, : len(row)][mine]
            torch.testing.assert_close(got, next(logits_alone)[: len(single)], **NEAR)

    gradients, losses = [], []
    for one in (batch, batch_alone):
        ours.model.zero_grad()
        total, losses_N = ours.model(one)
        (total / len(losses_N)).backward()
        losses.append(losses_N)
        gradients.append({n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], **NEAR)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # The image's gradient is a sum over branches: it rounds relative to its largest entry.
        largest = float(gradients[1][name].abs().max())
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5 * max(1.0, largest), rtol=0)


def test_branches_do_not_see_each_other(parts: Path) -> None:
    """Another text in the first branch changes nothing of the others, and the row's loss is their sum."""
    ours = rows.assemble(parts / "vit", parts / "llama")
    changed = [("blue blue blue", "green"), *PAIRS[1:]]
    losses = []
    for pairs in (PAIRS, changed):
        total, losses_N = ours.model(rows.batch(ours, [together(ours, pairs, 1, 0)]))
        torch.testing.assert_close(total, losses_N.sum())
        losses.append(losses_N)
    others = sum(len(single.targets) for single in alone(ours, PAIRS[1:], 1, 0))
    # The row is of another length, so matrix products may be cut into other pieces.
    torch.testing.assert_close(losses[0][-others:], losses[1][-others:], **NEAR)
    assert not torch.allclose(losses[0][:3], losses[1][:3], atol=1e-3)


@pytest.mark.parametrize("language", ["llama", "gpt2"])
def test_several_turns_and_branches_in_one_batch(parts: Path, language: str) -> None:
    """A plain conversation beside a row of branches: each as if alone."""
    ours = rows.assemble(parts / "vit", parts / language)
    encoded = [
        rows.conversation(ours, "<image>no", "yes", "<image>two<image>", "cats", seed=1),
        together(ours, PAIRS, 1, 2),
        rows.conversation(ours, "red", "blue", seed=3),
    ]
    logits_BTV = ours.model.logits(rows.batch(ours, encoded))
    for number, row in enumerate(encoded):
        single = ours.model.logits(rows.batch(ours, [row]))[0]
        torch.testing.assert_close(logits_BTV[number, : len(row)], single, **NEAR)
