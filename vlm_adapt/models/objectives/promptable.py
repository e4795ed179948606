"""Masks for prompts (SAM: Kirillov et al. 2023, arXiv 2304.02643, appendix A).

A mask that is learned, of the M that the decoder gives for its prompt, has the loss

    min over M of (20 Focal + Dice)  +  mean over M of (predicted IoU - IoU)^2

    Focal = mean over known pixels of -a (1 - q)^2 log q
    Dice = 1 - (2 sum p t + 1) / (sum p + sum t + 1), over known pixels
    IoU = of the pixels with logits above 0; no gradient goes through it
    p = sigmoid(logits); q = p and a = .25 inside, q = 1 - p and a = .75 outside

M is 3 for one point, which may mean several things, and 1 for all other prompts. Focal: Lin et al. 2017,
arXiv 1708.02002; Dice: Milletari et al. 2016, arXiv 1606.04797. The IoU of all M is learned, as in SAM 2's
training (arXiv 2408.00714): which of the masks is shown is chosen by it.

Knows batches of prompts and a promptable model; knows nothing about where masks come from.

    N images, P prompts, M masks a prompt, h x w target size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlm_adapt.data.prompt_batch import PromptBatch, PromptGroup
from vlm_adapt.data.prompt_draws import IGNORED

FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
ALPHA = 0.25  # Focal's exponent is 2
SMOOTH = 1.0  # pixels in Dice: two empty masks agree
CERTAIN = 10.0  # logit of a mask prompt
SEVERAL = ("point",)  # kinds of prompts that may mean several things


def promptable(model: Any, batch: PromptBatch) -> tuple[Tensor, Tensor]:
    """Sum over learned masks of the loss above (float32 scalar), and each one's own [T], detached.

    Raises:
        UserError: words prompt a model without a text encoder.
    """
    found = predict(model, batch)
    total: Tensor | float = 0.0
    losses: list[Tensor] = []
    for kind, (logits_NPMhw, iou_NPM) in found.items():
        group = batch.groups[kind]
        losses_NP = prompt_losses(logits_NPMhw, iou_NPM, group.targets_NPhw)
        # What is not there weighs nothing and still has a way back through every part: ZeRO waits for it.
        total = total + (losses_NP * group.there_NP).sum()
        losses.append(losses_NP[group.there_NP])
    assert isinstance(total, Tensor)
    return total, torch.cat(losses).detach()


def predict(model: Any, batch: PromptBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """By kind of prompt: logits_NPMhw as they leave the decoder, and the predicted IoU_NPM; float32.

    Words are left out where the model has no text encoder, and only there: whether it has learned them yet
    may differ between ranks, and all run the same modules.

    Raises:
        UserError: the batch has words, and the model cannot be prompted by them.
    """
    features_NDhw = model.features(batch.pixels_NCHW, batch.frames)
    found = {}
    for kind, group in batch.groups.items():
        tokens_NPTD = None
        if group.words:
            tokens_NPTD = _tokens(model, group)
            if tokens_NPTD is None:
                continue
        logits_NPMhw, iou_NPM = model.connector.decoder(
            features_NDhw,
            group.points_NPK2,
            group.labels_NPK,
            group.boxes_NP4,
            _mask_prompts(group, model.connector.decoder.mask_size),
            tokens_NPTD,
            multimask=kind in SEVERAL,
        )
        found[kind] = logits_NPMhw.float(), iou_NPM.float()
    return found


def _tokens(model: Any, group: PromptGroup) -> Tensor | None:
    """Prompt tokens_NPTD of words; None where there are none and the model has no text encoder."""
    flat = [name for own in group.words for name in own]
    if group.there_NP.any():
        tokens_L1D = model.word_tokens(flat)
    elif model.connector.words is None:
        return None
    else:  # a stand-in
        tokens_L1D = model.connector.words(model.labels(flat).to(model.device), counts=False)
    return tokens_L1D.unflatten(0, group.there_NP.shape)


def _mask_prompts(group: PromptGroup, size: int) -> Tensor | None:
    """Mask prompts as logits of the decoder's size."""
    if group.coarse_NPhw is None:
        return None
    logits_NPhw = (group.coarse_NPhw.float() * 2 - 1) * CERTAIN
    if logits_NPhw.shape[-1] == size:
        return logits_NPhw
    return functional.interpolate(logits_NPhw, (size, size), mode="nearest")


def prompt_losses(logits_NPMhw: Tensor, iou_NPM: Tensor, targets_NPhw: Tensor) -> Tensor:
    """losses_NP as above; logits of another size than the targets' are brought to it, bilinear."""
    size = targets_NPhw.shape[-2:]
    logits_NPMhw, iou_NPM = logits_NPMhw.float(), iou_NPM.float()
    if logits_NPMhw.shape[-2:] != size:
        flat = functional.interpolate(logits_NPMhw.flatten(0, 1), size, mode="bilinear")
        logits_NPMhw = flat.unflatten(0, logits_NPMhw.shape[:2])
    logits_NPMX, targets_NP1X = logits_NPMhw.flatten(3), targets_NPhw.flatten(2).unsqueeze(2)
    known_NP1X, inside_NP1X = targets_NP1X != IGNORED, targets_NP1X == 1
    of_masks_NPM = FOCAL_WEIGHT * focal(logits_NPMX, inside_NP1X, known_NP1X)
    of_masks_NPM = of_masks_NPM + DICE_WEIGHT * dice(logits_NPMX, inside_NP1X, known_NP1X)
    best_NP = of_masks_NPM.min(2).values
    true_NPM = intersection_over_union(logits_NPMX.detach() > 0, inside_NP1X, known_NP1X)
    return best_NP + IOU_WEIGHT * (iou_NPM - true_NPM).square().mean(2)


def focal(logits_X: Tensor, inside_X: Tensor, known_X: Tensor) -> Tensor:
    """Mean over the last dimension's known pixels of the focal loss."""
    inside_X = inside_X.to(logits_X.dtype).expand_as(logits_X)
    cross_entropy_X = functional.binary_cross_entropy_with_logits(logits_X, inside_X, reduction="none")
    chance_X = logits_X.sigmoid()
    wrong_X = chance_X + inside_X - 2 * chance_X * inside_X  # 1 - q
    weight_X = (1 - ALPHA) + (2 * ALPHA - 1) * inside_X
    losses_X = weight_X * wrong_X.square() * cross_entropy_X * known_X
    return losses_X.sum(-1) / known_X.sum(-1).clamp_min(1)


def dice(logits_X: Tensor, inside_X: Tensor, known_X: Tensor) -> Tensor:
    """The dice loss over the last dimension's known pixels."""
    chance_X = logits_X.sigmoid() * known_X
    both = (chance_X * inside_X).sum(-1)
    return 1 - (2 * both + SMOOTH) / (chance_X.sum(-1) + inside_X.sum(-1) + SMOOTH)


def intersection_over_union(predicted_X: Tensor, inside_X: Tensor, known_X: Tensor) -> Tensor:
    """IoU over the last dimension's known pixels; 0 where neither is there."""
    both = (predicted_X & inside_X).sum(-1)
    either = ((predicted_X | inside_X) & known_X).sum(-1)
    return both / either.clamp_min(1)
