"""Files of a segmentation: the mask, the picture, the chances. Each is there whole or not at all.

Knows formats; knows nothing of models. A mask is a PNG whose values are places in the list of labels: 8 bits
with a palette of the labels' colours, and 255 where there is no label; beyond 255 labels 16 bits of grey,
and 65535. The names stand in it as text ("labels", JSON), in that order.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from vlm_adapt.report.colours import Colour
from vlm_adapt.report.regions import PAPER, Entry, fit_mask, legend, picture_size, veiled
from vlm_adapt.segment.result import NONE, Segmentation

FEW = 255  # labels that fit into 8 bits beside the value for none
LEGEND_ROWS = 60  # names in the legend of a film, which is the same for every frame


def mask_png(found: Segmentation, palette: Sequence[Colour]) -> bytes:
    """The mask file."""
    words = PngInfo()
    words.add_itxt("labels", json.dumps(list(found.names), ensure_ascii=False))
    if len(found.names) > FEW:
        image = PILImage.fromarray(found.classes_HW)
    else:
        image = PILImage.fromarray(np.where(found.classes_HW == NONE, FEW, found.classes_HW).astype(np.uint8))
        image = image.convert("L")
        image.putpalette(
            [value for colour in [*palette, *[(0, 0, 0)] * (256 - len(palette))] for value in colour]
        )
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=words)
    return buffer.getvalue()


def scores_file(found: Segmentation) -> bytes:
    """safetensors: `scores` float16 [L, H, W], and the labels in its metadata."""
    from safetensors.numpy import save

    assert found.scores_LHW is not None
    words = {"labels": json.dumps(list(found.names), ensure_ascii=False)}
    return save({"scores": found.scores_LHW.astype(np.float16)}, metadata=words)


class Film:
    """Overlays of the frames of one film: all of one size, under one legend of all names."""

    def __init__(self, opacity: float):
        self.opacity = opacity
        self.size: tuple[int, int] | None = None
        self.key: PILImage.Image | None = None

    def picture(
        self, pixels_HWC: np.ndarray, found: Segmentation, palette: Sequence[Colour]
    ) -> PILImage.Image:
        """A frame under its regions, above the legend."""
        if self.size is None:
            self.size = picture_size(pixels_HWC.shape[1], pixels_HWC.shape[0])
            if found.listed:
                shown = zip(found.names[:LEGEND_ROWS], palette, strict=False)
                lines = [Entry(name, "", colour) for name, colour in shown]
                more = len(found.names) - len(lines)
                lines += [Entry(f"and {more} more", "", PAPER)] if more else []
                self.key = legend(lines, self.size[0], max(11, round(max(self.size) / 52)))
        image = PILImage.fromarray(pixels_HWC).resize(self.size, PILImage.Resampling.LANCZOS)
        mask_HW = fit_mask(found.classes_HW, self.size)
        image = PILImage.fromarray(veiled(np.asarray(image), mask_HW, palette, self.opacity))
        if self.key is None:
            return image
        page = PILImage.new("RGB", (image.width, image.height + self.key.height), PAPER)
        page.paste(image, (0, 0))
        page.paste(self.key, (0, image.height))
        return page


def folder_for(path: Path) -> Path:
    """The path, whose folder is there from now on. Raises UserError."""
    from vlm_adapt.data.write import clear_errors

    with clear_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path
