"""One sample of the stream made ready: read, decoded, phrased and encoded, or refused with a reason.

Knows phrasing and encoding; samples by number are in samples.py. Knows nothing about ranks, batches or the
order of samples. Picklable, so that worker processes can carry it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_adapt.config.schema import Data, Source
from vlm_adapt.data.encode import Encoded, Encoder
from vlm_adapt.data.images import load_image
from vlm_adapt.data.mask_targets import labels_shown
from vlm_adapt.data.patches import image_tokens, load_images
from vlm_adapt.data.phrase import Asked, Images, Phrasing
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.sample import Sample
from vlm_adapt.data.samples import Samples, clear, generator_of
from vlm_adapt.data.sizes import seen_size
from vlm_adapt.data.tasks.task import make_task
from vlm_adapt.data.token_masks import MaskSpec, mask_of, target_of
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.sentence import Sentence
from vlm_adapt.template import Template


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt and what it is scored against."""

    row: Encoded
    asked: Asked
    key: str


class Reader(Samples):
    """Samples by number over all sources.

    Args:
        sources: the configuration's sources.
        encoder, template, system: how text becomes ids.
        image_spec: how images are resized.
        seed: of the draws among captions and questions.
        data: limits of images, and where remote shards are kept.
        masks: what the model wants of masks, if it has a token for them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        template: Template,
        system: str | None,
        image_spec: ImageSpec,
        seed: int = 0,
        data: Data | None = None,
        masks: MaskSpec | None = None,
    ):
        super().__init__(sources, seed, data)
        self.encoder, self.image_spec, self.masks = encoder, image_spec, masks
        branches = template.prompt_is_causal and not encoder.seq2seq
        self.phrasings = [
            Phrasing(
                template,
                system,
                source.prompt,
                source.questions_per_image,
                source.questions_per_kind,
                branches,
                make_task(source.task),
            )
            for source in sources
        ]

    def sample(self, number: int) -> tuple[Sample, Phrasing]:
        """The sample, with the images that its source's task shows, and its source's phrasing.

        Raises:
            BadSample: its bytes or record cannot be used.
        """
        sample, phrasing = self.raw(number), self.phrasings[self.locate(number)[0]]
        record = sample.record
        if phrasing.needs_masks and sample.mask is not None:
            record = record | {"shown": labels_shown(sample)}
        kept = phrasing.images(record, len(sample.images))
        return replace(sample, record=record, images=[sample.images[place] for place in kept]), phrasing

    def _images(self, sample: Sample, phrasing: Phrasing) -> Images:
        """What the phrasing wants to know of a sample's images: how many, or their sizes."""
        if not phrasing.needs_sizes:
            return len(sample.images)
        return [seen_size(data, self.max_pixels) for data in sample.images]

    def training(
        self,
        number: int,
        epoch: int,
        position: int,
        account: Account,
        texts: Collection[int] | None = None,
        rows_apart: bool = False,
    ) -> list[Encoded]:
        """Texts to learn from; a refused sample gives none and an entry in the account.

        Args:
            texts: which of the sample's texts are wanted, by number; None is all. The sample is entered
                in the account by whoever asks for the first one.
            rows_apart: its texts went to different rows, which the account is told.
        """
        name = self.source_of(number)
        counts = texts is None or not len(texts) or 0 in texts
        try:
            sample, sentences, draws = self._sentences(number, epoch, position)
            rows = self._encoded(sample, sentences, draws)
            wanted = [row for place, row in enumerate(rows) if texts is None or place in texts]
            pixels = self.pixels(sample, draws)
            self._mask(sample, wanted)
        except BadSample as error:
            if counts:
                account.refuse(self.key(number), error, name)
            return []
        for row in wanted:
            row.pixels = pixels
        if counts:
            account.use(any(row.cut for row in rows), name, sum(len(row.targets) for row in rows), rows_apart)
        return wanted

    def measure(self, number: int, epoch: int, position: int) -> list[int]:
        """How many tokens each text has that `training` will make of a sample; decodes no image.

        Raises:
            BadSample: `training` will refuse it for the same reason.
        """
        return [len(row) for row in self._encoded(*self._sentences(number, epoch, position))]

    def twin(self) -> Reader:
        """The same samples for another thread."""
        other = super().twin()
        other.encoder = self.encoder.twin()
        return other

    def _sentences(
        self, number: int, epoch: int, position: int
    ) -> tuple[Sample, list[Sentence], np.random.Generator]:
        """The sample, its sentences of this epoch, and the draws that its images may need."""
        sample, phrasing = self.sample(number)
        generator = generator_of(self.seed, epoch, position)
        sentences = clear(phrasing.training, sample.record, self._images(sample, phrasing), generator)
        return sample, sentences, generator_of(self.seed, epoch, position, 1)

    def _encoded(
        self, sample: Sample, sentences: Sequence[Sentence], draws: np.random.Generator | None = None
    ) -> list[Encoded]:
        lengths = self.image_tokens(sample, draws)
        return [clear(self.encoder.encode, sentence, lengths, sample.key) for sentence in sentences]

    def references(self, sample: Sample, phrasing: Phrasing) -> list[Encoded]:
        """Rows that hold every reference of a sample, for its held-out loss."""
        images = self._images(sample, phrasing)
        return self.rows(sample, clear(phrasing.references, sample.record, images))

    def prompts(
        self, sample: Sample, phrasing: Phrasing, images: Sequence[bytes] | None = None
    ) -> list[Prompt]:
        """Every question of a sample, encoded up to where its answer begins.

        Args:
            images: shown in place of the sample's own (for the blind score).
        """
        pixels = self.pixels(sample)
        if images is not None:
            pixels = self.pixels(replace(sample, images=list(images)), like=pixels)
        scenes = self._scenes(sample) if self.masks is not None and self.masks.own else []
        prompts = []
        for asked in clear(phrasing.evaluation, sample.record, self._images(sample, phrasing)):
            lengths = self.image_tokens(sample)
            row = clear(self.encoder.encode, asked.sentence, lengths, sample.key, learn=False)
            if row.cut:
                raise BadSample("the questions on one image are too long for max_length")
            row.pixels, row.masks.scenes = pixels, scenes
            prompts.append(Prompt(row, asked, sample.key))
        return prompts

    def rows(self, sample: Sample, sentences: Sequence[Sentence]) -> list[Encoded]:
        """Encode sentences of a sample and attach its pixels."""
        rows = self._encoded(sample, sentences)
        pixels = self.pixels(sample)
        for row in rows:
            row.pixels = pixels
        self._mask(sample, rows)
        return rows

    def _mask(self, sample: Sample, rows: Sequence[Encoded]) -> None:
        """Attach what the rows' mask tokens mean, and the images for the masks' own tower."""
        if self.masks is None or not any(row.masks.references for row in rows):
            return
        if len(sample.images) != 1:
            raise BadSample("masks are learned on samples with one image", f"it has {len(sample.images)}")
        scenes = self._scenes(sample) if self.masks.own else []
        for row in rows:
            row.masks.scenes = scenes
            row.masks.targets = [
                target_of(mask_of(sample, reference), self.masks) for reference in row.masks.references
            ]

    def _scenes(self, sample: Sample) -> list[np.ndarray]:
        """The sample's images as the masks' own tower wants them."""
        assert self.masks is not None
        return [load_image(image, self.masks.image_spec, self.max_pixels) for image in sample.images]

    def image_tokens(self, sample: Sample, draws: np.random.Generator | None = None) -> list[int]:
        """How many tokens each image of a sample takes.

        Args:
            draws: for what is drawn in training; None draws nothing.
        """
        most, spec = self.encoder.tokens_per_image, self.image_spec
        return image_tokens(sample.images, spec, most, self.max_pixels, draws)

    def pixels(
        self,
        sample: Sample,
        draws: np.random.Generator | None = None,
        like: Sequence[Any] | None = None,
    ) -> list[Any]:
        """The sample's images resized for the tower: uint8 [C, H, W], or patches of native images.

        Args:
            draws: as in `image_tokens`, which leaves them as they are.
            like: images of another sample that these take the place of, with as many tokens.
        """
        return load_images(sample.images, self.image_spec, self.max_pixels, draws, like)
