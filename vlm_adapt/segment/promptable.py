"""A promptable model asked with points, boxes, a mask or words, or for every mask that there is.

Knows the ask and the ways to a map of masks; knows nothing about files of results. All points are one
object's, and go with the one box or mask that is given beside them; several boxes are several objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_adapt.data.masks import ignored_value, read_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.models.automatic_masks import AutomaticMasks, Box, FoundMask
from vlm_adapt.models.naming import (
    NamedMask,
    name_masks,
    scores_by_segmenter,
    scores_by_words,
    semantic_map,
)
from vlm_adapt.models.promptable import ImageEmbedding, Promptable
from vlm_adapt.models.restore import read_checkpoint, restore_any
from vlm_adapt.segment.ask import Ask
from vlm_adapt.segment.result import NONE, Segmentation
from vlm_adapt.text.labels import shown

TAKES = ("points", "boxes", "mask", "everything", "labels", "name_with", "grid", "crops", "min_area")


class Prompted:
    """See segment/kinds.py.

    Raises:
        UserError: words were asked for that the model never learned.
    """

    def __init__(self, assembled: Any, ask: Ask):
        self.model: Promptable = assembled.model
        self.ask = ask
        self.mask_HW = None if ask.mask is None else _inside(ask.mask.read_bytes(), str(ask.mask))
        self.segmenter: Any = None
        self.automatic = AutomaticMasks(ask.grid, crop_layers=ask.crops, min_area=ask.min_area)
        if ask.name_with is not None:
            named, _, _ = restore_any(ask.name_with)
            self.segmenter = named.model.to(self.model.device).eval()
        elif ask.labels:
            self.model.word_tokens(ask.labels[:1])  # says so where it cannot

    @staticmethod
    def check(ask: Ask, config: Any) -> None:
        """Raises UserError: nothing was asked, or what does not go together."""
        ask.only(TAKES, "a promptable model")
        prompts = bool(ask.points or ask.boxes or ask.mask)
        if ask.everything and prompts:
            raise UserError("--everything asks for all masks and prompts for one: give one of them")
        if not ask.everything and not prompts and not ask.labels:
            raise UserError(
                "a promptable model needs to be asked: give --point X,Y, --box X0,Y0,X1,Y1, --mask FILE, "
                "--labels or --everything"
            )
        if len(ask.boxes) > 1 and (ask.points or ask.mask):
            raise UserError("points and a mask go with one box: give one --box, or several boxes alone")
        if ask.name_with is not None and not ask.labels:
            raise UserError('--name-with chooses among words: give --labels "cat, grass, other"')
        if ask.name_with is not None and not ask.everything and not prompts:
            raise UserError("--name-with names masks: ask for them with --everything, or by --point or --box")
        if ask.name_with is not None:
            run, _ = read_checkpoint(ask.name_with)
            if run.model.kind != "segmenter":
                raise UserError(
                    f"'{ask.name_with}' holds a model of kind {run.model.kind}: --name-with needs a segmenter"
                )
        if ask.labels and ask.name_with is None and config.text is None:
            raise UserError(
                "this model has no text encoder and reads no words: name its masks by a segmenter "
                "(--everything --name-with CHECKPOINT --labels ...)"
            )
        if not ask.everything and (ask.grid, ask.crops, ask.min_area) != (Ask.grid, Ask.crops, Ask.min_area):
            raise UserError("--grid, --crops and --min-area are settings of --everything: give it too")
        AutomaticMasks(ask.grid, crop_layers=ask.crops, min_area=ask.min_area)

    def __call__(self, pixels_HWC: np.ndarray) -> Segmentation:
        """The masks that were asked for; where they overlap, the smaller lies on top."""
        ask = self.ask
        if ask.everything:
            found = self.automatic(self.model, pixels_HWC)
            embedding = None
            names = [f"mask {number + 1}" for number in range(len(found))]
        else:
            embedding = self.model.embed(pixels_HWC)
            if not (ask.points or ask.boxes or ask.mask):
                return self._words(embedding)
            found, names = self._prompted(embedding)
        if ask.labels:
            return self._named(pixels_HWC, embedding, found)
        whole = [NamedMask(mask, number, names[number], 1.0) for number, mask in enumerate(found)]
        classes_HW, _ = semantic_map(whole, pixels_HWC.shape[:2])
        scores = [min(1.0, mask.predicted_iou) for mask in found]
        return Segmentation(
            classes_HW,
            names,
            scores=scores,
            listed=not ask.everything,
            figures={"masks": [_told(mask) for mask in found]},
        )

    def _prompted(self, embedding: ImageEmbedding) -> tuple[list[FoundMask], list[str]]:
        """A mask for each object that was asked for, and what they are called."""
        ask, (height, width) = self.ask, embedding.frame.original
        for x, y, *_ in (*ask.points, *ask.boxes, *(box[2:] for box in ask.boxes)):
            if not (0 <= x <= width and 0 <= y <= height):
                raise BadSample("a prompt lies outside of the image", f"{x:g},{y:g} of {width} x {height}")
        low = None
        boxes = np.array(ask.boxes, np.float32) if ask.boxes else None
        if self.mask_HW is not None:
            try:
                low = self.model.mask_prompt(self.mask_HW, embedding.frame)
            except UserError as error:
                raise BadSample("mask and image differ in size", str(error)) from error
            if boxes is None and not ask.points:  # SAM never learned from a mask alone
                boxes = np.array([_box(self.mask_HW)], np.float32)
        points = np.array([[point[:2] for point in ask.points]], np.float32) if ask.points else None
        labels = np.array([[point[2] for point in ask.points]]) if ask.points else None
        several = points is not None and len(ask.points) == 1 and boxes is None and low is None
        made = self.model.masks(embedding, points, labels, boxes, low, multimask=several)
        best = made.iou_PM.argmax(1).tolist()
        found = []
        for number, choice in enumerate(best):
            mask_HW = (made.logits_PMHW[number, choice] > 0).cpu().numpy()
            score = float(made.iou_PM[number, choice])
            at = ask.points[0][:2] if ask.points else (0.0, 0.0)
            found.append(FoundMask(mask_HW, _box(mask_HW), int(mask_HW.sum()), score, 1.0, at))
        alone = len(found) == 1
        return found, ["object"] if alone else [f"box {number + 1}" for number in range(len(found))]

    def _named(
        self, pixels_HWC: np.ndarray, embedding: ImageEmbedding | None, found: Sequence[FoundMask]
    ) -> Segmentation:
        """Masks under the best of the labels' names."""
        labels, masks = self.ask.labels, [mask.mask_HW for mask in found]
        if self.segmenter is not None:
            scores_PL = scores_by_segmenter(self.segmenter, pixels_HWC, masks, labels)
        else:
            embedding = embedding or self.model.embed(pixels_HWC)
            scores_PL = scores_by_words(self.model, embedding, masks, labels)
        named = name_masks(found, scores_PL, labels)
        classes_HW, confidence_HW = semantic_map(named, pixels_HWC.shape[:2])
        masks_told = [_told(one.found) | {"label": one.name, "score": one.score} for one in named]
        names = [shown(label) for label in labels]
        return Segmentation(classes_HW, names, confidence_HW, figures={"masks": masks_told})

    def _words(self, embedding: ImageEmbedding) -> Segmentation:
        """What each label means: a pixel has the label whose mask is surest of it, if any is."""
        made = self.model.masks(embedding, words=self.ask.labels, multimask=False)
        chances_LHW = made.logits_PMHW[:, 0].sigmoid().cpu().numpy()
        best_HW, chance_HW = chances_LHW.argmax(0), chances_LHW.max(0)
        classes_HW = np.where(chance_HW > 0.5, best_HW, NONE).astype(np.uint16)
        return Segmentation(classes_HW, [shown(label) for label in self.ask.labels], chance_HW)


def _inside(data: bytes, where: str) -> np.ndarray:
    """A mask file as inside or not; the ignored value is outside."""
    try:
        mask_HW = read_mask(data)
    except BadSample as error:
        raise UserError(f"the mask '{where}' cannot be read: {error}") from error
    inside_HW: np.ndarray = (mask_HW > 0) & (mask_HW != ignored_value(mask_HW))
    if not inside_HW.any():
        if (mask_HW > 0).any():  # black and white: 255 is inside
            return mask_HW > 0
        raise UserError(f"the mask '{where}' is empty: nothing in it is above 0")
    return inside_HW


def _box(mask_HW: np.ndarray) -> Box:
    """The box that a mask fills; of none, one without size."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _told(mask: FoundMask) -> dict[str, Any]:
    """A mask in numbers."""
    return {
        "box": list(mask.box),
        "area": mask.area,
        "predicted_iou": round(mask.predicted_iou, 4),
        "stability": round(mask.stability, 4),
    }
