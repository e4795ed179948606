"""The seam between any text encoder and the rest of the house: texts to vectors of length 1.

Knows tokens, blocks and lengths; knows nothing about the library an encoder comes from, nor about labels,
images or training.

    N texts, T tokens, D width of the vectors
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.errors import UserError


class TextEncoder(nn.Module):
    """A text encoder. Subclasses say how texts become ids and ids become vectors.

    Attributes:
        name: as the configuration says it.
        model: the library's own model; names below it are those its users know.
        width: numbers of a vector (D).
        limit: the most tokens a text may have, special ones included; None for no limit.
        block_names: dotted names of the transformer blocks below this module, in order. `blocks` are these
            modules as they are now; `set_block` puts another in a block's place.
        tokenizer: the library's own.
        notes: what a user should know of how this encoder was made.
    """

    def __init__(self, model: nn.Module, width: int, block_names: Iterable[str], limit: int | None):
        super().__init__()
        self.model: Any = model
        self.name = ""
        self.width, self.limit = int(width), limit
        self.block_names = list(block_names)
        self.tokenizer: Any = None
        self.notes: list[str] = []

    # What there is -------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return [self.get_submodule(name) for name in self.block_names]

    def set_block(self, index: int, module: nn.Module) -> None:
        """Put `module` where block `index` is."""
        parent, _, leaf = self.block_names[index].rpartition(".")
        setattr(self.get_submodule(parent), leaf, module)

    def unused_modules(self) -> list[str]:
        """Dotted names of modules whose parameters get no gradient."""
        return []

    @property
    def trains(self) -> bool:
        """Whether anything in it is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def prompts(self) -> Any:
        """Places for learned vectors: there are none.

        Raises:
            UserError: always.
        """
        raise UserError(
            "adapt: a text encoder has no places for learned vectors in its texts: choose another method "
            "than prompt_tuning, p_tuning or prefix_tuning (lora, ia3, bitfit)"
        )

    @property
    def seq2seq(self) -> bool:
        """Which kind of writer it is: none.

        Raises:
            UserError: always; side_tuning asks.
        """
        raise UserError(
            "adapt: side_tuning stands beside language models that write and not beside a text encoder: "
            "choose another method (lora, houlsby)"
        )

    @property
    def config(self) -> Any:
        """The configuration of a transformers model.

        Raises:
            UserError: it is none; prefix_tuning asks.
        """
        raise UserError(
            "adapt: prefix_tuning knows the attention of transformers' language models and not of "
            f"'{self.name}': choose another method (lora, ia3, bitfit)"
        )

    def embed(self, ids_NT: Tensor) -> Tensor:
        """ids [N, T] -> embeddings [N, T, width of the first block]."""
        return self.model.get_input_embeddings()(ids_NT)

    # What it does --------------------------------------------------------------------------------

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, special ones included, uncut."""
        raise TypeError(f"{type(self).__name__} does not say how to count tokens")

    def _vectors(self, texts: list[str]) -> Tensor:
        """vectors_ND of texts that fit, not normalised."""
        raise TypeError(f"{type(self).__name__} does not say how to encode")

    def check(self, texts: Sequence[str]) -> None:
        """Whether every text can be read whole.

        Raises:
            UserError: one is empty, or longer than the encoder reads.
        """
        for text in texts:
            if not text.strip():
                raise UserError("a text to encode is empty: every label, synonym and sentence needs a word")
        if self.limit is None:
            return
        counts = self.token_counts(texts)
        texts = list(texts)
        long = [text for text, count in zip(texts, counts, strict=True) if count > self.limit]
        if long:
            shown = " ".join(long[0].split())
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            others = f", and so have {len(long) - 1} others" if len(long) > 1 else ""
            count = counts[texts.index(long[0])]
            raise UserError(
                f"'{shown}' has {count} tokens and the text encoder '{self.name}' reads "
                f"{self.limit} at most{others}: shorten what is too long"
            )

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Texts to vectors_ND, float32, each of length 1.

        Raises:
            UserError: no text, an empty one, or one that is too long: nothing is cut.
        """
        if isinstance(texts, str) or not texts:
            raise UserError("a text encoder needs a list of at least one text")
        self.check(texts)
        return functional.normalize(self._vectors(list(texts)).float(), dim=-1)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass (True) or keep its activations (False)."""
        raise TypeError(f"{type(self).__name__} does not say how to checkpoint activations")


def find_blocks(model: nn.Module, prefix: str = "model") -> list[str]:
    """Dotted names of a model's blocks: the members of its longest outermost list of modules.

    Raises:
        UserError: there is no such list.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists.append((name, module))
    if not lists:
        raise UserError(f"a {type(model).__name__} has no list of blocks: choose a transformer")
    name, found = max(lists, key=lambda pair: len(pair[1]))
    return [f"{prefix}.{name}.{number}" for number in range(len(found))]
