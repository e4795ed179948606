"""GQA: compositional questions about real images. Hudson and Manning 2019, arXiv:1902.09506;
cs.stanford.edu/people/dorarad/gqa. `{id: {imageId, question, answer, fullAnswer, types, ...}}`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_adapt.data.convert.common import (
    Conversion,
    ImageFolders,
    Recipe,
    existing,
    read_json,
    safe_key,
    several,
)
from vlm_adapt.data.convert.questions import question_recipes
from vlm_adapt.errors import UserError

KINDS = ("structural", "semantic", "detailed")


def _files(questions: str) -> list[Path]:
    """The question files; a folder stands for its JSON files (`train_all_questions` has ten)."""
    files: list[Path] = []
    for name in several(questions):
        path = existing(name, "question file")
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{questions} holds no question files (*.json)")
    return files


def convert(
    conversion: Conversion, *, questions: str, images: str, kind: str = "structural", group: bool = True
) -> Iterator[Recipe]:
    """Samples with question, answer, the answer as a sentence (`full_answer`) and the question's types.

    Args:
        questions: `*_balanced_questions.json`, `*_all_questions.json`, a folder of them, or several of
            these joined by `::`.
        images: the folder of the images (`IMAGEID.jpg`), or several joined by `::`.
        kind: which of a question's types is its `kind`, by which scores are broken down: `structural`
            (query, verify, logical, choose, compare), `semantic` (obj, attr, cat, rel, global) or
            `detailed`.
        group: one sample an image, with a list of questions; False gives one sample a question.
    """
    if kind not in KINDS:
        raise UserError(f"kind is '{kind}': say {', '.join(KINDS)}")
    folders = ImageFolders(images)
    by_image: dict[str, list[dict[str, Any]]] = {}
    for path in _files(questions):
        content = read_json(str(path), "question file")
        try:
            for number, entry in content.items():
                answer = entry.get("answer") or ""
                if not answer.strip():  # the questions of the test and challenge splits have none
                    conversion.lose(f"question {number}", "question without an answer")
                    continue
                item = {"id": str(number), "question": entry["question"], "answers": [answer]}
                types = {name: value for name, value in (entry.get("types") or {}).items() if value}
                if types.get(kind):
                    item["kind"] = types[kind]
                if types:
                    item["types"] = types
                if entry.get("fullAnswer"):
                    item["full_answer"] = entry["fullAnswer"]
                by_image.setdefault(str(entry["imageId"]), []).append(item)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a GQA question file ({type(error).__name__}: {error})") from error
    conversion.total = len(by_image) if group else sum(map(len, by_image.values()))
    for image, items in by_image.items():
        yield from question_recipes(safe_key(image), image, folders.places(f"{image}.jpg"), items, group)
