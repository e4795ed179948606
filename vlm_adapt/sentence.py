"""The multimodal sentence: text, images and state vectors in the order in which a model reads them.

Knows what each segment is, whether it is learned and whether it is read causally; knows nothing
about tokens, pixels or models. Captions, questions, chat turns, several images, prefix-LM masks and
encoder-decoder splits all follow from it (PaLM-E's multimodal sentences, PaliGemma's segments).

    prefix (branch 0)                               branch 1                 branch 2
    [Text system][Image 0][Text "\\n"]  ->  [Text question][Text answer*]   [Text question][Text answer*]
                                                          * learned

Branches share the prefix and see only the prefix and themselves, with positions that start again
after the prefix: each branch reads exactly as if it stood alone, and the image is paid for once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm_adapt.errors import UserError

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Text:
    """A run of text. Learned text is in the loss; text that is not causal is seen both ways.

    `masks` say what the mask tokens in it mean, in their order (see data/token_masks.py).
    """

    text: str
    learned: bool = False
    causal: bool = True
    turn: int = 0
    branch: int = 0
    masks: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Image:
    """The sample's image number `index`, standing here as the connector's tokens."""

    index: int
    causal: bool = True
    turn: int = 0
    branch: int = 0


@dataclass(frozen=True)
class State:
    """A vector of numbers (a robot's state, say), standing here as one token (PaLM-E, section 3)."""

    values: tuple[float, ...]
    causal: bool = True
    turn: int = 0
    branch: int = 0


Segment = Text | Image | State


@dataclass(frozen=True)
class Sentence:
    """An ordered list of segments; iterable."""

    segments: tuple[Segment, ...]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    @property
    def image_count(self) -> int:
        """How many images the sentence shows (an image shown twice counts twice)."""
        return sum(isinstance(segment, Image) for segment in self.segments)

    @property
    def turns(self) -> int:
        """How many turns there are."""
        return 1 + max((segment.turn for segment in self.segments), default=-1)

    def first_turns(self, count: int) -> Sentence:
        """The sentence cut after its first `count` turns."""
        return Sentence(tuple(s for s in self.segments if s.turn < count))

    def with_masks(self, answers: Iterator[Sequence[Mapping[str, Any]]]) -> Sentence:
        """The sentence with what each answer's mask tokens mean; takes one entry for each learned text."""
        return Sentence(
            tuple(
                replace(s, masks=tuple(next(answers))) if isinstance(s, Text) and s.learned else s
                for s in self.segments
            )
        )

    def prompt(self) -> Sentence:
        """Everything before the first learned segment: what a model is shown when it is asked."""
        for position, segment in enumerate(self.segments):
            if isinstance(segment, Text) and segment.learned:
                return Sentence(self.segments[:position])
        return self


def check_images(sentence: Sentence, available: int, where: str) -> None:
    """Raise UserError unless the sentence shows every image of the sample, and no other.

    Args:
        available: the number of images that the sample carries.
        where: the sample's key, for the message.
    """
    used = {s.index for s in sentence if isinstance(s, Image)}
    if used != set(range(available)):
        raise UserError(
            f"sample '{where}' has {sentence.image_count} image placeholder(s) and {available} image(s): "
            f"give it as many {IMAGE_PLACEHOLDER} as images"
        )
