"""The verb `segment` asked of promptable models: prompts, everything, names; models without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sam
import torch
import yaml
from PIL import Image

from vlm_adapt.cli import main
from vlm_adapt.data.masks import read_mask
from vlm_adapt.errors import UserError
from vlm_adapt.models.promptable_build import build
from vlm_adapt.segment.ask import Ask
from vlm_adapt.segment.opened import UNTRAINED, config_of, load, locate
from vlm_adapt.segment.promptable import Prompted


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture, a mask of it, and a configuration of a tiny random model."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save("street.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:50] = 255  # black and white, as people draw them
    Image.fromarray(mask).save("part.png")
    model = tiny_sam.config(tmp_path).model_dump(exclude_none=True)
    tree = {"output_dir": "out", "seed": 3, "model": model, "train": {"bf16": False}}
    Path("sam.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    return tmp_path


def segment(*words: str) -> int:
    return main(["segment", "sam.yaml", "--image", "street.png", *words])


def test_a_point(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is the mask that the model gives, the best of three by its own estimate."""
    assert segment("--point", "30,20", "--point", "5,5,0", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in told["labels"]] == ["object"]
    written = read_mask((folder / "street-mask.png").read_bytes())
    assert written.shape == (40, 60) and set(np.unique(written)) <= {0, 255}
    assert (written == 0).mean() == pytest.approx(told["labels"][0]["share"])
    assert (folder / "street-overlay.png").is_file()


def asked(folder: Path, **ask: Any) -> tuple[Prompted, np.ndarray]:
    assembled = load("sam.yaml").assembled
    return Prompted(assembled, Ask(**ask)), np.asarray(Image.open("street.png"))


def test_prompts_reach_the_model(folder: Path) -> None:
    """Points, a box and a mask are one object's; several boxes are several; a lone point is ambiguous."""
    for ask, given, multimask in (
        ({"points": ((30.0, 20.0, 1),)}, {"points_PK2": [[[30, 20]]]}, True),
        (
            {"points": ((30.0, 20.0, 1), (5.0, 5.0, 0)), "boxes": ((2.0, 2.0, 40.0, 30.0),)},
            {
                "points_PK2": [[[30, 20], [5, 5]]],
                "point_labels_PK": [[1, 0]],
                "boxes_P4": [[2, 2, 40, 30]],
            },
            False,
        ),
        (
            {"boxes": ((2.0, 2.0, 40.0, 30.0), (0.0, 0.0, 9.0, 9.0))},
            {"boxes_P4": [[2, 2, 40, 30], [0, 0, 9, 9]]},
            False,
        ),
    ):
        prompted, pixels = asked(folder, **ask)
        found, _ = prompted._prompted(prompted.model.embed(pixels))
        wanted = prompted.model.masks(prompted.model.embed(pixels), **given, multimask=multimask)
        assert len(found) == len(wanted.logits_PMHW)
        for one, logits, iou in zip(found, wanted.logits_PMHW, wanted.iou_PM, strict=True):
            best = int(iou.argmax())
            np.testing.assert_array_equal(one.mask_HW, (logits[best] > 0).numpy())
            assert one.predicted_iou == pytest.approx(float(iou[best]))


def test_a_mask_file_goes_with_its_box(folder: Path) -> None:
    prompted, pixels = asked(folder, mask=Path("part.png"))
    embedding = prompted.model.embed(pixels)
    found, _ = prompted._prompted(embedding)
    inside = np.asarray(Image.open("part.png")) > 0
    low = prompted.model.mask_prompt(inside, embedding.frame)
    wanted = prompted.model.masks(
        embedding, boxes_P4=[[20, 10, 50, 30]], mask_inputs_Phw=low, multimask=False
    )
    np.testing.assert_array_equal(found[0].mask_HW, (wanted.logits_PMHW[0, 0] > 0).numpy())


def test_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights believe in nothing: nothing is found, and that is no error."""
    assert segment("--everything", "--grid", "2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["labels"] == [] and told["masks"] == []
    assert (read_mask((folder / "street-mask.png").read_bytes()) == 255).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "needs to be asked"),
        (("--point", "30,20", "--everything"), "give one of them"),
        (("--box", "0,0,9,9", "--box", "1,1,9,9", "--point", "3,3"), "go with one box"),
        (("--point", "61,20"), "a prompt lies outside of the image"),
        (("--box", "0,0,9,41"), "a prompt lies outside of the image"),
        (("--labels", "cat"), "has no text encoder"),
        (("--point", "3,3", "--grid", "4"), "settings of --everything"),
        (("--everything", "--grid", "0"), "points_per_side is from 1 to 512"),
        (("--point", "3,3", "--scores"), "--scores is nothing that a promptable model can be asked"),
        (("--point", "3,3", "--flip"), "--flip is nothing"),
        (("--mask", "sam.yaml"), "cannot be read"),
        (("--mask", "small.png"), "the mask is 8 x 8 and the image 60 x 40"),
        (("--mask", "empty.png"), "is empty"),
    ],
)
def test_what_cannot_be_asked(
    folder: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.ones((8, 8), np.uint8)).save("small.png")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save("empty.png")
    assert segment(*words) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert not (folder / "street-mask.png").exists()


def test_names_need_a_segmenter_and_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "named").mkdir()
    (folder / "named" / "state.json").write_text("{}")
    assert segment("--everything", "--name-with", "named") == 2
    assert "--name-with chooses among words" in capsys.readouterr().err
    (folder / "named" / "run.yaml").write_text(Path("sam.yaml").read_text())
    (folder / "named" / "state.json").write_text('{"step": 1, "stage": 0, "labels": [], "plan": []}')
    assert segment("--everything", "--name-with", "named", "--labels", "road") == 2
    assert "of kind promptable: --name-with needs a segmenter" in capsys.readouterr().err


def test_models_without_a_run(folder: Path) -> None:
    assert locate("package:mobile-sam") == "package:mobile-sam"
    config = config_of("package:mobile-sam")
    assert (config.kind, config.vision.image_size) == ("promptable", 1024)
    assert config.vision.options == {"last_stride": 1}
    assert set(UNTRAINED) == {"package:mobile-sam"}
    with pytest.raises(UserError, match="did you mean 'package:mobile-sam'"):
        locate("package:mobile-san")
    with pytest.raises(UserError, match="there is no checkpoint"):
        locate("nowhere")
    opened = load("sam.yaml").assembled
    assert not any(one.requires_grad for one in opened.model.parameters())
    # The seed of the file is that of its random weights, the same every time.
    again = build(config_of("sam.yaml"), torch.float32, 3).model
    for name, value in opened.model.connector.state_dict().items():
        torch.testing.assert_close(again.connector.state_dict()[name], value, rtol=0, atol=0)
