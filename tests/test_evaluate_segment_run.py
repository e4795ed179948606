"""Segmenters of training runs are scored: the same figures at one process and at two with ZeRO-3, and later
from the checkpoint, by shards and by a zero-shot protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import episode_folders as folders
import numpy as np
import pytest
import tiny_masks
from episode_folders import blocks
from forks import write

from vlm_adapt.cli import main

# Pixels whose two likeliest labels are as good as equal may turn over by rounding: of 8,000, a few.
CLOSE = 2e-3
TEXT_TOO = [{"method": "full", "where": "connector"}, {"method": "lora", "where": "language", "r": 4}]


def metrics_of(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    return found


def tree_of(root: Path, output: str, zero: str = "zero0", rows: int = 4) -> dict[str, Any]:
    """A run of four steps, evaluated in between and at the end, on two sets of other labels and sizes."""
    tree = tiny_masks.run_tree(
        root,
        output,
        adapt=TEXT_TOO,
        model__head={"channels": 16, "regularisation": "bottleneck", "regularisation_depth": 1},
        model__temperature="learned",
        train__deepspeed=zero,
        train__eval_steps=2,
        train__per_device_train_batch_size=rows,
    )
    tree["data"]["evaluate"] = [{"shards": str(root / name)} for name in ("held.tar", "more.tar")]
    tree["evaluate"] = {"batch_size": 4, "unseen": ["blue"]}
    return tree


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(server: Any, root: Path) -> Path:
    """The output folder of a run of one process."""
    tree = tree_of(root, "alone")
    server.run(["train", write(tree)])
    return Path(tree["output_dir"])


@pytest.mark.slow
def test_ranks_count_alike(trained: Path, root: Path, server: Any) -> None:
    """Seven or eight images a rank, of other sizes and labels, in a model whose weights are shared out."""
    whole = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else tiny parameters stay whole
    (root / "zero3.json").write_text(json.dumps({"zero_optimization": whole}))
    tree = tree_of(root, "two", str(root / "zero3.json"), 2)
    server.run(["train", write(tree)], ranks=2)
    alone, two = metrics_of(trained), metrics_of(tree["output_dir"])
    assert list(alone["sources"]) == list(two["sources"]) == ["held.tar", "more.tar"]
    assert alone["samples"] == two["samples"] == alone["account"]["used"] == two["account"]["used"] == 15
    for key in ("miou", "pixel_accuracy", "miou_seen", "miou_unseen", "harmonic_miou", "loss"):
        assert two[key] == pytest.approx(alone[key], rel=CLOSE, abs=CLOSE), key
    pixels = [sum(one["pixels"] for one in found["sources"].values()) for found in (alone, two)]
    assert pixels[0] == pixels[1] > 5000


def test_again_from_the_checkpoint(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`vlm-adapt evaluate` finds the last checkpoint's figures again, prints classes, writes its files."""
    known = metrics_of(trained)
    last = str(trained / known["checkpoint"])
    assert main(["evaluate", last, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "blue (unseen)" in said and "drawn evenly" in said and "harmonic_miou" in said
    again = metrics_of(tmp_path)
    for key in ("miou", "loss"):
        assert again[key] == pytest.approx(known[key], rel=CLOSE), key
    written = {path.name for path in tmp_path.iterdir()}
    assert {"confusion-0.csv", "confusion-1.png", "samples-1.png"} <= written
    assert (trained / "confusion-0.png").is_file()


def test_zero_shot(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A protocol's road from folder to file, on a real (and ignorant) model."""
    whole = np.ones((2, 2), int).repeat(20, 0).repeat(30, 1)
    root = folders.pascal(
        tmp_path, {"a": (whole, whole), "b": (blocks("12"), blocks("1."))}, ["a__01", "b__01"], 0
    )
    output = str(trained)
    assert main(["zero-shot", output, "pascal5i", str(root), "--output", str(tmp_path / "out")]) == 0
    assert "FB-IoU" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "zero_shot.json").read_text())
    assert found["episodes"] == 1000 and 0 <= found["miou"] <= 1 and found["side"] == 480
    assert main(["zero-shot", output, "pascal5i", str(root), "--full", "--limit", "2"]) == 0
    assert "at the images' own size" in capsys.readouterr().out
