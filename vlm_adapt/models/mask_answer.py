"""Answers with their masks: what was written, and what each mask token in it draws.

Knows generation, the mask token and how an image lay before its tower; knows nothing about files or
terminals. A mask is drawn from the very state that read its token while the answer was written.

    N answers of a batch, D width, h x w size of the decoder's masks, H x W an image's own size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlm_adapt.data.collate import Batch
from vlm_adapt.data.token_masks import frame
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.language.language import Generation

PIXELS_AT_ONCE = 2**22  # of an image whose mask is brought to its size: 50 MB


class Watch:
    """Keeps the states that have read mask tokens; `Generation.on_states` of one batch.

    Args:
        model: with `masks`.
        batch: of prompts, with their images.
    """

    def __init__(self, model: Any, batch: Batch):
        self.model, self.batch = model, batch
        self.token = model.masks.row.token
        self.steps = 0
        self.states: dict[tuple[int, int], Tensor] = {}  # (answer, place in it) to state_D

    def __call__(self, ids_N: Tensor, states_ND: Tensor) -> None:
        for answer in (ids_N == self.token).nonzero()[:, 0].tolist():
            self.states[answer, self.steps] = states_ND[answer]
        self.steps += 1

    @torch.no_grad()
    def masks(self, written: Sequence[Sequence[int]], synced: bool = False) -> list[list[Tensor | None]]:
        """For every answer its masks in the order of their tokens.

        Args:
            written: the answers' tokens.
            synced: run the decoder also when there is nothing to draw, since other ranks may have.

        Returns:
            logits_hw; None where there is nothing to draw on (no image), or the token was never read.
        """
        found: list[list[Tensor | None]] = [[] for _ in written]
        assert self.batch.masks is not None
        images = [*self.batch.masks.writers_W.tolist(), -1]  # the row of padding of a rank without a share
        todo: list[tuple[int, int, Tensor, int]] = []
        for answer, tokens in enumerate(written):
            for place in (place for place, token in enumerate(tokens) if token == self.token):
                state_D = self.states.get((answer, place))
                if state_D is not None and images[answer] >= 0:
                    todo.append((answer, len(found[answer]), state_D, images[answer]))
                found[answer].append(None)
        if not todo and not synced:
            return found
        model = self.model
        features = model.seen(self.batch.images) if model.mask_vision is None else []
        features_JPE = model.mask_features(self.batch, features)
        if not todo:
            model.masks.nothing(features_JPE, features_JPE.new_zeros(model.language.width))
            return found
        states_MD = torch.stack([state_D for _, _, state_D, _ in todo])
        images_M = torch.tensor([image for _, _, _, image in todo], device=states_MD.device)
        logits_Mhw = model.masks(features_JPE, states_MD, images_M)
        for (answer, number, _, _), logits_hw in zip(todo, logits_Mhw, strict=True):
            found[answer][number] = logits_hw
        return found


def answer(
    model: Any, batch: Batch, settings: Generation, stop_ids: set[int]
) -> tuple[list[list[int]], list[list[Tensor | None]]]:
    """Write an answer for every writer, and draw its masks; a model without masks draws none."""
    if model.masks is None:
        written = model.generate(batch, settings, stop_ids)
        return written, [[] for _ in written]
    watch = Watch(model, batch)
    written = model.generate(batch, replace(settings, on_states=watch), stop_ids)
    return written, watch.masks(written, settings.synced)


def at_size(logits_hw: Tensor, spec: ImageSpec, height: int, width: int) -> np.ndarray:
    """A mask at its image's own size: bool [H, W]; nothing where the tower did not see the image.

    Args:
        spec: of the tower on whose features it was drawn.
    """
    tall, wide, top, left = frame(height, width, spec)
    axes = []
    for length, inner, first, whole in ((height, tall, top, spec.size[0]), (width, wide, left, spec.size[1])):
        places = (torch.arange(length, dtype=torch.float32) + 0.5) / length * inner + first
        axes.append(places / whole * 2 - 1)
    y_H, x_W = axes
    low_11hw = logits_hw.detach().float().cpu()[None, None]
    inside_HW = np.empty((height, width), bool)
    rows = max(1, PIXELS_AT_ONCE // width)
    for start in range(0, height, rows):
        y_R = y_H[start : start + rows]
        grid_RW2 = torch.stack([x_W.expand(len(y_R), width), y_R[:, None].expand(len(y_R), width)], -1)
        drawn_RW = functional.grid_sample(
            low_11hw, grid_RW2[None], mode="bilinear", padding_mode="border", align_corners=False
        )[0, 0]
        seen_RW = (y_R.abs() <= 1)[:, None] & (x_W.abs() <= 1)[None]
        inside_HW[start : start + rows] = ((drawn_RW > 0) & seen_RW).numpy()
    return inside_HW
