"""A contact sheet: samples as a person would look at them, with words, masks, boxes and a legend.

Knows samples, masks and drawing; knows nothing about models, tokens or training.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from PIL import ImageDraw

from vlm_adapt.data.images import decode
from vlm_adapt.data.lanes import shuffled
from vlm_adapt.data.overlay import Legend, Pen, annotated, fitted
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.sample import Sample, parse_sample
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError

TEXT_LINES, LEGEND_LINES, COLUMNS = 5, 3, 4
PAPER, INK, SOFT, ALARM = "white", "#1b1b1b", "#767676", "#b02a25"


def words(record: dict[str, Any]) -> list[str]:
    """The text of a record as lines for a reader. Labels and expressions are the legend's."""
    lines = [f"{message['role']}: {message['content']}" for message in record.get("messages", [])]
    lines += [record["caption"]] if "caption" in record else []
    lines += [f"– {caption}" for caption in record.get("captions", [])]
    for question in questions(record):
        answers = question.get("answers") or [question.get("answer", "")]
        common = " / ".join(text for text, _ in Counter(answers).most_common(2))
        lines.append(f"Q: {question['question']}  A: {common}")
    if record.get("ocr"):
        lines.append("Text in it: " + " | ".join(entry["text"] for entry in record["ocr"]))
    lines += [record["text"]] if "text" in record else []
    return lines


def questions(record: dict[str, Any]) -> list[dict[str, Any]]:
    """All questions of a record."""
    own = [record] if "question" in record else []
    return own + list(record.get("questions", []))


def wrapped(lines: Sequence[str], font: Any, width: int, limit: int) -> list[str]:
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


def _cell(sample: Sample | None, key: str, trouble: str, pen: Pen, text_lines: int) -> PILImage.Image:
    height = pen.cell + pen.line * (text_lines + 1 + LEGEND_LINES) + pen.gap
    cell = PILImage.new("RGB", (pen.cell, height), PAPER)
    images = sample.images[:4] if sample else []
    side, legend, used = pen.cell // (2 if len(images) > 1 else 1), Legend(), 0
    for place, data in enumerate(images):
        try:
            if place == 0 and sample:
                picture, legend = annotated(sample, (side, side), pen)
            else:
                picture = fitted(PILImage.fromarray(decode(data)), (side, side))
        except BadSample as error:
            trouble = str(error)
            continue
        left, top = place % 2 * side, place // 2 * side
        cell.paste(picture, (left + (side - picture.width) // 2, top))
        used = max(used, top + picture.height)
    draw, top = ImageDraw.Draw(cell), used + pen.line // 4
    top = _draw_legend(draw, top, legend, pen)
    count = f"  ({len(sample.images)} images)" if sample and len(sample.images) != 1 else ""
    draw.text((0, top + pen.scale), f"{key}{count}", fill=SOFT, font=pen.small)
    lines = [f"REFUSED: {trouble}"] if trouble else words(sample.record) if sample else []
    for line in wrapped(lines, pen.font, pen.cell, text_lines):
        top += pen.line
        draw.text((0, top), line, fill=ALARM if trouble else INK, font=pen.font)
    return cell.crop((0, 0, pen.cell, min(height, top + pen.line + pen.gap)))


def _draw_legend(draw: Any, top: int, legend: Legend, pen: Pen) -> int:
    """Squares of colour with names, in as many lines as they need; returns where the next line begins."""
    left, line, square = 0, 0, pen.line // 2
    for place, (name, text) in enumerate(legend):
        most = pen.cell - 2 * square
        while text and pen.small.getlength(text) > most:
            text = text[:-2] + "…" if not text.endswith("…") else text[:-2] + "…"
        width = int(1.5 * square + pen.small.getlength(text) + square)
        if left and left + width - square > pen.cell:
            left, line = 0, line + 1
        if line == LEGEND_LINES:
            draw.text((0, top + line * pen.line), f"and {len(legend) - place} more", SOFT, font=pen.small)
            return top + (line + 1) * pen.line
        y = top + line * pen.line
        draw.rectangle((left, y + 3 * pen.scale, left + square, y + square + 3 * pen.scale), pen.colour(name))
        draw.text((left + int(1.5 * square), y + pen.scale), text, INK, font=pen.small)
        left += width
    return top + (line + 1) * pen.line if legend else top


def contact_sheet(
    shards: ShardSet,
    output: str | os.PathLike[str],
    count: int = 24,
    seed: int = 0,
    text_lines: int = TEXT_LINES,
    scale: int = 1,
) -> Path:
    """Draw `count` samples, chosen by `seed`, with masks, boxes and words; writes and returns a picture.

    Refused samples are drawn too, with the reason in red.

    Args:
        output: .png or .pdf.
        scale: pixels a point.
    """
    if shards.samples == 0:
        raise UserError("there is no sample to draw: the shards are empty")
    pen, cells = Pen(scale), []
    for number in sorted(shuffled(shards.samples, seed, "contact sheet")[:count].tolist()):
        key, sample, trouble = shards.ref(number).key, None, ""
        try:
            sample = parse_sample(*shards.read(number))
        except BadSample as error:
            trouble = str(error)
        cells.append(_cell(sample, key, trouble, pen, text_lines))
    columns = min(COLUMNS, len(cells))
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + pen.gap for row in rows]
    sheet = PILImage.new("RGB", (columns * (pen.cell + pen.gap), sum(heights)), PAPER)
    for number, row in enumerate(rows):
        for place, cell in enumerate(row):
            left = place * (pen.cell + pen.gap) + pen.gap // 2
            sheet.paste(cell, (left, sum(heights[:number]) + pen.gap // 2))
    return save(sheet, output)


def save(sheet: PILImage.Image, output: str | os.PathLike[str]) -> Path:
    """Write a picture as .png (any other name too) or .pdf. Raises UserError if that cannot be done."""
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PDF" if path.suffix.lower() == ".pdf" else "PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path
