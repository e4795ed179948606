"""Zero-shot protocols: folds exactly, episodes as published, counts summed and not averaged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import episode_folders as folders
import flat_segmenter as flat
import numpy as np
import pytest
import torch
from episode_folders import blocks
from torch.nn import functional

from vlm_adapt.cli import main
from vlm_adapt.data.episodes import PROTOCOLS
from vlm_adapt.data.episodes.protocol import Episode, Protocol
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate import zero_shot as room
from vlm_adapt.evaluate.zero_shot import nearest_square, zero_shot, zero_shot_checkpoint

VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
# The published label file, in its order.
COCO = (
    "person bicycle car motorbike aeroplane bus train truck boat trafficlight firehydrant stopsign "
    "parkingmeter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella "
    "handbag tie suitcase frisbee skis snowboard sportsball kite baseballbat baseballglove skateboard "
    "surfboard tennisracket bottle wineglass cup fork knife spoon bowl banana apple sandwich orange "
    "broccoli carrot hotdog pizza donut cake chair sofa pottedplant bed diningtable toilet tvmonitor "
    "laptop mouse remote keyboard cellphone microwave oven toaster sink refrigerator book clock vase "
    "scissors teddybear hairdrier toothbrush"
).split()


def opened(name: str, root: Path, fold: int = 0, **more: Any) -> Protocol:
    protocol: Protocol = PROTOCOLS.load(name)(fold, **more)
    protocol.open(root)
    return protocol


def segmenter(looks: dict[str, int], size: tuple[int, int] = (480, 480)) -> flat.FlatSegmenter:
    model = flat.FlatSegmenter(size)
    model.labels.looks = looks
    return model


@pytest.mark.parametrize("fold", range(4))
def test_folds(fold: int) -> None:
    pascal, coco = PROTOCOLS.load("pascal5i")(fold), PROTOCOLS.load("coco20i")(fold)
    assert list(pascal.unseen()) == VOC[5 * fold : 5 * fold + 5]
    assert list(coco.unseen()) == [COCO[fold + 4 * place] for place in range(20)]
    for protocol, everything in ((pascal, VOC), (coco, COCO)):
        assert sorted((*protocol.unseen(), *protocol.seen())) == sorted(everything)


def test_plain_names() -> None:
    assert PROTOCOLS.load("pascal5i")(3, "plain").unseen()[0] == "potted plant"
    coco = PROTOCOLS.load("coco20i")(1, "plain")
    assert {"traffic light", "couch"} <= set(coco.unseen()) and {"airplane", "tv"} <= set(coco.seen())


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Aeroplane: a small one found, a large one missed. Boat: found, and its ignored edge does not count."""
    return folders.pascal(
        tmp_path,
        {
            "small": (blocks("1000", "0000", "0000", "0000"), blocks("1000", "0000", "0000", "0006")),
            "large": (blocks("00", "00"), blocks("11", "11")),
            "boat": (blocks("44", "40"), blocks("44", ".0")),
        },
        ["small__01", "large__01", "boat__04"],
        fold=0,
    )


def test_pascal(voc: Path) -> None:
    """1000 episodes through the list of three: 334 times the first, 333 the others."""
    protocol = opened("pascal5i", voc)
    episodes = protocol.episodes()
    assert episodes == [
        (Episode("small", 0), Episode("large", 0), Episode("boat", 3))[place % 3] for place in range(1000)
    ]
    found = zero_shot(segmenter({"aeroplane": 1, "boat": 4}), protocol)
    metrics, part = found.metrics, 480 * 480 // 16
    aeroplane = 334 * part / (334 * part + 333 * 16 * part)
    assert metrics["per_class"]["aeroplane"] == {"iou": pytest.approx(aeroplane), "episodes": 667}
    # Averaged over images it would be a half: 334 hits of 667.
    assert metrics["per_class"]["boat"]["iou"] == 1.0
    assert metrics["miou"] == pytest.approx((aeroplane + 1) / 2)
    front = (334 + 333 * 8) / (334 + 333 * 16 + 333 * 8)
    back = (334 * 15 + 333 * 4) / (334 * 15 + 333 * 16 + 333 * 4)
    assert metrics["fb_iou"] == pytest.approx((front + back) / 2)
    assert metrics["absent"] == ["bicycle", "bird", "bottle"]
    assert metrics["episodes"] == 1000 and not metrics["as_published"]
    assert "aeroplane" in found.table() and "1000" in found.table()


def test_others_is_the_other_label(voc: Path) -> None:
    model = segmenter({"aeroplane": 1, "boat": 4})
    zero_shot(model, opened("pascal5i", voc), limit=1)
    assert set(model.labels.asked) == {("others", "aeroplane")}


def test_as_published_means_these_episodes(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the published list's mark figures are called so, and not with a limit or at another size."""
    protocol = opened("pascal5i", voc)
    mark = protocol.mark(protocol.episodes())
    monkeypatch.setattr(type(protocol), "marks", (mark, "", "", ""))
    model = segmenter({})
    assert zero_shot(model, protocol).metrics["as_published"]
    assert not zero_shot(model, protocol, limit=999).metrics["as_published"]
    assert not zero_shot(model, protocol, side=240).metrics["as_published"]
    assert not zero_shot(model, protocol, side=None).metrics["as_published"]


def coco_folder(root: Path) -> tuple[Path, dict[int, list[str]]]:
    draws = np.random.default_rng(3)
    lists: dict[int, list[str]] = {number: [] for number in range(80)}
    for number in range(1, 80, 4):
        count = int(draws.integers(1, 4))
        lists[number] = [f"val2014/COCO_val2014_{number:06}{place:06}.jpg" for place in range(count)]
    images = [name for some in lists.values() for name in some]
    masks = {name: np.full((480, 480), int(name[21:27]) + 1) for name in images}
    masks[lists[1][0]][:240] = 255  # nothing is ignored there: it is not the class
    return folders.coco(root, lists, masks, fold=1), lists


def test_coco(tmp_path: Path) -> None:
    """Draws as numpy's global generator makes them from seed 0: a class, then one of its images."""
    root, lists = coco_folder(tmp_path)
    protocol = opened("coco20i", root, 1)
    ids, wanted = list(range(1, 80, 4)), []
    kept = np.random.get_state()
    np.random.seed(0)
    for _ in range(1000):
        number = np.random.choice(ids, 1, replace=False)[0]
        wanted.append((str(np.random.choice(lists[number], 1, replace=False)[0]), ids.index(number)))
    np.random.set_state(kept)
    assert [tuple(one) for one in protocol.episodes()] == wanted
    assert protocol.episodes() == protocol.episodes()
    pixels_HWC, truth_HW = protocol.read(Episode(lists[1][0], 0))
    assert pixels_HWC.shape == (480, 480, 3)
    assert (truth_HW[:240] == 0).all() and (truth_HW[240:] == 1).all()
    model = segmenter({name: 1 for name in protocol.unseen()})
    metrics = zero_shot(model, protocol, limit=10).metrics
    assert metrics["episodes"] == 10 and metrics["episodes_in_all"] == 1000 and metrics["miou"] > 0.5


def test_fss(tmp_path: Path) -> None:
    """Every image, classes by letters whatever the list's order and line ends; half grey is the class."""
    one = (blocks("10", "00"), np.where(blocks("10", "00") > 0, 128, 127))
    missed = (blocks("00", "00"), blocks("10", "00") * 255)
    root = folders.fss(tmp_path, {"yak_hair": [one] * 10, "abacus": [missed] * 2}, ["zebra_crossing"])
    protocol = opened("fss1000", root)
    assert protocol.unseen() == ("abacus", "yak_hair") and protocol.seen() == ("zebra_crossing",)
    images = [episode.image for episode in protocol.episodes()]
    assert images[:4] == ["abacus/1.jpg", "abacus/2.jpg", "yak_hair/1.jpg", "yak_hair/10.jpg"]
    assert list(protocol.unseen_ids()) == [760, 761]
    metrics = zero_shot(segmenter({"abacus": 1, "yak_hair": 1}), protocol).metrics
    assert metrics["per_class"] == {
        "abacus": {"iou": 0.0, "episodes": 2},
        "yak_hair": {"iou": 1.0, "episodes": 10},
    }
    assert opened("fss1000", root, names="plain").unseen() == ("abacus", "yak hair")


def test_nearest_is_torchs() -> None:
    """For every length of a photograph's side, with torch's rounding."""
    for length in [*range(1, 40), *range(300, 641, 7), 375, 500, 640, 479, 481, 961]:
        row = np.arange(length, dtype=np.float32)[None].repeat(2, 0)  # as the published masks are
        torchs = functional.interpolate(torch.from_numpy(row)[None, None], (480, 480), mode="nearest")
        np.testing.assert_array_equal(nearest_square(row, 480)[0], torchs[0, 0, 0].numpy())


def test_damaged_files_are_named(voc: Path) -> None:
    (voc / "VOC2012" / "SegmentationClassAug" / "large.png").write_bytes(b"no")
    protocol = opened("pascal5i", voc)
    account = zero_shot(segmenter({}), protocol).metrics["account"]
    assert account["refused"] == {"mask is not a PNG": 1} and account["used"] == 2
    for name in ("small", "boat"):
        (voc / "VOC2012" / "JPEGImages" / f"{name}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of 1000 episodes could be used"):
        zero_shot(segmenter({}), protocol)


def spoil(root: Path, what: str) -> None:
    fold = root / "VOC2012" / "splits" / "pascal" / "val" / "fold0.txt"
    if what == "layout":
        (root / "VOC2012" / "SegmentationClassAug").rename(root / "VOC2012" / "SegmentationClass")
    elif what == "list":
        fold.unlink()
    else:
        fold.write_text(what)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("layout", "is not laid out as PASCAL-5i is distributed: there is no SegmentationClassAug/ in it"),
        ("list", "there is no list .*fold0.txt: the published lists are those of HSNet's data/splits"),
        ("", "is empty"),
        ("2007_000033__06\n", "line '2007_000033__06' of .* is not an image and a class from 01 to 05"),
        ("2007_000033\n", "line '2007_000033' of"),
    ],
)
def test_wrong_folders(voc: Path, what: str, words: str) -> None:
    spoil(voc, what)
    with pytest.raises(UserError, match=words):
        opened("pascal5i", voc)


def test_other_mistakes(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="PASCAL-5i has folds 0 to 3, and no fold 4"):
        PROTOCOLS.load("pascal5i")(4)
    with pytest.raises(UserError, match="FSS-1000 has one test split"):
        PROTOCOLS.load("fss1000")(1)
    with pytest.raises(UserError, match="there is no folder"):
        opened("coco20i", tmp_path / "nowhere")
    with pytest.raises(UserError, match="unknown spelling 'plane', did you mean 'plain'"):
        PROTOCOLS.load("pascal5i")(0, "plane")
    root, lists = coco_folder(tmp_path / "coco")
    with pytest.raises(UserError, match="does not hold lists of images by class number, 0, 4, 8"):
        folders.coco(root, {2: ["val2014/a.jpg"]}, {}, fold=0)
        opened("coco20i", root, 0)
    (root / "COCO2014" / lists[1][0]).unlink()
    protocol = opened("coco20i", root, 1)
    with pytest.raises(UserError, match="1 of .* files that fold1.pkl names are not there, first .*val2014"):
        protocol.check_files(protocol.episodes())
    empty = folders.fss(tmp_path / "fss", {"abacus": []}, [])
    with pytest.raises(UserError, match="1 of the 1 test classes have no folder"):
        opened("fss1000", empty)


def test_the_verb(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = segmenter({"aeroplane": 1, "boat": 4})
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    monkeypatch.setattr(room, "restore_any", lambda path: (flat.assembled(model), None, checkpoint))
    monkeypatch.setattr(room, "find_checkpoint", lambda path: path)
    run = SimpleNamespace(model=SimpleNamespace(), evaluate=None)
    monkeypatch.setattr(room, "load_run", lambda path, overrides: run)
    monkeypatch.setattr(sys.modules["vlm_adapt.cli.zero_shot"], "checkpoint_folder", lambda path: path)
    run.model.kind = "segmenter"
    assert main(["zero-shot", str(checkpoint), "pascal5i", str(voc)]) == 0
    said = capsys.readouterr()
    assert "mIoU" in said.out and "not the published episodes: the list" in said.out
    file = checkpoint / "zero_shot" / "pascal5i-0" / "zero_shot.json"
    assert json.loads(file.read_text())["episodes"] == 1000 and str(file) in said.err
    run.model.kind = "vision_language"
    assert main(["zero-shot", str(checkpoint), "pascal5i", str(voc)]) == 2
    assert "zero-shot needs a segmenter" in capsys.readouterr().err
    protocol = opened("pascal5i", voc)
    (voc / "VOC2012" / "JPEGImages" / "boat.jpg").unlink()
    with pytest.raises(UserError, match="1 of 6 files"):
        zero_shot_checkpoint(checkpoint, protocol)


def test_classes_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["zero-shot", "pascal5i", "--list-classes", "--fold", "1", "--names", "plain"]) == 0
    said = capsys.readouterr().out
    assert "unseen, 5:\n  bus, car, cat, chair, cow" in said
    assert "task: {name: masks, leave_out: [bus, car, cat, chair, cow]}" in said
    assert main(["zero-shot", "fss1000", "--list-classes"]) == 2
    assert "name their folder with --lists" in capsys.readouterr().err
    root = folders.fss(tmp_path, {"abe's_fish": [(blocks("1"), blocks("1"))]}, ["yes"])
    lists = root / "FSS-1000" / "splits" / "fss"
    assert main(["zero-shot", "fss1000", "--list-classes", "--lists", str(lists)]) == 0
    assert 'leave_out: ["abe\'s_fish"]' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pascal5i"], "takes a checkpoint, a protocol"),
        (["here", "pascal5", "there"], "did you mean 'pascal5i'"),
        (["nowhere", "pascal5i", "there"], "nowhere"),
        (["pascal5i", "--list-classes", "--fold", "9"], "no fold 9"),
    ],
)
def test_wrong_words(words: list[str], sentence: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["zero-shot", *words]) == 2
    assert sentence in capsys.readouterr().err
