"""Prompts drawn from a mask: points, a box with noise, a coarse mask (SAM, arXiv 2304.02643, appendix A).

Knows pixels and random draws; knows nothing about files, samples or models.

    K points, h x w a mask as the decoder gives it
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

POINTS = 3
IGNORED = 255  # in a mask: pixels of which nothing is known
BLOCKS = (8, 16, 32)  # sides of the blocks of a coarse mask, as divisors of its side


def inside_points(mask_HW: np.ndarray, count: int, draws: np.random.Generator) -> np.ndarray:
    """(x, y) of pixels of a mask, uniformly, [count, 2] float32."""
    rows, columns = np.nonzero(mask_HW == 1)
    chosen = draws.integers(0, len(rows), count)
    return np.stack([columns[chosen], rows[chosen]], axis=1).astype(np.float32)


def several_points(mask_HW: np.ndarray, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """POINTS points and their labels: the first inside, each other one inside or, as often, outside but near.

    Near is a box twice as long and wide as the mask's. Where nothing there is outside, all are inside.
    """
    points_K2 = inside_points(mask_HW, POINTS, draws)
    labels_K = np.ones(POINTS, np.int64)
    left, top, right, bottom = tight_box(mask_HW).astype(int)
    across, down = (right - left + 1) // 2, (bottom - top + 1) // 2
    x0, y0 = max(0, left - across), max(0, top - down)
    rows, columns = np.nonzero(mask_HW[y0 : bottom + down, x0 : right + across] == 0)
    for place in range(1, POINTS):
        if len(rows) and draws.random() < 0.5:
            chosen = draws.integers(0, len(rows))
            points_K2[place] = columns[chosen] + x0, rows[chosen] + y0
            labels_K[place] = 0
    return points_K2, labels_K


def tight_box(mask_HW: np.ndarray) -> np.ndarray:
    """(left, top, right, bottom) of a mask, right and bottom past its last pixel, float32."""
    rows, columns = np.flatnonzero((mask_HW == 1).any(1)), np.flatnonzero((mask_HW == 1).any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def noisy_box(
    box_4: np.ndarray, size: tuple[int, int], noise: float, most: float, draws: np.random.Generator
) -> np.ndarray:
    """A box whose sides are moved by normal noise, inside the image and never turned inside out.

    Args:
        size: (height, width) of the image.
        noise: deviation as a share of the box's width (left, right) and height (top, bottom).
        most: in pixels.
    """
    width, height = box_4[2] - box_4[0], box_4[3] - box_4[1]
    sides = np.array([width, height, width, height])
    moved = box_4 + (draws.normal(size=4) * noise * sides).clip(-most, most)
    moved = moved.clip(0, [size[1], size[0], size[1], size[0]])
    for low, high in ((0, 2), (1, 3)):
        if moved[high] - moved[low] < 1:  # a sliver that noise has closed stays as it was
            moved[low], moved[high] = box_4[low], box_4[high]
    return moved.astype(np.float32)


def coarse_mask(target_hw: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """A mask in blocks, each as most of its pixels are: 1 inside, 0 outside or unknown."""
    side = target_hw.shape[0]
    block = max(1, side // int(draws.choice(BLOCKS)))
    blocks = -(-side // block)
    padded = np.zeros((blocks * block, blocks * block), np.float32)
    padded[:side, :side] = target_hw == 1
    means = padded.reshape(blocks, block, blocks, block).mean((1, 3))
    wide: np.ndarray = np.kron(means >= 0.5, np.ones((block, block), bool))[:side, :side]
    return wide.astype(np.uint8)


def corrected_point(
    coarse_hw: np.ndarray, target_hw: np.ndarray, scale: float, draws: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A point [1, 2] where a coarse mask is wrong and its label [1]; inside the target where it is right.

    Args:
        scale: pixels of the square to one of the mask.
    """
    wrong = np.flatnonzero((coarse_hw != target_hw) & (target_hw != IGNORED))
    if not len(wrong):
        wrong = np.flatnonzero(target_hw == 1)
    place = int(wrong[draws.integers(0, len(wrong))])
    row, column = divmod(place, target_hw.shape[1])
    # The prompt encoder adds half a pixel: this is the middle of the mask's pixel, less that half.
    points_12 = (np.array([[column, row]], np.float32) + 0.5) * scale - 0.5
    return points_12.astype(np.float32), np.array([int(target_hw[row, column] == 1)], np.int64)


def quota(count: int, shares: Mapping[str, float], draws: np.random.Generator) -> list[str]:
    """`count` kinds, in any order: whole numbers nearest to their shares, what is left over is drawn."""
    kinds = [kind for kind, share in shares.items() if share > 0]
    ends = np.cumsum([shares[kind] for kind in kinds])
    places = (np.arange(count) + draws.random()) / count * ends[-1]
    chosen = np.searchsorted(ends, places, side="right").clip(max=len(kinds) - 1)
    return [kinds[place] for place in draws.permutation(chosen).tolist()]
