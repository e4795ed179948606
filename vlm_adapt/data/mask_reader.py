"""One sample with its semantic mask made ready to learn from, or refused with a reason.

Knows masks, label sets and how image and mask vary together; samples by number are in samples.py. Knows
nothing about ranks, batches or the order of samples. Picklable, so that worker processes can carry it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from vlm_adapt.config.schema import Augment, Data, Source
from vlm_adapt.data.augment import Cut, cut_mask, cut_pixels, draw_cut, fitted, jitter_colours, squashed
from vlm_adapt.data.images import decode
from vlm_adapt.data.masks import check_names, check_values, read_mask
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.reduced import decode_reduced, reducible
from vlm_adapt.data.sample import Sample
from vlm_adapt.data.samples import Samples, generator_of
from vlm_adapt.data.tasks.masks import LabelSet, Masks, make_masks
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec

DRAWS = 8  # crops that are tried for one that shows a labelled pixel
SAMPLES_LOOKED_AT = 16  # of a source, for the labels that its settings name
SETS_KEPT = 256


@dataclass
class MaskRow:
    """A sample to learn from.

    Attributes:
        pixels_CHW: uint8, of the tower's size.
        mask_HW: int16 or int32: numbers of labels, -1 is ignored.
        labels: all labels of the sample's set, whether they occur or not.
        learned: pixels that are not ignored.
    """

    key: str
    pixels_CHW: np.ndarray
    mask_HW: np.ndarray
    labels: tuple[str, ...]
    learned: int = -1

    def __post_init__(self) -> None:
        if self.learned < 0:
            self.learned = int(np.count_nonzero(self.mask_HW >= 0))


@dataclass(frozen=True)
class WholeMask:
    """A sample to be judged by, at the image's own size.

    Attributes:
        pixels_HWC: uint8, upright.
        mask_HW: as in MaskRow.
    """

    key: str
    pixels_HWC: np.ndarray
    mask_HW: np.ndarray
    labels: tuple[str, ...]


class MaskReader(Samples):
    """Samples with masks, by number over all sources.

    Args:
        sources: the configuration's sources; the task of each is `masks`, or none.
        image_spec: the size and statistics of training pictures.
        seed: of the draws.
        data: limits of images, where remote shards are kept, and `augment`: how training pictures vary (None
            brings every image to the size as `image_spec` says).
        augment: in place of that of `data`.

    Raises:
        UserError: another task, or a label in its settings that the data do not have.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        image_spec: ImageSpec,
        seed: int = 0,
        data: Data | None = None,
        augment: Augment | None = None,
    ):
        if image_spec.native is not None:
            raise UserError("masks are learned on images of one size: take a tower without native sizes")
        super().__init__(sources, seed, data)
        self.image_spec = image_spec
        self.augment = augment or (data or Data()).augment
        self.tasks = [make_masks(source.task) for source in sources]
        self._sets: dict[tuple[int, tuple[str, ...]], LabelSet] = {}
        for source, task in enumerate(self.tasks):
            if task.wanted:
                self._check_names(source, task)

    def _check_names(self, source: int, task: Masks) -> None:
        """Look for the labels that a task names in a source's first samples, as many as it takes."""
        found: dict[str, None] = {}
        mistake: UserError | None = None
        for sample in self._first(source):
            found |= dict.fromkeys(sample.record.get("labels", ()))
            try:
                return task.check(found, self.names[source])
            except UserError as error:
                mistake = error  # perhaps a later sample has the label
        if mistake is not None and any(name.strip() for name in found):
            raise mistake

    def labels(self, source: int) -> tuple[str, ...]:
        """The label set of a source's first sample that has one; () where none of the first ones has."""
        for sample in self._first(source):
            if sample.record.get("labels"):
                with suppress(BadSample):
                    return self._labelled(source, sample).labels
        return ()

    def _first(self, source: int) -> Iterator[Sample]:
        """The first samples of a source, without those that are refused: training names them."""
        first, last = self.starts[source], self.starts[source + 1]
        for number in range(first, min(last, first + SAMPLES_LOOKED_AT)):
            try:
                yield self.raw(number)
            except BadSample:
                continue

    def training(
        self,
        number: int,
        epoch: int,
        position: int,
        account: Account,
        texts: Collection[int] | None = None,
        rows_apart: bool = False,
    ) -> list[MaskRow]:
        """The sample's one row; a refused sample gives none and an entry in the account.

        Args:
            texts: which of the sample's rows are wanted, by number; None is all.
            rows_apart: the account is told that they are apart.
        """
        name = self.source_of(number)
        counts = texts is None or not len(texts) or 0 in texts
        if not counts:
            return []
        try:
            row = self.row(number, epoch, position)
        except BadSample as error:
            account.refuse(self.key(number), error, name)
            return []
        account.use(False, name, row.learned, rows_apart)
        return [row]

    def measure(self, number: int, epoch: int, position: int) -> list[int]:
        """Every sample makes one row, as long as any other."""
        return [1]

    def row(self, number: int, epoch: int, position: int) -> MaskRow:
        """A sample's row of this epoch and position, the same for any number of ranks and workers.

        Raises:
            BadSample: image, mask or labels cannot be used.
        """
        sample, draws = self.raw(number), generator_of(self.seed, epoch, position, 2)
        source = self.locate(number)[0]
        found, codes_HW = self._codes(source, sample)
        cut, mask_HW, learned = self._cut(sample.images[0], codes_HW, found.kind, draws)
        pixels_HWC = decode_reduced(sample.images[0], cut.factor, self.max_pixels)
        picture_HWC = cut_pixels(pixels_HWC, cut, self.image_spec)
        if self.augment is not None and self.augment.jitter:
            jitter_colours(picture_HWC, cut, self.augment.jitter, draws)
        labels = found.labels
        if self.tasks[source].only_present:
            mask_HW, labels = _present(mask_HW, labels)
        return MaskRow(sample.key, picture_HWC.transpose(2, 0, 1), mask_HW, labels, learned)

    def _cut(
        self,
        image: bytes,
        codes_HW: np.ndarray,
        kind: type[np.signedinteger],
        draws: np.random.Generator,
    ) -> tuple[Cut, np.ndarray, int]:
        """A cut in which a pixel is labelled, its mask, and how many are."""
        for cut in self._cuts(image, codes_HW.shape, draws):
            mask_HW = cut_mask(codes_HW, cut, kind)
            learned = int(np.count_nonzero(mask_HW >= 0))
            if learned:
                return cut, mask_HW, learned
        raise BadSample("no labelled pixel of the mask is left at the size of training")

    def _cuts(self, image: bytes, image_size: tuple[int, ...], draws: np.random.Generator) -> Iterator[Cut]:
        """Crops to try, at last the whole image: where little is labelled, crops may miss it."""
        size = self.image_spec.size
        if self.augment is None:
            yield fitted(image_size, self.image_spec)
        else:
            fraction = reducible(image)
            for _ in range(DRAWS):
                yield draw_cut(image_size, size, self.augment, draws, fraction)
        yield squashed(image_size, size)

    def whole(self, number: int) -> WholeMask:
        """A sample at its full size, its mask in the numbers of its label set.

        Raises:
            BadSample: as `row`.
        """
        sample = self.raw(number)
        found, codes_HW = self._codes(self.locate(number)[0], sample)
        mask_HW = codes_HW.astype(found.kind) - found.kind(1)
        return WholeMask(sample.key, decode(sample.images[0], self.max_pixels), mask_HW, found.labels)

    def _codes(self, source: int, sample: Sample) -> tuple[LabelSet, np.ndarray]:
        """A sample's label set, and its checked mask in classes plus one (0 is ignored)."""
        if len(sample.images) != 1:
            raise BadSample("a mask needs exactly one image", f"the sample has {len(sample.images)}")
        if sample.mask is None:
            has = f", it has {len(sample.masks)} masks of objects" if sample.masks else ""
            raise BadSample("no semantic mask", f"KEY.mask.png is missing{has}")
        found, values_HW = self._labelled(source, sample), read_mask(sample.mask)
        codes_HW = found.codes(values_HW)
        if codes_HW is None or not codes_HW.any():
            check_values(values_HW, [name.strip() for name in sample.record["labels"]])  # says which value
            raise BadSample(
                "all pixels of the mask are ignored",
                "none of its labels is in the set that its source's task leaves",
            )
        return found, codes_HW

    def _labelled(self, source: int, sample: Sample) -> LabelSet:
        names = tuple(sample.record.get("labels", ()))
        if not names:
            raise BadSample("mask without labels", f"the record has {', '.join(sample.record)}")
        known = self._sets.get((source, names))
        if known is None:
            if len(self._sets) >= SETS_KEPT:
                self._sets.clear()
            known = self.tasks[source].label_set(names)
            check_names(known.labels)
            self._sets[source, names] = known
        return known


def _present(mask_HW: np.ndarray, labels: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Only the labels that occur, and the mask in their numbers."""
    counts = np.bincount(mask_HW.reshape(-1) + 1, minlength=len(labels) + 1)[1:]
    numbers = np.flatnonzero(counts)
    lookup_V = np.full(len(labels) + 1, -1, mask_HW.dtype)  # the last is found by -1
    lookup_V[numbers] = np.arange(len(numbers))
    return lookup_V[mask_HW], tuple(labels[number] for number in numbers.tolist())
