"""Masks on their way: what tokens mean, how targets lie before a tower, and how answers' masks are scored."""

from __future__ import annotations

from typing import Any

import asking
import numpy as np
import pytest
import tiny
import torch

from vlm_adapt.data.collate import collate
from vlm_adapt.data.encode import Encoder
from vlm_adapt.data.images import resize
from vlm_adapt.data.masks import encode_mask
from vlm_adapt.data.phrase import Phrasing
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.sample import Sample
from vlm_adapt.data.token_masks import IGNORED, MaskSpec, RowMasks, mask_of, target_of
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.metrics.masks import mask_metrics, overlaps
from vlm_adapt.models.mask_answer import at_size
from vlm_adapt.template import tokenizer_template

SIZES = [(64, 64), (64, 96), (90, 60), (33, 200)]


def spec(kind: str, size: int = 64) -> ImageSpec:
    return ImageSpec((size, size), (0.1,) * 3, (0.5,) * 3, kind, "bilinear")


@pytest.mark.parametrize("kind", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_a_target_lies_where_the_tower_sees_its_object(kind: str, size: tuple[int, int]) -> None:
    """The mask of a white square agrees with the white pixels of the resized image, and comes back."""
    height, width = size
    mask_HW = np.zeros(size, np.uint8)
    mask_HW[height // 4 : height // 2, width // 3 : 2 * width // 3] = 1
    picture = resize(np.repeat(mask_HW[..., None] * 255, 3, 2), spec(kind))
    target = target_of(mask_HW, MaskSpec(0, (64, 64), spec(kind), True))
    white = picture[0] > 127
    assert ((target == 1) != white)[target != IGNORED].mean() < 0.03  # half pixels at the edges
    if kind == "pad" and height != width:
        assert (target == IGNORED).any() and not white[target == IGNORED].any()
    back = at_size(torch.from_numpy(np.where(target == 1, 4.0, -4.0)), spec(kind), height, width)
    both, union = (back & (mask_HW > 0)).sum(), (back | (mask_HW > 0)).sum()
    if kind != "crop":
        # A strip of 33 x 200 is but 11 rows high before the tower: half a row is lost or won at each edge.
        assert both / union > (0.85 if width < 200 else 0.7)


def test_what_a_cropped_tower_did_not_see_is_not_inside() -> None:
    inside = at_size(torch.full((8, 8), 5.0), spec("crop"), 64, 128)
    assert inside[:, 32:96].all() and not inside[:, :31].any() and not inside[:, 97:].any()


def test_references_are_found_or_refused() -> None:
    semantic = np.array([[0, 1], [255, 2]], np.uint8)
    record = {"labels": ["sky", "road", "sky"]}
    sample = Sample("s", [b""], record, encode_mask(semantic), {4: encode_mask(np.array([[0, 1], [1, 0]]))})
    np.testing.assert_array_equal(mask_of(sample, {"mask": 4}), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(mask_of(sample, {"label": "sky"}), [[1, 0], [IGNORED, 1]])
    np.testing.assert_array_equal(mask_of(sample, {"label": "cat", "empty": True}), [[0, 0], [IGNORED, 0]])
    for wrong in ({"mask": 5}, {"label": "cat"}, {}):
        with pytest.raises(BadSample):
            mask_of(sample, wrong)
    with pytest.raises(BadSample, match="no semantic mask"):
        mask_of(Sample("s", [b""], record), {"label": "sky"})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    made = tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    made.add_tokens(["<seg>"])
    return Encoder(made, 3, 256, mask_token=made.convert_tokens_to_ids("<seg>"))


def rows_of(encoder: Encoder, record: dict[str, Any], branches: bool = True) -> list[Any]:
    template = tokenizer_template(encoder.tokenizer)
    phrasing = Phrasing(template, branches=branches)
    draws = np.random.default_rng(0)
    return [encoder.encode(one, 1, "s") for one in phrasing.training(record, 1, draws)]


@pytest.mark.parametrize("branches", [True, False])
def test_positions_are_those_of_the_tokens(encoder: Encoder, branches: bool) -> None:
    """In branches, in rows of their own, and in packed rows behind another text."""
    questions = [
        {"question": "where is red?", "answer": "it is <seg>", "masks": [{"mask": 0}]},
        {"question": "what is the shape?", "answer": "red"},
        {"question": "both?", "answer": "<seg> yes <seg>", "masks": [{"mask": 1}, {"mask": 2}]},
    ]
    rows = rows_of(encoder, {"questions": questions}, branches)
    token = encoder.mask_token
    for row in rows:
        assert [int(row.ids[place]) for place in row.masks.starts] == [token] * len(row.masks.starts)
        assert (row.ids == token).sum() == len(row.masks.starts) == len(row.masks.references)
        row.pixels = [np.zeros((3, 16, 16), np.uint8)]
        row.masks.targets = [np.full((8, 8), ref["mask"], np.uint8) for ref in row.masks.references]
    wanted = MaskSpec(token, (8, 8), spec("squash", 16), False)
    batch = collate([rows, rows], (16, 16), 3, masks=wanted)
    assert batch.masks is not None and len(batch.masks.positions_M) == 6
    assert (batch.ids_BT.flatten()[batch.masks.positions_M] == token).all()
    # Questions are drawn in random order; a target goes with its own token wherever that ends up.
    numbers = batch.masks.targets_Mhw[:, 0, 0].tolist()
    assert sorted(numbers) == [0, 0, 1, 1, 2, 2] and numbers[:3] == numbers[3:]
    assert numbers.index(2) == numbers.index(1) + 1
    assert batch.masks.images_M.tolist() == sorted(batch.masks.images_M.tolist())
    moved = batch.to(torch.device("cpu"))
    assert moved.masks is not None and torch.equal(moved.masks.positions_M, batch.masks.positions_M)


def test_tokens_and_masks_must_agree(encoder: Encoder) -> None:
    question = {"question": "where?", "answer": "<seg>", "masks": [{"mask": 0}]}
    for wrong in ({"masks": []}, {"answer": "<seg> <seg>"}, {"answer": "there"}):
        with pytest.raises(BadSample, match="differ in number"):
            rows_of(encoder, {"questions": [question | wrong]})
    plain = Encoder(encoder.tokenizer, 3, 256)
    with pytest.raises(BadSample, match=r"set model\.masks"):
        rows_of(plain, {"questions": [question]})
    with pytest.raises(BadSample, match="differ in number"):
        RowMasks().note([7], 0, 7, [], True)


def test_overlaps_by_hand() -> None:
    meant = np.array([[1, 1], [0, 255]], np.uint8)
    drawn = np.array([[True, False], [True, True]])
    assert overlaps([drawn], [meant]) == [(1, 3)]  # the ignored pixel counts nowhere
    assert overlaps([None], [meant]) == overlaps([], [meant]) == [(0, 2)]
    assert overlaps([drawn, drawn], [meant]) == [(1, 3), (0, 3)]
    figures = mask_metrics([(1, 3), (0, 0), (5, 5)])
    assert figures["gIoU"] == pytest.approx((1 / 3 + 1 + 1) / 3) and figures["cIoU"] == pytest.approx(6 / 8)
    assert mask_metrics([]) == {}


def test_the_tests_own_pictures_show_what_their_masks_say() -> None:
    pixels_HWC, masks = asking.picture(3)
    for name, mask_HW in masks.items():
        assert (pixels_HWC[mask_HW > 0] == asking.COLOURS[name]).all()
