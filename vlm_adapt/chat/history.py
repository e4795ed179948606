"""What of a conversation a model is shown next, by the same template and encoder as training.

Knows turns, images and lengths; knows nothing about generation or terminals. The prompt of a turn is,
token for token, a prefix of what training makes of the same messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_adapt.data.encode import Encoded, Encoder
from vlm_adapt.data.patches import tokens_of
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.sentence import IMAGE_PLACEHOLDER
from vlm_adapt.template import Message, Template


@dataclass(eq=False)
class Turn:
    """A question and its answer.

    Attributes:
        content: the user's text, `<image>` where its images stand.
        pixels: [C, H, W] uint8 each, of the tower's size, or patches; `names` where they came from.
        scenes: the same images for a model's mask tower, where it has one of its own.
        answer: None until there is one.
    """

    content: str
    pixels: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    answer: str | None = None
    scenes: list[Any] = field(default_factory=list)


def place_images(text: str, images: int) -> str:
    """The content of a turn: placeholders that the text has stay, else all images come before it.

    Raises:
        UserError: the text has placeholders, and not as many as there are images.
    """
    placeholders = text.count(IMAGE_PLACEHOLDER)
    if placeholders and placeholders != images:
        raise UserError(
            f"the text has {placeholders} {IMAGE_PLACEHOLDER} and comes with {images} image(s): write as "
            "many as there are images, or none to have them placed before the text"
        )
    if placeholders or not images:
        return text
    return IMAGE_PLACEHOLDER * images + "\n" + text


class History:
    """The turns so far and the window of them that fits.

    Args:
        template, encoder: those of training.
        system: the system message; None is the template's own default.
    """

    def __init__(self, template: Template, encoder: Encoder, system: str | None = None):
        self.template, self.encoder, self.system = template, encoder, system
        self.turns: list[Turn] = []
        self.first = 0  # the oldest turn still shown

    @property
    def limit(self) -> int:
        """Tokens that a conversation may have, images and reply included."""
        return self.encoder.max_length

    def messages(self, first: int = 0) -> list[Message]:
        """The conversation from turn `first` on, in training's form."""
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns[first:]:
            messages.append({"role": "user", "content": turn.content})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def images(self) -> list[str]:
        """Names of all images in reading order."""
        return [name for turn in self.turns for name in turn.names]

    def ask(self, text: str, pixels: Sequence[Any], names: Sequence[str], scenes: Sequence[Any] = ()) -> Turn:
        """Add a question. An encoder-decoder is shown this turn alone, with the last images if it has none.

        Raises:
            UserError: placeholders and images differ in number.
        """
        turn = Turn(place_images(text, len(pixels)), list(pixels), list(names), scenes=list(scenes))
        if self.turns and self.turns[-1].answer is None:
            self.turns.pop()  # its reply was never read
        if self.encoder.seq2seq and self.turns:
            last = self.turns[-1]
            if not pixels and last.pixels:
                turn = Turn(place_images(text, len(last.pixels)), list(last.pixels), list(last.names))
            self.first = len(self.turns)
        self.turns.append(turn)
        return turn

    def prompt(self, new_tokens: int) -> tuple[Encoded, int]:
        """The prompt of the last turn, with pixels; oldest turns leave until the reply has room.

        Args:
            new_tokens: room wanted for the reply. At most half of the limit is kept free of old turns,
                so that a generous wish does not empty a short memory.

        Returns:
            (the row, how many turns left)

        Raises:
            UserError: the last turn alone is too long; the window stays as it was.
        """
        room = self.limit if self.encoder.seq2seq else self.limit - min(new_tokens, self.limit // 2)
        for first in range(self.first, len(self.turns)):
            row = self._encode(first)
            alone = first == len(self.turns) - 1
            if row is not None and not row.cut and (len(row) <= room or alone and len(row) < self.limit):
                dropped, self.first = first - self.first, first
                return row, dropped
        taken = tokens_of(self.turns[-1].pixels, self.encoder.tokens_per_image)
        raise UserError(
            f"this question with its {len(taken)} image(s) is too long: a conversation has "
            f"room for {self.limit} tokens, of which an image takes {max(taken, default=0)} "
            "(model.language.max_length of the run)"
        )

    def _encode(self, first: int) -> Encoded | None:
        """The row from a turn on; None when even one turn of it is too long."""
        pixels = [image for turn in self.turns[first:] for image in turn.pixels]
        sentence = self.template.conversation(self.messages(first))
        try:
            lengths = tokens_of(pixels, self.encoder.tokens_per_image)
            row = self.encoder.encode(sentence, lengths, "chat", learn=False)
        except BadSample:
            return None
        row.pixels = pixels
        row.masks.scenes = [scene for turn in self.turns[first:] for scene in turn.scenes]
        return row

    def last_image(self) -> str | None:
        """The name of the last image that the model still sees."""
        names = [name for turn in self.turns[self.first :] for name in turn.names]
        return names[-1] if names else None
