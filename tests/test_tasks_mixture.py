"""A mixture of all tasks through the reader: for a causal, a prefix-LM and an encoder-decoder language,
with samples of no, one and several images; and PaLI's own as a configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml

from vlm_adapt.config import schema
from vlm_adapt.data.encode import Encoded, Encoder
from vlm_adapt.data.problems import Account
from vlm_adapt.data.reader import Reader
from vlm_adapt.data.tasks import TASKS
from vlm_adapt.data.tasks.task import make_task
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.template import Template, bare_template, plain_template

K = 3
RECORD = {
    "captions": ["two cats on a photo", "a photo of two cats"],
    "questions": [
        {"question": "what is it?", "answers": ["two cats", "cats", "two cats"]},
        {"question": "is it red?", "answer": "no"},
    ],
    "objects": [{"label": "circle", "box": [2, 3, 20, 18]}, {"label": "a cat", "box": [0, 0, 24, 20]}],
    "labels": ["circle", "a cat", "square", "shape"],
    "ocr": [{"text": "no"}, {"text": "two"}],
    "text": tiny.WORDS,
    "lang": "en",
}
QUESTIONS = {"object_aware": 4, "vqa": 2, "vqg": 2}  # one of everything else
KINDS: dict[str, tuple[Template, bool]] = {
    "causal": (plain_template("</s>"), False),
    "prefix": (bare_template("</s>", prompt_is_causal=False), False),
    "seq2seq": (bare_template("</s>"), True),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same record with 0, 1 and 3 images."""
    folder = tmp_path_factory.mktemp("shards")
    data = json.dumps(RECORD).encode()
    for count in (0, 1, 3):
        members = {f"{n}.png": tiny.image(n) for n in range(count)}
        tiny.shard(folder / f"{count}.tar", [(f"s{count}", {"json": data, **members})])
    return folder


# Tasks of masks need a model with a token for them: tests/test_tasks_masks.py.
WORDS = [name for name in TASKS if not name.endswith("_masks")]


def reader(tokenizer: Any, kind: str, shards: Path, images: int, *names: str) -> Reader:
    template, seq2seq = KINDS[kind]
    encoder = Encoder(tokenizer, K, 600, seq2seq=seq2seq, start_id=0)
    sources = [
        schema.Source(shards=str(shards / f"{images}.tar"), task=schema.Task(name=name)) for name in names
    ]
    return Reader(sources, encoder, template, None, ImageSpec((8, 8)))


def learned(tokenizer: Any, row: Encoded) -> list[str]:
    """The answers of a row."""
    return [text.strip() for text in tokenizer.decode(row.targets).split("</s>") if text.strip()]


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_encodes(tokenizer: Any, shards: Path, kind: str, images: int) -> None:
    names = WORDS
    made = reader(tokenizer, kind, shards, images, *names)
    for number, name in enumerate(names):
        account = Account()
        rows = made.training(number, 0, 5, account)
        if name == "detection" and images != 1:
            reason = "the task 'detection' needs exactly one image"
            assert not rows and account.refused == {reason: 1}
            continue
        shown = 0 if name == "span_corruption" else images
        questions = QUESTIONS.get(name, 1)
        assert account.used == 1 and len(rows) == (1 if kind == "causal" else questions)
        assert sum(len(learned(tokenizer, row)) for row in rows) == questions
        for row in rows:
            assert len(row.image_starts) == len(row.pixels) == len(row.image_order) == shown
            assert (row.decoder_ids is not None) == (kind == "seq2seq") and row.cut == 0
        assert made.measure(number, 0, 5) == [len(row) for row in rows]
        again = made.training(number, 0, 5, Account())
        assert [row.ids.tolist() for row in again] == [row.ids.tolist() for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_references(tokenizer: Any, shards: Path, kind: str) -> None:
    """Every task can be held out, too: prompts are where references begin."""
    names = WORDS
    made = reader(tokenizer, kind, shards, 1, *names)
    for number, name in enumerate(names):
        sample, phrasing = made.sample(number)
        prompts, rows = made.prompts(sample, phrasing), made.references(sample, phrasing)
        asked = [question for prompt in prompts for question in prompt.asked.questions]
        assert len(asked) == QUESTIONS.get(name, 1)
        answers = [text for row in rows for text in learned(tokenizer, row)]
        wanted = list(asked[0].answers) if name == "caption" else [question.answer for question in asked]
        assert answers == [tokenizer.decode(tokenizer.encode(text)).strip() for text in wanted]
        first, prompt = rows[0], prompts[0].row
        assert len(prompt.pixels) == len(first.pixels) == (name != "span_corruption")
        if len(asked) == 1 and name != "caption":
            assert prompt.ids.tolist() == first.ids[: len(prompt.ids)].tolist()


def test_what_is_learned(tokenizer: Any, shards: Path) -> None:
    """Each task's answers, by a few words of them."""
    names = WORDS
    made = reader(tokenizer, "seq2seq", shards, 1, *names)
    said = {
        name: [
            (tokenizer.decode(row.ids), learned(tokenizer, row)[0])
            for row in made.training(number, 0, 0, Account())
        ]
        for number, name in enumerate(names)
    }
    assert said["caption"][0][1] in RECORD["captions"]
    (split,) = said["split_cap"]
    assert any(caption.endswith(split[1]) for caption in RECORD["captions"])
    assert said["ocr"][0][1] == "no two" and "ocr_text in en:" in said["ocr"][0][0]
    assert {answer for _, answer in said["vqa"]} == {"two cats", "no"}
    assert {answer for _, answer in said["vqg"]} == {"what is it?", "is it red?"}
    assert {"2", "1"} & {answer for _, answer in said["object_aware"]}
    assert "circle" in said["detection"][0][1] and "<loc0153>" in said["detection"][0][1]
    assert said["span_corruption"][0][1].startswith("<extra_id_0>")


def test_a_row_holds_what_it_says(tokenizer: Any, shards: Path) -> None:
    """One draw differs from the next, and a plain record without a task is refused with what to do."""
    made = reader(tokenizer, "causal", shards, 0, "span_corruption")
    texts = {tokenizer.decode(made.training(0, 0, place, Account())[0].ids) for place in range(12)}
    assert len(texts) > 6
    tiny.shard(shards / "bare.tar", [("s", {"json": b'{"text": "a b"}'})])
    bare = Reader(
        [schema.Source(shards=str(shards / "bare.tar"))],
        made.encoder,
        KINDS["causal"][0],
        None,
        made.image_spec,
    )
    account = Account()
    assert bare.training(0, 0, 0, account) == []
    assert account.refused == {"nothing is asked of it: give the source a task": 1}


def test_palis_own() -> None:
    """The weights of the paper, every task once."""
    path = Path(__file__).parents[1] / "configs" / "pali_mixture.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    assert data["mixing"] == "weight"
    sources = [schema.Source.model_validate(source) for source in data["train"]]
    tasks = [make_task(source.task) for source in sources]
    assert {task.name: source.weight for task, source in zip(tasks, sources, strict=True) if task} == {
        "span_corruption": 100,
        "split_cap": 1000,
        "caption": 100,
        "ocr": 100,
        "vqa": 100,
        "vqg": 100,
        "object_aware": 50,
        "detection": 16,
    }
    assert {source.name for source in sources} == set(WORDS)
    assert np.isclose(sum(source.weight for source in sources), 1566)
