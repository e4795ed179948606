"""The section of a segmentation in a run's report: IoU by class beside the baselines, confusion, samples.

Knows metrics.json of a segmenter and the pictures beside it; knows nothing about how they came about.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from vlm_adapt.report.charts import bars
from vlm_adapt.report.read import RunRecord
from vlm_adapt.report.words import count, share

SIDE = 1600  # pixels of the longer side of a picture in the page
PICTURES = {"samples": "Samples: image, truth and prediction", "confusion": "Confusion of classes"}


def masks(record: RunRecord) -> str:
    """The section's HTML; empty for a run that has not been scored on masks."""
    metrics = record.metrics or {}
    sources = metrics.get("sources")
    each = sources if isinstance(sources, Mapping) else {"": metrics}
    body = ""
    for name, figures in each.items():
        if isinstance(figures, Mapping) and isinstance(figures.get("per_class"), Mapping):
            body += _classes(str(name), figures)
    if not body:
        return ""
    assert record.metrics_folder is not None
    for stem, title in PICTURES.items():
        for path in sorted(record.metrics_folder.glob(f"{stem}*.png")):
            body += _picture(path, title)
    return f'<section id="masks"><h2>Classes</h2>{body}</section>'


def _classes(name: str, figures: Mapping[str, Any]) -> str:
    """Bars of the classes, the best first, and a sentence on what they are to be compared with."""
    found = [
        (str(label).split("|")[0], one.get("iou"), None)
        for label, one in figures["per_class"].items()
        if isinstance(one, Mapping) and isinstance(one.get("iou"), int | float)
    ]
    found.sort(key=lambda row: -float(row[1] or 0))
    title = f"IoU by class{f', {name}' if name else ''}"
    words = [f"{count(len(found))} classes"]
    if isinstance(figures.get("pixels"), int):
        words.append(f"{count(figures['pixels'])} pixels")
    baselines = figures.get("baselines")
    majority = baselines.get("majority") if isinstance(baselines, Mapping) else None
    if isinstance(majority, Mapping) and isinstance(majority.get("miou"), int | float):
        words.append(f"always saying {majority.get('class')} has {share(majority['miou'])} mIoU")
    absent = figures.get("absent")
    if isinstance(absent, list) and absent:
        words.append(f"neither true nor predicted: {', '.join(map(str, absent))}")
    return f'{bars(title, found, {})}<p class="lead above">{escape("; ".join(words))}.</p>'


def _picture(path: Path, title: str) -> str:
    """A picture inside the page; nothing where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    small.thumbnail((SIDE, SIDE * 4))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=86)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    alt = escape(f"{title} ({path.name})")
    source = f"data:image/jpeg;base64,{data}"
    shown = f'<img src="{source}" alt="{alt}" loading="lazy" style="max-width:100%">'
    return f'<figure class="wide"><figcaption>{escape(title)}</figcaption>{shown}</figure>'
