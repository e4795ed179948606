"""Ranks that segment different images, kept in step.

Where a model's weights are shared out (ZeRO-3) every forward pass is a collective: a rank that has fewer
windows to run, or has run out of images, must run along. Before each pass the ranks tell each other what they
want to run; each then does what is done, with its own input or with a stand-in, until none wants anything.

Knows the two calls of a segmenter that run its weights; knows nothing about images or scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_adapt import dist

STAND_IN = ("other",)
_EMBED, _LOGITS, _NAMES = range(3)


class Paced:
    """A segmenter whose passes all ranks make together.

    It has the seam of DenseInference: `embed`, `label_logits`, `image_spec`, `halo`, `parameters`. Each rank
    calls `finish` when it has nothing more to run; all return from it together.

    Args:
        segmenter: as models/segmenter.py; its text encoder is run together too, where it is trained.
    """

    def __init__(self, segmenter: Any, device: torch.device):
        self.segmenter, self.device = segmenter, device
        self.image_spec, self.halo = segmenter.image_spec, segmenter.halo
        self._shared: bool = segmenter.labels.encoder.trains
        if self._shared:
            segmenter.labels.forget()  # so that all ranks know the same names
        self._known: set[str] = set()
        self._small_1Ehw: Tensor | None = None

    def parameters(self) -> Any:
        """Those of the segmenter."""
        return self.segmenter.parameters()

    def embed(self, pixels_NCHW: Tensor) -> Tensor:
        """As the segmenter's, once all ranks make such a pass."""
        while self._agree(_EMBED) != _EMBED:
            pass
        return self._keep(self.segmenter.embed(pixels_NCHW))

    def label_logits(self, embeddings_NEhw: Tensor, names: Sequence[str], size: tuple[int, int]) -> Tensor:
        """As the segmenter's, once all ranks make such a pass."""
        if self._shared and not self._known.issuperset((*names, *STAND_IN)):
            while self._agree(_NAMES, names) != _NAMES:
                pass
        while self._agree(_LOGITS) != _LOGITS:
            pass
        return self.segmenter.label_logits(embeddings_NEhw, names, size)

    def finish(self) -> None:
        """Run along until no rank wants anything."""
        while self._agree(None) is not None:
            pass

    def _agree(self, wish: int | None, names: Sequence[str] = ()) -> int | None:
        """What is done in this round; done with a stand-in already where it is not this rank's wish.

        Embeddings go first, then names, then logits; None where no rank wants anything.
        """
        wishes = dist.total([float(wish == kind) for kind in (_EMBED, _NAMES, _LOGITS)])
        kinds = zip((_EMBED, _NAMES, _LOGITS), wishes, strict=True)
        done = next((kind for kind, ranks in kinds if ranks), None)
        if done == _NAMES:
            self.know(names)
        elif done is not None and done != wish:
            self._stand_in(done)
        return done

    def know(self, names: Sequence[str]) -> None:
        """Encode the names of all ranks; every rank calls it at the same point."""
        if self._shared:
            everyone = [name for part in dist.gather([*names, *STAND_IN]) for name in part]
            self.segmenter.labels(list(dict.fromkeys(everyone)))
            self._known.update(everyone)

    def _stand_in(self, kind: int) -> None:
        if kind == _EMBED:
            size = self.image_spec.size
            self._keep(self.segmenter.embed(torch.zeros(1, 3, *size, dtype=torch.uint8, device=self.device)))
        else:
            assert self._small_1Ehw is not None  # nobody wants logits before all have made an embedding
            self.segmenter.label_logits(self._small_1Ehw, list(STAND_IN), (2, 2))

    def _keep(self, embeddings_NEhw: Tensor) -> Tensor:
        """Remember a corner as a stand-in."""
        if self._small_1Ehw is None:
            self._small_1Ehw = embeddings_NEhw[:1, :, :2, :2].clone()
        return embeddings_NEhw
