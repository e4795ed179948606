"""An image and its mask stay together, whatever is drawn: scale, place, mirror, fraction of the decoder."""

from __future__ import annotations

import io
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_adapt.config.schema import Augment
from vlm_adapt.data.augment import (
    Cut,
    Span,
    cut_mask,
    cut_pixels,
    draw_cut,
    fitted,
    jitter_colours,
    squashed,
)
from vlm_adapt.data.images import decode
from vlm_adapt.data.reduced import decode_reduced, reducible
from vlm_adapt.image_spec import ImageSpec

torch.set_num_threads(1)
COLOURS = np.array([[230, 30, 30], [30, 230, 30], [30, 30, 230], [230, 230, 230], [20, 20, 20]], np.uint8)
MEAN = (0.6, 0.4, 0.1)  # of no colour above


def scene(seed: int, height: int, width: int) -> np.ndarray:
    """codes_HW: a board of 4 x 4 fields of classes 1 to 5, none of which any scale makes thin."""
    board = np.random.default_rng(seed).integers(1, 6, (4, 4)).astype(np.uint8)
    return board[np.arange(height) * 4 // height][:, np.arange(width) * 4 // width]


def inside(mask_HW: np.ndarray, by: int) -> np.ndarray:
    """Pixels whose neighbours, `by` pixels around, are all of their class."""
    padded = np.pad(mask_HW, by, mode="edge")
    same = np.ones(mask_HW.shape, bool)
    for down in range(2 * by + 1):
        for right in range(2 * by + 1):
            same &= padded[down : down + len(mask_HW), right : right + mask_HW.shape[1]] == mask_HW
    return same


def nearest_class(pixels_HWC: np.ndarray) -> np.ndarray:
    """The class whose colour is nearest, -1 for the padding's."""
    known = np.concatenate([COLOURS, [[round(255 * value) for value in MEAN]]]).astype(np.int32)
    distances = ((pixels_HWC[:, :, None].astype(np.int32) - known) ** 2).sum(-1)
    found = distances.argmin(-1)
    return np.where(found == len(COLOURS), -1, found)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_colours_and_classes_stay_together(kind: str, size: tuple[int, int]) -> None:
    """The image's colour encodes its class: after any cut each pixel still has its class's colour.

    A pixel at borders is left out, where antialiasing mixes colours.
    """
    spec, draws = ImageSpec(size, MEAN), np.random.default_rng(7)
    seen: set[object] = set()
    for number in range(60):
        height, width = (int(side) for side in draws.integers(40, 420, 2))
        codes_HW = scene(number, height, width)
        buffer = io.BytesIO()
        more = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
        Image.fromarray(COLOURS[codes_HW - 1]).save(buffer, kind, **more)
        data = buffer.getvalue()
        assert reducible(data) == (kind == "JPEG")
        cut = draw_cut((height, width), size, Augment(), draws, reducible(data))
        seen |= {cut.flip, cut.full, f"{cut.factor}", cut.rows.length < -(-height // cut.factor)}
        pixels_HWC = cut_pixels(decode_reduced(data, cut.factor), cut, spec)
        mask_HW = cut_mask(codes_HW, cut)
        assert pixels_HWC.shape == (*size, 3) and mask_HW.shape == size and mask_HW.dtype == np.int16
        clear_HW = inside(mask_HW, 1)
        wrong = (nearest_class(pixels_HWC) != mask_HW) & clear_HW
        assert not wrong.any()
        assert clear_HW.mean() > 0.2
    assert {True, False} <= seen and (kind == "PNG") == ({"2", "4"} & seen == set())


def test_masks_are_taken_at_pixel_centres() -> None:
    """Against the formula in exact fractions."""
    draws = np.random.default_rng(3)
    for _ in range(40):
        height, width = (int(side) for side in draws.integers(1, 90, 2))
        codes_HW = draws.integers(0, 250, (height, width)).astype(np.uint8)
        cut = draw_cut((height, width), (31, 17), Augment(scale=(0.1, 3.0)), draws, True)
        expected = np.full((31, 17), -1)
        for row in range(cut.rows.made):
            for column in range(cut.columns.made):
                places = []
                for span, target, old in (
                    (cut.rows, row, height),
                    (cut.columns, cut.columns.made - 1 - column if cut.flip else column, width),
                ):
                    at = span.start + Fraction(2 * target + 1, 2) * Fraction(span.length, span.made)
                    places.append(min(old - 1, floor(at * cut.factor)))
                expected[cut.rows.to + row, cut.columns.to + column] = int(codes_HW[tuple(places)]) - 1
        assert np.array_equal(cut_mask(codes_HW, cut), expected)


def test_draws() -> None:
    """Scales are those asked for, of fitting; places are uniform; a seed gives the same again."""
    draws, flips, scales, starts = np.random.default_rng(0), 0, [], set()
    for _ in range(400):
        cut = draw_cut((100, 200), (50, 50), Augment(), draws)
        flips += cut.flip
        scales.append(cut.columns.made / cut.columns.length / 0.25)
        if cut.columns.length == 100:
            starts.add(cut.columns.start)
        assert 0 <= cut.rows.to <= 50 - cut.rows.made
        assert cut.columns.start + cut.columns.length <= 200
    assert 150 < flips < 250  # five deviations
    # Whole pixels round a scale by at most half a pixel in the 25 that are made.
    assert 0.48 <= min(scales) < 0.55 and 1.95 < max(scales) <= 2.05 and 1.2 < np.mean(scales) < 1.3
    again = [draw_cut((100, 200), (50, 50), Augment(), np.random.default_rng(1)) for _ in range(2)]
    assert again[0] == again[1]
    assert not any(draw_cut((9, 9), (5, 5), Augment(flip=False), draws).flip for _ in range(20))
    whole = draw_cut((100, 200), (50, 50), Augment(crop=False, flip=False), draws)
    assert whole == squashed((100, 200), (50, 50)) and whole.full


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
def test_odd_images(size: tuple[int, int]) -> None:
    """Strips and single pixels give pictures, too."""
    draws = np.random.default_rng(0)
    pixels_HWC, codes_HW = np.full((*size, 3), 9, np.uint8), np.full(size, 3, np.uint8)
    for _ in range(20):
        cut = draw_cut(size, (16, 16), Augment(), draws)
        assert cut_pixels(pixels_HWC, cut, ImageSpec((16, 16))).shape == (16, 16, 3)
        assert (cut_mask(codes_HW, cut) == 2).any()


@pytest.mark.parametrize(("way", "tall"), [("squash", 8), ("pad", 4), ("crop", 8)])
def test_nothing_drawn(way: str, tall: int) -> None:
    """As the tower's own images are made."""
    cut = fitted((10, 20), ImageSpec((8, 8), resize=way))
    assert cut.rows.made == tall and cut.columns.made == 8 and not cut.flip
    assert cut.rows.to == (8 - tall) // 2
    assert (cut.columns.start, cut.columns.length) == ((5, 10) if way == "crop" else (0, 20))


def test_the_picture_has_memory_of_its_own() -> None:
    """The decoder's memory is used again for the next image."""
    pixels_HWC = np.zeros((8, 8, 3), np.uint8)
    for cut in (squashed((8, 8), (8, 8)), Cut(Span(0, 8, 0, 8), Span(0, 4, 0, 4), (8, 8))):
        assert not np.may_share_memory(cut_pixels(pixels_HWC, cut, ImageSpec((8, 8))), pixels_HWC)


def test_jitter() -> None:
    """Against the three steps one after the other; padding keeps its colour."""
    draws = np.random.default_rng(5)
    pixels_HWC = np.repeat(draws.integers(60, 180, (8, 8, 3)).astype(np.uint8), 4, 0).repeat(4, 1)
    cut = Cut(Span(0, 1, 0, 32), Span(0, 1, 0, 28), (32, 32))
    changed_HWC = pixels_HWC.copy()
    jitter_colours(changed_HWC, cut, 0.2, np.random.default_rng(9))
    brightness, contrast, saturation = np.random.default_rng(9).uniform(0.8, 1.2, 3)
    luma = np.array([0.299, 0.587, 0.114])
    values = pixels_HWC[:, :28] * brightness
    grey = (values @ luma).mean()
    values = (values - grey) * contrast + grey
    own = (values @ luma)[..., None]
    values = own + (values - own) * saturation
    # Rounding to whole values is half a level; every other row of the mean is the same here.
    assert np.abs(changed_HWC[:, :28] - values.clip(0, 255)).max() <= 0.51
    assert np.array_equal(changed_HWC[:, 28:], pixels_HWC[:, 28:])


def test_reduced_images() -> None:
    """A fraction of a smooth photograph is what averaging gives; turned files and others stay whole."""
    rows, columns = np.mgrid[0:96, 0:130]
    wave = 128 + 90 * np.sin(rows / 17) * np.cos(columns / 23)
    pixels_HWC = np.stack([wave, wave[::-1], wave[:, ::-1]], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=95, subsampling=0)
    data = buffer.getvalue()
    for factor in (2, 4, 8):
        small_HWC = decode_reduced(data, factor)
        assert small_HWC.shape == (-(-96 // factor), -(-130 // factor), 3)
        tall, wide = 96 // factor, 130 // factor
        means = (
            pixels_HWC[: tall * factor, : wide * factor].reshape(tall, factor, wide, factor, 3).mean((1, 3))
        )
        # Grey levels: JPEG's own loss at this quality.
        assert np.abs(small_HWC[:tall, :wide] - means).max() < 4
    assert np.array_equal(decode_reduced(data), decode(data))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", exif=exif)
    assert not reducible(buffer.getvalue()) and not reducible(b"\xff\xd8 broken") and not reducible(b"PNG")
