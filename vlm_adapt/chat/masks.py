"""The masks of a reply: drawn over their image, and written beside it.

Knows images, masks and file names; knows nothing about models or terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from vlm_adapt.data.images import MAX_PIXELS, decode
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.report.colours import Colour
from vlm_adapt.report.regions import veiled

# A mask is known by its place in the reply, not by a name. Okabe and Ito's, the strongest first.
PALETTE: tuple[Colour, ...] = (
    *((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)),
    (240, 228, 66),
)


@dataclass(frozen=True)
class ReplyMask:
    """A mask that a reply carries.

    Attributes:
        image: the file that it is of.
        mask_HW: bool, of the image's own size.
    """

    image: str
    mask_HW: np.ndarray

    @property
    def share(self) -> float:
        """Of the image's pixels."""
        return float(self.mask_HW.mean())


def read_pixels(file: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """pixels_HWC of an image that was shown before.

    Raises:
        UserError: it is gone, or another file now.
    """
    try:
        return decode(Path(file).read_bytes(), max_pixels)
    except (OSError, BadSample) as error:
        raise UserError(f"'{file}' can no longer be read, so its mask is not drawn: {error}") from error


def overlay(masks: Sequence[ReplyMask], max_pixels: int = MAX_PIXELS) -> PILImage.Image:
    """An image under the masks of a reply on it, each in its colour; a later one covers an earlier one.

    Raises:
        UserError: the image is gone, or has another size now.
    """
    pixels_HWC = read_pixels(masks[0].image, max_pixels)
    index_HW = np.full(pixels_HWC.shape[:2], 255, np.uint8)
    for number, mask in enumerate(masks):
        if mask.mask_HW.shape != index_HW.shape:
            raise UserError(f"'{mask.image}' has another size than when it was shown: ask again")
        index_HW[mask.mask_HW] = number % len(PALETTE)
    return PILImage.fromarray(veiled(pixels_HWC, index_HW, PALETTE))


def write(picture: PILImage.Image, image: str) -> Path:
    """Write a picture beside its image, or in this folder where nothing can be written there.

    Returns:
        its file, of a name that was free.

    Raises:
        UserError: neither folder can be written to.
    """
    reason = ""
    for folder in (Path(image).parent, Path.cwd()):
        for number in count(1):
            target = folder / f"{Path(image).stem}-mask-{number}.png"
            try:
                with target.open("xb") as file:
                    picture.save(file, "PNG")
                return target
            except FileExistsError:
                continue
            except OSError as error:
                reason = reason or f"'{target}': {error.strerror}"
                with suppress(OSError):
                    target.unlink(missing_ok=True)  # of a full disk
                break
    raise UserError(f"the mask can be written neither to {reason}, nor to the current folder")
