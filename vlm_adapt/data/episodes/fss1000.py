"""FSS-1000: ten images of each of 1000 classes (Li et al. 2020, arXiv 1907.12347).

520 classes are for training, 240 for validation and 240 for the test, by lists of names. The test asks for
its class in every image, 2,400 episodes, classes and file names in order of letters. A mask is a picture:
half grey and above is the class. Knows this layout and no other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlm_adapt.data.episodes.protocol import Episode, Protocol, read_text
from vlm_adapt.data.masks import open_mask
from vlm_adapt.errors import UserError

LISTS = ("trn.txt", "val.txt")
FIRST_TEST_ID = 760


class Fss1000(Protocol):
    """The test of FSS-1000, see Protocol."""

    name, title, folds = "fss1000", "FSS-1000", 1
    inner = ("FSS-1000",)
    wants = ()
    list_name = "fss/test.txt"
    marks = ("e50f2318da9ebe20",)
    _classes: tuple[str, ...] = ()
    _others: tuple[str, ...] = ()

    def _read_list(self) -> None:
        self._classes = tuple(sorted(read_text(self.list_file)))
        if not self._classes:
            raise UserError(f"{self.title}: the list {self.list_file} is empty")
        beside = [self.list_file.with_name(name) for name in LISTS]
        self._others = tuple(sorted(name for file in beside if file.is_file() for name in read_text(file)))

    def _check_folder(self) -> None:
        missing = [name for name in self._classes if not (self.root / name).is_dir()]
        if missing:
            raise UserError(
                f"{self.title}: {len(missing)} of the {len(self._classes)} test classes have no folder in "
                f"'{self.root}', first '{missing[0]}'"
            )

    def unseen_ids(self) -> range:
        """See Protocol."""
        return range(FIRST_TEST_ID, FIRST_TEST_ID + len(self._classes))

    def _spelt(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.replace("_", " ") for name in names) if self.names == "plain" else names

    def unseen(self) -> tuple[str, ...]:
        """See Protocol: the list's, so it is known once a folder is open."""
        return self._spelt(self._classes)

    def seen(self) -> tuple[str, ...]:
        """See Protocol; also those of validation, as far as their lists lie beside the test's."""
        return self._spelt(self._others)

    def episodes(self) -> list[Episode]:
        """See Protocol: every image of every class."""
        found = [
            Episode(f"{name}/{path.name}", number)
            for number, name in enumerate(self._classes)
            for path in sorted((self.root / name).glob("*.jpg"))
        ]
        if not found:
            raise UserError(f"{self.title}: there is not one .jpg in the folders of '{self.root}'")
        return found

    def paths(self, image: str) -> tuple[Path, Path]:
        """See Protocol."""
        return self.root / image, (self.root / image).with_suffix(".png")

    def foreground(self, mask: bytes, number: int) -> np.ndarray:
        """See Protocol."""
        return (np.asarray(open_mask(mask).convert("L")) >= 128).astype(np.int8)
