"""A warm start for a connector: image tokens are turned towards the words of the answer.

The mean of a row's image tokens should point where the row's learned words point in the language's own
embedding table. The language model itself does not run, so thousands of images pass in the time of a
few hundred steps, and training proper starts with image tokens that already mean something (measured:
docs/log.md, the quickstart's recipe).

    loss of a row = 1 - cos(mean of image tokens - m, weighted mean of word embeddings - m)

m is the table's mean. A word weighs log(1 + id) / log(V): byte-pair vocabularies are numbered in the
order of their merges, so a high id is a rare word, which says more than an "a" or a "yes".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlm_adapt.data.collate import Batch

SAMPLED_WORDS = 4096  # of the table, to find its mean


def embedding(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum over targets of their row's loss (float32 scalar), and each target's loss [N], detached.

    Rows without an image or without words have no loss.
    """
    rows, width = batch.ids_BT.shape
    per_row = width if batch.decoder_ids_BU is None else batch.decoder_ids_BU.shape[1]
    vocabulary = model.language.model.get_input_embeddings().num_embeddings
    stride = max(1, vocabulary // SAMPLED_WORDS)
    sample = torch.arange(0, vocabulary, stride, device=batch.ids_BT.device)
    center_D = model.language.embed(sample).float().mean(0)

    tokens_UD = model.image_tokens(batch.images).flatten(0, -2).float()
    unused = tokens_UD.sum() * 0
    # A text is its document's place in the batch: packed rows hold several.
    documents = int(batch.documents_BT.max()) if per_row == width else 1
    text_of_BT = (
        batch.documents_BT.clamp_min(1) - 1 + torch.arange(rows, device=center_D.device)[:, None] * documents
    )
    texts = rows * documents
    row_of_K = text_of_BT.flatten()[batch.image_positions_K]
    counts_B = torch.bincount(row_of_K, minlength=texts)
    pooled_BD = torch.zeros(texts, tokens_UD.shape[-1], device=tokens_UD.device)
    pooled_BD = pooled_BD.index_add(0, row_of_K, tokens_UD[: len(row_of_K)])
    pooled_BD = pooled_BD / counts_B.clamp_min(1)[:, None] - center_D

    row_of_N = batch.predict_from_N // per_row
    if per_row == width:
        row_of_N = text_of_BT.flatten()[batch.predict_from_N]
    weights_N = torch.log1p(batch.targets_N.float()) / torch.log(torch.tensor(float(vocabulary)))
    stops = torch.tensor(sorted(model.stop_ids), device=weights_N.device, dtype=batch.targets_N.dtype)
    weights_N = weights_N * ~torch.isin(batch.targets_N, stops)
    words_ND = functional.normalize(model.language.embed(batch.targets_N).float() - center_D, dim=-1)
    wanted_BD = torch.zeros_like(pooled_BD).index_add(0, row_of_N, words_ND * weights_N[:, None])

    usable_B = (counts_B > 0) & (wanted_BD.abs().sum(1) > 0)
    losses_B = (1 - functional.cosine_similarity(pooled_BD, wanted_BD, dim=-1)) * usable_B
    losses_N = losses_B[row_of_N]
    return losses_N.sum() + unused, losses_N.detach()
