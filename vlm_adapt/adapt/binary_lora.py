"""LoRA whose A and B are stored with one bit for each number (Bi-LoRA).

W x + (lora_alpha / r) b(B) b(A) x, where b keeps of each factor the sign of every z-score, its mean and its
deviation (adapt/bits.py). Trained are floats. Knows linear layers; knows nothing about what they are for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vlm_adapt.adapt.bits import binarised
from vlm_adapt.adapt.linear_layers import LINEAR, find_layers
from vlm_adapt.adapt.low_rank import Joined, Update, check_dropout, check_droppable, check_rank
from vlm_adapt.adapt.one_bit import OneBitFiles
from vlm_adapt.adapt.place import Place


class BinaryUpdate(Update):
    """An update whose factors take two values each."""

    def factor(self, tensor: Tensor) -> Tensor:
        """As in Update."""
        return binarised(tensor)


class BinaryLora(OneBitFiles):
    """LoRA of one bit a number, on the linear layers of a part.

    B starts with a deviation of 0.001, as in the paper's code: at zero it would have no sign. So the model
    is not quite the base at the start.

    Args:
        r: rank; the paper spends what a bit saves on rank, and takes 32.
        lora_alpha: the update is scaled by lora_alpha / r; r by default.
        lora_dropout: dropout on the update's input.
        target_modules: `all-linear` (of the part's blocks), a name, or a list of names.

    Raises:
        UserError: bad numbers, or no such layer.
    """

    name = "binary_lora"
    summary = "LoRA with factors of one bit a number"
    paper = "Jie et al. 2023, arXiv 2307.16867"
    order = 1
    mergeable = True
    identity = False
    example = {"r": 4}

    def __init__(
        self,
        r: int = 32,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
    ):
        super().__init__()
        self.r, self.scale = check_rank(self.name, r, lora_alpha, 1.0)
        self.dropout = check_dropout(self.name, lora_dropout)
        self.targets = target_modules
        self.joined: list[Joined] = []

    def attach(self, place: Place) -> None:
        """Put an update beside each chosen layer."""
        self.part = place.part
        layers = find_layers(place, self.name, self.targets, LINEAR)
        check_droppable(self.name, self.dropout, layers)
        for layer in layers:
            update = BinaryUpdate(layer.shape, self.r, self.scale, self.dropout, device=place.device)
            nn.init.trunc_normal_(update.get_parameter("lora_B"), std=0.001, a=-0.002, b=0.002)
            self.joined.append(Joined(layer, update, self.name))
            for leaf in ("lora_A", "lora_B"):
                self.parameters[f"{layer.name}.{leaf}"] = update.get_parameter(leaf)

    def set_active(self, active: bool) -> None:
        """As in Method."""
        super().set_active(active)
        for joined in self.joined:
            joined.set_active(active)

    def merge(self) -> None:
        """Add the updates to the weights."""
        for joined in self.joined:
            joined.merge()
        self.joined, self.parameters = [], {}
