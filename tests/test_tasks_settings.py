"""Mistakes in a task's settings are told at the start, in one sentence that names the nearest."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from vlm_adapt.config import schema
from vlm_adapt.config.load import validate
from vlm_adapt.data.tasks import TASKS
from vlm_adapt.data.tasks.task import make_task
from vlm_adapt.errors import UserError
from vlm_adapt.models.check import check_run


def make(name: str, **settings: Any) -> Any:
    return make_task(schema.Task(name=name, **settings))


def test_no_task() -> None:
    assert make_task(None) is None


@pytest.mark.parametrize("name", TASKS)
def test_every_task(name: str) -> None:
    """Frozen, picklable, named as in the table, with a prompt of either style; its module cites a paper."""
    made = make(name)
    assert made.name == name and pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.prompt = "x"
    assert make(name, style="paligemma").template and made.template
    assert "arXiv:" in (sys.modules[type(made).__module__].__doc__ or "")


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("captions", {}, r"unknown task 'captions', did you mean 'caption'\? known are caption, class_masks"),
        ("caption", {"promt": "x"}, r"task 'caption' has no setting 'promt', did you mean 'prompt'\?"),
        ("caption", {"zzz": 1}, r"task 'caption' has no setting 'zzz': known are style, prompt, lang"),
        ("caption", {"prompt": "in {lnag}:"}, r"task 'caption': prompt .* no field '\{lnag\}', did you mean"),
        ("caption", {"prompt": "in {question}"}, "has no field '{question}', did you mean 'position'"),
        ("caption", {"prompt": "in {lang"}, "cannot be read: .*braces are written {{"),
        ("caption", {"prompt": "in {}"}, "has no field '{}'"),
        ("caption", {"prompt": "in {lang!r}"}, "has no field '{lang}'"),
        ("caption", {"prompt": "in {lang.upper}"}, "has no field '{lang.upper}', did you mean"),
        ("caption", {"prompt": 3}, r"prompt: .*\(it is 3\)"),
        ("caption", {"style": "palli"}, r"style: Input should be 'pali' or 'paligemma' \(it is 'palli'\)"),
        ("vqa", {"prompt": "Answer in {lang}:"}, "lacks the field '{question}'"),
        ("vqg", {"prompt": "ask"}, "lacks the field '{answer}'"),
        ("split_cap", {"prompt": "go on at {position}"}, "lacks the field '{start}'"),
        ("ocr", {"most_texts": 0}, "most_texts: .*greater than 0"),
        ("span_corruption", {"noise_density": 1.0}, "noise_density: .*less than 1"),
        ("span_corruption", {"sentinel": "<x>"}, "sentinel '<x>' lacks the field '{number}'"),
        ("detection", {"coordinates": "tokens"}, "coordinates: Input should be 'loc' or 'numbers'"),
        ("detection", {"vocabulary": "/no/such/file"}, "vocabulary '/no/such/file' is no text file"),
        ("object_aware", {"vocabulary": [" "]}, "vocabulary has no names in it"),
        ("object_aware", {"vocabulary": 3}, r"task 'object_aware': vocabulary: .*\(it is 3\)"),
        ("object_aware", {"forms": []}, "forms: "),
        ("object_aware", {"forms": ["listing", "listing"]}, "forms names one of them twice"),
        ("object_aware", {"forms": ["list"]}, "forms.0: Input should be 'listing'"),
        ("object_aware", {"vocabulary": ["a", 3]}, "vocabulary.1: .*valid string"),
        ("caption", {"prompt": "about {zzz}"}, "has no field '{zzz}': known are lang, language, position"),
        (
            "object_aware",
            {"presence": "Is it there?"},
            "presence 'Is it there\\?' lacks the field '{object}'",
        ),
        ("object_aware", {"listing": "What {object}?"}, "listing .* has no field '{object}'"),
    ],
)
def test_mistakes(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        make(name, **settings)
    tiny.sentence(caught)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"name": "vqas"}, "unknown task 'vqas'"), ({"name": "vqa", "stile": "pali"}, "has no setting 'stile'")],
)
@pytest.mark.parametrize("part", ["train", "evaluate"])
def test_a_run_is_told_before_anything_is_loaded(
    tmp_path: Path, settings: dict[str, Any], said: str, part: str
) -> None:
    (tmp_path / "llama").mkdir()  # there are no parts that could be loaded
    tiny.questions_shard(tmp_path / "train.tar", 1)
    sources = [{"shards": str(tmp_path / "train.tar"), "task": settings}]
    changes = {f"data__{part}": sources, "model__vision__model": "hf:none"}
    run = validate(tiny.run_tree(tmp_path, **changes), "x")
    with pytest.raises(UserError, match=said):
        check_run(run)


def test_the_table_imports_nothing_heavy() -> None:
    code = "import sys, vlm_adapt.data.tasks; print(*({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
