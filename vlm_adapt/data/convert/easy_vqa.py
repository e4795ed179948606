"""easy-vqa: simple shapes, one sample an image with all its questions. github.com/vzhou842/easy-VQA"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_adapt.data.convert.common import Conversion, Recipe, existing, read_json
from vlm_adapt.data.convert.questions import question_recipes
from vlm_adapt.errors import UserError

SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")


def kind_of(answer: str) -> str:
    """What an answer answers: `shape`, `color` or `yes_no`."""
    if answer in YES_NO:
        return "yes_no"
    return "shape" if answer in SHAPES else "color"


def convert(conversion: Conversion, *, folder: str, split: str = "train") -> Iterator[Recipe]:
    """Samples `{questions: [{id, question, answers, kind}], id}` in the order of the images' numbers.

    Args:
        folder: that of the package (it holds `data/`), or its `data` folder.
        split: `train` or `test`.
    """
    root = existing(folder, "easy-vqa folder")
    root = root / "data" if (root / "data").is_dir() else root
    if not (root / split).is_dir():
        raise UserError(f"{folder} has no easy-vqa split '{split}': choose train or test")
    entries = read_json(str(root / split / "questions.json"), "question file")
    questions: dict[int, list[dict[str, Any]]] = {}
    try:
        for number, (question, answer, image) in enumerate(entries):
            entry = {
                "id": f"{split}-{number}",
                "question": question,
                "answers": [answer],
                "kind": kind_of(answer),
            }
            questions.setdefault(int(image), []).append(entry)
    except (TypeError, ValueError) as error:
        raise UserError(f"{root / split / 'questions.json'} is not a list of easy-vqa questions") from error
    conversion.total = len(questions)
    for image, asked in sorted(questions.items()):
        places = (str(root / split / "images" / f"{image}.png"),)
        yield from question_recipes(f"{split}-{image:06d}", str(image), places, asked, group=True)
