"""Who cannot teach, and when that is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from teaching import ALL, DISTIL, PROMPTS, student, trained

from vlm_adapt.errors import UserError
from vlm_adapt.models.check import check_run

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(parts, tmp_path_factory.mktemp("distil") / "teacher")


def test_who_cannot_teach(parts: Path, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    tiny.llama(folder)
    other = json.loads((folder / "tokenizer.json").read_text())
    last = max(other["model"]["vocab"], key=other["model"]["vocab"].get)
    other["model"]["vocab"]["!!new!!"] = other["model"]["vocab"].pop(last)
    other["model"]["merges"] = [m for m in other["model"]["merges"] if "".join(m) != last]
    (folder / "tokenizer.json").write_text(json.dumps(other))
    big = tiny.vit(tmp_path / "big", size=32)
    for change, said in (
        ({"model__language": {"model": str(folder)}}, "its tokenizer has other words"),
        (
            {"model__vision": {"model": str(big)}},
            r"images of this size differ, \(16, 16\) there and \(32, 32\)",
        ),
        ({"model__connector": {"name": "pixel_shuffle"}}, "tokens an image differ, 4 there and 1 here"),
        ({"adapt": [*ALL, PROMPTS]}, "places for prompts in every text differ, 0 there and 3 here"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            student(parts, teacher, **change)
        tiny.sentence(caught)
    for change, said in (
        ({"adapt": [*ALL, PROMPTS]}, "places for prompts in every text differ, 0 there and 3 here"),
        ({"model__state_size": 2}, "'base' cannot read state vectors"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            student(parts, "base", **change)
        tiny.sentence(caught)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (DISTIL, "needs train.teacher"),
        ({"train__teacher": "base"}, "train.teacher is for train.objective 'distillation'"),
        (DISTIL | {"train__teacher": "nowhere"}, "there is no checkpoint 'nowhere'"),
        (
            DISTIL | {"train__teacher": "base", "train__distill_weight": 0, "train__feature_weight": 0},
            "takes nothing from its teacher",
        ),
        (
            DISTIL | {"train__teacher": "base", "train__distill_features": "connector"},
            "'base' has no trained connector",
        ),
        (DISTIL | {"train__teacher": "base", "train__temperature": 0}, "temperature"),
    ],
)
def test_told_early(parts: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_run(tiny.run_of(parts, tmp_path / "out", **changes))
    tiny.sentence(caught)
