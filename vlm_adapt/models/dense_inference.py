"""A segmenter over images of any size: windows, scales and mirrored images, averaged in bounded memory.

Knows how the logits of windows are brought together; where windows lie is dense_windows.py's. Knows nothing
about towers, texts, files or metrics.

The evaluation of LSeg (Li et al. 2022, arXiv 2201.03546): the image is resized, keeping its aspect; windows
of the tower's size are laid over it with an overlap of a third; the logits of windows that cover a pixel are
averaged, and so are those of several scales and of mirrored windows. Two things differ. Windows are spread
evenly, so that none hangs over the edge (LSeg's last ones are filled up with black). And no array of labels x
height x width is held: a band of rows at a time is made from the windows' small maps, two matrix products a
window.

Shapes: L labels, H x W pixels of the image, E channels of an embedding, h x w places of a window's map, y
rows of a band.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_adapt.errors import UserError
from vlm_adapt.models.dense_windows import Side, View, sliding_view, whole_view

WINDOWS = ("sliding", "whole")
LONGEST = 16  # windows along an image at scale 1: a strip of 10 x 100,000 pixels would have thousands
LABELS = 65535  # that a uint16 tells apart, one value being kept for "ignore"


@dataclass
class _Held:
    """Some rows of a window's map, from row `first` on, as logits or as embeddings."""

    map_Cyw: Tensor
    first: int
    rows: Side
    columns: Side
    mirrored: bool
    share: float


class DenseInference:
    """The label of every pixel of an image, whatever its size.

    Memory beside the model's own for a batch of windows: at most `kept` float32 values of maps, and about 4 x
    `values_at_once` for a band of rows (or one row, if that is more): 1.3 GB with the defaults, for any
    number of labels, windows and pixels. A map is kept as logits, or as embeddings where labels outnumber
    channels. Where the maps of an image are more than `kept`, it is done in strips, and the windows that a
    strip needs are run for it again.

    Args:
        segmenter: has `embed(pixels_NCHW uint8) -> embeddings_NEhw`, `label_logits(embeddings, names, size)
            -> logits_NLHW` and `image_spec`; may have `halo`, how many rows beside a row its logits look at.
        window: `sliding`, or `whole`: the image squashed to the tower's size.
        scales: of the resized image; the logits of several are averaged. LSeg: 0.5, 0.75, 1, 1.25, 1.5, 1.75.
        flip: average with mirrored windows.
        overlap: share of a window that its neighbour covers too, at least.
        base_size: pixels of the image's long side at scale 1 (LSeg: 520 for windows of 480). By default the
            smallest image that fills a window, at most 16 windows long.
        windows_at_once: that go through the tower together.

    Raises:
        UserError: a setting that cannot work.
    """

    def __init__(
        self,
        segmenter: Any,
        window: str = "sliding",
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        overlap: float = 1 / 3,
        base_size: int | None = None,
        windows_at_once: int = 4,
        values_at_once: int = 2**24,
        kept: int = 2**28,
    ):
        scales = tuple(float(scale) for scale in scales)
        if window not in WINDOWS:
            raise UserError(f"unknown window '{window}': choose {' or '.join(WINDOWS)}")
        if not scales or not all(0.05 <= scale <= 16 for scale in scales):
            raise UserError(f"scales {list(scales)}: give at least one number, each from 0.05 to 16")
        if window == "whole" and (scales != (1.0,) or base_size is not None):
            raise UserError(
                "window 'whole' has one size, the tower's: scales and base_size go with 'sliding'"
            )
        if not 0 <= overlap < 1:
            raise UserError(f"overlap is a share from 0 to below 1, not {overlap}")
        if base_size is not None and base_size < 1:
            raise UserError(f"base_size is a number of pixels from 1, not {base_size}")
        self.segmenter, self.window, self.scales, self.flip = segmenter, window, scales, flip
        self.overlap, self.base_size, self.windows_at_once = overlap, base_size, windows_at_once
        self.values_at_once, self.kept = values_at_once, kept

    def scores(self, pixels_HWC: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Mean logits, float32 [L, H, W]: the one call that needs memory for labels x pixels.

        Args:
            pixels_HWC: uint8, any size.
        """
        found_LHW = np.empty((len(names), *pixels_HWC.shape[:2]), np.float32)
        for first, logits_LyW in self._bands(pixels_HWC, names):
            found_LHW[:, first : first + logits_LyW.shape[1]] = logits_LyW.cpu().numpy()
        return found_LHW

    def classes(
        self, pixels_HWC: np.ndarray, names: Sequence[str], handicap: Sequence[float] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The label of every pixel, and how sure it is.

        Args:
            pixels_HWC: uint8, any size.
            handicap: taken off each label's logits.

        Returns:
            classes_HW, uint16, places in `names`; confidence_HW, float32, the label's share in a softmax of
            the mean logits.

        Raises:
            UserError: no labels, or more than 65535.
        """
        size = pixels_HWC.shape[:2]
        classes_HW, confidence_HW = np.empty(size, np.uint16), np.empty(size, np.float32)
        for first, logits_LyW in self._bands(pixels_HWC, names):
            rows = slice(first, first + logits_LyW.shape[1])
            if handicap is not None:
                logits_LyW -= torch.tensor(handicap, device=logits_LyW.device)[:, None, None]
            best_yW, class_yW = logits_LyW.max(0)
            share_yW = logits_LyW.sub_(best_yW).exp_().sum(0).reciprocal_()
            classes_HW[rows], confidence_HW[rows] = class_yW.cpu().numpy(), share_yW.cpu().numpy()
        return classes_HW, confidence_HW

    def _views(self, pixels_HWC: np.ndarray) -> list[View]:
        spec = self.segmenter.image_spec
        if self.window == "whole":
            return [whole_view(pixels_HWC, spec)]
        height, width = pixels_HWC.shape[:2]
        views = []
        for scale in self.scales:
            if self.base_size is not None:
                factor = math.ceil(self.base_size * scale) / max(height, width)
            else:
                sides = (spec.size[0] / height, spec.size[1] / width)
                factor = min(max(sides), LONGEST * min(sides)) * scale
            size = (max(1, math.floor(height * factor + 0.5)), max(1, math.floor(width * factor + 0.5)))
            views.append(sliding_view(pixels_HWC, spec, size, self.overlap))
        return views

    @torch.no_grad()
    def _bands(self, pixels_HWC: np.ndarray, names: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
        """(first row, logits_LyW) of bands from top to bottom."""
        if not 0 < len(names) <= LABELS:
            raise UserError(f"{len(names):,} labels: give from 1 to {LABELS:,}")
        image = (pixels_HWC.shape[0], pixels_HWC.shape[1])
        runs = _Runs(self, self._views(pixels_HWC), image, list(names))
        height = math.ceil(image[0] / min(image[0], max(1, math.ceil(runs.values / self.kept))))
        # A band holds L x y x W values, and those it is made of: more rows, where maps are the larger.
        density = max(1.0, max(runs.grid[0] * len(view.tops) for view in runs.views) / image[0])
        most = max(1, int(self.values_at_once / (len(names) * max(image[1], runs.grid[1]) * density)))
        for top in range(0, image[0], height):
            bottom = min(top + height, image[0])
            held = list(runs.hold(top, bottom))
            for first in range(top, bottom, most):
                yield first, runs.band(held, first, min(first + most, bottom))


class _Runs:
    """The windows of one image: run, kept, and put together."""

    def __init__(
        self, inference: DenseInference, views: list[View], image: tuple[int, int], names: list[str]
    ):
        self.inference, self.views, self.image, self.names = inference, views, image, names
        self.segmenter = inference.segmenter
        self.device = next(self.segmenter.parameters()).device
        self.halo = int(getattr(self.segmenter, "halo", 0))
        self._last: tuple[Any, Tensor] | None = None  # the batch run last, and its embeddings
        places = views[0].places()[: inference.windows_at_once]
        embeddings_NEhw = self._embed(0, places, False)
        self.grid: tuple[int, int] = (embeddings_NEhw.shape[2], embeddings_NEhw.shape[3])
        self.as_logits = len(names) <= embeddings_NEhw.shape[1]
        one = min(len(names), embeddings_NEhw.shape[1]) * math.prod(self.grid)
        # Logits of a window and of its mirror image are added at once; embeddings are not, since what follows
        # need not be linear.
        mirrors = 2 if inference.flip and not self.as_logits else 1
        self.values = one * mirrors * sum(len(view.places()) for view in views)
        self.sides = [view.sides(image, self.grid, self.device) for view in views]

    def _embed(self, number: int, places: list[tuple[int, int]], mirrored: bool) -> Tensor:
        key = (number, tuple(places), mirrored)
        if self._last is None or self._last[0] != key:
            pixels_NCHW = torch.stack([self.views[number].cut(place) for place in places]).to(self.device)
            self._last = None  # let go of the old ones first
            self._last = (key, self.segmenter.embed(pixels_NCHW.flip(-1) if mirrored else pixels_NCHW))
        return self._last[1]

    def hold(self, top: int, bottom: int) -> Iterator[_Held]:
        """What rows `top` to `bottom` of the image are made of."""
        at_once = self.inference.windows_at_once
        for number, view in enumerate(self.views):
            rows, columns = self.sides[number]
            places = [place for place in view.places() if rows[place[0]].of(top, bottom)]
            for begin in range(0, len(places), at_once):
                batch = places[begin : begin + at_once]
                for maps_NChw, mirrored, share in self._maps(number, batch):
                    for map_Chw, (y, x) in zip(maps_NChw, batch, strict=True):
                        found = rows[y].of(top, bottom)
                        assert found is not None
                        beside = 0 if self.as_logits else self.halo
                        first = max(0, found[1].start - beside)
                        kept_Cyw = map_Chw[:, first : found[1].stop + beside]
                        if kept_Cyw.shape != map_Chw.shape or len(maps_NChw) > 1:
                            kept_Cyw = kept_Cyw.clone()  # a view would keep the whole batch
                        yield _Held(kept_Cyw, first, rows[y], columns[x], mirrored, share / len(self.views))
        self._last = None

    def _maps(self, number: int, batch: list[tuple[int, int]]) -> Iterator[tuple[Tensor, bool, float]]:
        """(maps_NChw, whether they are mirrored, their share) of a batch of windows."""
        ways = (False, True) if self.inference.flip else (False,)
        if not self.as_logits:
            for mirrored in ways:
                yield self._embed(number, batch, mirrored), mirrored, 1 / len(ways)
            return
        total_NLhw: Tensor | None = None
        for mirrored in ways:
            embeddings_NEhw = self._embed(number, batch, mirrored)
            logits_NLhw = self.segmenter.label_logits(embeddings_NEhw, self.names, self.grid).float()
            logits_NLhw = logits_NLhw.flip(-1) if mirrored else logits_NLhw
            total_NLhw = logits_NLhw if total_NLhw is None else total_NLhw + logits_NLhw
        assert total_NLhw is not None
        yield total_NLhw, False, 1 / len(ways)

    def band(self, held: Sequence[_Held], first: int, last: int) -> Tensor:
        """logits_LyW of rows `first` to `last`."""
        total_LyW = torch.zeros(len(self.names), last - first, self.image[1], device=self.device)
        for one in held:
            down, across = one.rows.of(first, last), one.columns.of(0, self.image[1])
            if down is None or across is None:
                continue
            logits_Ljw = self._logits(one, down[1])
            with torch.autocast(self.device.type, enabled=False):
                columns_Xw = one.columns.weights_SM[across[0], across[1]]
                wide_LjX = logits_Ljw[..., across[1]] @ columns_Xw.T
                part_LyX = one.rows.weights_SM[down[0], down[1]] @ wide_LjX
            rows = slice(down[0].start - first, down[0].stop - first)
            total_LyW[:, rows, across[0]].add_(part_LyX, alpha=one.share)
        return total_LyW

    def _logits(self, held: _Held, rows: slice) -> Tensor:
        """logits_Ljw of some rows of a map."""
        if self.as_logits:
            return held.map_Cyw[:, rows.start - held.first : rows.stop - held.first]
        begin = max(held.first, rows.start - self.halo)
        part_Ejw = held.map_Cyw[:, begin - held.first : rows.stop + self.halo - held.first]
        size = (part_Ejw.shape[1], part_Ejw.shape[2])
        logits_Ljw = self.segmenter.label_logits(part_Ejw[None], self.names, size)[0].float()
        logits_Ljw = logits_Ljw[:, rows.start - begin : rows.stop - begin]
        return logits_Ljw.flip(-1) if held.mirrored else logits_Ljw
