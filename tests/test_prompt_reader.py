"""Masks with prompts: connected regions, what is drawn from a mask, batches, bad samples and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_prompts
import torch

from vlm_adapt.config.schema import Augment, Data, Source
from vlm_adapt.data import prompt_draws
from vlm_adapt.data.long_side import fit_mask
from vlm_adapt.data.masks import encode_mask
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.prompt_batch import collate_prompts
from vlm_adapt.data.prompt_reader import PromptReader
from vlm_adapt.data.regions import components
from vlm_adapt.data.tasks.prompted import KINDS
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec

SPEC = ImageSpec((64, 64))


def flooded(inside_HW: np.ndarray) -> np.ndarray:
    """Regions by filling each from its first pixel on: slow, and plainly right."""
    numbers_HW = np.zeros(inside_HW.shape, np.int32)
    count = 0
    for start in zip(*np.nonzero(inside_HW), strict=True):
        if numbers_HW[start]:
            continue
        count += 1
        todo = [start]
        while todo:
            row, column = todo.pop()
            inside = 0 <= row < inside_HW.shape[0] and 0 <= column < inside_HW.shape[1]
            if inside and inside_HW[row, column] and not numbers_HW[row, column]:
                numbers_HW[row, column] = count
                todo += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return numbers_HW


def test_regions() -> None:
    draws = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.55, 0.65, 1.0):
        for size in ((1, 1), (1, 9), (9, 1), (23, 31)):
            inside_HW = draws.random(size) < share
            assert np.array_equal(components(inside_HW), flooded(inside_HW))
    spiral = np.zeros((9, 9), bool)
    spiral[0], spiral[:, 8], spiral[8], spiral[2:, 0], spiral[2, :7], spiral[2:7, 6] = (
        True,
        True,
        True,
        1,
        1,
        1,
    )
    assert components(spiral).max() == flooded(spiral).max() == 1


def reader(path: Path, flip: bool = False, seed: int = 0, **task: Any) -> PromptReader:
    source = Source(shards=str(path), task={"name": "prompts", **task})
    data = Data(augment=Augment(flip=True) if flip else None)
    return PromptReader([source], SPEC, seed, data)


def one_sample(folder: Path, members: dict[str, bytes], record: dict[str, Any], **task: Any) -> PromptReader:
    path = tiny.shard(folder / "one.tar", [("a", members | {"json": json.dumps(record).encode()})])
    return reader(path, **task)


def test_points_and_boxes_lie_where_they_should(parts: Path) -> None:
    tiny_prompts.run_tree(parts)
    kinds = {"point": 1, "points": 1, "box": 1, "mask": 1}
    source = reader(parts / "prompts.tar", masks_per_image=8, kinds=kinds, box_noise=0.3, box_noise_pixels=3)
    seen: dict[str, int] = {}
    for number in range(8):
        row = source.row(number, 0, number)
        assert row.pixels_CHW.shape == (3, 64, 64) and row.pixels_CHW.dtype == np.uint8
        for one in row.targets:
            seen[one.kind] = seen.get(one.kind, 0) + 1
            assert one.target_hw.shape == (16, 16) and (one.target_hw == 1).any()
            for (x, y), label in zip(
                () if one.points_K2 is None else one.points_K2,
                () if one.labels_K is None else one.labels_K,
                strict=True,
            ):
                value = one.target_hw[min(15, int((y + 0.5) / 4)), min(15, int((x + 0.5) / 4))]
                around = one.target_hw[
                    max(0, int(y / 4) - 1) : int(y / 4) + 2, max(0, int(x / 4) - 1) : int(x / 4) + 2
                ]
                # Points are drawn at full size, targets are 16 times smaller: a neighbour may have the value.
                assert value == label if one.kind == "mask" else label in around
            if one.box_4 is not None:
                rows, columns = np.nonzero(one.target_hw == 1)
                tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * 4
                assert (
                    np.abs(one.box_4 - tight).max() <= 3 + 4
                )  # the noise's limit, and a pixel of the target
                assert one.box_4[0] < one.box_4[2] and one.box_4[1] < one.box_4[3]
    assert set(seen) == set(kinds) and max(seen.values()) - min(seen.values()) <= 8


def test_the_first_point_is_uniform() -> None:
    mask_HW = np.zeros((4, 6), np.uint8)
    mask_HW[1:3, 2:5] = 1
    mask_HW[0, 0] = 255
    points = prompt_draws.inside_points(mask_HW, 6000, np.random.default_rng(0))
    counts = np.zeros_like(mask_HW, int)
    np.add.at(counts, (points[:, 1].astype(int), points[:, 0].astype(int)), 1)
    assert (counts[mask_HW != 1] == 0).all()
    assert np.abs(counts[mask_HW == 1] - 1000).max() < 5 * 1000**0.5  # five deviations of a draw of 1000


def test_noise_is_a_tenth_and_limited() -> None:
    draws = np.random.default_rng(0)
    box = np.array([300, 300, 400, 700], np.float32)
    moved = np.stack([prompt_draws.noisy_box(box, (1024, 1024), 0.1, 20, draws) for _ in range(4000)]) - box
    assert np.abs(moved).max() <= 20
    assert 9 < moved[:, 0].std() < 10.2  # 10 % of 100, a little less for the limit
    assert moved[:, 1].std() > 14  # 10 % of 400 is 40: most sides are moved to the limit
    edge = prompt_draws.noisy_box(np.array([0, 0, 2, 2], np.float32), (8, 8), 5.0, 20, draws)
    assert (edge >= 0).all() and (edge <= 8).all() and edge[2] - edge[0] >= 1


def test_coarse_masks_are_mended_by_their_point() -> None:
    draws = np.random.default_rng(0)
    target = np.zeros((64, 64), np.uint8)
    target[5:20, 9:40] = 1
    target[60:] = prompt_draws.IGNORED
    for _ in range(20):
        coarse = prompt_draws.coarse_mask(target, draws)
        overlap = ((coarse == 1) & (target == 1)).sum() / ((coarse == 1) | (target == 1)).sum()
        assert coarse.shape == target.shape and overlap > 0.5
        points, labels = prompt_draws.corrected_point(coarse, target, 4.0, draws)
        column, row = ((points[0] + 0.5) / 4).astype(int)
        assert target[row, column] == labels[0] != prompt_draws.IGNORED
        if (coarse != target)[:60].any():
            assert coarse[row, column] != target[row, column]


def test_quota() -> None:
    draws = np.random.default_rng(0)
    shares = {"point": 2.0, "box": 1.0, "text": 0.0}
    for _ in range(20):
        kinds = prompt_draws.quota(6, shares, draws)
        assert 3 <= kinds.count("point") <= 5 and len(kinds) == 6
    first = [prompt_draws.quota(1, shares, draws)[0] for _ in range(300)]
    assert set(first) == {"point", "box"} and 170 < first.count("point") < 230  # 200 +- 4 deviations


def test_the_same_draws_whoever_asks_and_others_next_epoch(parts: Path) -> None:
    tiny_prompts.run_tree(parts)
    one, other = (reader(parts / "prompts.tar").row(2, 0, 5) for _ in range(2))
    later = reader(parts / "prompts.tar").row(2, 1, 5)
    plain = [
        [np.array_equal(a.target_hw, b.target_hw) for a, b in zip(one.targets, row.targets, strict=False)]
        for row in (other, later)
    ]
    assert all(plain[0]) and len(plain[0]) == len(one.targets)
    assert [t.kind for t in later.targets] != [t.kind for t in one.targets] or not all(plain[1])


def test_mirrored_images_have_mirrored_masks(tmp_path: Path) -> None:
    pixels_HWC, mask_HW = tiny_prompts.scene(3)
    members = {"png": tiny_prompts.png(pixels_HWC), "mask.png": encode_mask(mask_HW)}
    record = {"labels": ["ground", "box", "disc"]}
    path = tiny.shard(tmp_path / "one.tar", [("a", members | {"json": json.dumps(record).encode()})])
    source, found = reader(path, flip=True, masks="labels"), set()
    for epoch in range(12):
        row = source.row(0, epoch, 0)
        mirrored = not np.array_equal(row.pixels_CHW, reader(path).row(0, 0, 0).pixels_CHW)
        found.add(mirrored)
        wanted = mask_HW[:, ::-1] if mirrored else mask_HW
        regions = [
            fit_mask((wanted == value).astype(np.uint8), row.frame, 16, fill=255) for value in range(3)
        ]
        for one in row.targets:
            assert any(np.array_equal(one.target_hw, region) for region in regions)
    assert found == {True, False}
    referring = record | {"referring": [{"expressions": ["left"], "box": [0, 0, 9, 9]}]}
    source = one_sample(tmp_path, members, referring, masks="labels")
    source.flip = True
    for epoch in range(6):  # "left" stays left
        row = source.row(0, epoch, 0)
        assert np.array_equal(row.pixels_CHW, reader(path).row(0, 0, 0).pixels_CHW)


def test_which_masks(tmp_path: Path) -> None:
    pixels_HWC, mask_HW = tiny_prompts.scene(3)
    members = {"png": tiny_prompts.png(pixels_HWC), "mask.png": encode_mask(mask_HW)}
    record: dict[str, Any] = {"labels": ["ground", "box", "disc"]}
    areas = {}
    for masks in ("components", "labels"):
        row = one_sample(tmp_path, members, record, masks=masks, masks_per_image=20).row(0, 0, 0)
        areas[masks] = len(row.targets)
    assert areas == {"components": 4, "labels": 3}  # two boxes
    binary = {f"mask.{place}.png": encode_mask((mask_HW == place).astype(np.uint8)) for place in (1, 2)}
    objects = [{"label": "box", "box": [0, 0, 9, 9], "mask": 1}, {"label": "disc", "box": [0, 0, 9, 9]}]
    said = [{"expressions": ["the blue | disc"], "mask": 2}]
    more = record | {"objects": objects, "referring": said}
    source = one_sample(tmp_path, members | binary, more, kinds={"box": 1, "text": 9}, masks_per_image=20)
    row = source.judged(0)
    assert [t.kind for t in row.targets].count("box") == 2  # objects are taken where there are some
    assert {t.words for t in row.targets if t.kind == "text"} == {"ground", "box", "disc", "the blue   disc"}
    for one in row.targets:
        assert one.truth_HW is not None and one.truth_HW.shape == mask_HW.shape
    del more["labels"]
    binary.pop("mask.png", None)
    without = {key: value for key, value in (members | binary).items() if key != "mask.png"}
    row = one_sample(tmp_path, without, more, kinds={"text": 1}, masks_per_image=20).row(0, 0, 0)
    # "disc" has an object without a mask: what the word means is not known
    assert {t.words for t in row.targets} == {"box", "the blue   disc"}


def test_bad_samples_are_named(tmp_path: Path) -> None:
    pixels_HWC, mask_HW = tiny_prompts.scene(3)
    image = {"png": tiny_prompts.png(pixels_HWC)}
    mask = {"mask.png": encode_mask(mask_HW)}
    record = {"labels": ["ground", "box", "disc"]}
    for members, said, task, words in [
        (image, record, {}, "no mask to prompt for"),
        (image | mask, {"labels": ["ground", "box"]}, {}, "value without a label"),
        (image | mask, {"caption": "a box"}, {}, "mask without labels"),
        (image | mask, record, {"masks": "objects"}, "no mask to prompt for"),
        (image | mask, record, {"smallest": 0.99}, "none large enough"),
        (mask, record, {}, "exactly one image"),
        (image | {"mask.png": encode_mask(mask_HW[:-1])}, record, {}, "differ in size"),
        (image | {"mask.png": encode_mask(np.full_like(mask_HW, 255))}, record, {}, "all pixels of the mask"),
    ]:
        source = one_sample(tmp_path, members, said, **task)
        with pytest.raises(BadSample, match=words):
            source.row(0, 0, 0)
        account = Account()
        assert source.training(0, 0, 0, account) == [] and account.refusals == 1


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "masks"}, "its task is 'prompts'"),
        ({"name": "vqa"}, "its task is 'prompts'"),
        ({"name": "promts"}, "did you mean 'prompts'"),
        ({"name": "prompts", "mask_per_image": 3}, "did you mean 'masks_per_image'"),
        ({"name": "prompts", "kinds": {"pont": 1}}, "did you mean 'point'"),
        ({"name": "prompts", "kinds": {"point": -1}}, "a number from 0"),
        ({"name": "prompts", "kinds": {"point": 0}}, "draws no prompt"),
        ({"name": "prompts", "masks_per_image": 0}, "masks_per_image"),
        ({"name": "prompts", "masks": "things"}, "masks"),
    ],
)
def test_wrong_settings(parts: Path, task: dict[str, Any], words: str) -> None:
    tiny_prompts.run_tree(parts)
    with pytest.raises(UserError, match=words) as caught:
        PromptReader([Source(shards=str(parts / "prompts.tar"), task=task)], SPEC)
    tiny.sentence(caught)


def test_batches(parts: Path) -> None:
    tiny_prompts.run_tree(parts)
    source = reader(parts / "prompts.tar", masks_per_image=5, kinds={"point": 2, "box": 1, "text": 1})
    rows = [source.row(number, 0, number) for number in range(3)]
    batch = collate_prompts([[row] for row in rows], image_size=(64, 64))
    assert tuple(batch.groups) == KINDS and batch.pixels_NCHW.shape == (3, 3, 64, 64)
    assert batch.learned == sum(len(row.targets) for row in rows) == batch.tokens < batch.places
    assert sum(int(group.there_NP.sum()) for group in batch.groups.values()) == batch.learned
    for image, row in enumerate(rows):
        for kind, group in batch.groups.items():
            own = [one for one in row.targets if one.kind == kind]
            assert group.there_NP[image].tolist() == [
                place < len(own) for place in range(group.there_NP.shape[1])
            ]
            for place, one in enumerate(own):
                assert np.array_equal(group.targets_NPhw[image, place], one.target_hw)
                if group.boxes_NP4 is not None:
                    assert np.array_equal(group.boxes_NP4[image, place], one.box_4)
                if group.words:
                    assert group.words[image][place] == one.words
    nothing = collate_prompts([], samples=2, image_size=(64, 64))
    assert nothing.learned == 0 and nothing.samples == 2 and nothing.pixels_NCHW.shape == (1, 3, 64, 64)
    assert all(not group.there_NP.any() for group in nothing.groups.values())
    moved = batch.to(torch.device("meta"))
    tensors = [moved.pixels_NCHW, *(g.there_NP for g in moved.groups.values()), moved.groups["box"].boxes_NP4]
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)
