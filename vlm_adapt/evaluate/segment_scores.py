"""What an evaluation of a segmenter found: figures by label set, the table, and files beside metrics.json.

Knows counts, names and files; knows nothing about models.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt import dist
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.scores import Scores
from vlm_adapt.metrics.segment import NamedConfusion, harmonic_mean, mean

MEANS = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")
CELLS = ("IoU %", "accuracy %", "pixels %")
SPLIT = ("miou_seen", "miou_unseen", "harmonic_miou")


@dataclass
class SegmentScores(Scores):
    """Scores with the counts that they come from.

    Attributes:
        confusions: by the name of the source, or of sources with one label set.
        unseen: the labels whose scores are given apart, as the data write them.
        shown: some images of each label set: (pixels_HWC, truth_HW, predicted_HW, key).
    """

    confusions: dict[str, NamedConfusion] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    shown: dict[tuple[str, ...], list[tuple[Any, ...]]] = field(default_factory=dict)

    def table(self) -> str:
        """A line a class and, for comparison, a line a baseline; one table a label set."""
        from vlm_adapt.report.tables import plain_table

        blocks = []
        for name, confusion in self.confusions.items():
            figures = self.metrics["sources"][name] if "sources" in self.metrics else self.metrics
            head = [name] if len(self.confusions) > 1 else []
            table = plain_table(_rows(confusion, figures, self.unseen), right=CELLS)
            blocks.append("\n".join([*head, table]))
            if figures["absent"]:
                absent = ", ".join(_shown(label) for label in figures["absent"])
                blocks.append(f"neither true nor predicted, and left out of the means: {absent}")
        return "\n\n".join(blocks)

    def write(self, folder: Path) -> None:
        """`confusion.csv` (pixels, a row a true class), `confusion.png`, `samples.png` of each label set."""
        from vlm_adapt.report.confusion import confusion_picture
        from vlm_adapt.report.segmentation import SampleRow, write_samples

        for place, (name, confusion) in enumerate(self.confusions.items()):
            end = f"-{place}" if len(self.confusions) > 1 else ""
            counts_CC, labels = confusion.confusion.counts_CC, confusion.labels
            with (folder / f"confusion{end}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["true \\ predicted", *labels])
                writer.writerows([label, *row] for label, row in zip(labels, counts_CC.tolist(), strict=True))
            title = f"Confusion of classes, {name}"
            confusion_picture(counts_CC, labels, folder / f"confusion{end}.png", title, self.unseen)
        for place, (names, rows) in enumerate(self.shown.items()):
            end = f"-{place}" if len(self.shown) > 1 else ""
            write_samples(folder / f"samples{end}.png", [SampleRow(*row) for row in rows], names)


def gathered(own: Mapping[str, NamedConfusion], sources: Sequence[str]) -> dict[str, NamedConfusion]:
    """The counts of all ranks, sources with the same labels as one, in the order of the sources."""
    merged: dict[str, NamedConfusion] = {}
    for part in dist.gather({name: one.plain() for name, one in own.items()}):
        for name, counts in part.items():
            merged.setdefault(name, NamedConfusion()).merge(NamedConfusion.from_plain(*counts))
    groups: dict[frozenset[str], list[str]] = {}
    for name in sources:
        if name in merged:
            groups.setdefault(frozenset(merged[name].labels), []).append(name)
    found = {}
    for names in groups.values():
        for other in names[1:]:
            merged[names[0]].merge(merged[other])
        found[" + ".join(names)] = merged[names[0]]
    return found


def scores_of(
    confusions: dict[str, NamedConfusion],
    unseen: Sequence[str] = (),
    loss: float | None = None,
    rows: list[dict[str, Any]] | None = None,
) -> SegmentScores:
    """Figures of each label set, and the mean over label sets where there are several.

    Args:
        unseen: names of labels, or of a synonym of theirs.

    Raises:
        UserError: an unseen label is in no set, or nothing but unseen labels is left.
    """
    apart = _unseen_labels(unseen, [label for one in confusions.values() for label in one.labels])
    each = {name: _figures(one, apart) for name, one in confusions.items()}
    if len(each) == 1:
        metrics = dict(next(iter(each.values())))
    else:
        keys = [key for key in (*MEANS, *SPLIT) if any(key in one for one in each.values())]
        columns = {key: [one[key] for one in each.values() if one.get(key) is not None] for key in keys}
        metrics = {key: float(np.mean(values)) if values else None for key, values in columns.items()}
        metrics["sources"] = each
    if loss is not None:
        metrics["loss"] = loss
    if apart:
        metrics["unseen"] = list(apart)
    return SegmentScores(metrics, rows or [], confusions, apart)


def handicaps(labels: Sequence[str], unseen: Sequence[str], amount: float) -> list[float] | None:
    """What is taken off each label's logits, so that those that training knew do not take all pixels.

    Calibrated stacking, Chao et al. 2016, arXiv 1605.04253. None where nothing is.
    """
    if not amount:
        return None
    wanted = {_plain(name) for name in unseen}
    return [
        0.0 if wanted & {_plain(name) for name in (label, *label.split("|"))} else amount for label in labels
    ]


def _unseen_labels(unseen: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """The labels that these names mean, each once."""
    named = {_plain(synonym): label for label in labels for synonym in reversed([label, *label.split("|")])}
    found = []
    for name in unseen:
        if _plain(name) not in named:
            shown = [_shown(label) for label in dict.fromkeys(labels)]
            more = ", …" if len(shown) > 20 else ""
            raise UserError(
                f"evaluate.unseen: no held-out mask has a label '{name}'"
                f"{nearest(name, shown)}; labels are {', '.join(shown[:20])}{more}"
            )
        found.append(named[_plain(name)])
    return tuple(dict.fromkeys(found))


def _figures(confusion: NamedConfusion, unseen: Sequence[str]) -> dict[str, Any]:
    figures = confusion.confusion.to_dict(confusion.labels)
    apart = [place for place, label in enumerate(confusion.labels) if label in unseen]
    if apart:
        rest = [place for place in range(len(confusion.labels)) if place not in apart]
        chance_C = confusion.confusion.chance_C()
        seen, new = confusion.confusion.miou(rest), confusion.confusion.miou(apart)
        split = dict(zip(SPLIT, (seen, new, harmonic_mean(seen, new)), strict=True))
        figures |= {key: None if math.isnan(value) else value for key, value in split.items()}
        by_chance = {"miou_seen": mean(chance_C[rest]), "miou_unseen": mean(chance_C[apart])}
        chance = figures["baselines"]["chance"]
        chance |= {key: None if math.isnan(value) else value for key, value in by_chance.items()}
    return figures


def _rows(
    confusion: NamedConfusion, figures: Mapping[str, Any], unseen: Sequence[str]
) -> list[dict[str, Any]]:
    total = max(1, figures["pixels"])
    rows = []
    for label in confusion.labels:
        if label in figures["per_class"]:
            one = figures["per_class"][label]
            name = _shown(label) + (" (unseen)" if label in unseen else "")
            rows.append(_row(name, one["iou"], one["accuracy"], one["pixels"] / total))
    rows.append(_row("mean", figures["miou"], figures["mean_accuracy"], None))
    for key, name in (("miou_seen", "mean of seen"), ("miou_unseen", "mean of unseen")):
        if key in figures:
            rows.append(_row(name, figures[key], None, None))
    rows.append(_row("all pixels", None, figures["pixel_accuracy"], None))
    majority, chance = figures["baselines"]["majority"], figures["baselines"]["chance"]
    always = f"always {_shown(majority['class'])}"
    rows.append(_row(always, majority["miou"], majority["pixel_accuracy"], None))
    rows.append(_row("drawn evenly", chance["miou"], chance["pixel_accuracy"], None))
    return rows


def _row(name: str, iou: float | None, accuracy: float | None, share: float | None) -> dict[str, Any]:
    cells = zip(CELLS, (iou, accuracy, share), strict=True)
    return {"class": name} | {
        key: "" if value is None or math.isnan(value) else f"{100 * value:.1f}" for key, value in cells
    }


def _shown(label: str) -> str:
    return label.split("|")[0].strip()


def _plain(name: str) -> str:
    return " ".join(name.split()).lower()
