"""`metrics.json`, `predictions.jsonl` and thumbnails of an evaluation.

Knows files; the scores come from run.py.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from vlm_adapt.config.schema import Run
from vlm_adapt.evaluate.scores import Scores
from vlm_adapt.models.assembled import AssembledModel

THUMBNAILS = 96  # samples with a picture in the report
SIDE = 192  # pixels


def write_scores(folder: Path, scores: Scores, assembled: AssembledModel, run: Run) -> None:
    """Write `metrics.json` and what the scores bring beside it, then a line a question (of a segmenter, an
    image) in `predictions.jsonl`, with pictures for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(
        json.dumps(scores.metrics, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    scores.write(folder)
    pictures = _thumbnails(folder, assembled, run) if assembled.thumbnails else {}
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for row in scores.predictions:
            number = row["number"]
            shown = row | ({"image": pictures[number]} if number in pictures else {})
            file.write(json.dumps(shown, ensure_ascii=False) + "\n")


def _thumbnails(folder: Path, assembled: AssembledModel, run: Run) -> dict[int, str]:
    """Small JPEGs of the first held-out samples, by number; paths relative to `folder`."""
    from PIL import Image

    from vlm_adapt.data.images import decode
    from vlm_adapt.data.problems import BadSample

    reader = assembled.reader(run.data.evaluate, run.seed, run.data)
    pictures: dict[int, str] = {}
    (folder / "images").mkdir(exist_ok=True)
    for number in range(min(THUMBNAILS, len(reader))):
        try:
            sample, _ = reader.sample(number)
            images = [decode(data, run.data.max_pixels) for data in sample.images]
        except BadSample:
            continue  # it is in the account, with its reason
        if images:
            image = Image.fromarray(images[0])
            image.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=85)
            name = f"images/{number:06d}.jpg"
            (folder / name).write_bytes(buffer.getvalue())
            pictures[number] = name
    return pictures
