"""Features of images of different sizes, and what connectors do to them image by image.

Knows grids and lengths; knows nothing about towers or language models.

    T patches of all images, I images, P patches of the longest, V channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VARIES = (0, 0)  # the grid of layers whose images have each their own


@dataclass(frozen=True)
class PackedFeatures:
    """A tower's features, the patches of one image after another.

    Attributes:
        layers: features_TV of each layer.
        grids: (rows, columns) of each image.
        lengths: how many of its patches are there.
    """

    layers: Sequence[Tensor]
    grids: Sequence[tuple[int, int]]
    lengths: Sequence[int]

    def select(self, images: Sequence[int]) -> PackedFeatures:
        """Some of the images, in the order given."""
        layers = []
        for features_TV in self.layers:
            apart = features_TV.split(list(self.lengths))
            layers.append(torch.cat([apart[image] for image in images]))
        grids, lengths = [self.grids[i] for i in images], [self.lengths[i] for i in images]
        return PackedFeatures(layers, grids, lengths)


def padded(features_TV: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Each image's patches in a row of their own: features_IPV, and which places are taken [I, P]."""
    features_IPV = nn.utils.rnn.pad_sequence(list(features_TV.split(list(lengths))), batch_first=True)
    places_P = torch.arange(features_IPV.shape[1], device=features_TV.device)
    return features_IPV, places_P < torch.tensor(lengths, device=features_TV.device)[:, None]


def grouped(features_TV: Tensor, grids: Sequence[tuple[int, int]], factor: int) -> Tensor:
    """factor x factor neighbours of each image joined: [T / factor^2, factor^2 * V], images in order.

    Within a group patches are ordered by row, then column; groups of an image row by row.
    """
    order, start = [], 0
    for rows, columns in grids:
        places_RC = torch.arange(rows * columns).view(rows // factor, factor, columns // factor, factor)
        order.append(places_RC.transpose(1, 2).flatten() + start)
        start += rows * columns
    taken_TV = features_TV[torch.cat(order).to(features_TV.device)]
    return taken_TV.unflatten(0, (-1, factor**2)).flatten(1)
