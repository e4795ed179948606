"""Rows put together into a Batch of tensors, and a Batch moved to its device.

Knows padding, documents of a row and flat positions; knows nothing about models. Pixels stay uint8
until they are on the device.

    B rows, T positions, N targets, I images, K tokens of all images, S states, U decoder positions,
    D documents of all rows, P places of each for learned vectors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_adapt.data.encode import FILLER_ID, Encoded
from vlm_adapt.data.patches import Patches, stand_in, together
from vlm_adapt.data.token_masks import MaskSpec, TokenMasks
from vlm_adapt.data.token_masks import together as masks_together
from vlm_adapt.image_spec import Native


@dataclass
class Batch:
    """What the model reads in one microbatch.

    Attributes:
        ids_BT: token ids; FILLER_ID under images, states and padding.
        documents_BT: 0 at padding, else the number (from 1) of the document within the row.
        blocks_BT: a token sees the blocks that are not above its own (see Encoded).
        branches_BT: 0 for the prefix; a branch sees the prefix and itself.
        positions_BT: from 0 in each document.
        plain: every row is one causal text padded on the right: no mask is needed.
        predict_from_N, targets_N: flat positions of predicting states, and the ids they predict.
        pixels_ICHW: uint8; ONE zero image when there is none, so that every rank runs its tower.
        patches: images of native sizes, which are then not in pixels_ICHW; as above when there is none.
        image_positions_K: flat positions in [B*T] of the images' tokens; empty when there is none.
        image_lengths_I: how many tokens each image takes; empty when there is none.
        states_SF, state_positions_S: state vectors and their flat positions.
        prompt_positions_DP: flat positions of each document's places for learned vectors.
        decoder_ids_BU: for encoder-decoders.
        writers_BW: where answers begin after prompts: each branch's last token; -1 where a row has fewer.
        keys: the samples' keys, document after document.
        samples: how many samples of the stream went in (a sample may make several rows).
        masks: what the texts' mask tokens mean, where the model has such a token.
    """

    ids_BT: Tensor
    documents_BT: Tensor
    blocks_BT: Tensor
    branches_BT: Tensor
    positions_BT: Tensor
    plain: bool
    predict_from_N: Tensor
    targets_N: Tensor
    pixels_ICHW: Tensor
    image_positions_K: Tensor
    image_lengths_I: Tensor
    states_SF: Tensor
    state_positions_S: Tensor
    decoder_ids_BU: Tensor | None = None
    writers_BW: Tensor | None = None
    keys: tuple[str, ...] = ()
    samples: int = 0
    patches: Patches | None = None
    masks: TokenMasks | None = None
    prompt_positions_DP: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))

    @property
    def images(self) -> Tensor | Patches:
        """What the tower reads."""
        return self.pixels_ICHW if self.patches is None else self.patches

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                changed[one.name] = change(value)
            elif isinstance(value, Patches | TokenMasks):
                changed[one.name] = value.each(change)
        return replace(self, **changed)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from where a GPU takes it without waiting."""
        return self._each(lambda tensor: tensor.pin_memory())

    @property
    def learned(self) -> int:
        """How many targets there are: what the loss is divided by, over all ranks."""
        return len(self.targets_N)

    @property
    def places(self) -> int:
        """Positions, padding included."""
        return self.ids_BT.numel()

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.documents_BT > 0).sum())


def collate(
    rows: Sequence[Encoded | Sequence[Encoded]],
    image_size: tuple[int, int],
    tokens_per_image: int,
    state_size: int = 0,
    multiple: int = 1,
    samples: int | None = None,
    seq2seq: bool = False,
    length: int = 0,
    native: Native | None = None,
    masks: MaskSpec | None = None,
) -> Batch:
    """Put rows together; no rows at all give one row of padding that a rank can still run.

    Args:
        rows: each one text, or several that share the row without seeing each other.
        image_size: (height, width), for the stand-in when no row has an image.
        tokens_per_image: of that stand-in.
        multiple: T is rounded up to this.
        samples: what `Batch.samples` says; by default the number of rows.
        native: how images of native sizes are cut, for the stand-in.
        length: the least T (packed rows keep one shape, which compilers and GPUs like).
        masks: what the model wants of masks, if it has a token for them.

    Raises:
        ValueError: texts of an encoder-decoder cannot share a row, or texts were encoded for different
            prompts.
    """
    texts = [[row] if isinstance(row, Encoded) else list(row) for row in rows]
    if seq2seq and any(len(row) > 1 for row in texts):
        raise ValueError("rows of an encoder-decoder hold one text each")
    count = max(1, len(texts))
    longest = max((sum(map(len, row)) for row in texts), default=1)
    length = -(-max(1, longest, length) // multiple) * multiple
    grids = {name: np.zeros((count, length), np.int64) for name in ("ids", "blocks", "branches", "positions")}
    grids["ids"][:] = FILLER_ID
    documents = np.zeros((count, length), np.int64)
    predict_from, targets, positions = [], [], []
    images: list[Any] = []
    states, state_positions, lengths, prompts = [], [], [], []
    placed = []
    decoder_length = max(
        (len(t.decoder_ids) for row in texts for t in row if t.decoder_ids is not None), default=1
    )
    decoder = np.zeros((count, decoder_length), np.int64) if seq2seq else None
    for number, row in enumerate(texts):
        start = 0
        for document, text in enumerate(row, 1):
            place = slice(start, start + len(text))
            documents[number, place] = document
            for name, grid in grids.items():
                grid[number, place] = getattr(text, name)
            offset = number * length + start
            if decoder is not None and text.decoder_ids is not None:
                decoder[number, : len(text.decoder_ids)] = text.decoder_ids
                predict_from.append(text.predict_from + number * decoder_length)
            else:
                predict_from.append(text.predict_from + offset)
            targets.append(text.targets)
            placed.append((text, offset, len(images)))
            for image_start, index, taken in zip(
                text.image_starts, text.image_order, text.image_lengths, strict=True
            ):
                images.append(text.pixels[index])
                positions.append(np.arange(taken) + image_start + offset)
                lengths.append(taken)
            states.append(text.states)
            state_positions.append(text.state_starts + offset)
            prompts.append(np.arange(text.prompt_tokens) + offset)
            start = place.stop
    if not images:
        images.append(np.zeros((3, *image_size), np.uint8) if native is None else stand_in(native))
    shown = together(images)
    patches = shown if isinstance(shown, Patches) else None
    return Batch(
        ids_BT=torch.from_numpy(grids["ids"]),
        documents_BT=torch.from_numpy(documents),
        blocks_BT=torch.from_numpy(grids["blocks"]),
        branches_BT=torch.from_numpy(grids["branches"]),
        positions_BT=torch.from_numpy(grids["positions"]),
        plain=all(len(row) <= 1 and all(text.plain for text in row) for row in texts),
        predict_from_N=torch.from_numpy(_joined(predict_from)),
        targets_N=torch.from_numpy(_joined(targets)),
        pixels_ICHW=torch.zeros(0, 3, *image_size, dtype=torch.uint8) if patches else shown,
        patches=patches,
        image_positions_K=torch.from_numpy(_joined(positions)),
        image_lengths_I=torch.from_numpy(np.array(lengths, np.int64)),
        states_SF=torch.from_numpy(
            np.concatenate(states) if states else np.zeros((0, state_size), np.float32)
        ),
        state_positions_S=torch.from_numpy(_joined(state_positions)),
        prompt_positions_DP=torch.from_numpy(np.stack(prompts) if prompts else np.zeros((0, 0), np.int64)),
        decoder_ids_BU=None if decoder is None else torch.from_numpy(decoder),
        writers_BW=torch.from_numpy(_writers(texts)),
        keys=tuple(text.key for row in texts for text in row),
        samples=len(rows) if samples is None else samples,
        masks=None if masks is None else masks_together(placed, masks),
    )


def _writers(texts: Sequence[Sequence[Encoded]]) -> np.ndarray:
    """Where answers begin; of rows with one text only, since packed rows are not written after."""
    ends = [row[0].ends() if len(row) == 1 else [0] for row in texts] or [[0]]
    writers = np.full((len(ends), max(len(end) for end in ends)), -1, np.int64)
    for number, end in enumerate(ends):
        writers[number, : len(end)] = end
    return writers


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
