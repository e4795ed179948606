"""An encoded row taken apart for a reader: pieces of text with ids, what is learned, where images sit.

Knows Encoded and a tokenizer; knows nothing about samples, files or terminals.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vlm_adapt.data.encode import Encoded


@dataclass(frozen=True)
class Piece:
    """A token, or an image's tokens, or places for learned vectors (`id` is None for both)."""

    text: str
    id: int | None
    learned: bool = False
    place: int = 0


@dataclass
class Part:
    """Neighbouring tokens of one branch that are read in one way.

    Attributes:
        branch: 0 is the prefix that all branches see, and everything where there are none.
        how: "causal", "both ways" (each sees all of them), or "decoder".
        first, last: positions of the first and the last token.
    """

    branch: int
    how: str
    first: int
    last: int = 0
    pieces: list[Piece] = field(default_factory=list)
    tokens: int = 0

    @property
    def learned(self) -> int:
        """How many of its tokens are learned."""
        return sum(piece.learned for piece in self.pieces)


def piece_text(tokenizer: Any, token: int) -> str:
    """What a token stands for, with spaces and line breaks made visible."""
    raw = tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token])
    if raw is None or "\ufffd" in text:  # a part of a letter: the tokenizer's own name for its bytes
        return str(raw)
    if isinstance(raw, str) and raw.startswith("\u2581") and not text.startswith(" "):
        text = f" {text}"  # sentencepiece drops the space that begins a word
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣") or str(raw)


def learned_places(row: Encoded) -> set[int]:
    """Places in the row (of an encoder-decoder: in the decoder) whose tokens are learned."""
    if row.decoder_ids is not None:
        return {int(place) + 1 for place in row.predict_from}
    wanted = Counter(zip(row.predict_from.tolist(), row.targets.tolist(), strict=True))
    places: set[int] = set()
    last_of: dict[int, int] = {}
    for place, (token, branch) in enumerate(zip(row.ids.tolist(), row.branches.tolist(), strict=True)):
        previous = last_of.get(branch, last_of.get(0, -1))  # as Encoder writes it
        if wanted[previous, token] > 0:
            wanted[previous, token] -= 1
            places.add(place)
        last_of[branch] = place
    return places


def parts(row: Encoded, tokenizer: Any, start: int = 0) -> list[Part]:
    """The row from token `start` on, cut where the branch or the way of reading changes."""
    sizes = Counter(row.blocks.tolist())
    learned = learned_places(row) if row.decoder_ids is None else set()
    images = {
        int(first): (index, length)
        for first, index, length in zip(row.image_starts, row.image_order, row.image_lengths, strict=True)
    }
    states = set(row.state_starts.tolist())
    found: list[Part] = []
    place = start
    while place < len(row):
        branch, block = int(row.branches[place]), int(row.blocks[place])
        two_ways = row.decoder_ids is not None or block == 0 or sizes[block] > 1  # an encoder reads all
        how = "both ways" if two_ways else "causal"
        if not found or (found[-1].branch, found[-1].how) != (branch, how):
            found.append(Part(branch, how, int(row.positions[place])))
        taken = 1
        if place < row.prompt_tokens:
            taken = row.prompt_tokens - place
            piece = Piece(f"<{taken} learned vectors>", None, place=place)
        elif place in images:
            index, taken = images[place]
            piece = Piece(f"<image {index}: {taken} tokens>", None, place=place)
        elif place in states:
            number = row.state_starts.tolist().index(place)
            values = ", ".join(f"{value:g}" for value in row.states[number])
            piece = Piece(f"<state: {values}>", None, place=place)
        else:
            token = int(row.ids[place])
            piece = Piece(piece_text(tokenizer, token), token, place in learned, place)
        found[-1].pieces.append(piece)
        found[-1].tokens += taken
        place += taken
        found[-1].last = int(row.positions[place - 1])
    return found + _decoder(row, tokenizer)


def _decoder(row: Encoded, tokenizer: Any) -> list[Part]:
    """What an encoder-decoder's decoder reads and learns; its last target is read by nobody."""
    if row.decoder_ids is None:
        return []
    learned = learned_places(row)
    ids = row.decoder_ids.tolist()
    if learned and max(learned) == len(ids):
        ids.append(int(row.targets[-1]))
    pieces = [
        Piece(piece_text(tokenizer, token), token, place in learned, place) for place, token in enumerate(ids)
    ]
    return [Part(0, "decoder", 0, len(ids) - 1, pieces, len(ids))]
