"""A learned frame of pixels around every image: a prompt for any encoder, hierarchical ones too.

Bahng et al. 2022, arXiv 2203.17274 (the padding of section 3; Jia et al. 2022 do the same to ConvNets).
Knows towers that take pixels_NCHW; knows nothing about their layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.visual_prompt import free_name
from vlm_adapt.errors import UserError

INITIALS = ("zeros", "normal")


class Frame(nn.Module):
    """What is added to the outermost pixels: whole rows above and below, the rest at the sides."""

    def __init__(self, channels: int, size: tuple[int, int], frame: int, initial: str, device: torch.device):
        super().__init__()
        (height, width), draw = size, torch.zeros if initial == "zeros" else torch.randn
        self.top, self.bottom = (nn.Parameter(draw(channels, frame, width, device=device)) for _ in range(2))
        self.left, self.right = (
            nn.Parameter(draw(channels, height - 2 * frame, frame, device=device)) for _ in range(2)
        )

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Normalised pixels with the frame added, in their own dtype."""
        inside = self.left.shape[1], pixels_NCHW.shape[-1] - 2 * self.left.shape[2]
        middle_CHW = torch.cat([self.left, self.left.new_zeros(len(self.left), *inside), self.right], dim=2)
        frame_CHW = torch.cat([self.top, middle_CHW, self.bottom], dim=1)
        return pixels_NCHW + frame_CHW.to(pixels_NCHW.dtype)


class ImagePrompt(Method):
    """A frame of `frame` pixels, the same for all images, added to them after they are normalised.

    2 C p (H + W - 2p) parameters for p pixels and images of C x H x W. Gradients pass through the whole
    tower, so a step costs what training the tower costs, without its weights' gradients.

    Args:
        frame: p, the width in pixels.
        initial: `zeros`, so that training begins where the tower is; or `normal`, N(0, 1) as the paper does.
    """

    name = "image_prompt"
    summary = "a learned frame of pixels added to the border of every image, for any tower"
    paper = "Bahng et al. 2022, arXiv 2203.17274"
    sides = ("vision",)
    example = {"frame": 2}  # noqa: RUF012

    def __init__(self, frame: int = 30, initial: str = "zeros"):
        super().__init__()
        if not isinstance(frame, int) or isinstance(frame, bool) or frame < 1:
            raise UserError(
                f"adapt: image_prompt takes a whole number of pixels from 1 as frame, not {frame!r}"
            )
        if initial not in INITIALS:
            raise UserError(f"adapt: image_prompt's initial is zeros or normal, not {initial!r}")
        self.frame, self.initial = frame, initial
        self.identity = initial == "zeros"

    def attach(self, place: Place) -> None:
        """Hang the frame before the tower.

        Raises:
            UserError: images too small for it or of no one size, or chosen blocks.
        """
        self.part = part = place.part
        spec: Any = part.image_spec
        if spec.native is not None:
            raise UserError(
                "adapt: 'image_prompt' needs images of one size: leave model.vision.options.native out, "
                "or choose another method such as lora"
            )
        if place.chosen is not None:
            raise UserError("adapt: 'image_prompt' stands before all blocks: leave blocks out")
        if 2 * self.frame >= min(spec.size):
            raise UserError(
                f"adapt: image_prompt's frame of {self.frame} pixels leaves nothing of an image of "
                f"{spec.size[0]} x {spec.size[1]}: choose at most {(min(spec.size) - 1) // 2}"
            )
        leaf = free_name(part, self.name)
        frame = Frame(len(spec.mean), spec.size, self.frame, self.initial, place.device)
        part.add_module(leaf, frame)
        self.parameters = {f"{self.name}.{key}": p for key, p in frame.named_parameters()}

        def before(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.active:
                return None
            pixels_NCHW, *more = args
            if tuple(pixels_NCHW.shape[-2:]) != spec.size:
                return None  # the tower says what is wrong with them
            return (tower.get_submodule(leaf)(pixels_NCHW), *more), kwargs

        part.register_forward_pre_hook(before, with_kwargs=True)
