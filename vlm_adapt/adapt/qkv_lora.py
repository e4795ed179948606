"""LoRA on some of the projections of attention, where one fused layer gives queries, keys and values too.

W x + (lora_alpha / r) B A x for each chosen piece of the output, with an A and a B of its own: loralib's
MergedLinear, for any layout. The pieces that are not chosen are the base's to the bit. Knows layouts by
adapt/projections.py; knows nothing about attention itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_adapt.adapt.linear_layers import LINEAR, Layer, find_layers
from vlm_adapt.adapt.low_rank import Joined, Update, check_dropout, check_droppable, check_rank
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.projections import LETTERS, Projections, projections_of
from vlm_adapt.errors import UserError


class QkvLora(Method):
    """LoRA on queries, keys or values alone, in any attention: fused or separate projections.

    Args:
        r: rank of each projection's update.
        lora_alpha: the update is scaled by lora_alpha / r; 2 r by default.
        lora_dropout: dropout on the update's input; not where the library reads the fused weight itself
            (torch's attention in open_clip, BEiT, EVA, Swin V2).
        projections: any of q, k and v.

    Raises:
        UserError: bad numbers, no such projection, or a fused layout that is not known.
    """

    name = "qkv_lora"
    summary = "LoRA on chosen ones of query, key and value, also where one layer gives all three"
    paper = "Hu et al. 2021, arXiv 2106.09685, and MergedLinear of its library loralib"
    order = 1
    mergeable = True
    example = {"r": 4}

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        projections: Sequence[str] = ("q", "v"),
    ):
        super().__init__()
        self.r, self.scale = check_rank(self.name, r, lora_alpha)
        self.dropout = check_dropout(self.name, lora_dropout)
        chosen = [projections] if isinstance(projections, str) else list(projections)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(LETTERS):
            raise UserError(
                f"adapt: {self.name}'s projections are some of q, k and v, as [q, v], not {projections!r}"
            )
        self.chosen = chosen
        self.joined: list[Joined] = []

    def attach(self, place: Place) -> None:
        """Put an update on each layer that gives one of the projections."""
        self.part = place.part
        found = self._layers(place)
        for layer, layout in found:
            letters = list(layout.sizes)
            chosen = {
                letters.index(letter): letter
                for letter in LETTERS
                if letter in self.chosen and letter in letters
            }
            sizes = list(layout.sizes.values())
            update = Update(
                layer.shape, self.r, self.scale, self.dropout, chosen, layout.groups, sizes, place.device
            )
            self.joined.append(Joined(layer, update, self.name))
            # A separate projection says in its own name which one it is.
            inner = {letter: f"{letter}." if len(letters) > 1 else "" for letter in letters}
            for letter in chosen.values():
                for side in "AB":
                    key = f"{layer.name}.{inner[letter]}lora_{side}"
                    self.parameters[key] = update.get_parameter(f"{letter}_{side}")

    def _layers(self, place: Place) -> list[tuple[Layer, Projections]]:
        found = []
        for layer in find_layers(place, self.name, "all-linear", LINEAR):
            try:
                layout = projections_of(layer)
            except LookupError:
                raise UserError(
                    f"adapt: {self.name} cannot tell where q, k and v lie in '{layer.name}' of "
                    f"'{place.where}': use lora with target_modules there"
                ) from None
            if layout is not None and set(layout.sizes) & set(self.chosen):
                found.append((layer, layout))
        if not found:
            raise UserError(
                f"adapt: {self.name} finds no query, key or value projection in '{place.where}': "
                "use lora with target_modules there"
            )
        check_droppable(self.name, self.dropout, [layer for layer, _ in found])
        return found

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
