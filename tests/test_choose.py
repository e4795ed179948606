"""Which checkpoint to begin from: leave-one-out neighbours over its vision features, against brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from small_adapters import copied, full, trained

from vlm_adapt.cli import main
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.choose import choose
from vlm_adapt.models.restore import restore

COUNT = 18


def task(path: Path) -> Path:
    """Pictures of three kinds of noise; of each two shades, which only the label tells together."""
    samples = []
    for number in range(COUNT):
        record = {"caption": "x", "kind": ["dot", "bar", "ring"][number % 3], "size": number % 2}
        members = {"json": json.dumps(record).encode(), "png": tiny.image(number % 6 * 7 + number // 9)}
        samples.append((f"s{number:03d}", members))
    return tiny.shard(path, samples)


@pytest.fixture(scope="module")
def experts(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints with other eyes, `blind` whose first layer is zero, and `task.tar`."""
    folder = tmp_path_factory.mktemp("experts")
    for name, seed in (("one", 0), ("two", 1)):
        plan = [full("vision")]
        trained(parts, folder / f"run-{name}", adapt=plan, seed=seed, train__max_steps=2).rename(
            folder / name
        )
    blind = copied(folder / "one", folder / "blind")
    path = blind / "vision-full" / "model.safetensors"
    # Nothing of the pixels comes in: every image looks the same.
    tensors = load_file(path)
    still = {k: torch.zeros_like(t) if "projection.weight" in k else t for k, t in tensors.items()}
    assert any("projection.weight" in key for key in tensors)
    save_file(still, path)
    task(folder / "task.tar")
    return folder


def by_hand(folder: Path, shards: Path, field: str, k: int) -> float:
    """Mean over patches of the last layer; cosine; the k nearest others vote; the nearest wins a tie."""
    import tarfile

    from vlm_adapt.data.patches import load

    ours: Any = restore(folder)[0]
    pixels, labels = [], []
    with tarfile.open(shards) as tar:
        for member in sorted(tar.getnames()):
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.endswith(".json"):
                labels.append(str(json.loads(data)[field]))
            else:
                pixels.append(load(data, ours.model.vision.image_spec))
    with torch.no_grad():
        features = ours.model.features(torch.from_numpy(np.stack(pixels)))[-1].mean(1).double()
    unit = features / features.norm(dim=1, keepdim=True)
    right = 0
    for number in range(len(unit)):
        near = sorted(
            range(len(unit)), key=lambda other: (-round(float(unit[number] @ unit[other]), 10), other)
        )
        near = [other for other in near if other != number][:k]
        votes = [labels[other] for other in near]
        most = max(votes.count(vote) for vote in votes)
        right += next(vote for vote in votes if votes.count(vote) == most) == labels[number]
    return right / len(unit)


@pytest.mark.parametrize(("field", "k"), [("kind", 1), ("kind", 3), ("size", 1)])
def test_against_brute_force(experts: Path, field: str, k: int) -> None:
    folders = [experts / name for name in ("blind", "one", "two")]
    ranked = choose(folders, [str(experts / "task.tar")], field, k, batch_size=5)
    want = {str(folder): by_hand(folder, experts / "task.tar", field, k) for folder in folders}
    assert {one.checkpoint: one.accuracy for one in ranked} == pytest.approx(want)
    assert [one.accuracy for one in ranked] == sorted(want.values(), reverse=True)
    assert {(one.images, one.classes) for one in ranked} == {(COUNT, 3 if field == "kind" else 2)}


def test_eyes_that_see_go_before_eyes_that_do_not(experts: Path) -> None:
    """Equal features for all: the first other image always votes, and a third of the labels is its."""
    folders = [experts / name for name in ("blind", "one", "two")]
    ranked = choose(folders, [str(experts / "task.tar")], "kind")
    assert Path(ranked[-1].checkpoint).name == "blind" and ranked[-1].accuracy < 0.4 < ranked[0].accuracy
    # Of equals the first given goes first.
    twice = choose(
        [experts / "two", copied(experts / "two", experts / "again")], [str(experts / "task.tar")], "kind"
    )
    assert [Path(one.checkpoint).name for one in twice] == ["two", "again"]


def test_verb(experts: Path, capsys: Any) -> None:
    words = ["adapt", "choose", str(experts / "one"), str(experts / "blind")]
    words += ["--shards", str(experts / "task.tar"), "--label"]
    assert main([*words, "kind"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[-1].endswith("one") and "18 images of 3 classes, 1 neighbour(s)" in said[2]
    assert main([*words, "kind", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["images"] == COUNT
    for extra, wrong in ((["knd"], "none of 18 samples"), (["caption"], "every sample's 'caption' is 'x'")):
        assert main([*words, *extra]) == 2
        assert wrong in capsys.readouterr().err
    assert main([*words, "kind", "--k", "18"]) == 2
    assert "from 1 to 17" in capsys.readouterr().err


def test_samples_without_a_label_are_counted(experts: Path, parts: Path, tmp_path: Path) -> None:
    mixed = tiny.questions_shard(tmp_path / "mixed.tar", 4)
    (one,) = choose([experts / "one"], [str(experts / "task.tar"), str(mixed)], "kind")
    assert one.images == COUNT and sum(one.refused.values()) == 4
    with pytest.raises(UserError, match="needs checkpoints"):
        choose([], [str(mixed)], "kind")
