"""Words and the masks that they ask for (LISA: Lai et al. 2023, arXiv 2308.00692, eq. 3 to 5).

A learned token of an answer has the loss

    CE(z, target) + mean over the masks of its text of (cross_entropy_weight BCE + dice_weight Dice)

    BCE = mean over known pixels of the binary cross-entropy
    Dice = 1 - (2 sum p t + 1) / (sum p + sum t + 1)        p = sigmoid(logits), over known pixels

so that a step's loss is the mean of its words' losses plus the mean of its texts' mask losses, each text
weighted by its learned tokens, however texts are spread over batches and ranks. A text is a branch of a row,
or the row's part that has no branches; one without masks has no second term. LISA weighs 2.0 and 0.5.

Knows batches and the model's mask token; knows nothing about where masks come from.

    N learned tokens, M masks, X texts
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlm_adapt.data.collate import Batch
from vlm_adapt.data.token_masks import IGNORED
from vlm_adapt.errors import UserError
from vlm_adapt.models.objectives.promptable import dice


def masks(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum over targets of the loss above (float32 scalar), and each target's own [N], detached.

    Raises:
        UserError: the model has no token for masks.
    """
    if model.masks is None or batch.masks is None:
        raise UserError("train.objective 'masks' needs a model that draws them: give model.masks")
    features = model.seen(batch.images)
    hidden_BTD = model.language.hidden(model.inputs(batch, model.connector(features)))
    words_N = model.language.token_losses(hidden_BTD, batch.predict_from_N, batch.targets_N)
    count = len(batch.targets_N)
    states_MD = hidden_BTD.flatten(0, 1)[batch.masks.positions_M]
    features_JPE = model.mask_features(batch, features)
    if not len(states_MD):
        unused = model.masks.nothing(features_JPE, hidden_BTD[0, 0])
        return words_N.sum() + unused, words_N.detach()[:count]
    logits_Mhw = model.masks(features_JPE, states_MD, batch.masks.images_M)
    cross_entropy, dice = model.mask_weights
    bce_M, dice_M = mask_losses(logits_Mhw, batch.masks.targets_Mhw)
    texts_N, texts_M = texts_of(batch)
    of_token_N = mean_of_texts(cross_entropy * bce_M + dice * dice_M, texts_M, texts_N)
    return words_N.sum() + of_token_N.sum(), words_N.detach()[:count] + of_token_N.detach()


def mask_losses(logits_Mhw: Tensor, targets_Mhw: Tensor) -> tuple[Tensor, Tensor]:
    """BCE_M and Dice_M of masks, float32.

    Args:
        targets_Mhw: 1 inside, 0 outside, IGNORED; a mask of which nothing is known has losses 0.
    """
    logits_MP, targets_MP = logits_Mhw.flatten(1).float(), targets_Mhw.flatten(1)
    known_MP = (targets_MP != IGNORED).float()
    inside_MP = (targets_MP == 1).float()
    each_MP = functional.binary_cross_entropy_with_logits(logits_MP, inside_MP, reduction="none")
    bce_M = (each_MP * known_MP).sum(1) / known_MP.sum(1).clamp_min(1)
    return bce_M, dice(logits_MP, inside_MP, known_MP)


def texts_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """The text of each target and of each mask, as numbers from 0: row, document and branch in one."""
    assert batch.masks is not None
    documents, branches = batch.documents_BT.max() + 1, batch.branches_BT.max() + 1
    rows_B1 = torch.arange(len(batch.ids_BT), device=batch.ids_BT.device)[:, None]
    key_BT = (rows_B1 * documents + batch.documents_BT) * branches + batch.branches_BT
    keys = torch.cat([key_BT.flatten()[batch.predict_from_N], key_BT.flatten()[batch.masks.positions_M]])
    numbers = keys.unique(return_inverse=True)[1]
    return numbers[: len(batch.predict_from_N)], numbers[len(batch.predict_from_N) :]


def mean_of_texts(losses_M: Tensor, texts_M: Tensor, texts_N: Tensor) -> Tensor:
    """For each learned token the mean loss of its text's masks, 0 where it has none."""
    texts = int(torch.cat([texts_M, texts_N]).max()) + 1
    sums_X = losses_M.new_zeros(texts).index_add(0, texts_M, losses_M)
    counts_X = torch.bincount(texts_M, minlength=texts).clamp_min(1)
    return (sums_X / counts_X)[texts_N]
