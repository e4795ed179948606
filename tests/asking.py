"""Tiny chat models that draw masks, and samples that ask for them, which the tests share."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from vlm_adapt.data.masks import encode_mask

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (50, 60, 230)}
DECODER = {"width": 32, "mlp_dim": 32, "num_attention_heads": 2, "mask_input_channels": 4}


def picture(seed: int, side: int = 24) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(pixels_HWC, mask_HW of each colour): two bright squares on grey, which do not overlap."""
    draws = np.random.default_rng(seed)
    pixels_HWC = draws.integers(90, 120, (side, side, 3)).astype(np.uint8)
    names = [str(name) for name in draws.choice(list(COLOURS), 2, replace=False)]
    masks = {}
    for place, name in enumerate(names):
        mask_HW = np.zeros((side, side), np.uint8)
        size = int(draws.integers(side // 4, side // 2))
        top = int(draws.integers(0, side - size))
        left = int(draws.integers(0, side // 2 - size + 1)) + place * side // 2
        mask_HW[top : top + size, left : left + size] = 1
        pixels_HWC[mask_HW > 0] = COLOURS[name]
        masks[name] = mask_HW
    return pixels_HWC, masks


def png(pixels_HWC: np.ndarray) -> bytes:
    """The pixels as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, count: int = 21, first: int = 0, side: int = 24, plain: Sequence[int] = (2, 5)) -> Path:
    """Samples that ask for a square by its colour; those whose number ends in one of `plain` ask for none."""
    samples = []
    for number in range(first, first + count):
        pixels_HWC, masks = picture(number, side)
        questions: list[dict[str, Any]] = [
            {
                "question": f"where is {name}?",
                "answer": "it is <seg>",
                "masks": [{"mask": place}],
                "kind": name,
            }
            for place, name in enumerate(masks)
        ]
        if number % 10 in plain:
            questions = [
                {"question": "what color is the shape?", "answer": next(iter(masks)), "kind": "none"}
            ]
        record: dict[str, Any] = {"questions": questions}
        if number % 10 not in plain:
            record["referring"] = [
                {"expressions": [f"the {name} square"], "mask": place} for place, name in enumerate(masks)
            ]
        members = {"png": png(pixels_HWC), "json": json.dumps(record).encode()}
        if number % 10 not in plain:
            members |= {f"mask.{place}.png": encode_mask(one) for place, one in enumerate(masks.values())}
        samples.append((f"m{number:04d}", members))
    return tiny.shard(path, samples)


def run_tree(folder: Path, output: str = "out", own: bool = True, **changes: Any) -> dict[str, Any]:
    """A complete tiny run with a mask token, as plain values; `own` gives masks a tower of their own."""
    if not (folder / "masks.tar").exists():
        tiny.vit(folder / "eye", size=32, patch=8)
        shard(folder / "masks.tar")
        shard(folder / "masks-test.tar", 6, first=100)
    masks: dict[str, Any] = {"decoder": {"weights": "random:", **DECODER}}
    if own:
        masks["vision"] = {"model": str(folder / "eye")}
    tree = tiny.run_tree(folder, output)
    tree["model"]["masks"] = masks
    tree["adapt"] = [
        {"method": "full", "where": "connector", "learning_rate": 2e-3},
        {"method": "lora", "where": "language", "r": 4, "learning_rate": 1e-3},
        {"method": "full", "where": "masks", "learning_rate": 1e-3},
    ]
    tree["data"] = {"train": [{"shards": str(folder / "masks.tar")}], "evaluate": [], "lanes": 1}
    tree["train"] |= {"objective": "masks"}
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return tree
