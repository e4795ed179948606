"""What is asked of a model for every image. Knows names and numbers only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from vlm_adapt.errors import UserError


@dataclass(frozen=True)
class Ask:
    """All that the verb can ask; each kind of model takes a part of it.

    Args:
        labels: checked ones, "car|automobile" is one; () for none.
        points: (x, y, 1 inside or 0 outside), pixels of the image. boxes: (left, top, right, bottom).
        mask: a mask file as a prompt.
        everything: all masks that there are.
        name_with: a segmenter's checkpoint that names masks by the labels.
        grid, crops, min_area: of `everything`: points a side, layers of crops, pixels of the smallest mask.
        window, scales, flip, base_size: see models.dense_inference.
        scores: also the chances of every label in every pixel.
    """

    labels: tuple[str, ...] = ()
    points: tuple[tuple[float, float, int], ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    mask: Path | None = None
    everything: bool = False
    name_with: Path | None = None
    grid: int = 32
    crops: int = 0
    min_area: int = 0
    window: str = "sliding"
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    base_size: int | None = None
    scores: bool = False

    def only(self, taken: Iterable[str], who: str) -> None:
        """Refuse what is asked beyond `taken`.

        Args:
            who: as in "a segmenter".

        Raises:
            UserError: something else was asked.
        """
        taken = set(taken)
        for field in fields(self):
            if field.name not in taken and getattr(self, field.name) != field.default:
                option = "--" + field.name.replace("_", "-")
                option = {"--points": "--point", "--boxes": "--box"}.get(option, option)
                known = ", ".join("--" + name.replace("_", "-") for name in sorted(taken))
                raise UserError(f"{option} is nothing that {who} can be asked: it takes {known}")
