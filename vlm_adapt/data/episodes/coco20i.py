"""COCO-20i: COCO 2014's 80 classes in four folds of twenty (Nguyen and Todorovic 2019, arXiv 1909.13140).

Fold i leaves out class numbers i + 4v. The list of a fold is a pickle {class: [val2014/NAME.jpg, ...]}; the
test draws 1000 times a class, then one of its images, with numpy's old generator from seed 0. Masks hold the
class number + 1, and nothing is ignored. Knows this layout and no other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlm_adapt.data.convert.plain_pickle import read_pickle
from vlm_adapt.data.episodes.protocol import Episode, Protocol, split_fold
from vlm_adapt.data.masks import read_mask
from vlm_adapt.errors import UserError

EPISODES = 1000
SEED = 0
FOLDS = 4
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
# The papers' label file has VOC's words where VOC has the class, and writes all names without spaces.
_VOC = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "tv": "tvmonitor"}


class Coco20i(Protocol):
    """A fold of COCO-20i, see Protocol."""

    name, title, folds = "coco20i", "COCO-20i", FOLDS
    inner = ("COCO2014",)
    wants = ("val2014", "annotations/val2014")
    list_name = "coco/val/fold{fold}.pkl"
    marks = ("41e5ff88a17e0680", "297c72ef2323922a", "bbc92f2b0ebaef87", "b0911bc82e0717a3")

    def _read_list(self) -> None:
        found = read_pickle(self.list_file, "the list")
        images = [found.get(one) for one in self.unseen_ids()] if isinstance(found, dict) else []
        good = bool(images) and all(isinstance(one, list) for one in images)
        if not good or not all(isinstance(name, str) for some in images for name in some or ()):
            wanted = f"lists of images by class number, {', '.join(map(str, self.unseen_ids()[:3]))}, …"
            raise UserError(f"{self.title}: {self.list_file} does not hold {wanted}")
        empty = [name for name, some in zip(self.unseen(), images, strict=True) if not some]
        if empty:
            raise UserError(f"{self.title}: {self.list_file} has no image of '{empty[0]}'")
        self._images: list[list[str]] = [list(some or ()) for some in images]

    def unseen_ids(self) -> range:
        """See Protocol."""
        return range(self.fold, len(CLASSES), FOLDS)

    def _names(self) -> list[str]:
        if self.names == "plain":
            return list(CLASSES)
        return [_VOC.get(name, name).replace(" ", "") for name in CLASSES]

    def unseen(self) -> tuple[str, ...]:
        """See Protocol."""
        return split_fold(self._names(), self.unseen_ids())[0]

    def seen(self) -> tuple[str, ...]:
        """See Protocol."""
        return split_fold(self._names(), self.unseen_ids())[1]

    def episodes(self) -> list[Episode]:
        """See Protocol: 1000 draws, the published ones from the published list."""
        draws, found = np.random.RandomState(SEED), []
        for _ in range(EPISODES):
            number = int(draws.choice(len(self._images), 1, replace=False)[0])
            image = int(draws.choice(len(self._images[number]), 1, replace=False)[0])
            found.append(Episode(self._images[number][image], number))
        return found

    def paths(self, image: str) -> tuple[Path, Path]:
        """See Protocol; the name of an image begins with its folder."""
        return self.root / image, (self.root / "annotations" / image).with_suffix(".png")

    def foreground(self, mask: bytes, number: int) -> np.ndarray:
        """See Protocol."""
        return (read_mask(mask) == self.unseen_ids()[number] + 1).astype(np.int8)
