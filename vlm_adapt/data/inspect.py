"""What lies in shards, in figures; `sheet.py` draws it.

Knows samples and images; knows nothing about models, tokens or training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from vlm_adapt.data.images import MAX_PIXELS, image_size
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.sample import parse_sample
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.data.sheet import contact_sheet, questions, words

__all__ = ["contact_sheet", "summary", "words"]


def _spread(values: list[int]) -> dict[str, int] | None:
    """Least, quartiles and greatest."""
    if not values:
        return None
    marks = np.percentile(values, [0, 25, 50, 75, 100], method="nearest").tolist()
    return dict(zip(("min", "p25", "median", "p75", "max"), map(int, marks), strict=True))


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
    counts: Counter[str] = Counter()
    labels: Counter[str] = Counter()
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
        asked = questions(sample.record)
        counts["questions"] += len(asked)
        counts["masks"] += sample.mask is not None
        counts["masks of objects"] += len(sample.masks)
        for name in ("objects", "referring", "ocr"):
            counts[name] += len(sample.record.get(name, ()))
        labels.update(str(entry["label"]) for entry in sample.record.get("objects", ()))
        kinds.update(str(question["kind"]) for question in asked if question.get("kind") is not None)
        per_sample[len(sizes)] += 1
        widths += [width for width, _ in sizes]
        heights += [height for _, height in sizes]
        bytes_ += [len(data) for data in sample.images]
    return {
        "shards": len(shards.indexes),
        "samples": shards.samples,
        "samples_per_shard": _spread(list(shards.counts)),
        "bytes": sum(index.file_bytes for index in shards.indexes),
        "images": len(widths),
        "images_per_sample": {str(count): times for count, times in sorted(per_sample.items())},
        "masks": counts["masks"],
        "object_masks": counts["masks of objects"],
        "fields": dict(fields.most_common()),
        "questions": counts["questions"],
        "kinds": dict(kinds.most_common()),
        "objects": counts["objects"],
        "labels": dict(labels.most_common(20)),
        "referring": counts["referring"],
        "ocr": counts["ocr"],
        "width": _spread(widths),
        "height": _spread(heights),
        "image_bytes": _spread(bytes_),
        "refused": account.refused,
        "examples": account.examples,
    }
