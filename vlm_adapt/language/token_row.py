"""One more token for a frozen language: a row beside its table of embeddings, and one beside its head.

Knows ids, embeddings and logits; knows nothing about what the token is for. The table itself is never
trained nor made longer, so that frozen weights stay bit for bit what they were, tied embeddings stay tied,
and what is saved is two rows. A row of the table that has this number already (tables are often longer than
their tokenizer) is not looked at.

    D width, V words
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenRow(nn.Module):
    """The embedding of a token, and the vector by which the head scores it.

    Args:
        token: its number.
        width: of the language's embeddings.
    """

    def __init__(self, token: int, width: int):
        super().__init__()
        self.token = token
        # Modules that are called, so that ZeRO-3 gathers them.
        self.embedding = nn.Embedding(1, width)
        self.head = nn.Linear(width, 1, bias=False)

    @torch.no_grad()
    def begin(self, embedding_D: Tensor, head_D: Tensor) -> None:
        """Start from these vectors."""
        self.embedding.weight.copy_(embedding_D[None])
        self.head.weight.copy_(head_D[None])

    def embed(self, ids_T: Tensor, embeds_TD: Tensor) -> Tensor:
        """The embeddings with this token's own where it stands; it takes part where it stands nowhere."""
        row_D = self.embedding(torch.zeros(1, dtype=torch.int64, device=ids_T.device))[0]
        return torch.where((ids_T == self.token)[..., None], row_D.to(embeds_TD.dtype), embeds_TD)

    def score(self, hidden_D: Tensor, logits_V: Tensor) -> Tensor:
        """The head's logits `[..., V]` with this token's own in its place, behind the others if need be."""
        own_1 = self.head(hidden_D.to(self.head.weight.dtype)).to(logits_V.dtype)
        words = logits_V.shape[-1]
        pieces = [logits_V[..., : self.token], own_1, logits_V[..., self.token + 1 :]]
        if self.token > words:  # words that the tokenizer has and the table lacks are never written
            never = torch.finfo(logits_V.dtype).min
            gap = logits_V.new_full((*logits_V.shape[:-1], self.token - words), never)
            pieces.insert(1, gap)
        return torch.cat(pieces, -1)
