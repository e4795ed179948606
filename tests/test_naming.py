"""Names of masks: by a segmenter's pixel embeddings, by the model's own words; the map that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sam
import torch
from torch.nn import functional

from vlm_adapt.data.images import resize
from vlm_adapt.errors import UserError
from vlm_adapt.heads.sam_words import WordPrompt
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.models.automatic_masks import FoundMask
from vlm_adapt.models.naming import (
    UNNAMED,
    name_masks,
    scores_by_segmenter,
    scores_by_words,
    semantic_map,
)
from vlm_adapt.models.promptable_build import build

NAMES = ("red|crimson", "green", "blue")


class Colours:
    """A segmenter that sees colours: a pixel's embedding is its colour, and so is a label's."""

    image_spec = ImageSpec((32, 32), resize="crop")

    def __init__(self) -> None:
        self.connector: Any = torch.nn.Linear(1, 1)
        self.connector.temperature = lambda like: torch.tensor(10.0)

    def unit_embeddings(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        return functional.normalize(functional.avg_pool2d(pixels_NCHW.float() + 0.01, 2), dim=1)

    def labels(self, names: Any) -> torch.Tensor:
        return torch.eye(3)[[["red|crimson", "green", "blue"].index(name) for name in names]]


def mask(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    inside = np.zeros((48, 96), bool)
    inside[top:bottom, left:right] = True
    return inside


def one(inside: np.ndarray) -> FoundMask:
    return FoundMask(inside, (0, 0, 1, 1), int(inside.sum()), 0.9, 0.95, (0.0, 0.0))


def picture() -> np.ndarray:
    """Red on the left, green on the right, a little blue on the green; the whole width counts, uncropped."""
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:, :48, 0] = pixels[:, 48:, 1] = 200
    pixels[16:32, 80:96] = (0, 0, 200)
    return pixels


def test_named_by_a_segmenter() -> None:
    segmenter: Any = Colours()
    masks = [mask(0, 0, 48, 48), mask(48, 0, 80, 48), mask(80, 16, 96, 32), mask(0, 0, 96, 48)]
    scores = scores_by_segmenter(segmenter, picture(), masks, NAMES)
    assert scores.shape == (4, 3)
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)  # float32
    assert scores.argmax(1).tolist()[:3] == [0, 1, 2]
    sure = np.exp(10) / (np.exp(10) + 2)
    np.testing.assert_allclose(scores[0, 0], sure, rtol=1e-3)  # 0.01 is added to black
    # Of everything: the plain mean of all embeddings, of the picture as the tower sees it.
    seen = resize(picture(), ImageSpec((32, 32), resize="squash"))
    embeddings = segmenter.unit_embeddings(torch.from_numpy(np.ascontiguousarray(seen))[None])
    wanted = (10 * functional.normalize(embeddings.mean((0, 2, 3)), dim=0)).softmax(0).numpy()
    np.testing.assert_allclose(scores[3], wanted, rtol=1e-4)
    assert wanted[0] > wanted[1] > wanted[2]  # half of it is red, a twelfth blue
    swapped = scores_by_segmenter(segmenter, picture(), masks, NAMES[::-1])
    np.testing.assert_allclose(swapped, scores[:, ::-1], rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # as the verb does it
        half = scores_by_segmenter(segmenter, picture(), masks, NAMES)
    np.testing.assert_allclose(half, scores, rtol=1e-5)
    assert scores_by_segmenter(segmenter, picture(), [], NAMES).shape == (0, 3)


def test_a_mask_smaller_than_a_place_of_the_map() -> None:
    segmenter: Any = Colours()
    scores = scores_by_segmenter(segmenter, picture(), [mask(88, 24, 89, 25), mask(5, 5, 6, 6)], NAMES)
    assert scores.argmax(1).tolist() == [2, 0]


def test_smaller_masks_on_top() -> None:
    """Whatever the order they come in; pixels of no mask, or of a mask without a name, are marked."""
    masks = [one(mask(80, 16, 96, 32)), one(mask(48, 0, 96, 48)), one(mask(0, 0, 10, 48))]
    scores = np.array([[0.1, 0.1, 0.8], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3]], np.float32)
    named = name_masks(masks, scores, NAMES, least=0.5)
    assert [(each.name, each.label) for each in named] == [("blue", 2), ("green", 1), (None, None)]
    classes, sure = semantic_map(named, (48, 96))
    assert classes.dtype == np.uint16
    assert classes[20, 90] == 2 and classes[2, 90] == 1
    assert (classes[:, :48] == UNNAMED).all() and (sure[:, :48] == 0).all()
    assert sure[20, 90] == pytest.approx(0.8) and sure[2, 60] == pytest.approx(0.7)
    every = name_masks(masks, scores, NAMES)
    assert every[2].name == "red"  # of several names the first is shown
    assert (semantic_map(every, (48, 96))[0][:, :10] == 0).all()
    with pytest.raises(UserError, match="list of labels is empty"):
        name_masks(masks, scores, [])


class Vectors:
    """Labels whose vectors are known."""

    width = 6

    def __call__(self, names: Any) -> torch.Tensor:
        return torch.stack([torch.full((6,), float(len(name))) for name in names])


def test_words_that_were_learned(tmp_path: Path) -> None:
    """The score is the mean probability inside each mask of what the words alone prompt."""
    model = build(tiny_sam.config(tmp_path), torch.float32).model
    model.connector.words = WordPrompt(6, 32)
    model._labels = [Vectors()]  # type: ignore[list-item]
    embedding = model.embed(picture())
    with pytest.raises(UserError, match="has not learned to be prompted by words"):
        model.masks(embedding, words=["cat"])
    model.connector.words.steps += 1
    names = ["cat", "giraffe"]
    masks = [mask(0, 0, 48, 48), mask(60, 0, 80, 20)]
    scores = scores_by_words(model, embedding, masks, names)
    found = model.masks(embedding, words=names, multimask=False)
    assert found.logits_PMHW.shape == (2, 1, 48, 96)
    chances = found.logits_PMHW[:, 0].sigmoid().numpy()
    for row, inside in enumerate(masks):
        for column in range(2):
            np.testing.assert_allclose(scores[row, column], chances[column][inside].mean(), rtol=1e-5)
    assert not np.allclose(scores[:, 0], scores[:, 1])
