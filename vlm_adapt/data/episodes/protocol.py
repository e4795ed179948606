"""What the zero-shot protocols share: folds of unseen classes, episodes, and the reading of one.

An episode is an image and one class that is asked for in it: is a pixel that class, or other? The protocols
are those of few-shot segmentation without the shots: folders, lists and draws as HSNet (Min et al. 2021,
arXiv 2104.01538) laid them down and LSeg (Li et al. 2022, arXiv 2201.03546) took them over. Knows folders,
lists and masks; knows nothing about models or scores.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from vlm_adapt.choices import nearest
from vlm_adapt.data.images import decode
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

NAMES = ("published", "plain")


class Episode(NamedTuple):
    """An image, by its name in the protocol's list, and the class that is asked for.

    Attributes:
        number: the class by its place among the fold's unseen ones.
    """

    image: str
    number: int


class Protocol(ABC):
    """A fold of a protocol.

    Class attributes:
        name: as in the table. title: as papers write it. folds: how many. inner: folders that FOLDER may be
        above of. wants: what lies in the folder. list_name: of the list, below a folder of lists.
        marks: what `mark` says of the published episodes, by fold.

    Args:
        fold: from 0.
        names: `published` writes classes as the papers' label files do, `plain` as a person would.

    Raises:
        UserError: there is no such fold.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folds: ClassVar[int]
    inner: ClassVar[tuple[str, ...]]
    wants: ClassVar[tuple[str, ...]]
    list_name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]

    def __init__(self, fold: int = 0, names: str = "published"):
        if not 0 <= fold < self.folds:
            raise UserError(
                f"{self.title} has one test split: leave --fold out"
                if self.folds == 1
                else f"{self.title} has folds 0 to {self.folds - 1}, and no fold {fold}"
            )
        if names not in NAMES:
            raise UserError(
                f"unknown spelling '{names}'{nearest(names, NAMES)}: known are {', '.join(NAMES)}"
            )
        self.fold, self.names = fold, names
        self.root, self.list_file = Path(), Path()

    def open(self, folder: str | Path, lists: str | Path | None = None) -> None:
        """Find the images and the list of episodes.

        Args:
            folder: the data set's folder, or one of those above it.
            lists: a folder of lists as HSNet's `data/splits`; by default `splits` in the data set's folder.

        Raises:
            UserError: the folder is not there or laid out otherwise, or the list is missing.
        """
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"there is no folder '{folder}': give the folder of {self.title}")
        for inner in self.inner:
            root = root / inner if (root / inner).is_dir() else root
        missing = [name for name in self.wants if not (root / name).is_dir()]
        if missing:
            raise UserError(
                f"'{root}' is not laid out as {self.title} is distributed: there is no {missing[0]}/ in it"
            )
        self.root = root
        self.read_list(root / "splits" if lists is None else lists)
        self._check_folder()

    def read_list(self, lists: str | Path) -> None:
        """Read the fold's list alone, from a folder of lists.

        Raises:
            UserError: it is missing, or is no list of this protocol.
        """
        inside = self.list_name.format(fold=self.fold).split("/")
        places = [Path(lists).expanduser().joinpath(*inside[start:]) for start in range(len(inside))]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(
                f"{self.title}: there is no list {places[0]}: the published lists are those of HSNet's "
                "data/splits; name the folder that holds them with --lists"
            )
        self.list_file = found
        self._read_list()

    def _check_folder(self) -> None:  # noqa: B027 - most have nothing to add
        """Raises UserError: the folder lacks what the list asks for."""

    @abstractmethod
    def _read_list(self) -> None:
        """Read `list_file`. Raises UserError: it is not a list of this protocol."""

    @abstractmethod
    def unseen(self) -> tuple[str, ...]:
        """The fold's classes, which training leaves out."""

    @abstractmethod
    def seen(self) -> tuple[str, ...]:
        """All other classes."""

    @abstractmethod
    def episodes(self) -> list[Episode]:
        """All episodes, in their order, the same at every call."""

    @abstractmethod
    def paths(self, image: str) -> tuple[Path, Path]:
        """Where an image and its mask lie."""

    @abstractmethod
    def foreground(self, mask: bytes, number: int) -> np.ndarray:
        """truth_HW int8 of a mask file: 1 class, 0 other, -1 ignored. Raises BadSample."""

    @abstractmethod
    def unseen_ids(self) -> Sequence[int]:
        """The published number of each unseen class."""

    def check_files(self, episodes: Sequence[Episode]) -> None:
        """Raises UserError: an image or a mask that the list names is not there."""
        files = [path for image in {one.image: None for one in episodes} for path in self.paths(image)]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise UserError(
                f"{self.title}: {len(missing):,} of {len(files):,} files that {self.list_file.name} names "
                f"are not there, first {missing[0]}"
            )

    def read(self, episode: Episode, alike: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(pixels_HWC uint8, truth_HW int8: 1 class, 0 other, -1 ignored).

        Args:
            alike: image and mask have one size. Published figures squash them apart, whatever their sizes.

        Raises:
            BadSample: damaged, or of sizes that differ.
        """
        image, mask = self.paths(episode.image)
        try:
            pixels_HWC = decode(image.read_bytes())
            truth_HW = self.foreground(mask.read_bytes(), episode.number)
        except OSError as error:
            raise BadSample("file cannot be read", str(error)) from error
        if alike and pixels_HWC.shape[:2] != truth_HW.shape:
            sizes = f"image {pixels_HWC.shape[:2]}, mask {truth_HW.shape}"
            raise BadSample("mask and image differ in size", sizes)
        return pixels_HWC, truth_HW

    def mark(self, episodes: Sequence[Episode]) -> str:
        """16 letters that differ when the episodes do."""
        unseen = self.unseen_ids()
        text = "\n".join(f"{one.image} {unseen[one.number]}" for one in episodes)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def as_published(self, episodes: Sequence[Episode]) -> bool:
        """Whether these are the episodes that published figures are of."""
        return self.mark(episodes) == self.marks[self.fold]


def read_text(file: Path) -> list[str]:
    """A list's lines, stripped, without empty ones. Raises UserError."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {file} cannot be read ({error})") from error


def split_fold(names: Sequence[str], chosen: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names at these places, all others)."""
    inside = set(chosen)
    rest = tuple(name for place, name in enumerate(names) if place not in inside)
    return tuple(names[place] for place in chosen), rest
