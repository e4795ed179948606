"""The verb `segment` with a checkpoint that a training run wrote, end to end; tiny parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_masks
import torch
from PIL import Image

from vlm_adapt.cli import main
from vlm_adapt.config.load import validate
from vlm_adapt.data.masks import read_mask
from vlm_adapt.models.dense_inference import DenseInference
from vlm_adapt.models.restore import restore_any
from vlm_adapt.train.run import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segment")
    train(validate(tiny_masks.run_tree(folder), "x"))
    return folder / "out"


def photograph(path: Path, width: int = 70, height: int = 45) -> np.ndarray:
    pixels_HWC, _ = tiny_masks.scene(5, ("red", "green", "blue"), width, height)
    Image.fromarray(pixels_HWC).save(path)
    return pixels_HWC


def test_the_mask_is_the_models(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels_HWC = photograph(tmp_path / "a.png")
    words = ["--labels", "red|crimson, blue, never seen", "--scales", "1,1.5", "--flip", "--scores", "--json"]
    words += ["--image", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert main(["segment", str(trained), *words]) == 0
    told = json.loads(capsys.readouterr().out)
    mask_HW = read_mask(Path(told["mask"]).read_bytes())
    model = restore_any(trained, torch.float32)[0].model.eval()
    labels = ("red|crimson", "blue", "never seen")
    classes_HW, sure_HW = DenseInference(model, scales=(1, 1.5), flip=True).classes(pixels_HWC, labels)
    assert (mask_HW == classes_HW).all()
    best = told["labels"][0]
    place = [name.split("|")[0] for name in labels].index(best["label"])
    assert best["share"] == pytest.approx((classes_HW == place).mean())
    assert best["score"] == pytest.approx(sure_HW[classes_HW == place].mean(), abs=1e-4)


def test_other_checkpoints_say_what_they_are(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph(tmp_path / "a.png")
    words = ["--image", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert main(["segment", str(trained), *words]) == 2
    assert "give --labels" in capsys.readouterr().err
    assert main(["segment", str(trained), *words, "--labels", "red", "--everything"]) == 2
    assert "--everything is nothing that a segmenter can be asked" in capsys.readouterr().err
    tree = tiny.run_tree(tmp_path)
    chat = tmp_path / "chat" / "checkpoint-1"
    chat.mkdir(parents=True)
    (chat / "run.yaml").write_text(json.dumps(tree))
    (chat / "state.json").write_text(json.dumps({"step": 1, "stage": 0, "labels": []}))
    assert main(["segment", str(chat), *words, "--labels", "red"]) == 2
    said = capsys.readouterr().err
    assert "answers in words (ask it with chat)" in said and "of kind segmenter or promptable" in said
    assert not (tmp_path / "out").exists()
