"""The seam of every language model: embed, blocks, loss on chosen positions, generation.

Knows embeddings, hidden states and the output head; knows nothing about images, files or training.

    B rows, T positions, U decoder positions, D width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm_adapt.language.layout import Layout
from vlm_adapt.language.loss import cross_entropy
from vlm_adapt.language.places import Prompt, Prompts
from vlm_adapt.language.token_row import TokenRow

LOGIT_ROWS_AT_ONCE = 4096  # rows of logits held at a time: at 150 k words, 2.4 GB in float32


@dataclass
class LanguageInput:
    """What a language reads.

    Attributes:
        embeds_BTD: text embeddings with image and state tokens already in their places.
        valid_BT: False at padding.
        allow_BTT: who sees whom, [b, query, key], where no layout says it; without either every row is
            plain causal text padded on the right, which backends handle without a mask.
        positions_BT: position of each token in its own sample; None counts from 0.
        decoder_ids_BU: what the decoder reads (encoder-decoder only).
        branches_BT, writers_BW: for generation: each token's branch, and the positions after which
            answers begin (-1 where a row has fewer).
        layout: where texts lie and who sees whom in them.
        places: flat places in [B*T] of the prompts that reach into the blocks.
    """

    embeds_BTD: Tensor
    valid_BT: Tensor
    allow_BTT: Tensor | None = None
    positions_BT: Tensor | None = None
    decoder_ids_BU: Tensor | None = None
    branches_BT: Tensor | None = None
    writers_BW: Tensor | None = None
    layout: Layout | None = None
    places: Mapping[Prompt, Tensor] | None = None

    @property
    def seen_BTT(self) -> Tensor | None:
        """Who sees whom, as a table; None for plain causal text padded on the right."""
        if self.layout is None:
            return self.allow_BTT
        return None if self.layout.plain else self.layout.allow_BTT


@dataclass
class Generation:
    """How to write: greedy at temperature 0, otherwise sampling from the nucleus `top_p`."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    on_token: Callable[[list[int | None]], None] | None = None
    synced: bool = False  # keep stepping until every rank has finished (ZeRO-3 gathers together)
    # Called with (ids_N, states_ND) of every step: the tokens just read, and the states that have read them.
    on_states: Callable[[Tensor, Tensor], None] | None = None


class Language(nn.Module):
    """A language model of transformers.

    Args:
        model: an `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`.
    Attributes:
        prompts: learned vectors with places of their own in every text.
        ladder: a side network that keeps activations in the model's stead; None for none.
        tokenizer: the run's; prompts that start from words ask it.
        rows: tokens beside the table, trained with another part and not among this one's modules.
    """

    seq2seq: bool
    model: Any  # transformers' classes share no useful type

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.ladder: nn.Module | None = None
        self.prompts = Prompts()
        self.tokenizer: Any = None
        self.rows: list[TokenRow] = []

    @property
    def config(self) -> Any:
        """The transformers configuration of the text model."""
        return self.model.config.get_text_config()

    @property
    def width(self) -> int:
        """Width of the embeddings (D)."""
        return self.model.get_input_embeddings().embedding_dim

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order; encoder blocks come before decoder blocks."""
        raise AttributeError("a kind of language defines its blocks")

    def embed(self, ids_BT: Tensor) -> Tensor:
        """ids [B, T] -> embeddings [B, T, D], scaled as the model scales its own (Gemma)."""
        table = self.model.get_input_embeddings()
        if not self.rows:
            return table(ids_BT)
        embeds_BTD = table(ids_BT.clamp_max(table.num_embeddings - 1))
        for row in self.rows:
            embeds_BTD = row.embed(ids_BT, embeds_BTD)
        return embeds_BTD

    @torch.no_grad()
    def embedding_rms(self) -> float:
        """Root mean square of the embeddings that the first block sees; a scale for image tokens."""
        words = torch.arange(0, self.model.get_input_embeddings().num_embeddings, 7)[:4096]
        device = self.model.get_input_embeddings().weight.device
        if device.type == "meta":
            return 1.0  # shapes alone are wanted
        return float(self.embed(words.to(device)).float().pow(2).mean().sqrt())

    def hidden(self, inputs: LanguageInput) -> Tensor:
        """Last hidden states, [B, T, D], or [B, U, D] of the decoder."""
        raise AttributeError("a kind of language defines its hidden states")

    def logits(self, hidden_D: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V], with the scale or soft cap that the model declares."""
        logits = self.model.get_output_embeddings()(hidden_D)
        for row in self.rows:
            logits = row.score(hidden_D, logits)
        config = self.config
        if getattr(config, "logits_scaling", None):
            divides = config.model_type.startswith("granite")  # HyperCLOVA X multiplies
            logits = logits / config.logits_scaling if divides else logits * config.logits_scaling
        if getattr(config, "logit_scale", None) and config.model_type.startswith("cohere"):
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        if cap:
            logits = torch.tanh(logits.float() / cap) * cap
        return logits

    def forward(
        self, inputs: LanguageInput, predict_from_N: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of token losses and each token's own loss.

        The head is applied to the positions that predict something learned and to no others: at a
        large vocabulary it is a third of a small model's work.

        Args:
            predict_from_N: flat index into [B*T] (or [B*U]) of the state that predicts each target.
            targets_N: the token ids to predict.

        Returns:
            (sum of cross-entropies in float32, losses_N detached)
        """
        losses_N = self.token_losses(self.hidden(inputs), predict_from_N, targets_N)
        return losses_N.sum(), losses_N.detach()[: len(targets_N)]

    def token_losses(self, hidden_BTD: Tensor, predict_from_N: Tensor, targets_N: Tensor) -> Tensor:
        """Each target's cross-entropy in float32, from the last hidden states; a zero for no targets."""
        picked_ND = hidden_BTD.flatten(0, 1)[predict_from_N]
        losses = []
        for start in range(0, max(1, len(targets_N)), LOGIT_ROWS_AT_ONCE):
            rows = slice(start, start + LOGIT_ROWS_AT_ONCE)
            pieces = (picked_ND[rows], targets_N[rows])
            if len(targets_N) > LOGIT_ROWS_AT_ONCE and torch.is_grad_enabled():
                losses.append(checkpoint(self._losses, *pieces, use_reentrant=False))
            else:
                losses.append(self._losses(*pieces))
        return torch.cat(losses)

    def _losses(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        if not len(targets_N):
            # A rank without targets still runs the head, and backward through every block: ZeRO waits.
            nothing_1D = hidden_ND.sum(0, keepdim=True)
            return self.logits(nothing_1D).float().sum()[None] * 0.0
        return cross_entropy(self.logits(hidden_ND), targets_N)

    def generate(self, inputs: LanguageInput, settings: Generation, stop_ids: set[int]) -> list[list[int]]:
        """Write an answer for every row (or every writer of a row); ids without the stop token."""
        raise AttributeError("a kind of language defines its generation")

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        if enabled:
            kept = {"use_reentrant": False, "context_fn": self.prompts.kept}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
        else:
            self.model.gradient_checkpointing_disable()
