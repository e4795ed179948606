"""P-tuning: learned embeddings before every text, made by a small encoder so that they know of each other.

Liu et al. 2021, "GPT Understands, Too". Knows the encoder, in peft's two forms; where its vectors go is
prompt tuning's business.

    MLP     Linear(d, h) ReLU Linear(h, h) ReLU Linear(h, d) of n embeddings of d numbers
    LSTM    both ways, h numbers each, then Linear(2h, 2h) ReLU Linear(2h, d)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.prompt_tuning import SoftPrompt, Vectors, whole
from vlm_adapt.errors import UserError


class PromptEncoder(nn.Module):
    """n embeddings of d numbers through an MLP or an LSTM; names as in peft."""

    def __init__(
        self, tokens: int, width: int, hidden: int, kind: str, layers: int, dropout: float, device: Any
    ):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width, device=device)
        self.lstm_head: nn.Module | None = None
        if kind == "LSTM":
            self.lstm_head = nn.LSTM(
                width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True, device=device
            )
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, hidden, hidden, width]
        steps: list[nn.Module] = []
        for first, second in zip(sizes, sizes[1:], strict=False):
            steps += [nn.Linear(first, second, device=device), nn.ReLU()]
        self.mlp_head = nn.Sequential(*steps[:-1])

    def forward(self) -> Tensor:
        """vectors [n, d]."""
        places_1P = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)[None]
        vectors_1PD = self.embedding(places_1P)
        if self.lstm_head is not None:
            vectors_1PD = self.lstm_head(vectors_1PD)[0]
        return self.mlp_head(vectors_1PD)[0]


class PTuning(SoftPrompt):
    """n embeddings made by an encoder.

    Args:
        num_virtual_tokens: n.
        encoder_reparameterization_type: `MLP` or `LSTM`.
        encoder_hidden_size: h; by default d, the language's width.
        encoder_num_layers, encoder_dropout: of the LSTM.
    """

    name = "p_tuning"
    summary = "learned embeddings before every text, made by a small MLP or LSTM"
    paper = "Liu et al. 2021, arXiv 2103.10385"
    example = {"num_virtual_tokens": 4, "encoder_hidden_size": 8}

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        encoder_reparameterization_type: str = "MLP",
        encoder_hidden_size: int | None = None,
        encoder_num_layers: int = 2,
        encoder_dropout: float = 0.0,
    ):
        super().__init__(num_virtual_tokens)
        self.kind = encoder_reparameterization_type
        if self.kind not in ("MLP", "LSTM"):
            raise UserError(
                f"adapt: p_tuning's encoder_reparameterization_type is MLP or LSTM, not '{self.kind}'"
            )
        self.hidden = encoder_hidden_size
        if encoder_hidden_size is not None:
            whole(self.name, encoder_hidden_size=encoder_hidden_size)
        self.layers, self.dropout = whole(self.name, encoder_num_layers=encoder_num_layers), encoder_dropout
        if not isinstance(encoder_dropout, int | float) or not 0 <= encoder_dropout < 1:
            raise UserError(
                f"adapt: p_tuning's encoder_dropout is a share from 0 to 1, not {encoder_dropout!r}"
            )

    def build(self, device: torch.device | str) -> nn.Module:
        """The encoder and its embeddings."""
        hidden = self.hidden or self.width
        return PromptEncoder(
            self.virtual_tokens, self.width, hidden, self.kind, self.layers, self.dropout, device
        )

    def words(self) -> dict[str, Any]:
        """peft's P_TUNING; it reads the vectors, which need no encoder any more."""
        return {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": self.kind,
            "encoder_hidden_size": self.hidden or self.width,
            "encoder_num_layers": self.layers,
            "encoder_dropout": self.dropout,
        }


__all__ = ["PTuning", "PromptEncoder", "Vectors"]
