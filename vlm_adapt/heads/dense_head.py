"""The seam of dense heads: features of a tower at some depths to a map of embeddings.

Knows what goes in and what comes out; knows nothing about any architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class DenseHead(nn.Module):
    """Subclasses give `forward`.

    Attributes:
        wants_class_token: whether each depth's features begin with the class token.
        grid: (rows, columns) of the map that comes out.
    """

    wants_class_token: bool
    grid: tuple[int, int]

    def forward(self, features: Sequence[Tensor], compact: bool = False) -> Any:
        """features_NPD of each depth ([N, 1 + P, D] with a class token) to embeddings_NEhw, not normalised.

        Args:
            compact: (pixels_NBhw, basis_EB) instead, from which the same cosines come (heads/projection.py).

        Raises:
            UserError: other depths, widths or grids than it was built for.
        """
        raise TypeError(f"{type(self).__name__} does not say how to compute embeddings")

    def basis(self) -> Tensor:
        """basis_EB alone, as `compact` gives it."""
        raise TypeError(f"{type(self).__name__} does not say what its embeddings are made of")

    def unused_modules(self) -> list[str]:
        """Dotted names of modules whose parameters get no gradient, whatever goes in."""
        return []
