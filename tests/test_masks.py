"""Who sees whom against a loop that spells it out, and image tokens put in their places or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rows
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from vlm_adapt.language.layout import additive_mask, attention_mask
from vlm_adapt.models.splice import splice

torch.set_num_threads(1)


def allowed(documents: list[int], blocks: list[int], branches: list[int], query: int, key: int) -> bool:
    """The rules in words: one's own document, not later, and of the branches the prefix and one's own."""
    if query == key:
        return True  # padding too, so that no row is empty
    if documents[query] == 0 or documents[key] == 0:
        return False
    if documents[query] != documents[key]:
        return False
    if blocks[key] > blocks[query]:
        return False
    return branches[key] in (0, branches[query])


cells = some.tuples(some.integers(0, 2), some.integers(0, 3), some.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(rows=some.lists(some.lists(cells, min_size=7, max_size=7), min_size=1, max_size=2))
def test_against_a_loop(rows: list[list[tuple[int, int, int]]]) -> None:
    """Any documents, blocks and branches, in any order."""
    columns = torch.tensor(rows).permute(2, 0, 1)
    allow_BTT = attention_mask(*columns)
    for number, row in enumerate(rows):
        parts = [list(part) for part in zip(*row, strict=True)]
        want = [[allowed(*parts, query, key) for key in range(7)] for query in range(7)]
        assert allow_BTT[number].tolist() == want


def test_the_picture_of_the_file() -> None:
    """Two-way prefix, then causal text, then padding."""
    one_BT = torch.tensor([[1, 1, 1, 1, 1, 0]])
    allow_BTT = attention_mask(one_BT, torch.tensor([[0, 0, 0, 1, 2, 0]]), torch.zeros_like(one_BT))
    assert ["".join(".#"[int(x)] for x in line) for line in allow_BTT[0]] == [
        "###...",
        "###...",
        "###...",
        "####..",
        "#####.",
        ".....#",
    ]


def test_additive() -> None:
    mask = additive_mask(torch.tensor([[[True, False]]]), torch.bfloat16)
    assert mask.shape == (1, 1, 1, 2) and mask.dtype == torch.bfloat16
    assert mask.flatten().tolist() == [0.0, torch.finfo(torch.bfloat16).min]


@pytest.mark.parametrize("prefix_lm", [False, True], ids=["plain", "masked"])
def test_nothing_sees_padding(tmp_path: Path, prefix_lm: bool) -> None:
    """Whatever stands under padding, the logits of real tokens are the same to the bit."""
    ours = rows.assemble(tiny.vit(tmp_path / "v"), tiny.llama(tmp_path / "l"), prefix_lm=prefix_lm)
    talks = [["<image>what color is the shape?", "red"], ["no", "yes"]]
    batch = rows.batch(ours, [rows.conversation(ours, *talk, seed=i) for i, talk in enumerate(talks)])
    valid_BT = batch.documents_BT > 0
    assert batch.plain != prefix_lm and not valid_BT.all()
    first = ours.model.logits(batch)[valid_BT]
    batch.ids_BT[~valid_BT] = 77
    assert torch.equal(ours.model.logits(batch)[valid_BT], first)


def test_splice_puts_tokens_in_order() -> None:
    embeds_BTD = torch.zeros(2, 4, 3)
    tokens_ND = torch.arange(1.0, 10).view(3, 3)
    places_N = torch.tensor([1, 2, 7])
    spliced = splice(embeds_BTD, tokens_ND, places_N)
    np.testing.assert_array_equal(spliced.flatten(0, 1)[places_N], tokens_ND)
    assert spliced.abs().sum() == tokens_ND.sum() and embeds_BTD.sum() == 0
    assert splice(embeds_BTD.bfloat16(), tokens_ND, places_N).dtype == torch.bfloat16


@pytest.mark.parametrize(("features", "places"), [(2, 3), (4, 3)])
def test_splice_refuses_a_mismatch(features: int, places: int) -> None:
    with pytest.raises(ValueError, match=f"{features} feature vectors for {places} places"):
        splice(torch.zeros(1, 8, 2), torch.ones(features, 2), torch.arange(places))


def test_without_images_every_part_takes_part(tmp_path: Path) -> None:
    """Text alone: the stand-in changes nothing, and connector and tower get gradients of zero, not none."""
    ours = rows.assemble(tiny.vit(tmp_path / "v"), tiny.llama(tmp_path / "l"), state_size=2)
    batch = rows.batch(ours, [rows.conversation(ours, "no", "yes")])
    assert len(batch.pixels_ICHW) == 1 and not len(batch.image_positions_K)
    total, _ = ours.model(batch)
    total.backward()
    for name, parameter in ours.model.named_parameters():
        assert parameter.grad is not None, name
        assert name.startswith("language.") or not parameter.grad.any(), name
    batch.pixels_ICHW += 50
    assert torch.equal(ours.model(batch)[0], total)


def test_nothing_at_all_runs(tmp_path: Path) -> None:
    """A rank whose share of the batch is empty: loss 0, a gradient of zeros everywhere."""
    for language in (tiny.llama(tmp_path / "llama"), tiny.t5(tmp_path / "t5")):
        ours = rows.assemble(tiny.vit(tmp_path / "v"), language)
        total, losses_N = ours.model(rows.batch(ours, []))
        total.backward()
        assert total == 0 and len(losses_N) == 0
        for name, parameter in ours.model.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_states_reach_the_language(tmp_path: Path) -> None:
    """A state vector is one token, through its own small MLP, in place of its filler."""
    ours = rows.assemble(tiny.vit(tmp_path / "v"), tiny.llama(tmp_path / "l"), state_size=2)
    made = [
        rows.row(ours, ours.template.conversation(rows.chat("<image>no", "yes"), state=state))
        for state in ([0.5, 1.0], [3.0, -1.0])
    ]
    batch = rows.batch(ours, made)
    inputs = ours.model.inputs(batch)
    want = ours.model.state_projector(torch.tensor([[0.5, 1.0], [3.0, -1.0]]))
    got = inputs.embeds_BTD.flatten(0, 1)[batch.state_positions_S]
    torch.testing.assert_close(got, want, atol=0, rtol=0)
    ours.model(batch)[0].backward()
    assert all(p.grad.any() for p in ours.model.state_projector.parameters())
