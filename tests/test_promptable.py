"""A promptable model: its square, prompts in the image's own pixels, what is refused, its parts and plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_sam
import torch

from vlm_adapt.adapt.plan import apply_plan
from vlm_adapt.config.schema import Adapt
from vlm_adapt.data.long_side import Frame, fit_long_side, fit_mask
from vlm_adapt.errors import UserError
from vlm_adapt.heads.sam_words import WordPrompt
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.models.promptable import Promptable
from vlm_adapt.models.promptable_build import build

SAME = 1e-5  # the same modules on the same numbers; what differs is only in what order places lie in memory


@pytest.fixture
def model(tmp_path: Path) -> Promptable:
    return build(tiny_sam.config(tmp_path), torch.float32).model


@pytest.mark.parametrize(
    ("size", "resized"),
    [((48, 64), (48, 64)), ((30, 60), (32, 64)), ((100, 33), (64, 21)), ((1, 900), (1, 64))],
)
def test_square(size: tuple[int, int], resized: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (*size, 3), np.uint8)
    spec = ImageSpec((64, 64), (0.5, 0.25, 0.75))
    square, frame = fit_long_side(pixels, 64, spec)
    assert frame == Frame(size, resized, 64) and square.shape == (3, 64, 64)
    beyond = np.ones((64, 64), bool)
    beyond[: resized[0], : resized[1]] = False
    for channel, value in enumerate((128, 64, 191)):
        assert (square[channel][beyond] == value).all()
    if size == resized:
        assert (square[:, :48] == pixels.transpose(2, 0, 1)).all()
    corner = frame.inward(np.array([[size[1], size[0]]]))
    np.testing.assert_allclose(corner, [[resized[1], resized[0]]])
    mask = np.ones(size, np.uint8)
    assert (fit_mask(mask, frame, fill=7)[~beyond] == 1).all()
    assert (fit_mask(mask, frame, fill=7)[beyond] == 7).all()


def test_the_road_of_sam(model: Promptable) -> None:
    """Points of the image, scaled; beyond the image zeros; logits to the square, cut, and to the image."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 100, 3), np.uint8)
    embedding = model.embed(pixels)
    square, frame = fit_long_side(pixels, 64, model.image_spec)
    normalised = model.vision.normalise(torch.from_numpy(square)[None])
    normalised[:, :, frame.resized[0] :] = 0
    with torch.no_grad():
        features = model.connector.neck(model.vision(normalised)[0])
        torch.testing.assert_close(embedding.features_1Dhw, features, rtol=0, atol=0)
        scaled = torch.tensor([[[[50 * 0.64, 20 * (26 / 40)]]]])
        low, iou = model.connector.decoder(features, scaled, torch.ones(1, 1, 1))
        big = torch.nn.functional.interpolate(low[0], (64, 64), mode="bilinear")[..., :26, :]
        big = torch.nn.functional.interpolate(big, (40, 100), mode="bilinear")
    found = model.masks(embedding, [[[50, 20]]])
    assert found.logits_PMHW.shape == (1, 3, 40, 100)
    torch.testing.assert_close(found.logits_PMHW, big, rtol=SAME, atol=SAME)
    torch.testing.assert_close(found.iou_PM, iou[0], rtol=SAME, atol=SAME)
    again = model.masks(embedding, [[[50, 20]]], mask_inputs_Phw=found.low_PMhw[:, 1], multimask=False)
    assert again.logits_PMHW.shape == (1, 1, 40, 100)
    assert not torch.equal(again.low_PMhw, model.masks(embedding, [[[50, 20]]], multimask=False).low_PMhw)


def test_many_prompts_equal_each_alone(model: Promptable) -> None:
    embedding = model.embed(np.full((30, 30, 3), 90, np.uint8))
    boxes = np.random.default_rng(0).uniform(0, 30, (11, 4)).astype(np.float32)
    together = model.masks(embedding, boxes_P4=boxes)
    for number in (0, 5, 10):
        alone = model.masks(embedding, boxes_P4=boxes[number : number + 1])
        torch.testing.assert_close(together.logits_PMHW[number], alone.logits_PMHW[0], rtol=SAME, atol=SAME)


def test_mask_prompt(model: Promptable) -> None:
    mask = np.zeros((30, 60), bool)
    mask[:, 30:] = True
    frame = Frame.of((30, 60), 64)
    prompt = model.mask_prompt(mask, frame)
    assert prompt.shape == (1, 32, 32)
    assert (prompt[0, :16, 16:] > 0).all() and (prompt[0, :, :16] < 0).all() and (prompt[0, 16:] < 0).all()
    with pytest.raises(UserError, match="the mask is 30 x 30 and the image 60 x 30"):
        model.mask_prompt(mask[:, :30], frame)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "a mask needs a prompt"),
        ({"points_PK2": [[1, 2]]}, r"points are \[prompts, points, 2\]"),
        ({"points_PK2": [[[1, 2]]], "point_labels_PK": [[1, 0]]}, "1 points have 2 labels"),
        ({"points_PK2": [[[1, 2]]], "boxes_P4": [[0, 0, 1, 1]] * 2}, "there are 1 and 2 prompts"),
        ({"boxes_P4": [[0, 0, 1, 1]], "mask_inputs_Phw": torch.zeros(1, 8, 8)}, "of 32 x 32 logits, not 8"),
        ({"words": ["cat"]}, "has no text encoder"),
    ],
)
def test_prompts_that_cannot_be(model: Promptable, given: dict[str, object], said: str) -> None:
    embedding = model.embed(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=said):
        model.masks(embedding, **given)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decoder": {"mlp_dims": 3}}, "did you mean 'mlp_dim'"),
        ({"decoder": {"width": 20}}, "a multiple of 8, not 20"),
        ({"decoder": {"weights": "random:x"}}, "whole number after 'random:'"),
        ({"decoder": {"weights": "hub:"}}, "names nothing"),
        ({"decoder": {"weights": "file:/nowhere"}}, "there is no file"),
    ],
)
def test_decoders_that_cannot_be(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(tiny_sam.config(tmp_path, **settings), torch.float32)


def test_one_layer_and_squares(tmp_path: Path) -> None:
    vision = tiny_sam.config(tmp_path).vision
    several = vision.model_copy(update={"layers": (0, 1)})
    with pytest.raises(UserError, match="reads one layer"):
        build(tiny_sam.config(tmp_path, vision=several), torch.float32)
    wide = vision.model_copy(update={"image_size": (32, 64)})
    with pytest.raises(UserError, match="squares"):
        build(tiny_sam.config(tmp_path, vision=wide), torch.float32)


def test_bf16_leaves_the_decoder_exact(tmp_path: Path) -> None:
    model = build(tiny_sam.config(tmp_path), torch.bfloat16).model
    before = model.connector.neck.layers.conv1.weight.clone()
    model.to(torch.bfloat16)
    torch.testing.assert_close(model.connector.neck.layers.conv1.weight, before, rtol=0, atol=0)
    assert {one.dtype for one in model.vision.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in model.connector.parameters()} == {torch.float32}
    assert model.embed(np.zeros((8, 8, 3), np.uint8)).features_1Dhw.dtype == torch.float32


def test_no_weights_are_held_where_none_are_wanted(tmp_path: Path) -> None:
    model = build(tiny_sam.config(tmp_path), torch.float32, empty=True).model
    assert {one.device.type for one in model.parameters()} == {"meta"}


def test_words_are_refused_until_learned() -> None:
    """The count of steps is a buffer, so that it is saved with what was measured."""
    words = WordPrompt(6, 32)
    with torch.no_grad():
        assert words(torch.randn(3, 6)).shape == (3, 1, 32)
    assert not words.trained and words.learns
    words(torch.randn(3, 6))
    assert words.trained and "steps" in words.state_dict()


def test_plan_on_decoder(tmp_path: Path) -> None:
    assembled = build(tiny_sam.config(tmp_path), torch.float32)
    connector = assembled.model.connector
    plan = apply_plan(assembled.model.parts(), [[Adapt(method="full", where="connector")]])
    assert plan.table()[1]["trainable"] == sum(one.numel() for one in connector.parameters())
    assert list(assembled.statistics()) == [
        "decoder.prompt_encoder.shared_embedding.made.positional_embedding"
    ]
