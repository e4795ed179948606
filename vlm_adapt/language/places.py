"""Places at the start of every text that learned vectors take: soft prompts, prefixes.

Knows which places of a batch are whose, and what a decoder that runs just now finds at them; knows nothing
about how the vectors are learned or where in a block they go.

    D texts, P places of a text, B rows, T positions, V numbers of a vector
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Prompt:
    """Vectors that take places of their own in every text.

    Attributes:
        tokens: places it takes (P).
        make: gives vectors_PV; it must call the module that holds them.
        embeds: whether the vectors stand for word embeddings (V is the width); else hooks on the blocks put
            them in the place of keys and values.
        active: whether it takes part; if not, texts have no places for it.
    """

    tokens: int
    make: Callable[[], Tensor]
    embeds: bool
    active: bool = True


@dataclass(frozen=True)
class Taken:
    """What one prompt puts where in the decoder that runs.

    Attributes:
        places_N: flat places in [B*T], text after text; none in a microbatch without texts.
        vectors_PV: what each text has there.
    """

    places_N: Tensor
    vectors_PV: Tensor

    def put(self, flat_NX: Tensor, columns: slice, at: Tensor | None = None) -> Tensor:
        """Overwrite rows of [B*T, X] by some columns of the vectors.

        Args:
            at: the columns of X that they take; None is all of them.

        Without a place for any they take part with weight zero, so that every rank runs the same modules.
        """
        vectors_PX = self.vectors_PV[:, columns].to(flat_NX.dtype)
        if not len(self.places_N):
            return flat_NX + vectors_PX.sum() * 0
        texts = len(self.places_N) // len(vectors_PX)
        new_NX = vectors_PX.expand(texts, -1, -1).flatten(0, 1)
        if at is not None:
            new_NX = flat_NX[self.places_N].index_copy(1, at.to(flat_NX.device), new_NX)
        return flat_NX.index_copy(0, self.places_N, new_NX)


class Prompts:
    """The prompts of a language, and the places of those that reach into its blocks while it runs.

    Attributes:
        every: prefixes first, since what they hold is seen from everywhere; else in the order attached.
        current: of the decoder that runs; None outside, and while answers go on token by token.
    """

    def __init__(self) -> None:
        self.every: list[Prompt] = []
        self.current: Mapping[Prompt, Taken] | None = None

    def add(self, tokens: int, make: Callable[[], Tensor], embeds: bool) -> Prompt:
        """A new prompt, behind the others of its kind."""
        prompt = Prompt(tokens, make, embeds)
        before = len(self.every) if embeds else sum(not other.embeds for other in self.every)
        self.every.insert(before, prompt)
        return prompt

    @property
    def tokens(self) -> int:
        """Places of all active prompts in a text."""
        return sum(prompt.tokens for prompt in self.every if prompt.active)

    def share(self, places_DP: Tensor) -> dict[Prompt, Tensor]:
        """Which of the places are whose: flat places [D * its tokens] of each active prompt.

        Raises:
            ValueError: the texts were encoded for other prompts.
        """
        if len(places_DP) and places_DP.shape[1] != self.tokens:
            raise ValueError(
                f"texts were encoded with {places_DP.shape[1]} places for learned vectors and the model "
                f"has {self.tokens}: encode them after the plan is applied (Assembled.adapt, set_active)"
            )
        shares, first = {}, 0
        for prompt in self.every:
            if prompt.active:
                shares[prompt] = places_DP[:, first : first + prompt.tokens].flatten()
                first += prompt.tokens
        return shares

    @contextmanager
    def during(self, places: Mapping[Prompt, Tensor] | None) -> Iterator[None]:
        """Let blocks that run within find the vectors at these places of their input.

        The vectors are made once, outside of blocks that are recomputed in the backward pass.
        """
        before = self.current
        self.current = {p: Taken(places_N, p.make()) for p, places_N in places.items()} if places else None
        try:
            yield
        finally:
            self.current = before

    def kept(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What activation checkpointing enters when it runs a block, and when it runs it again."""
        return nullcontext(), _Again(self, self.current)


class _Again(AbstractContextManager[None]):
    """The places as they were when a block ran first; may be entered more than once."""

    def __init__(self, prompts: Prompts, places: Mapping[Prompt, Taken] | None):
        self.prompts, self.places = prompts, places
        self.before: list[Mapping[Prompt, Taken] | None] = []

    def __enter__(self) -> None:
        self.before.append(self.prompts.current)
        self.prompts.current = self.places

    def __exit__(self, *error: object) -> None:
        self.prompts.current = self.before.pop()


def renumbered(places: Mapping[Prompt, Tensor], kept_N: Tensor, count: int) -> dict[Prompt, Tensor]:
    """The same places when of `count` flat ones only `kept_N` are left, in that order."""
    new = torch.zeros(count, dtype=torch.int64, device=kept_N.device)
    new[kept_N] = torch.arange(len(kept_N), device=kept_N.device)
    return {prompt: new[places_N] for prompt, places_N in places.items()}
