"""TextVQA v0.5.1: questions about text in OpenImages photographs, ten answers each. Singh et al. 2019,
arXiv:1904.08920; textvqa.org. The Rosetta OCR files come apart and are optional."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_adapt.data.convert.common import Conversion, ImageFolders, Recipe, read_json, safe_key, several
from vlm_adapt.data.convert.questions import question_recipes
from vlm_adapt.errors import UserError


def _entries(paths: str, what: str) -> Iterator[Mapping[str, Any]]:
    for path in several(paths):
        content = read_json(path, what)
        entries = content.get("data") if isinstance(content, Mapping) else None
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise UserError(f"{path} is not a TextVQA file: it should hold a list of entries under 'data'")
        yield from entries


def _words(entry: Mapping[str, Any], width: int, height: int) -> list[dict[str, Any]]:
    """What OCR read in an image. Rosetta's boxes are shares of width and height; ours are pixels."""
    if not entry.get("ocr_info"):
        return [{"text": token} for token in entry.get("ocr_tokens") or [] if token.strip()]
    words = []
    for info in entry["ocr_info"]:
        if not info["word"].strip():
            continue
        word: dict[str, Any] = {"text": info["word"]}
        box = info.get("bounding_box") or {}
        names = ("top_left_x", "topLeftX"), ("top_left_y", "topLeftY"), ("width",), ("height",)
        place = [next((box[name] for name in either if name in box), None) for either in names]
        if None not in place and width and height:
            left, top, wide, high = map(float, place)  # type: ignore[arg-type]
            right, bottom = min(left + wide, 1.0) * width, min(top + high, 1.0) * height
            word["box"] = [round(n, 1) for n in (max(left, 0) * width, max(top, 0) * height, right, bottom)]
        words.append(word)
    return words


def convert(
    conversion: Conversion, *, questions: str, images: str, ocr: str = "", group: bool = True
) -> Iterator[Recipe]:
    """Samples with question and answers, and what OCR read in the image as `ocr`.

    Args:
        questions: `TextVQA_0.5.1_train.json` or `_val.json`, or several joined by `::`.
        images: the folder of the images (`IMAGEID.jpg`), or several joined by `::`.
        ocr: `TextVQA_Rosetta_OCR_v0.2_*.json`, or several joined by `::`. Without it the `ocr_tokens` of
            the questions are taken, where they have them.
        group: one sample an image, with a list of questions; False gives one sample a question.
    """
    folders = ImageFolders(images)
    by_image: dict[str, list[dict[str, Any]]] = {}
    read: dict[str, list[dict[str, Any]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    try:
        for entry in _entries(questions, "question file"):
            image, number = str(entry["image_id"]), str(entry["question_id"])
            answers = [answer for answer in entry.get("answers") or [] if answer.strip()]
            if not answers:  # the test split has none
                conversion.lose(f"question {number}", "question without an answer")
                continue
            if len(answers) < len(entry["answers"]):
                conversion.lose(f"question {number} (an answer)", "empty answer")
            sizes[image] = int(entry.get("image_width") or 0), int(entry.get("image_height") or 0)
            if "ocr_tokens" in entry:
                read.setdefault(image, _words(entry, *sizes[image]))
            item = {"id": number, "question": entry["question"], "answers": answers}
            by_image.setdefault(image, []).append(item)
        for entry in _entries(ocr, "OCR file"):
            image = str(entry["image_id"])
            if image in sizes:
                read[image] = _words(entry, *sizes[image])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{questions} is not a TextVQA file ({type(error).__name__}: {error})") from error
    conversion.total = len(by_image) if group else sum(map(len, by_image.values()))
    for image, items in by_image.items():
        more = {"ocr": read[image]} if read.get(image) else {}
        places = folders.places(f"{image}.jpg")
        yield from question_recipes(safe_key(image), image, places, items, group, more)
