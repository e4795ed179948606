"""A colour for every label: its own wherever possible, and never close to another one's.

Knows names and colours; knows nothing about masks or pictures. Colours are told apart as people see them,
with usual vision and with either of the two common kinds of colour blindness: the distance of two is the
smallest of the three, in OKLab.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np

Colour = tuple[int, int, int]
# Okabe and Ito's, made to be told apart with any colour vision.
FIRST = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")
# Words whose colour readers expect. Everything else gets one by its letters.
EXPECTED = {
    "#55585e": "other others background void unlabelled unlabeled stuff ignore",
    "#56b4e9": "sky",
    "#009e73": "tree trees vegetation plant bush forest",
    "#a3d860": "grass lawn field",
    "#0072b2": "water sea river lake ocean",
    "#7a5c8e": "road street asphalt",
    "#ecc3e4": "pavement sidewalk path",
    "#d55e00": "person people man woman pedestrian human",
    "#f0e442": "sign traffic-sign",
    "#d2ad6f": "earth ground soil sand dirt",
    "#8a3b22": "building buildings house wall",
    "#1b3fae": "car cars automobile vehicle",
}
# From linear RGB to what is seen without one kind of cones (Machado, Oliveira and Fernandes 2009).
_BLIND = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
)
# OKLab (Ottosson 2020): linear RGB to cone responses, and their cube roots to lightness and two axes.
_CONES = np.array(
    ((0.4122214708, 0.5363325363, 0.0514459929),)
    + ((0.2119034982, 0.6806995451, 0.1073969566),)
    + ((0.0883024619, 0.2817188376, 0.6299787005),)
)
_AXES = np.array(
    ((0.2104542553, 0.7936177850, -0.0040720468),)
    + ((1.9779984951, -2.4285922050, 0.4505937099),)
    + ((0.0259040371, 0.7827717662, -0.8086757660),)
)
EXPECTED_APART = 0.05  # for a colour by meaning: a tree stays green beside a person in vermilion
APART = 0.17  # distance in OKLab at which two colours are not mistaken for each other under a photograph


def colours(names: Sequence[str]) -> list[Colour]:
    """A colour a label, in order.

    A label has the same colour in every picture of one set of labels, in whatever order they are named, and
    in other sets too unless another label has taken it. Beyond some 150 labels colours come close, beyond
    300 they repeat.
    """
    pool, wanted = _pool(), {name: _wanted(name) for name in dict.fromkeys(names)}
    taken: list[int] = []
    chosen: dict[str, int] = {}
    nearest = np.full(len(pool), np.inf)
    # Expected colours go first; then by the letters' own number, so that the order of names says nothing.
    for name in sorted(wanted, key=lambda name: (not wanted[name][1], _number(name), name)):
        first = wanted[name][0]
        place = first
        if nearest[first] < (EXPECTED_APART if wanted[name][1] else APART):
            rest = [(first + step) % len(FIRST) for step in range(len(FIRST))]
            free = [one for one in rest if nearest[one] >= APART]
            place = free[0] if free else int(nearest.argmax())
            if nearest[place] <= 0:
                place = first  # all are taken
        chosen[name] = place
        taken.append(place)
        nearest = np.minimum(nearest, _distances()[place])
    return [pool[chosen[name]] for name in names]


def distance(one: Colour, other: Colour) -> float:
    """How far apart two colours are, for whoever tells them apart worst; black and white are 1."""
    seen = _seen(np.array([one, other]))
    return float(np.linalg.norm(seen[:, 0] - seen[:, 1], axis=-1).min())


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big")


def _wanted(name: str) -> tuple[int, bool]:
    """The place in the pool of the colour of a label that is alone; whether it is by its meaning."""
    word = name.strip().lower().replace(" ", "-")
    for place, words in enumerate(EXPECTED.values()):
        if word in words.split():
            return len(FIRST) + place, True
    return _number(word) % len(FIRST), False


@cache
def _pool() -> list[Colour]:
    """All colours there are: the first ones, the expected ones, then a net over lightness and hue."""
    found = [_hex(text) for text in (*FIRST, *EXPECTED)]
    back = np.linalg.inv(_AXES), np.linalg.inv(_CONES)
    for lightness in (0.42, 0.52, 0.62, 0.72, 0.82, 0.91):
        for chroma in (0.17, 0.13, 0.09):
            for hue in np.arange(18) * (2 * np.pi / 18):
                lab = np.array((lightness, chroma * np.cos(hue), chroma * np.sin(hue)))
                linear = back[1] @ (back[0] @ lab) ** 3
                if linear.min() >= 0 and linear.max() <= 1:
                    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
                    red, green, blue = (round(255 * float(value)) for value in curve)
                    found.append((red, green, blue))
    return found


@cache
def _distances() -> np.ndarray:
    seen = _seen(np.array(_pool()))
    return np.linalg.norm(seen[:, :, None] - seen[:, None], axis=-1).min(0)


def _seen(colours_N3: np.ndarray) -> np.ndarray:
    """OKLab [3, N, 3] of 0..255 colours: with usual vision, without red and without green cones."""
    values = colours_N3 / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    kinds = [linear, *(np.clip(linear @ np.array(matrix).T, 0, 1) for matrix in _BLIND)]
    return np.stack([np.cbrt(kind @ _CONES.T) @ _AXES.T for kind in kinds])


def _hex(text: str) -> Colour:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
