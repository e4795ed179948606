"""Samples with masks become rows: the same for any ranks and workers, and bad ones are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_masks
import torch
from mask_files import CLASSES, GOOD, SPEC, VALUES, WHOLE, grey_of, members, palette, png, reader
from PIL import Image

from vlm_adapt.config.schema import Augment, Data, Source
from vlm_adapt.data.lanes import LaneCursor, Plan
from vlm_adapt.data.lanes import Source as Lane
from vlm_adapt.data.mask_batch import STAND_IN, MaskBatch, collate_masks
from vlm_adapt.data.mask_reader import MaskReader
from vlm_adapt.data.masks import encode_mask
from vlm_adapt.data.problems import Account
from vlm_adapt.data.rows import PaddedRows
from vlm_adapt.data.stream import Shape, Stream
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec, Native

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("mask", "classes"),
    [
        (encode_mask(VALUES), CLASSES),
        (palette(VALUES), CLASSES),
        (palette(VALUES % 4 % 3, bits=2), np.where(VALUES % 4 % 3 == 1, 1, 0)),  # 0 1 0 0
        (png(np.where(VALUES == 255, 65535, VALUES.astype(np.uint16))), CLASSES),
        (grey_of(VALUES % 4, 4), np.array([0, 1, -9, 2])[VALUES % 4]),
        (grey_of(VALUES % 4, 2), np.array([0, 1, -9, 2])[VALUES % 4]),
        (grey_of(VALUES % 2, 1), VALUES % 2),
    ],
    ids=["grey", "palette", "palette of 2 bits", "16 bits", "4 bits", "2 bits", "1 bit"],
)
def test_kinds_of_masks(tmp_path: Path, mask: bytes, classes: np.ndarray) -> None:
    """Every depth, and palettes by index, give the same classes; whole and at the tower's size."""
    made = reader(tmp_path, [("s", members(mask))])
    whole = made.whole(0)
    assert np.array_equal(whole.mask_HW, classes) and whole.labels == ("red", "green", "blue")
    assert whole.pixels_HWC.shape == (16, 24, 3) and whole.mask_HW.dtype == np.int16
    (row,) = made.training(0, 0, 0, Account())
    assert np.array_equal(row.mask_HW, classes) and row.learned == (classes >= 0).sum()
    assert np.array_equal(row.pixels_CHW.transpose(1, 2, 0), whole.pixels_HWC)


@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_images(tmp_path: Path, turn: int) -> None:
    """The mask is of the image as it is seen."""
    seen_HW = np.zeros((16, 24), np.uint8)
    seen_HW[2:6, 3:20] = 1
    seen_HW[2:14, 3:6] = 1
    seen_HWC = np.where(seen_HW[..., None] == 1, 250, 5).repeat(3, -1).astype(np.uint8)
    # Undo what a viewer will do.
    stored = seen_HWC
    if turn in (2, 3, 6, 7):
        stored = stored[:, ::-1]
    if turn in (3, 4, 7, 8):
        stored = stored[::-1]
    if turn >= 5:
        stored = stored.transpose(1, 0, 2)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = png(np.ascontiguousarray(stored), "JPEG", exif=exif, quality=95)
    sample = {"jpg": data, "mask.png": encode_mask(seen_HW), "json": b'{"labels": ["red", "green"]}'}
    made = reader(tmp_path, [("s", sample)])
    (row,) = made.training(0, 0, 0, Account())
    assert np.array_equal(row.mask_HW, seen_HW)
    assert np.array_equal(row.pixels_CHW[0] > 128, seen_HW == 1)
    if turn >= 5:
        account = Account()
        flat = reader(tmp_path, [("s", sample | {"mask.png": encode_mask(seen_HW.T)})])
        assert not flat.training(0, 0, 0, account) and "mask and image differ in size" in account.refused


def test_duplicate_labels_are_one_class(tmp_path: Path) -> None:
    made = reader(tmp_path, [("s", members(GOOD, ["red", "green", "", "red "]))])
    whole = made.whole(0)
    assert whole.labels == ("red", "green")
    assert np.array_equal(whole.mask_HW, np.array([0, 1, 0, -1])[CLASSES])


def test_label_sets_of_sources(tmp_path: Path) -> None:
    """Left out, kept, named anew and only what is there; two sets in one batch."""
    made = reader(tmp_path, [("s", members(GOOD))], leave_out=["green"], rename={"red": "red|crimson"})
    (row,) = made.training(0, 0, 0, Account())
    assert row.labels == made.labels(0) == ("red|crimson", "blue")
    assert np.array_equal(row.mask_HW, np.array([0, -1, 1, -1])[CLASSES])
    names = [f"n{number}" for number in range(3)] + ["blue"]
    few = members(encode_mask(np.where(VALUES == 1, 0, VALUES)), names)
    present = reader(tmp_path / "b", [("t", few)], only_present=True)
    (other,) = present.training(0, 0, 0, Account())
    assert other.labels == ("n0", "blue") and present.whole(0).labels == tuple(names)
    assert np.array_equal(other.mask_HW, np.array([0, 0, 1, -1])[CLASSES])
    batch = collate_masks([row, [other]])
    assert batch.labels == (("red|crimson", "blue"), ("n0", "blue")) and batch.valid == (192, 288)
    account = Account()
    none = reader(
        tmp_path / "c", [("s", members(GOOD)), ("u", members(encode_mask(VALUES * 0 + 1)))], keep=["red"]
    )
    assert none.training(0, 0, 0, account) and not none.training(1, 0, 1, account)
    assert account.refused == {"all pixels of the mask are ignored": 1}
    assert "none of its labels is in the set" in account.named()


def test_names_that_the_data_lack(tmp_path: Path) -> None:
    """Said before training, from the first samples; a bad one among them does not matter."""
    samples = [("bad", members(GOOD, [])), ("s", members(GOOD)), ("t", members(GOOD, ["grey"] * 4))]
    with pytest.raises(UserError, match=r"source 's.tar' has no label 'gren', did you mean 'green'\?"):
        reader(tmp_path, samples, leave_out=["gren"])
    assert reader(tmp_path, samples, leave_out=["grey"]).labels(0) == ("red", "green", "blue")
    assert reader(tmp_path, [("bad", members(GOOD, []))], leave_out=["x"]).labels(0) == ()
    native = ImageSpec((16, 16), native=Native(8))
    with pytest.raises(UserError, match="masks are learned on images of one size"):
        MaskReader([], native)


def test_crops_show_something(tmp_path: Path) -> None:
    """Where one pixel of 200 x 200 is labelled, most crops miss it: the image is squashed, or refused."""
    values_HW = np.full((200, 200), 255, np.uint8)
    values_HW[100, 100] = 1
    sample = members(encode_mask(values_HW)) | {"png": tiny.image(1, 200, 200)}
    path = tiny.shard(tmp_path / "s.tar", [("s", sample)])
    made = MaskReader(
        [Source(shards=str(path))], ImageSpec((200, 200)), 0, Data(augment=Augment(scale=(8, 8)))
    )
    learned = [made.training(0, 0, position, Account())[0].learned for position in range(6)]
    assert 1 in learned and max(learned) >= 1
    small = MaskReader([Source(shards=str(path))], ImageSpec((4, 4)), 0, WHOLE)
    account = Account()
    assert not small.training(0, 0, 0, account)
    assert account.refused == {"no labelled pixel of the mask is left at the size of training": 1}


def sources(folder: Path) -> list[Source]:
    tiny_masks.shard(folder / "a.tar", 13)
    tiny_masks.shard(folder / "b.tar", 8, ("grey", "blue"), first=50)
    return [Source(shards=str(folder / name)) for name in ("a.tar", "b.tar")]


def stream_of(folder: Path, rank: int, ranks: int, workers: int) -> list[MaskBatch]:
    made = MaskReader(sources(folder), SPEC, 3, Data(augment=Augment(jitter=0.2)))
    plan = Plan([Lane(made.counts(n), mark=made.mark(n)) for n in range(2)], seed=1, lanes=4)
    rows = PaddedRows(plan, made.twin().measure)
    stream = Stream(
        made, rows, Shape(12 // ranks, 1, rank, ranks), {"image_size": SPEC.size}, workers, collate_masks
    )
    return [batch for step in stream.steps(LaneCursor(), 3) for batch in step.batches]


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (1, 2), (3, 1)])
def test_ranks_and_workers_draw_the_same(tmp_path: Path, ranks: int, workers: int) -> None:
    """Draws depend on seed, epoch and position alone; another epoch draws others."""
    (whole, *_), parts = (
        [stream_of(tmp_path, 0, 1, 0)],
        [stream_of(tmp_path, rank, ranks, workers) for rank in range(ranks)],
    )
    for number, batch in enumerate(whole):
        mine = [part[number] for part in parts]
        assert sum((one.keys for one in mine), ()) == batch.keys
        real = [one for one in mine if one.keys]
        assert torch.equal(torch.cat([one.pixels_NCHW for one in real]), batch.pixels_NCHW)
        assert torch.equal(torch.cat([one.masks_NHW for one in real]), batch.masks_NHW)
        assert sum((one.labels for one in real), ()) == batch.labels
    assert {len(labels) for batch in whole for labels in batch.labels} == {2, 3}
    made = MaskReader(sources(tmp_path), SPEC)
    first, again, later = (made.row(0, epoch, 0) for epoch in (0, 0, 1))
    assert np.array_equal(first.pixels_CHW, again.pixels_CHW)
    assert not np.array_equal(first.pixels_CHW, later.pixels_CHW)


def test_batches() -> None:
    """Counts, no rows at all, wide label sets, and the memory that pixels lie in."""
    none = collate_masks([], 0, (4, 6))
    assert none.pixels_NCHW.shape == (1, 3, 4, 6) and none.masks_NHW.tolist() == [[[-1] * 6] * 4]
    assert (none.learned, none.tokens, none.places, none.samples) == (0, 0, 24, 0)
    assert none.labels == (STAND_IN,) and none.keys == () and none.images is none.pixels_NCHW
    moved = none.to(torch.device("cpu"))
    assert isinstance(moved, MaskBatch) and moved.labels == none.labels


def test_texts_of_a_sample(tmp_path: Path) -> None:
    """A sample makes one row; whoever asks for another gets nothing and enters nothing."""
    made = reader(tmp_path, [("s", members(GOOD))])
    account = Account()
    assert made.measure(0, 0, 0) == [1] and made.training(0, 0, 0, account, (1,)) == [] and not account.read
    assert len(made.training(0, 0, 0, account, (0,))) == 1 and account.used == 1
