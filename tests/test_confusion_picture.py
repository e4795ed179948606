"""The confusion picture: it is drawn of any number of classes, and what it says is what was counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlm_adapt.errors import UserError
from vlm_adapt.report.confusion import SHOWN, confusion_picture


def words(counts: np.ndarray, labels: list[str], **named: object) -> list[str]:
    figure = confusion_picture(counts, labels, **named)  # type: ignore[arg-type]
    texts = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        texts += [text.get_text() for text in axes.texts]
        texts += [tick.get_text() for tick in axes.get_yticklabels()]
    return texts


def test_says_what_was_counted(tmp_path: Path) -> None:
    """Rows as shares, classes nowhere left out, synonyms by their first, unseen ones starred."""
    counts = np.array([[3, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4]])
    file = tmp_path / "deep" / "confusion.png"
    texts = words(counts, ["car|automobile", "x$_2$", "nowhere", "sky"], output=file, marked=["sky"])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert {"car", "x$_2$", "sky *", "75", "25", "75.0", "50.0", "100.0"} <= set(texts)
    assert "nowhere" not in texts
    assert any("mIoU 75.0 %, pixel accuracy 88.9 %" in text for text in texts)


def test_predicted_only() -> None:
    assert "no true pixel" in words(np.array([[2, 1], [0, 0]]), ["a", "b"])


def test_many_classes() -> None:
    """The most frequent are shown, and it says so."""
    many = SHOWN + 60
    texts = words(np.diag(np.arange(1, many + 1)), [f"thing {i}" for i in range(many)])
    assert f"thing {many - 1}" in texts and f"thing {many - SHOWN - 1}" not in texts
    assert any(f"the {SHOWN} most frequent of {many} classes" in text for text in texts)


def test_nothing_to_draw() -> None:
    with pytest.raises(UserError, match="not one pixel"):
        confusion_picture(np.zeros((2, 2), int), ["a", "b"])
