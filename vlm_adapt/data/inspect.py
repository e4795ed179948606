"""What lies in shards: figures, and a picture of some samples with their words.

Knows samples and images; knows nothing about models, tokens or training.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vlm_adapt.data.images import MAX_PIXELS, decode, image_size
from vlm_adapt.data.lanes import shuffled
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.sample import Sample, parse_sample
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError

CELL, TEXT_LINES, COLUMNS, LINE = 220, 5, 4, 15


def _spread(values: list[int]) -> dict[str, int] | None:
    """Least, quartiles and greatest."""
    if not values:
        return None
    marks = np.percentile(values, [0, 25, 50, 75, 100], method="nearest").tolist()
    return dict(zip(("min", "p25", "median", "p75", "max"), map(int, marks), strict=True))


def _questions(record: dict[str, Any]) -> list[dict[str, Any]]:
    own = [record] if "question" in record else []
    return own + list(record.get("questions", []))


def summary(
    shards: ShardSet, max_pixels: int = MAX_PIXELS, tick: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Figures of all samples: counts, fields of the text, sizes of images, and every problem.

    Images are judged by their headers, not decoded. `tick(n)` is called after each n-th sample.
    """
    account = Account()
    account.lose_all(shards.problems)
    fields: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    per_sample: Counter[int] = Counter()
    widths, heights, bytes_ = [], [], []
    questions = masks = 0
    for number in range(shards.samples):
        key = shards.ref(number).key
        try:
            sample = parse_sample(*shards.read(number))
            sizes = [image_size(data, max_pixels) for data in sample.images]
        except BadSample as error:
            account.refuse(key, error)
            continue
        finally:
            if tick:
                tick(number + 1)
        account.use()
        fields.update(sample.record.keys())
        asked = _questions(sample.record)
        questions += len(asked)
        kinds.update(str(question["kind"]) for question in asked if question.get("kind") is not None)
        per_sample[len(sizes)] += 1
        widths += [width for width, _ in sizes]
        heights += [height for _, height in sizes]
        bytes_ += [len(data) for data in sample.images]
        masks += sample.mask is not None
    return {
        "shards": len(shards.indexes),
        "samples": shards.samples,
        "samples_per_shard": _spread(list(shards.counts)),
        "bytes": sum(index.file_bytes for index in shards.indexes),
        "images": len(widths),
        "images_per_sample": {str(count): times for count, times in sorted(per_sample.items())},
        "masks": masks,
        "fields": dict(fields.most_common()),
        "questions": questions,
        "kinds": dict(kinds.most_common()),
        "width": _spread(widths),
        "height": _spread(heights),
        "image_bytes": _spread(bytes_),
        "refused": account.refused,
        "examples": account.examples,
    }


def words(record: dict[str, Any]) -> list[str]:
    """The text of a record as lines for a reader."""
    lines = [f"{message['role']}: {message['content']}" for message in record.get("messages", [])]
    lines += [record["caption"]] if "caption" in record else []
    lines += record.get("captions", [])
    for question in _questions(record):
        answers = question.get("answers") or [question.get("answer", "")]
        common = " / ".join(text for text, _ in Counter(answers).most_common(2))
        lines.append(f"Q: {question['question']}  A: {common}")
    return lines


def _wrapped(lines: list[str], font: Any, width: int, limit: int) -> list[str]:
    """Lines broken to a width in pixels; what is beyond `limit` lines is told by a last '...'."""
    rows: list[str] = []
    for line in lines:
        row = ""
        for word in " ".join(line.split()).split(" "):
            longer = f"{row} {word}".strip()
            if row and font.getlength(longer) > width:
                rows.append(row)
                row = word
            else:
                row = longer
        rows.append(row)
    return rows if len(rows) <= limit else [*rows[: limit - 1], "..."]


def _cell(sample: Sample | None, key: str, trouble: str, font: Any, text_lines: int) -> PILImage.Image:
    cell = PILImage.new("RGB", (CELL, CELL + LINE * (text_lines + 1) + 8), "white")
    draw = ImageDraw.Draw(cell)
    images = sample.images[:4] if sample else []
    side = CELL // 2 if len(images) > 1 else CELL
    for place, data in enumerate(images):
        try:
            picture = PILImage.fromarray(decode(data))
        except BadSample as error:
            trouble = str(error)
            continue
        picture.thumbnail((side, side))  # makes smaller, never larger
        if max(picture.size) < side // 2:  # tiny images are enlarged without smoothing, to be seen at all
            factor = side // max(picture.size)
            picture = picture.resize(
                (picture.width * factor, picture.height * factor), PILImage.Resampling.NEAREST
            )
        left, top = place % 2 * side, place // 2 * side
        cell.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    count = f" ({len(sample.images)} images)" if sample and len(sample.images) != 1 else ""
    draw.text((2, CELL + 2), f"{key}{count}", fill="grey", font=font)
    lines = [f"REFUSED: {trouble}"] if trouble else words(sample.record) if sample else []
    for row, line in enumerate(_wrapped(lines, font, CELL - 6, text_lines)):
        draw.text((2, CELL + 2 + LINE * (row + 1)), line, fill="red" if trouble else "black", font=font)
    return cell


def contact_sheet(
    shards: ShardSet,
    output: str | os.PathLike[str],
    count: int = 24,
    seed: int = 0,
    text_lines: int = TEXT_LINES,
) -> Path:
    """Draw `count` samples, chosen by `seed`, with their words below; writes and returns a PNG.

    Refused samples are drawn too, with the reason in red.
    """
    if shards.samples == 0:
        raise UserError("there is no sample to draw: the shards are empty")
    font = ImageFont.load_default(12)
    cells = []
    for number in sorted(shuffled(shards.samples, seed, "contact sheet")[:count].tolist()):
        key, sample, trouble = shards.ref(number).key, None, ""
        try:
            sample = parse_sample(*shards.read(number))
        except BadSample as error:
            trouble = str(error)
        cells.append(_cell(sample, key, trouble, font, text_lines))
    columns = min(COLUMNS, len(cells))
    width, height = cells[0].size
    sheet = PILImage.new("RGB", (columns * (width + 8), -(-len(cells) // columns) * (height + 8)), "white")
    for place, cell in enumerate(cells):
        sheet.paste(cell, (place % columns * (width + 8) + 4, place // columns * (height + 8) + 4))
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path
