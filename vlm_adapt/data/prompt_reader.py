"""One sample made ready for a promptable model: its image in a square, masks of it, and a prompt for each.

Knows which masks are drawn and what goes with each; the masks of a sample are prompt_masks.py's, prompts
drawn from a mask prompt_draws.py's, samples by number samples.py's. Knows nothing about ranks, batches or the
order of samples. Picklable, so that worker processes can carry it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_adapt.config.schema import Data, Source
from vlm_adapt.data.images import decode
from vlm_adapt.data.long_side import Frame, fit_long_side, fit_mask
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.prompt_draws import (
    IGNORED,
    coarse_mask,
    corrected_point,
    inside_points,
    noisy_box,
    quota,
    several_points,
    tight_box,
)
from vlm_adapt.data.prompt_masks import Candidate, named_masks, shape_masks
from vlm_adapt.data.samples import Samples, generator_of
from vlm_adapt.data.tasks.prompted import Prompts, make_prompts
from vlm_adapt.image_spec import ImageSpec

MASK_SHARE = 4  # pixels of the square to one of a target: 256 of 1024, as SAM's decoder gives masks
MEASURED = ("point", "points", "box")  # what every mask is prompted with in an evaluation


@dataclass
class Target:
    """A prompt and the mask that it means.

    Attributes:
        kind: one of tasks.prompted.KINDS.
        target_hw: uint8: 1 inside, 0 outside, 255 unknown or beyond the image.
        points_K2, labels_K, box_4: in pixels of the square; None where the kind has none.
        coarse_hw: a mask prompt, 0 and 1.
        words: a label (with synonyms) or an expression.
        truth_HW: the mask at the image's own size, where it is asked for.
    """

    kind: str
    target_hw: np.ndarray
    points_K2: np.ndarray | None = None
    labels_K: np.ndarray | None = None
    box_4: np.ndarray | None = None
    coarse_hw: np.ndarray | None = None
    words: str = ""
    truth_HW: np.ndarray | None = None


@dataclass
class PromptRow:
    """A sample to learn from: its image as a square uint8 [3, side, side], how it lies there, its prompts."""

    key: str
    pixels_CHW: np.ndarray
    frame: Frame
    targets: list[Target]


class PromptReader(Samples):
    """Samples with prompts, by number over all sources.

    Args:
        sources: the configuration's sources; the task of each is `prompts`, or none.
        image_spec: of the tower; its size is the square's.
        seed: of the draws.
        data: limits of images, and where remote shards are kept. Of its `augment` only `flip` is done: images
            keep their proportions and their place in the square, as SAM's do.

    Raises:
        UserError: another task, or a setting that does not fit.
    """

    def __init__(
        self, sources: Sequence[Source], image_spec: ImageSpec, seed: int = 0, data: Data | None = None
    ):
        super().__init__(sources, seed, data)
        self.image_spec, self.side = image_spec, image_spec.size[0]
        self.flip = data is not None and data.augment is not None and data.augment.flip
        self.tasks: list[Prompts] = [make_prompts(source.task) for source in sources]

    def training(
        self,
        number: int,
        epoch: int,
        position: int,
        account: Account,
        texts: Collection[int] | None = None,
        rows_apart: bool = False,
    ) -> list[PromptRow]:
        """The sample's one row; a refused sample gives none and an entry in the account.

        Args:
            texts: which of the sample's rows are wanted, by number; None is all.
            rows_apart: the account is told that they are apart.
        """
        if texts is not None and len(texts) and 0 not in texts:
            return []
        name = self.source_of(number)
        try:
            row = self.row(number, epoch, position)
        except BadSample as error:
            account.refuse(self.key(number), error, name)
            return []
        account.use(False, name, len(row.targets), rows_apart)
        return [row]

    def measure(self, number: int, epoch: int, position: int) -> list[int]:
        """Every sample makes one row, as long as any other."""
        return [1]

    def row(self, number: int, epoch: int, position: int) -> PromptRow:
        """A sample's prompts of this epoch and position, the same for any number of ranks and workers.

        Raises:
            BadSample: image or masks cannot be used, or there is no mask to prompt for.
        """
        return self._row(number, generator_of(self.seed, epoch, position, 3), self.flip)

    def judged(self, number: int) -> PromptRow:
        """A sample to be judged by: the same masks every time, each with every kind of prompt.

        Raises:
            BadSample: as `row`.
        """
        return self._row(number, generator_of(self.seed, number, 4), False, every=True)

    def _row(self, number: int, draws: np.random.Generator, flip: bool, every: bool = False) -> PromptRow:
        sample, task = self.raw(number), self.tasks[self.locate(number)[0]]
        if len(sample.images) != 1:
            raise BadSample("a mask needs exactly one image", f"the sample has {len(sample.images)}")
        pixels_HWC = decode(sample.images[0], self.max_pixels)
        # Expressions say left and right: what they refer to is not mirrored.
        mirrored = flip and "referring" not in sample.record and draws.random() < 0.5
        if mirrored:
            pixels_HWC = np.ascontiguousarray(pixels_HWC[:, ::-1])
        square_CHW, frame = fit_long_side(pixels_HWC, self.side, self.image_spec)
        least = max(1.0, task.smallest * frame.original[0] * frame.original[1])
        shapes = [one for one in shape_masks(sample, task.masks) if one.area >= least]
        named = [one for one in named_masks(sample) if one.area >= least] if task.kinds.get("text") else []
        targets = list(self._targets(shapes, named, frame, task, draws, mirrored, every))
        if not targets:
            semantic = "a semantic mask" if sample.mask is not None else "no semantic mask"
            has = f"{semantic} and {len(sample.masks)} masks of objects"
            raise BadSample("no mask to prompt for", f"it has {has}, none large enough")
        return PromptRow(sample.key, square_CHW, frame, targets)

    def _targets(
        self,
        shapes: list[Candidate],
        named: list[Candidate],
        frame: Frame,
        task: Prompts,
        draws: np.random.Generator,
        mirrored: bool,
        every: bool,
    ) -> Iterator[Target]:
        """Prompts for masks drawn without repetition; `every` kind of prompt for each, or one."""
        shares = {kind: share for kind, share in task.kinds.items() if kind != "text" or named}
        if not shapes:
            shares = {kind: share for kind, share in shares.items() if kind == "text"}
        if not sum(shares.values()):
            return
        kinds = quota(task.masks_per_image, shares, draws)
        texts = task.masks_per_image if every else kinds.count("text")
        shape_kinds = [kind for kind in kinds if kind != "text"]
        wanted = task.masks_per_image if every else len(shape_kinds)
        for place, (mask_HW, target_hw, _) in enumerate(self._drawn(shapes, wanted, frame, draws, mirrored)):
            for kind in MEASURED if every else shape_kinds[place : place + 1]:
                yield self._prompt(kind, mask_HW, target_hw, frame, task, draws, every)
        for mask_HW, target_hw, words in self._drawn(named, texts, frame, draws, mirrored):
            said = words[int(draws.integers(0, len(words)))]
            yield Target("text", target_hw, words=said, truth_HW=mask_HW if every else None)

    def _drawn(
        self,
        candidates: list[Candidate],
        count: int,
        frame: Frame,
        draws: np.random.Generator,
        mirrored: bool,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[str, ...]]]:
        """(mask_HW, target_hw, words) of at most `count` candidates that are seen at the target's size."""
        found = 0
        for place in draws.permutation(len(candidates)).tolist():
            if found == count:
                return
            mask_HW = candidates[place].draw()
            mask_HW = mask_HW[:, ::-1] if mirrored else mask_HW
            target_hw = fit_mask(mask_HW, frame, max(1, self.side // MASK_SHARE), fill=IGNORED)
            if (target_hw == 1).any():
                found += 1
                yield mask_HW, target_hw, candidates[place].words

    def _prompt(
        self,
        kind: str,
        mask_HW: np.ndarray,
        target_hw: np.ndarray,
        frame: Frame,
        task: Prompts,
        draws: np.random.Generator,
        every: bool,
    ) -> Target:
        target = Target(kind, target_hw, truth_HW=mask_HW if every else None)
        if kind == "point":
            points_K2, target.labels_K = inside_points(mask_HW, 1, draws), np.ones(1, np.int64)
            target.points_K2 = frame.inward(points_K2)
        elif kind == "points":
            points_K2, target.labels_K = several_points(mask_HW, draws)
            target.points_K2 = frame.inward(points_K2)
        elif kind == "box":
            box_4 = frame.inward(tight_box(mask_HW))
            noise = 0.0 if every else task.box_noise
            target.box_4 = noisy_box(box_4, frame.resized, noise, task.box_noise_pixels, draws)
        else:
            target.coarse_hw = coarse_mask(target_hw, draws)
            scale = self.side / len(target_hw)
            target.points_K2, target.labels_K = corrected_point(target.coarse_hw, target_hw, scale, draws)
        return target
