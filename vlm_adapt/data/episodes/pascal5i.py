"""PASCAL-5i: VOC 2012's 20 classes in four folds of five (Shaban et al. 2017, arXiv 1709.03410).

Fold i leaves out classes 5i to 5i + 4. The list of a fold has a line `2007_000033__01` for an image and a
class (from 1); the test goes through it from the top, over and over, until there were 1000 episodes. The
boundary (255) is ignored. Knows this layout and no other.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from vlm_adapt.data.convert.pascal_voc import LABELS
from vlm_adapt.data.episodes.protocol import Episode, Protocol, read_text, split_fold
from vlm_adapt.data.masks import IGNORED_8, read_mask
from vlm_adapt.errors import UserError

EPISODES = 1000
IN_A_FOLD = 5
_PLAIN = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
_LINE = re.compile(r"(\S+?)__(\d{1,2})")


class Pascal5i(Protocol):
    """A fold of PASCAL-5i, see Protocol."""

    name, title, folds = "pascal5i", "PASCAL-5i", 4
    inner = ("VOCdevkit", "VOC2012")
    wants = ("JPEGImages", "SegmentationClassAug")
    list_name = "pascal/val/fold{fold}.txt"
    marks = ("17c6193f284225a4", "275bee3619c543d9", "41d567100018bfcc", "610032aee8d5cc52")

    def _read_list(self) -> None:
        self._pairs: list[Episode] = []
        ids = list(self.unseen_ids())
        for line in read_text(self.list_file):
            found = _LINE.fullmatch(line)
            if not found or int(found[2]) - 1 not in ids:
                wanted = f"an image and a class from {ids[0] + 1:02} to {ids[-1] + 1:02}, as 2007_000033__01"
                raise UserError(f"{self.title}: line '{line}' of {self.list_file} is not {wanted}")
            self._pairs.append(Episode(found[1], ids.index(int(found[2]) - 1)))
        if not self._pairs:
            raise UserError(f"{self.title}: the list {self.list_file} is empty")

    def unseen_ids(self) -> range:
        """See Protocol."""
        return range(IN_A_FOLD * self.fold, IN_A_FOLD * (self.fold + 1))

    def _names(self) -> list[str]:
        return [_PLAIN.get(name, name) if self.names == "plain" else name for name in LABELS[1:]]

    def unseen(self) -> tuple[str, ...]:
        """See Protocol."""
        return split_fold(self._names(), self.unseen_ids())[0]

    def seen(self) -> tuple[str, ...]:
        """See Protocol."""
        return split_fold(self._names(), self.unseen_ids())[1]

    def episodes(self) -> list[Episode]:
        """See Protocol: 1000, through the list and again from its top."""
        return [self._pairs[place % len(self._pairs)] for place in range(EPISODES)]

    def paths(self, image: str) -> tuple[Path, Path]:
        """See Protocol."""
        return (
            self.root / "JPEGImages" / f"{image}.jpg",
            self.root / "SegmentationClassAug" / f"{image}.png",
        )

    def foreground(self, mask: bytes, number: int) -> np.ndarray:
        """See Protocol."""
        values_HW = read_mask(mask)
        truth_HW = (values_HW == self.unseen_ids()[number] + 1).astype(np.int8)
        truth_HW[values_HW == IGNORED_8] = -1
        return truth_HW
