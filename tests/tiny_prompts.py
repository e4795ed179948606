"""Tiny promptable models and samples with masks of objects that the tests share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from vlm_adapt.data.masks import encode_mask

SIDE = 64


def scene(seed: int, width: int = 48, height: int = 36) -> tuple[np.ndarray, np.ndarray]:
    """(pixels_HWC, mask_HW): bright boxes (1) and a disc (2) on dark ground (0)."""
    draws = np.random.default_rng(seed)
    mask_HW = np.zeros((height, width), np.uint8)
    left, top = int(draws.integers(1, width // 4)), int(draws.integers(1, height // 4))
    mask_HW[top : top + height // 3, left : left + width // 4] = 1
    right = width - left - width // 5
    mask_HW[top : top + height // 4, right : right + width // 5] = 1
    rows, columns = np.mgrid[:height, :width]
    middle = height * 3 // 4, int(draws.integers(width // 3, width * 2 // 3))
    mask_HW[(rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < (height // 6) ** 2] = 2
    colours = np.array([[30, 30, 40], [220, 210, 60], [60, 90, 230]])
    pixels_HWC = (colours[mask_HW] + draws.integers(-10, 10, (height, width, 3))).clip(0, 255)
    return pixels_HWC.astype(np.uint8), mask_HW


def png(pixels: np.ndarray) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, count: int = 8, first: int = 0) -> Path:
    """Samples of two sizes with a semantic mask of ground, box and disc."""
    samples = []
    for number in range(first, first + count):
        size = (48, 36) if number % 2 else (30, 60)
        pixels_HWC, mask_HW = scene(number, *size)
        mask_HW[-1] = 255
        record = {"labels": ["ground", "box|square", "disc"]}
        members = {"png": png(pixels_HWC), "mask.png": encode_mask(mask_HW)}
        samples.append((f"p{number:03d}", members | {"json": json.dumps(record).encode()}))
    return tiny.shard(path, samples)


def run_tree(folder: Path, output: str = "out", text: bool = False, **changes: Any) -> dict[str, Any]:
    """A complete tiny run: ViT, neck and SAM's decoder, as plain values.

    Args:
        changes: dotted keys with `__` for the dots.
    """
    if not (folder / "prompts.tar").exists():
        tiny.vit(folder / "vit_sam", size=SIDE, patch=16, width=32, layers=2)
        shard(folder / "prompts.tar")
        shard(folder / "held_out.tar", 3, first=100)
    task: dict[str, Any] = {"name": "prompts", "masks_per_image": 4}
    if text:
        task["kinds"] = {"point": 1, "box": 1, "text": 2}
    tree: dict[str, Any] = {
        "output_dir": str(folder / output),
        "model": {
            "kind": "promptable",
            "vision": {"model": str(folder / "vit_sam")},
            "decoder": {"weights": "random:3", "width": 32, "mlp_dim": 32, "num_attention_heads": 2},
        },
        "adapt": [{"method": "full", "where": "connector", "learning_rate": 2e-3}],
        "data": {
            "train": [{"shards": str(folder / "prompts.tar"), "task": task}],
            "evaluate": [{"shards": str(folder / "held_out.tar"), "task": task}],
            "lanes": 2,
        },
        "train": {"max_steps": 3, "per_device_train_batch_size": 2, "bf16": False, "deepspeed": "zero0"},
        "evaluate": {"best_metric": "miou", "greater_is_better": True},
    }
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for parent in parents:
            node = node[int(parent) if isinstance(node, list) else parent]
        node[last] = value
    return tree
