"""VQAv2-style question and annotation files. Goyal et al. 2017, arXiv:1612.00837; visualqa.org."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_adapt.data.convert.common import Conversion, ImageFolders, Recipe, read_json, several
from vlm_adapt.data.convert.questions import question_recipes
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError


def convert(
    conversion: Conversion, *, questions: str, annotations: str, images: str, group: bool = True
) -> Iterator[Recipe]:
    """Samples with all ten answers of each question, and its answer type as `kind`.

    Args:
        questions, annotations: the two JSON files, or several of each joined by `::`.
        images: the folder of COCO images, or several joined by `::`.
        group: one sample an image, with a list of questions; False gives one sample a question.
    """
    folders = ImageFolders(images)
    answered: dict[int, dict[str, Any]] = {}
    by_image: dict[int, list[dict[str, Any]]] = {}
    try:
        for path in several(annotations):
            for entry in read_json(path, "annotation file")["annotations"]:
                answered[int(entry["question_id"])] = entry
        asked = [
            entry for path in several(questions) for entry in read_json(path, "question file")["questions"]
        ]
        for entry in asked:
            number = int(entry["question_id"])
            annotation = answered.get(number)
            if annotation is None:
                conversion.lose(f"question {number}", "question without annotation")
                continue
            answers = [answer["answer"] for answer in annotation["answers"] if answer["answer"].strip()]
            if len(answers) < len(annotation["answers"]):
                conversion.lose(f"question {number} (an answer)", "empty answer")
            if not answers:
                continue
            item = {"id": str(number), "question": entry["question"], "answers": answers}
            if annotation.get("answer_type"):
                item["kind"] = annotation["answer_type"]
            by_image.setdefault(int(entry["image_id"]), []).append(item)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        what = f"({type(error).__name__}: {error})"
        raise UserError(
            f"{questions} and {annotations} are not VQAv2 question and annotation files {what}"
        ) from error
    conversion.total = len(by_image) if group else sum(map(len, by_image.values()))
    for image, items in by_image.items():
        try:
            places = (str(folders.numbered(image)),)
        except BadSample as error:
            conversion.lose(f"image {image} and its {len(items)} question(s)", error)
            continue
        yield from question_recipes(f"{image:012d}", str(image), places, items, group)
