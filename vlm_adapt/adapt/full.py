"""Full fine-tuning of a part, or of some of its blocks. Knows only that whatever is used, trains."""

from __future__ import annotations

from torch import nn

from vlm_adapt.adapt.kept import Kept
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError

KEPT_BYTES = 2**28  # of the base's values, beside a part that trains in full: enough for any connector


class Full(Method):
    """Train every parameter that gets a gradient: of the part, or of the blocks that `blocks` names."""

    name = "full"
    summary = "every weight of the part, or of its last blocks with `blocks`"
    order = 0
    alone = True

    def __init__(self) -> None:
        super().__init__()
        self.kept: Kept | None = None

    def attach(self, place: Place) -> None:
        """Name every used parameter."""
        self.part = place.part
        self.alone = place.chosen is None
        within: set[int] | None = None
        if place.chosen is not None:
            within = {id(p) for _, _, block in place.blocks() for p in block.parameters()}
        self.parameters = {
            name: parameter
            for name, parameter in place.part.named_parameters()
            if place.is_used(name) and (within is None or id(parameter) in within)
        }
        if not self.parameters:
            raise UserError(f"adapt: '{self.name}' finds nothing to train: this part has no parameters")
        self._keep()

    def _keep(self) -> None:
        if sum(p.numel() * p.element_size() for p in self.parameters.values()) <= KEPT_BYTES:
            self.kept = Kept(self.parameters)

    def set_active(self, active: bool) -> None:
        """Put the trained values in place, or the base's own.

        Raises:
            UserError: the part is so large that the base's values were not kept beside it.
        """
        if active != self.active and self.kept is None:
            raise UserError(
                f"adapt: '{self.name}' cannot be switched: of so large a part the base's own values were "
                "not kept; open the checkpoint as an adapter (chat --adapter, models.adapters)"
            )
        super().set_active(active)
        if self.kept is not None:
            self.kept.show(active)


class LastBlocks(Full):
    """Train the last blocks alone.

    Args:
        k: how many, counted from the last that is used.
    """

    name = "last_blocks"
    summary = "every weight of the last k blocks"
    alone = False

    def __init__(self, k: int = 1):
        super().__init__()
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise UserError(f"adapt: last_blocks takes a whole number k from 1, not {k!r}")
        self.k = k

    def attach(self, place: Place) -> None:
        """Name the parameters of the last blocks."""
        blocks = place.blocks()
        if self.k > len(blocks):
            raise UserError(f"adapt: last_blocks k {self.k} is more than the {len(blocks)} blocks there are")
        parameters: dict[int, nn.Parameter] = {
            id(p): p for _, _, block in blocks[-self.k :] for p in block.parameters()
        }
        self.part = place.part
        self.parameters = {name: p for name, p in place.part.named_parameters() if id(p) in parameters}
        self._keep()
