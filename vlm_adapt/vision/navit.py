"""Our own vision transformer for images of native aspect ratio and resolution: `navit:tiny` and so on.

NaViT (Dehghani et al. 2023, arXiv 2307.06304): a plain pre-norm ViT with factorised position embeddings,
attention within each packed image, queries and keys normalised and no biases (Dehghani et al. 2023,
arXiv 2302.05442), and attention pooling (Zhai et al. 2022, arXiv 2106.04560) if it is asked for. Knows
the architecture and its options; knows nothing about connectors or training.

    T tokens of all images, I images, H heads of E channels, D channels
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import HALF_MEAN, HALF_STD, ImageSpec, Native
from vlm_adapt.tensor_files import Source, read_state
from vlm_adapt.vision.loading import load_strictly, note_left_out
from vlm_adapt.vision.navit_positions import FactorisedPositions
from vlm_adapt.vision.navit_tower import NativeTower, padded
from vlm_adapt.vision.packing import Layout, Packed, attend

SIZES = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def _norm(kind: str, width: int, bias: bool) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-6) if kind == "rms" else nn.LayerNorm(width, eps=1e-6, bias=bias)


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(width, inner, bias=bias)
        self.fc2 = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.fc2(functional.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention within each image; queries and keys normalised over a head's channels."""

    def __init__(self, width: int, heads: int, norm: str, qk_norm: bool, bias: bool):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)
        self.q_norm = _norm(norm, width // heads, bias) if qk_norm else nn.Identity()
        self.k_norm = _norm(norm, width // heads, bias) if qk_norm else nn.Identity()

    def forward(self, x_1TD: Tensor, layout: Layout) -> Tensor:
        """Tokens as they lie in the layout."""
        q_THE, k_THE, v_THE = (
            project(x_1TD)[0].unflatten(1, (self.heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Autocast leaves norms in float32.
        q_THE, k_THE = self.q_norm(q_THE).to(v_THE.dtype), self.k_norm(k_THE).to(v_THE.dtype)
        mixed_THE = attend(q_THE, k_THE, v_THE, layout, q_THE.shape[-1] ** -0.5)
        return self.out_proj(mixed_THE.flatten(1)[None])


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, width: int, heads: int, inner: int, norm: str, qk_norm: bool, bias: bool):
        super().__init__()
        self.norm1 = _norm(norm, width, bias)
        self.attention = Attention(width, heads, norm, qk_norm, bias)
        self.norm2 = _norm(norm, width, bias)
        self.mlp = FeedForward(width, inner, bias)

    def forward(self, x_1TD: Tensor, layout: Layout) -> Tensor:
        """Tokens as they lie in the layout."""
        x_1TD = x_1TD + self.attention(self.norm1(x_1TD), layout)
        return x_1TD + self.mlp(self.norm2(x_1TD))


class AttentionPool(nn.Module):
    """One learned query reads the patches of each image, and no other image's; then a feed-forward."""

    def __init__(self, width: int, heads: int, inner: int, norm: str, bias: bool):
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.probe, std=0.02)
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)
        self.norm = _norm(norm, width, bias)
        self.mlp = FeedForward(width, inner, bias)

    def forward(self, features_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """features_TD of all images to pooled_ID."""
        features_IPD, taken_IP = padded(features_TD, lengths)
        query_H1E = self.q_proj(self.probe).unflatten(0, (self.heads, 1, -1))
        key_IHPE, value_IHPE = (
            project(features_IPD).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        mixed_IH1E = functional.scaled_dot_product_attention(
            query_H1E.to(key_IHPE.dtype).expand(len(lengths), -1, -1, -1),
            key_IHPE,
            value_IHPE,
            attn_mask=taken_IP[:, None, None],
        )
        pooled_ID = self.out_proj(mixed_IH1E.flatten(1))
        return pooled_ID + self.mlp(self.norm(pooled_ID))


class NaViT(NativeTower):
    """The tower. Arguments as in `build`; names in the state dict are the attributes' here."""

    def __init__(
        self,
        image_spec: ImageSpec,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        norm: str,
        qk_norm: bool,
        bias: bool,
        positions: FactorisedPositions,
        pool: bool,
    ):
        assert image_spec.native is not None
        super().__init__(image_spec, width, [f"layers.{index}" for index in range(depth)])
        inner = round(width * mlp_ratio)
        values = image_spec.native.patch**2 * len(image_spec.mean)
        self.patch_embedding = nn.Linear(values, width, bias=bias)
        self.positions = positions
        self.layers = nn.ModuleList(Block(width, heads, inner, norm, qk_norm, bias) for _ in range(depth))
        self.norm = _norm(norm, width, bias)
        self.pool = AttentionPool(width, heads, inner, norm, bias) if pool else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _embed(self, images: Packed, layout: Layout) -> tuple[Tensor, dict[str, Any]]:
        patches_TD = self.patch_embedding(images.pixels_TV)
        positions_TD = self.positions(images.coordinates_T2, images.per_patch(images.grids))
        return layout.arrange(patches_TD + positions_TD.to(patches_TD.dtype))[None], {}

    def _finish(self, features_TD: Tensor, images: Packed) -> Tensor:
        features_TD = self.norm(features_TD)
        return features_TD if self.pool is None else self.pool(features_TD, images.lengths)

    def _last_layer_modules(self) -> list[str]:
        return ["norm", *(["pool"] if self.pool is not None else [])]


def build(
    name: str,
    source: Source,
    image_size: int | tuple[int, int] | None,
    native: Any = True,
    patch: int = 16,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp_ratio: float = 4.0,
    norm: str = "layer",
    qk_norm: bool = True,
    bias: bool = False,
    positions: str = "learned",
    coordinates: str = "absolute",
    combine: str = "sum",
    max_side: int = 128,
    pool: bool = False,
) -> NativeTower:
    """A tower of our own, of random weights or those of a file.

    Args:
        name: one of SIZES, for width, depth and heads that are not given.
        native: settings of images (`image_spec.Native`): max_patches, resolution, drop and so on.
        patch: side of a patch in pixels.
        norm: `layer` or `rms`.
        qk_norm: whether queries and keys are normalised.
        bias: whether Linears and LayerNorms have biases.
        positions, coordinates, combine: see `navit_positions`.
        max_side: patches along a side for which there are positions; longer images are squashed.
        pool: give one feature an image, by masked attention pooling, instead of its patches.
    Raises:
        UserError: unknown names, values that cannot work, or weights from a hub.
    """
    if name not in SIZES:
        raise UserError(f"unknown navit '{name}'{nearest(name, SIZES) or ':'} choose {', '.join(SIZES)}")
    if image_size is not None:
        raise UserError("navit's images have no one image_size: set options.native.max_patches instead")
    if source.kind == "hub":
        raise UserError("navit has no published weights: say weights: random:SEED, or file:PATH")
    width, depth, heads = (
        own if given is None else given for own, given in zip(SIZES[name], (width, depth, heads), strict=True)
    )
    named = {"width": width, "depth": depth, "heads": heads, "patch": patch, "max_side": max_side}
    for what, value in named.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"navit's {what} is a whole number from 1, not {value!r}")
    if width % heads:
        raise UserError(f"navit's width {width} is not a multiple of its {heads} heads")
    if norm not in ("layer", "rms"):
        raise UserError(f"unknown norm '{norm}' of navit: choose layer, rms")
    settings = Native.parse(native, patch=patch, max_side=max_side, pooled=pool)
    spec = ImageSpec((patch, patch), HALF_MEAN, HALF_STD, native=settings)
    embeddings = FactorisedPositions(width, positions, coordinates, combine, max_side)
    tower = NaViT(spec, width, depth, heads, mlp_ratio, norm, qk_norm, bias, embeddings, pool)
    if source.kind == "file":
        left_out = load_strictly(tower, read_state(source.path), str(source.path), ["pool."])
        tower.notes += note_left_out(str(source.path), left_out)
    return tower
