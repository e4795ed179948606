"""The figures of an evaluation: metrics of answers, held-out loss, and what the image is worth.

Knows numbers and strings; knows nothing about models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt.config.schema import Evaluate
from vlm_adapt.metrics import METRICS, SAMPLE_SCORES


@dataclass
class Scores:
    """What an evaluation found: `metrics` for `metrics.json`, a prediction a question."""

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def value(self, name: str) -> float | None:
        """A metric by name; dots reach inside (`accuracy_by_kind.color`)."""
        node: Any = self.metrics
        for key in name.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return float(node) if isinstance(node, int | float) else None

    def line(self) -> str:
        """The main figures in a line."""
        plain = {k: v for k, v in self.metrics.items() if isinstance(v, float) and not math.isnan(v)}
        kinds = self.metrics.get("accuracy_by_kind", {})
        return "  ".join(f"{key} {value:.4g}" for key, value in {**plain, **kinds}.items())

    def table(self) -> str:
        """Figures of classes for a terminal; empty where `line` says all."""
        return ""

    def write(self, folder: Path) -> None:
        """Further files beside `metrics.json`."""


def spread(count: int, limit: int | None) -> list[int]:
    """Numbers of the samples that are scored: all of `count`, or `limit` of them spread evenly."""
    if limit is None or limit >= count:
        return list(range(count))
    return [place * count // limit for place in range(limit)]


def answer_metrics(rows: list[dict[str, Any]], settings: Evaluate) -> dict[str, Any]:
    predictions, references = [row["prediction"] for row in rows], [row["answers"] for row in rows]
    kinds = [row["kind"] for row in rows]
    known = kinds if any(kind is not None for kind in kinds) else None
    metrics: dict[str, Any] = {}
    blind: dict[str, Any] = {}
    for name in settings.metrics:
        _add(metrics, name, METRICS.load(name)(predictions, references, known))
        if settings.blind:
            shown = [row["blind_prediction"] for row in rows]
            _add(blind, name, METRICS.load(name)(shown, references, known))
    metrics["questions"] = metrics.pop("samples", len(rows))
    if settings.blind:
        blind.pop("samples", None)
        metrics["blind"] = blind
    if settings.metrics:
        for row, score in zip(
            rows, SAMPLE_SCORES.load(settings.metrics[0])(predictions, references), strict=True
        ):
            row["score"] = float(score)
    return metrics


def _add(metrics: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Enter a metric's figures; one that calls them like an earlier one gets a section of its own."""
    clash = any(key in metrics for key in found if key != "samples")
    metrics |= {name: found} if clash else found


def loss_metrics(losses: list[tuple[float, float, int]]) -> dict[str, Any]:
    """Token-weighted held-out loss; with blind losses, what the image is worth in nats a token."""
    losses = [one for one in losses if one[2]]
    if not losses:
        return {}
    own, other, counts = (np.array(column, float) for column in zip(*losses, strict=True))
    metrics: dict[str, Any] = {"loss": float(own.sum() / counts.sum())}
    if not np.isnan(other).any():
        gains = (other - own) / counts
        spread = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None
        metrics["blind_loss"] = float(other.sum() / counts.sum())
        metrics["image_gain"] = {"nats_per_token": float(gains.mean()), "standard_error": spread}
    return metrics
