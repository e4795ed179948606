"""SAM's prompt encoder and mask decoder (Kirillov et al. 2023, arXiv 2304.02643), as transformers has them.

Knows prompts in pixels of the square that the image encoder sees, and embeddings of images; knows no images,
no original sizes, no towers and no files (heads/sam_weights.py reads those).

Shapes: N images, P prompts an image, K points a prompt, D channels, h x w the grid of the image's embedding,
M masks a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPositionalEmbedding, SamPromptEncoder

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

BACKGROUND, FOREGROUND, NOTHING, PADDING = 0, 1, -1, -10  # labels of points; boxes' corners have their own
SETTINGS = (
    *("mlp_dim", "num_hidden_layers", "num_attention_heads", "attention_downsample_rate"),
    *("num_multimask_outputs", "iou_head_depth", "iou_head_hidden_dim", "layer_norm_eps", "hidden_act"),
)


def float32_kept(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves tensors to another device (`.to`, `.cuda`), without what would round them on the way."""

    def moved(tensor: Tensor) -> Tensor:
        found = change(tensor)
        narrow = tensor.dtype == torch.float32 and found.is_floating_point() and found.dtype != tensor.dtype
        return tensor.to(found.device) if narrow else found

    return moved


class ExactPositions(nn.Module):
    """SAM's random Fourier features of places: fixed, and in float32 whatever the computation is in.

    bfloat16 has 8 bits: in a square of 1024 pixels places would move by some of them.
    """

    def __init__(self, width: int):
        super().__init__()
        made = SamPositionalEmbedding(SimpleNamespace(scale=1.0, num_pos_feats=width // 2))
        matrix_2F = made.positional_embedding.detach()
        # SAM draws it once and never trains it; transformers holds it as a parameter.
        del made.positional_embedding
        made.register_buffer("positional_embedding", matrix_2F)
        self.made = made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactPositions:
        super()._apply(float32_kept(fn), recurse)
        return self

    def forward(self, places: Tensor, input_shape: tuple[int, int] | None = None) -> Tensor:
        """(x, y) in pixels of `input_shape`, or in 0..1, to `[..., width]`."""
        with torch.autocast(places.device.type, enabled=False):
            found: Tensor = self.made(places.float(), input_shape)
        return found


class SamDecoder(nn.Module):
    """Masks for prompts on an image's embedding.

    Args:
        image_size: side in pixels of the square that the image encoder sees.
        grid: side of its embedding: 64 at 1024 pixels.
        width: channels of the embedding.
        mask_input_channels: of the convolutions that read a mask prompt.
        settings: of transformers' SamMaskDecoderConfig.

    Attributes:
        mask_size: side of the masks that come out and that go in as prompts.

    Raises:
        UserError: an unknown setting, or numbers that do not fit together.
    """

    def __init__(
        self,
        image_size: int = 1024,
        grid: int = 64,
        width: int = 256,
        mask_input_channels: int = 16,
        **settings: Any,
    ):
        super().__init__()
        for name in settings:
            if name not in SETTINGS:
                known = ("mask_input_channels", *SETTINGS)
                raise UserError(
                    f"unknown setting '{name}' of SAM's decoder{nearest(name, known) or ':'} "
                    f"known are {', '.join(known)}"
                )
        if image_size % grid:
            raise UserError(
                f"SAM's decoder needs images that its grid of {grid} divides, not {image_size} pixels"
            )
        if width % 8:
            raise UserError(f"the width of SAM's decoder is a multiple of 8, not {width}")
        self.image_size, self.grid, self.width, self.mask_size = image_size, grid, width, 4 * grid
        prompts = SamPromptEncoderConfig(
            hidden_size=width,
            image_size=image_size,
            patch_size=image_size // grid,
            mask_input_channels=mask_input_channels,
        )
        settings = {"iou_head_hidden_dim": width} | settings
        decoder = SamMaskDecoderConfig(hidden_size=width, **settings)
        decoder._attn_implementation = "sdpa"
        positions = SimpleNamespace(scale=1.0, num_pos_feats=width // 2)
        self.prompt_encoder: Any = SamPromptEncoder(
            SimpleNamespace(vision_config=positions, prompt_encoder_config=prompts)
        )
        self.prompt_encoder.shared_embedding = ExactPositions(width)
        try:
            self.mask_decoder: Any = SamMaskDecoder(decoder)
        except ValueError as error:
            raise UserError(f"SAM's decoder of width {width}: {error}") from error
        self.mask_decoder.transformer.register_forward_pre_hook(_places_in_rows, with_kwargs=True)

    def image_positions(self) -> Tensor:
        """Embeddings of the grid's places, `[1, D, h, w]`."""
        device = self.prompt_encoder.shared_embedding.made.positional_embedding.device
        middles = (torch.arange(self.grid, device=device, dtype=torch.float32) + 0.5) / self.grid
        y_hw, x_hw = torch.meshgrid(middles, middles, indexing="ij")
        places_hwD: Tensor = self.prompt_encoder.shared_embedding(torch.stack([x_hw, y_hw], dim=-1))
        return places_hwD.permute(2, 0, 1).unsqueeze(0)

    def forward(
        self,
        features_NDhw: Tensor,
        points_NPK2: Tensor | None = None,
        labels_NPK: Tensor | None = None,
        boxes_NP4: Tensor | None = None,
        masks_NPHW: Tensor | None = None,
        words_NPTD: Tensor | None = None,
        multimask: bool = True,
        masked_NP: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masks and what the decoder believes of them.

        Prompts come together (a box with points, a mask with points); at least one kind is given.

        Args:
            features_NDhw: embeddings of the images.
            points_NPK2: (x, y) in pixels of the square; half a pixel is added here, as in SAM.
            labels_NPK: 1 foreground, 0 background, -1 not a point, -10 padding that is no token of meaning.
            boxes_NP4: (left, top, right, bottom) in pixels of the square.
            masks_NPHW: logits of an earlier mask, `mask_size` a side.
            words_NPTD: further prompt tokens, such as projected text.
            multimask: several masks for an ambiguous prompt, or one.
            masked_NP: which prompts have a mask in `masks_NPHW`; the others' are not looked at. None: all.

        Returns:
            logits_NPMhw of `mask_size` a side, and the predicted IoU_NPM.

        Raises:
            UserError: no prompt at all, or prompts that do not fit together.
        """
        given = [prompt for prompt in (points_NPK2, boxes_NP4, masks_NPHW, words_NPTD) if prompt is not None]
        images = len(features_NDhw)
        shapes = {tuple(prompt.shape[:2]) for prompt in given}
        if not given:
            raise UserError("a mask needs a prompt: a point, a box, a mask or words")
        if len(shapes) > 1 or next(iter(shapes))[0] != images:
            raise UserError(
                f"prompts of (images, prompts) {sorted(shapes)} do not fit together on {images} images"
            )
        if (points_NPK2 is None) != (labels_NPK is None):
            raise UserError("points need a label each: 1 foreground, 0 background, -1 not a point")
        prompts = given[0].shape[1]
        sparse_NPTD = self._sparse(points_NPK2, labels_NPK, boxes_NP4, words_NPTD)
        dense_NDhw = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        if masks_NPHW is not None:
            if masks_NPHW.shape[-2:] != (self.mask_size, self.mask_size):
                raise UserError(
                    f"a mask prompt is of {self.mask_size} x {self.mask_size} logits, "
                    f"not {masks_NPHW.shape[-2]} x {masks_NPHW.shape[-1]}"
                )
            # transformers' decoder adds one mask an image: here each prompt has its own.
            none_1D11 = dense_NDhw
            dense_NDhw = self.prompt_encoder.mask_embed(masks_NPHW.flatten(0, 1)[:, None])
            if masked_NP is not None:
                dense_NDhw = torch.where(masked_NP.flatten().view(-1, 1, 1, 1), dense_NDhw, none_1D11)
            features_NDhw = features_NDhw.repeat_interleave(prompts, 0)
            sparse_NPTD = None if sparse_NPTD is None else sparse_NPTD.flatten(0, 1).unsqueeze(1)
        if torch.is_grad_enabled():
            dense_NDhw = dense_NDhw + self._anchor()
        logits, scores = self.mask_decoder(
            image_embeddings=features_NDhw,
            image_positional_embeddings=self.image_positions().expand(len(features_NDhw), -1, -1, -1),
            sparse_prompt_embeddings=sparse_NPTD,
            dense_prompt_embeddings=dense_NDhw,
            multimask_output=multimask,
        )
        return logits.view(images, prompts, *logits.shape[2:]), scores.view(images, prompts, -1)

    def _sparse(
        self, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, words: Tensor | None
    ) -> Tensor | None:
        """Tokens of points, boxes and words, `[N, P, T, D]`; None where there is only a mask."""
        pieces = []
        if points is not None or boxes is not None:
            pieces.append(
                self.prompt_encoder(
                    None if points is None else points.float(),
                    labels,
                    None if boxes is None else boxes.float(),
                    None,
                )[0]
            )
        if words is not None:
            pieces.append(words.float())
        return torch.cat(pieces, dim=2) if pieces else None

    def _anchor(self) -> Tensor:
        """Zero, made of every weight that some prompts leave out.

        So each gets a gradient whatever a batch holds: else ranks would wait for each other.
        """
        encoder = self.prompt_encoder
        embeddings = (*encoder.point_embed, encoder.not_a_point_embed, encoder.no_mask_embed)
        total: Tensor = sum(one.weight.sum() for one in embeddings)  # type: ignore[assignment]
        blank = torch.zeros(1, 1, 4, 4, device=total.device, dtype=total.dtype)
        return (total + encoder.mask_embed(blank).sum()) * 0.0


def _places_in_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The channels of a place side by side in memory, as the transformer reads them: a quarter faster."""
    for name in ("image_embeddings", "image_positional_embeddings"):
        kwargs[name] = kwargs[name].contiguous(memory_format=torch.channels_last)
    return args, kwargs


def decoder_options() -> list[str]:
    """Names of the settings that a configuration may give beside `weights`."""
    named = list(inspect.signature(SamDecoder).parameters)
    return [name for name in named if name not in ("image_size", "grid", "settings")] + list(SETTINGS)
