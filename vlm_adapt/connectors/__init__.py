"""Connectors by name: what turns a tower's features into tokens of a language model's width.

Knows the table and its options; knows nothing about any connector's inside. Importing this imports no
torch. Options of all of them: `grid`, `normalise` (see `gather.GatherLayers`) and `output_scale`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_adapt.choices import Choices, nearest
from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    from vlm_adapt.connectors.connector import Connector

CONNECTORS = Choices(
    "connector",
    {
        "linear": "vlm_adapt.connectors.linear:LinearConnector",
        "mlp": "vlm_adapt.connectors.mlp:MLPConnector",
        "pixel_shuffle": "vlm_adapt.connectors.pixel_shuffle:PixelShuffleConnector",
        "resampler": "vlm_adapt.connectors.resampler:ResamplerConnector",
        "qformer": "vlm_adapt.connectors.qformer:QFormerConnector",
    },
)


def connector_options(name: str) -> dict[str, Any]:
    """The options of connector `name` with their defaults: the keyword-only arguments of its class."""
    options: dict[str, Any] = {}
    for parent in reversed(CONNECTORS.load(name).__mro__):
        if "__init__" in vars(parent):
            for parameter in inspect.signature(vars(parent)["__init__"]).parameters.values():
                if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "embedding_rms":
                    options[parameter.name] = parameter.default
    return options


def build_connector(
    name: str,
    widths: Sequence[int],
    grids: Sequence[tuple[int, int]],
    width_out: int,
    embedding_rms: float | None = None,
    **options: Any,
) -> Connector:
    """A connector for features of these widths and grids (one entry for each requested layer).

    Args:
        name: an entry of CONNECTORS.
        widths, grids: channels and (rows, columns) of each layer, from `tower.widths(layers)` and
            `tower.grids(layers)`.
        width_out: the language model's embedding width.
        embedding_rms: root mean square of its embeddings' entries, for `output_scale=True`.
    Raises:
        UserError: an unknown connector or option, or an option's value that cannot work.
    """
    known = connector_options(name)
    for option in options:
        if option not in known:
            raise UserError(
                f"unknown option '{option}' of connector '{name}'{nearest(option, known) or ':'} "
                f"known are {', '.join(sorted(known))}"
            )
    return CONNECTORS.load(name)(
        list(widths), [tuple(grid) for grid in grids], width_out, embedding_rms=embedding_rms, **options
    )
