"""The seam between any vision encoder and the rest of the house: pixels to features at chosen depths.

Knows layers, grids, widths and blocks; knows nothing about the library an encoder comes from, nor
about connectors, text or training.

Shapes: N images, C channels, H x W pixels, P = h*w patches in row-major order, D channels of a layer.
A *layer* is a depth that can be asked for: a block of a plain ViT, a stage of a hierarchical one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec


class Tower(nn.Module):
    """A vision encoder. Subclasses give `_features` and name their blocks.

    Attributes:
        image_spec: what images must look like.
        depth: how many layers can be asked for.
        width, grid: channels and (rows, columns) of the last layer.
        block_names: dotted names of the adaptable blocks below this module, in order. `blocks` are
            these modules as they are now; `set_block` puts another (a wrapper, say) in a block's place.
            A wrapper must hand on all positional and keyword arguments.
        block_layers: for each block the layer that it feeds.
        notes: what a user should know of how this tower was made (weights left out, for example).
        ladder: a side network that keeps activations in the tower's stead; None for none.
        has_class_token: whether features can be had with the class token before the patches.
    """

    def __init__(
        self,
        image_spec: ImageSpec,
        widths: Sequence[int],
        grids: Sequence[tuple[int, int]],
        block_names: Sequence[str],
        block_layers: Sequence[int],
    ):
        super().__init__()
        self.image_spec = image_spec
        self._widths, self._grids = list(widths), [(int(grid[0]), int(grid[1])) for grid in grids]
        self.depth, self.width, self.grid = len(self._widths), self._widths[-1], self._grids[-1]
        self.block_names, self.block_layers = list(block_names), list(block_layers)
        self.notes: list[str] = []
        self.ladder: nn.Module | None = None
        self.has_class_token = False
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}

    # What there is -------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[nn.Module]:
        """The adaptable blocks in order."""
        return [self.get_submodule(name) for name in self.block_names]

    def set_block(self, index: int, module: nn.Module) -> None:
        """Put `module` where block `index` is."""
        parent, _, leaf = self.block_names[index].rpartition(".")
        setattr(self.get_submodule(parent), leaf, module)

    def resolve(self, layers: Sequence[int] | None) -> list[int]:
        """Layer numbers from 0 for numbers that may be negative; None is the last layer.

        -1 is the output of the last block. LLaVA's `vision_feature_layer=-2` is -2 here too.

        Raises:
            UserError: a layer that the tower does not have, or none at all.
        """
        layers = [-1] if layers is None else list(layers)
        if not layers:
            raise UserError("a tower needs at least one layer: leave `layers` out for the last")
        for layer in layers:
            if not -self.depth <= layer < self.depth:
                raise UserError(
                    f"vision layer {layer} does not exist: this tower has {self.depth} layers, "
                    f"numbered 0 to {self.depth - 1} or -{self.depth} to -1"
                )
        return [layer % self.depth for layer in layers]

    def widths(self, layers: Sequence[int] | None = None) -> list[int]:
        """Channels of each requested layer."""
        return [self._widths[layer] for layer in self.resolve(layers)]

    def grids(self, layers: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """(rows, columns) of each requested layer."""
        return [self._grids[layer] for layer in self.resolve(layers)]

    def used_blocks(self, layers: Sequence[int] | None = None) -> list[int]:
        """Numbers of the blocks that run for `layers`; the others get no gradient, so leave them frozen."""
        deepest = max(self.resolve(layers))
        return [index for index, layer in enumerate(self.block_layers) if layer <= deepest]

    def unused_modules(self, layers: Sequence[int] | None = None) -> list[str]:
        """Dotted names of modules whose parameters get no gradient when only `layers` are asked for."""
        deepest = max(self.resolve(layers))
        unused = [
            name for name, layer in zip(self.block_names, self.block_layers, strict=True) if layer > deepest
        ]
        return unused + ([] if deepest == self.depth - 1 else self._last_layer_modules())

    def _last_layer_modules(self) -> list[str]:
        """Modules beyond the blocks that only the last layer uses (the final norm, say)."""
        return []

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that pixels are handed over in: that of the first weight."""
        return next(self.parameters()).dtype

    # What it does --------------------------------------------------------------------------------

    def normalise(self, pixels_NCHW: Tensor) -> Tensor:
        """uint8 pixels to normalised floats on their own device, in the tower's dtype."""
        device = pixels_NCHW.device
        if device not in self._statistics:
            # Not a buffer: a bf16 tower would round the mean and the deviation too.
            shape = (1, len(self.image_spec.mean), 1, 1)
            mean = torch.tensor(self.image_spec.mean, device=device).view(shape) * 255
            std = torch.tensor(self.image_spec.std, device=device).view(shape) * 255
            self._statistics[device] = (mean, std)
        mean, std = self._statistics[device]
        # Batches come interleaved; towers see planes whatever came, and so the same sums everywhere.
        pixels_NCHW = pixels_NCHW.to(torch.float32, memory_format=torch.contiguous_format)
        return ((pixels_NCHW - mean) / std).to(self.dtype)

    def forward(
        self, pixels_NCHW: Tensor, layers: Sequence[int] | None = None, class_token: bool = False
    ) -> list[Tensor]:
        """Features of each requested layer: patches, without register tokens, and without the class token.

        Args:
            pixels_NCHW: normalised float pixels of the size of `image_spec`.
            layers: depths, in the order wanted; negative ones count from the end. Default: the last.
            class_token: hand it out too, before the patches: [N, 1 + P, D].
        Returns:
            features_NPD, one for each requested layer. Blocks after the deepest are not run.
        Raises:
            UserError: images of another size, a layer that does not exist, or no class token.
        """
        wanted = self.resolve(layers)
        if tuple(pixels_NCHW.shape[-2:]) != self.image_spec.size:
            raise UserError(
                f"the tower was built for images of {self.image_spec.size} pixels and got "
                f"{tuple(pixels_NCHW.shape[-2:])}: build it with that image_size, or resize the images"
            )
        if class_token and not self.has_class_token:
            raise UserError(f"{type(self).__name__} holds an encoder without a class token: do without")
        found = self._features(pixels_NCHW, sorted(set(wanted)), class_token)
        return [found[layer] for layer in wanted]

    def _features(self, pixels_NCHW: Tensor, layers: list[int], class_token: bool) -> dict[int, Tensor]:
        """features_NPD by layer, or [N, 1 + P, D], for ascending, distinct layer numbers from 0."""
        raise TypeError(f"{type(self).__name__} does not say how to compute features")

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass (True) or keep its activations (False)."""
        raise TypeError(f"{type(self).__name__} does not say how to checkpoint activations")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tower:
        """As usual (`.to`, `.float`), but batch norms stay in float32.

        Their statistics lose too much in half precision, and torch mixes no other dtypes in them.
        """
        super()._apply(fn, recurse)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.float()
        return self

    def train(self, mode: bool = True) -> Tower:
        """As usual, but batch norms stay in evaluation mode.

        Their running statistics are the pretrained ones: small, uneven batches would spoil them, and
        ranks would drift apart.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def mend_batch_norms(encoder: nn.Module) -> None:
    """Give the batch norms of an encoder the gradients of one image alone in plain order.

    On the CPU torch's backward of a batch norm in evaluation mode misreads such a gradient where it comes
    from tokens that were reshaped to a map (TinyViT): the strides of one image fit two orders. What it then
    gives is wrong by as much as the gradient is long, without a word.
    """

    def plain(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad and len(output) == 1:
            output.register_hook(Tensor.contiguous)

    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(plain)


def silence(tower: Tower) -> None:
    """Set the encoder's own dropout and stochastic depth to zero, with a note if there was any.

    They are the regularisers of its pretraining (timm's Swin has 0.1): left on, a frozen tower would
    give other features in training than in evaluation. Dropout added later (LoRA's) is not touched.
    """
    silenced = 0
    for module in tower.modules():
        for name in ("p", "drop_prob", "dropout", "attention_dropout", "dropout_prob"):
            value = getattr(module, name, None)
            if isinstance(value, float) and value > 0 and (name != "p" or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
                silenced += 1
    if silenced:
        tower.notes.append(
            f"dropout and stochastic depth were switched off in {silenced} places of the tower"
        )


def taken(tokens_NTD: Tensor, patches: int, class_token: bool) -> Tensor:
    """Of a block's tokens the patches, which are the last, and before them the class token, the first.

    Between them stand registers and what a block was given besides (learned prompts).
    """
    tokens = tokens_NTD.shape[1]
    if not class_token:
        return tokens_NTD[:, tokens - patches :]
    if tokens == 1 + patches:
        return tokens_NTD
    return torch.cat([tokens_NTD[:, :1], tokens_NTD[:, tokens - patches :]], dim=1)


def check_image_size(size: tuple[int, int], patch: tuple[int, int], model: str) -> None:
    """Raise UserError unless whole patches fill the image."""
    if size[0] % patch[0] or size[1] % patch[1] or min(size) < 1:
        given: Any = list(size)
        near: Any = [max(1, round(one / of)) * of for one, of in zip(size, patch, strict=True)]
        of_patch: Any = list(patch)
        if size[0] == size[1] and patch[0] == patch[1]:  # else it may be the width that is wrong
            given, near, of_patch = given[0], near[0], of_patch[0]
        raise UserError(
            f"image_size {given} is not a multiple of the patch size {of_patch} of '{model}': try {near}"
        )
