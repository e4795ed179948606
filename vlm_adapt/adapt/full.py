"""Full fine-tuning of a part. Knows only that whatever is used, trains."""

from __future__ import annotations

from torch import nn

from vlm_adapt.adapt.method import Method
from vlm_adapt.errors import UserError


class Full(Method):
    """Train every parameter of the part that gets a gradient."""

    name = "full"

    def attach(self, part: nn.Module, unused: set[str]) -> None:
        """Name every used parameter of the part."""
        self.part = part
        self.parameters = {
            name: parameter
            for name, parameter in part.named_parameters()
            if not any(name == place or name.startswith(place + ".") for place in unused)
        }
        if not self.parameters:
            raise UserError("adapt: 'full' finds nothing to train: this part has no parameters")
