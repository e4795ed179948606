"""Dense heads by name: what turns a tower's features at four depths into an embedding for every pixel.

Knows the table and its options; knows nothing about any head's inside, towers or texts. Importing this
imports no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_adapt.choices import Choices, nearest
from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    from vlm_adapt.heads.dense_head import DenseHead

HEADS = Choices("dense head", {"dpt": "vlm_adapt.heads.dpt:DptHead"})


def head_options(name: str) -> dict[str, Any]:
    """The options of head `name` with their defaults: the keyword-only arguments of its class."""
    parameters = inspect.signature(HEADS.load(name).__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


def build_head(
    name: str,
    widths: Sequence[int],
    grids: Sequence[tuple[int, int]],
    embedding_size: int,
    class_token: bool = False,
    **options: Any,
) -> DenseHead:
    """A dense head for features of these widths and grids (one entry for each depth).

    Args:
        name: an entry of HEADS.
        widths, grids: channels and (rows, columns) of each depth, from `tower.widths(layers)` and
            `tower.grids(layers)`.
        embedding_size: channels of a pixel's embedding: the text encoder's width.
        class_token: whether the tower has one (`tower.has_class_token`); the head's `wants_class_token` then
            says whether it wants features with it.
    Raises:
        UserError: an unknown head or option, or an option's value that cannot work.
    """
    known = head_options(name)
    for option in options:
        if option not in known:
            raise UserError(
                f"unknown option '{option}' of head '{name}'{nearest(option, known) or ':'} "
                f"known are {', '.join(sorted(known))}"
            )
    return HEADS.load(name)(
        list(widths), [tuple(grid) for grid in grids], embedding_size, class_token, **options
    )
