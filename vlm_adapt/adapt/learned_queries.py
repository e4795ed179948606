"""Learned queries on the connector: its own, trained alone, or tokens added to those of every image.

Knows which connectors read an image by learned queries (the resampler of Flamingo, Alayrac et al. 2022; the
Q-Former of BLIP-2, Li et al. 2023); knows nothing about towers or texts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.kept import Kept
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.prompt_tuning import whole
from vlm_adapt.errors import UserError

QUERIES = ("latents", "query_tokens")  # of the resampler, of the Q-Former


class Appended(nn.Module):
    """n learned tokens after those of every image."""

    def __init__(self, tokens: int, width: int, std: float, device: Any):
        super().__init__()
        self.tokens_KD = nn.Parameter(torch.empty(tokens, width, device=device).normal_(0, std))

    def forward(self, tokens_NKD: Tensor) -> Tensor:
        """tokens_NKD with n more each."""
        more_KD = self.tokens_KD.to(tokens_NKD.dtype)
        return torch.cat([tokens_NKD, more_KD.expand(len(tokens_NKD), -1, -1)], 1)


class LearnedQueries(Method):
    """Queries of a connector.

    Args:
        tokens: so many learned tokens are added to every image's, whatever the connector. None trains the
            queries by which a resampler or a Q-Former reads its images, and nothing else of it.
        init_std: deviation of added tokens at the start.
    """

    name = "learned_queries"
    summary = "the queries of a resampler or Q-Former alone, or learned tokens added to every image's"
    paper = "Li et al. 2023, arXiv 2301.12597; Alayrac et al. 2022, arXiv 2204.14198"
    sides = ("connector",)
    identity = False
    adds_tokens = True
    example = {"tokens": 2}

    def __init__(self, tokens: int | None = None, init_std: float = 0.02):
        super().__init__()
        self.image_tokens = 0 if tokens is None else whole(self.name, tokens=tokens)
        if isinstance(init_std, bool) or not isinstance(init_std, int | float) or init_std < 0:
            raise UserError(f"adapt: learned_queries' init_std is a number from 0, not {init_std!r}")
        self.init_std = float(init_std)
        self.appended: Appended | None = None
        self.kept: Kept | None = None

    def attach(self, place: Place) -> None:
        """Name the connector's queries, or add tokens after those it gives."""
        self.part = place.part
        inner: Any = place.part["connector"] if isinstance(place.part, nn.ModuleDict) else place.part
        if self.image_tokens:
            if not inner.tokens_per_image:
                raise UserError(
                    "adapt: learned_queries adds tokens to images of one size only: leave native images off, "
                    "or `tokens` out with a resampler or qformer"
                )
            number = sum(name.startswith(self.name) for name, _ in inner.named_children())
            name = f"{self.name}_{number + 1}"
            self.appended = Appended(self.image_tokens, inner.width_out, self.init_std, place.device)
            inner.add_module(name, self.appended)
            inner.register_forward_hook(self._append)
            self.parameters = {f"{name}.tokens_KD": self.appended.tokens_KD}
            return
        self.parameters = {
            name: parameter
            for name, parameter in place.part.named_parameters()
            if name.rpartition(".")[2] in QUERIES
        }
        if not self.parameters:
            raise UserError(
                "adapt: this connector has no queries of its own: choose a resampler or qformer, or add "
                "learned tokens with learned_queries' `tokens`"
            )
        self.kept = Kept(self.parameters)

    def set_active(self, active: bool) -> None:
        """Add the tokens or not; or put the trained queries, or the connector's own, in place."""
        if self.kept is not None:
            self.kept.show(active)
        super().set_active(active)

    def _append(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return self.appended(output) if self.active and self.appended is not None else None
