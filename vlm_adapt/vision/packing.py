"""Images of different sizes in one sequence of tokens: who lies where, and attention that stays in an image.

Patch n' Pack (Dehghani et al. 2023, arXiv 2307.06304, section 2.1). Knows lengths, orders and attention;
knows nothing about positions, blocks or files. Everything but attention works token by token, so all
images lie in one flat sequence without padding; only attention is told where they begin.

    T tokens of all images, I images, H heads of E channels, S packed sequences of L tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlm_adapt.errors import UserError

NAME = "vlm_adapt_packed"  # what transformers calls this attention


@dataclass(frozen=True)
class Packed:
    """Images as a tower reads them, one after another.

    Attributes:
        pixels_TV: normalised floats of each patch, ordered (row, column, channel) within the patch.
        places_T: each patch's number in its image's grid, row by row.
        grids: (rows, columns) of each image.
        lengths: patches of each image that are there; fewer than rows * columns where some were dropped.
    """

    pixels_TV: Tensor
    places_T: Tensor
    grids: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]

    @cached_property
    def coordinates_T2(self) -> Tensor:
        """(row, column) of each patch."""
        columns_T = self.per_patch([columns for _, columns in self.grids])
        return torch.stack([self.places_T // columns_T, self.places_T % columns_T], dim=1)

    def per_patch(self, values: Sequence[Any]) -> Tensor:
        """A value for each image, as one for each of its patches."""
        device = self.places_T.device
        repeats = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(
            torch.tensor(values, device=device), repeats, dim=0, output_size=len(self.places_T)
        )


def first_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Whole images into sequences of at most `most` tokens, each into the first that has room.

    Returns:
        the images' numbers by sequence, ascending within each.

    Raises:
        ValueError: an image that is longer than a sequence.
    """
    sequences: list[list[int]] = []
    room: list[int] = []
    for image, length in enumerate(lengths):
        if length > most:
            raise ValueError(f"image {image} has {length} tokens, a sequence {most}")
        place = next((number for number, left in enumerate(room) if left >= length), len(room))
        if place == len(room):
            sequences.append([])
            room.append(most)
        sequences[place].append(image)
        room[place] -= length
    return sequences


class Layout:
    """Where the tokens of each image lie, and how they attend to each other.

    Args:
        lengths: patches of each image.
        prefix: tokens (class, registers) that each image has before its patches.
        backend: one of BACKENDS, or `auto`.
        sequence: tokens of a packed sequence, prefixes included; at least those of the longest image.
        device: of the tokens.
    Attributes:
        order: the images' numbers in the order in which they lie.
        take_T: for each token its place in [prefix tokens, patches in the order of the images].
        patches_T: for each patch, in the order of the images, its place among the tokens.
        prefix: tokens before an image's patches, those put in later too.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        prefix: int = 0,
        backend: str = "auto",
        sequence: int | None = None,
        device: torch.device | None = None,
    ):
        self.device = torch.device("cpu") if device is None else device
        self.backend = choose(backend, self.device)
        self.lengths = [length + prefix for length in lengths]
        longest = max(self.lengths)
        self.sequences = first_fit(self.lengths, max(longest, sequence or longest))
        if self.backend == "images":  # equal ones together, to be computed at once
            self.order = sorted(range(len(lengths)), key=lambda image: self.lengths[image])
        else:
            self.order = [image for images in self.sequences for image in images]
        starts, total = [], prefix
        for length in lengths:
            starts.append(total)
            total += length
        first = torch.arange(prefix)
        take_T = torch.cat([torch.cat([first, torch.arange(lengths[i]) + starts[i]]) for i in self.order])
        # The inverse, patches only: prefix tokens are written over by one another, and are not asked for.
        places = torch.empty(total, dtype=torch.long)
        places[take_T] = torch.arange(len(take_T))
        self.take_T, self.patches_T = take_T.to(self.device), places[prefix:].to(self.device)
        self.prefix = prefix

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """(start, images, tokens of each) for images of one length that lie together."""
        runs: list[tuple[int, int, int]] = []
        start = 0
        for image in self.order:
            length = self.lengths[image]
            if runs and runs[-1][2] == length:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
            else:
                runs.append((start, 1, length))
            start += length
        return runs

    def arrange(self, patches_TD: Tensor, prefix_FD: Tensor | None = None) -> Tensor:
        """Patches in the order of the images to tokens as they lie, each image's after its prefix."""
        every = patches_TD if prefix_FD is None else torch.cat([prefix_FD, patches_TD])
        return every[self.take_T]

    def inserted(self, place: int, tokens: int, replace: bool = False) -> Tensor:
        """Where tokens come from when each image is given more from its token `place` on (or others there).

        They are places in [tokens as they lie, the new ones of each image as the images lie].
        """
        pieces: list[tuple[int, int]] = []
        start, total = 0, sum(self.lengths)
        for rank, image in enumerate(self.order):
            end, new = start + self.lengths[image], total + rank * tokens
            pieces += [(start, start + place), (new, new + tokens), (start + place + tokens * replace, end)]
            start = end
        return torch.cat([torch.arange(*piece) for piece in pieces]).to(self.device)

    def fit(self, total: int) -> Layout:
        """The layout of the same images in the same order for a sequence of `total` tokens."""
        tokens = (total - sum(self.lengths)) // len(self.order)  # more, or fewer, before each one's patches
        if not tokens:
            return self
        other = copy(self)
        for name in ("take_T", "runs", "images_T", "dense", "flex"):
            other.__dict__.pop(name, None)
        other.lengths, other.prefix = [length + tokens for length in self.lengths], self.prefix + tokens
        ranks_I = torch.tensor(self.order, device=self.device).argsort()
        other.patches_T = self.patches_T + tokens * (ranks_I[self.images_T[self.patches_T]] + 1)
        return other

    def patches(self, tokens_TD: Tensor) -> Tensor:
        """Tokens as they lie to patches in the order of the images."""
        return tokens_TD[self.patches_T]

    @cached_property
    def images_T(self) -> Tensor:
        """For each token the image it belongs to."""
        lengths = torch.tensor([self.lengths[image] for image in self.order])
        return torch.repeat_interleave(torch.tensor(self.order), lengths).to(self.device)

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor, int]:
        """Each token's slot in [S * L], the mask [S, 1, L, L] of who sees whom, and L."""
        width = max(sum(self.lengths[image] for image in images) for images in self.sequences)
        slots, owners = [], torch.full((len(self.sequences), width), -1)
        for number, images in enumerate(self.sequences):
            lengths = torch.tensor([self.lengths[image] for image in images])
            used = int(lengths.sum())
            owners[number, :used] = torch.repeat_interleave(torch.tensor(images), lengths)
            slots.append(torch.arange(used) + number * width)
        # Padding sees padding: a row that saw nothing would be no number.
        allow_S1LL = (owners[:, None, :, None] == owners[:, None, None, :]).to(self.device)
        return torch.cat(slots).to(self.device), allow_S1LL, width

    @cached_property
    def flex(self) -> Any:
        """FlexAttention's block mask over the flat sequence."""
        from torch.nn.attention.flex_attention import create_block_mask

        owners_T = self.images_T
        size = len(owners_T)

        def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return owners_T[query] == owners_T[key]

        return create_block_mask(same, None, None, size, size, device=str(self.device))


def _by_images(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, layout: Layout, scale: float) -> Tensor:
    """Runs of images of one length at once: no token is computed that an image does not have."""
    # Backward, torch's fused attention takes two to eight times as long in bf16 on a CPU (docs/log.md).
    half = q_THE.dtype in (torch.bfloat16, torch.float16)
    plain = half and q_THE.requires_grad and q_THE.device.type == "cpu"
    out = []
    for start, images, length in layout.runs:
        run = slice(start, start + images * length)
        q, k, v = (t[run].unflatten(0, (images, length)).transpose(1, 2) for t in (q_THE, k_THE, v_THE))
        if plain:
            mixed_NHLE = ((q * scale) @ k.transpose(2, 3)).softmax(-1) @ v
        else:
            mixed_NHLE = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        out.append(mixed_NHLE.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _dense(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, layout: Layout, scale: float) -> Tensor:
    """Packed sequences side by side, with a mask of blocks."""
    slots_T, allow_S1LL, width = layout.dense
    count = len(allow_S1LL)

    def spread(t_THE: Tensor) -> Tensor:
        flat = t_THE.new_zeros(count * width, *t_THE.shape[1:]).index_copy(0, slots_T, t_THE)
        return flat.unflatten(0, (count, width)).transpose(1, 2)

    mixed_SHLE = functional.scaled_dot_product_attention(
        spread(q_THE), spread(k_THE), spread(v_THE), attn_mask=allow_S1LL, scale=scale
    )
    return mixed_SHLE.transpose(1, 2).flatten(0, 1)[slots_T]


def _flex(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, layout: Layout, scale: float) -> Tensor:
    """The flat sequence, blocks that no image touches skipped."""
    from torch.nn.attention.flex_attention import flex_attention

    if not q_THE.is_cuda and q_THE.requires_grad:
        raise UserError("native attention 'flex' trains on a GPU only: leave it at auto")
    call: Any = torch.compile(flex_attention, dynamic=True) if q_THE.is_cuda else flex_attention
    parts = [t.transpose(0, 1)[None].contiguous() for t in (q_THE, k_THE, v_THE)]
    return call(*parts, block_mask=layout.flex, scale=scale)[0].transpose(0, 1)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]] = {
    "images": _by_images,
    "dense": _dense,
    "flex": _flex,
}


def choose(backend: str, device: torch.device) -> str:
    """The backend that `auto` is on a device; any other as it is.

    Raises:
        UserError: an unknown backend.
    """
    if backend == "auto":
        return "images" if device.type == "cpu" else "dense"
    if backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise UserError(f"unknown attention '{backend}' of native images: choose {known}")
    return backend


def attend(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, layout: Layout, scale: float) -> Tensor:
    """softmax(scale q k') v within each image, for tokens as they lie in the layout."""
    return BACKENDS[layout.backend](q_THE, k_THE, v_THE, layout, scale)


def _for_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function over [1, H, T, E], with a Layout where others have a mask."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_THE, k_THE, v_THE = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend(q_THE, k_THE, v_THE, attention_mask, scale)[None], None


def register() -> str:
    """Make it known to transformers; returns its name there."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _for_transformers)
    return NAME
