"""The seam of towers that read images of native aspect ratio and resolution, packed.

Knows layouts, blocks and layers; knows nothing about any architecture, connectors or files. What comes
out of a layer is flat: the patches of all images, one image after another, in the order given.

    T patches of all images, V values of a patch, D channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.vision.packing import Layout, Packed, choose
from vlm_adapt.vision.tower import Tower

VARIES = (0, 0)  # the grid of a tower whose images have each their own


class NativeTower(Tower):
    """A plain ViT over packed images. Subclasses give `_embed`, and `_block` and `_finish` where needed.

    Args:
        image_spec: with `native`; its `size` is not used.
        width: D, the same in every layer.
        block_names: as in Tower; layer i is the output of block i.
        prefix: tokens that every image has before its patches (class, registers).
    """

    def __init__(self, image_spec: ImageSpec, width: int, block_names: Sequence[str], prefix: int = 0):
        assert image_spec.native is not None
        native = image_spec.native
        choose(native.attention, torch.device("cpu"))
        if native.sequence is not None and native.sequence < native.max_patches + prefix:
            raise UserError(
                f"native sequence {native.sequence} has no room for an image of max_patches "
                f"{native.max_patches}: give at least {native.max_patches + prefix}"
            )
        if native.sequence is None:
            image_spec = replace(image_spec, native=replace(native, sequence=native.max_patches + prefix))
        depth = len(block_names)
        super().__init__(image_spec, [width] * depth, [VARIES] * depth, block_names, range(depth))
        self.prefix, self.checkpointing = prefix, False

    def normalise(self, pixels_TV: Tensor) -> Tensor:
        """uint8 patches, each (row, column, channel), to normalised floats in the tower's dtype."""
        device, channels = pixels_TV.device, len(self.image_spec.mean)
        if device not in self._statistics:
            mean = torch.tensor(self.image_spec.mean, device=device) * 255
            std = torch.tensor(self.image_spec.std, device=device) * 255
            self._statistics[device] = (mean, std)
        mean, std = self._statistics[device]
        values = pixels_TV.float().unflatten(1, (-1, channels))
        return ((values - mean) / std).flatten(1).to(self.dtype)

    def forward(  # type: ignore[override]
        self, images: Packed, layers: Sequence[int] | None = None, class_token: bool = False
    ) -> list[Tensor]:
        """Features of each requested layer, patches only, in the order of the images.

        Args:
            images: normalised patches.
            layers: as in Tower.
            class_token: not to be had here, where images have grids of their own.
        Returns:
            features_TD, one for each requested layer; [I, D] of a tower that pools.
        """
        if class_token:
            raise UserError(
                "a tower of native image sizes gives patches only: leave vision.options.native out"
            )
        wanted = self.resolve(layers)
        native = self.image_spec.native
        assert native is not None
        layout = Layout(
            images.lengths, self.prefix, native.attention, native.sequence, images.pixels_TV.device
        )
        hidden_1TD, arguments = self._embed(images, layout)
        found: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks[: max(wanted) + 1]):
            if self.checkpointing and torch.is_grad_enabled():
                output = checkpoint(block, hidden_1TD, layout, use_reentrant=False, **arguments)
            else:
                output = block(hidden_1TD, layout, **arguments)
            hidden_1TD = output[0] if isinstance(output, tuple) else output
            layout = layout.fit(hidden_1TD.shape[1])  # a block may have been given more tokens
            if index in wanted:
                found[index] = layout.patches(hidden_1TD[0])
        if self.depth - 1 in found:
            found[self.depth - 1] = self._finish(found[self.depth - 1], images)
        return [found[layer] for layer in wanted]

    def _embed(self, images: Packed, layout: Layout) -> tuple[Tensor, dict[str, Any]]:
        """The first block's input [1, tokens, D], arranged, and keyword arguments of every block."""
        raise TypeError(f"{type(self).__name__} does not say how to embed patches")

    def _finish(self, features_TD: Tensor, images: Packed) -> Tensor:
        """The last layer's features, after whatever comes behind the blocks."""
        return features_TD

    def shapes(self, images: Packed) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
        """(rows, columns) of each image's features, and how many of them there are."""
        if self.image_spec.native is not None and self.image_spec.native.pooled:
            return ((1, 1),) * len(images.grids), (1,) * len(images.grids)
        return images.grids, images.lengths

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in Tower, a block at a time."""
        self.checkpointing = enabled


def padded(features_TD: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Each image's patches in a row of their own: features_IPD, and which places are taken [I, P]."""
    features_IPD = nn.utils.rnn.pad_sequence(list(features_TD.split(list(lengths))), batch_first=True)
    places_P = torch.arange(features_IPD.shape[1], device=features_TD.device)
    return features_IPD, places_P < torch.tensor(lengths, device=features_TD.device)[:, None]
