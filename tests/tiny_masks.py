"""Tiny segmenters and samples with masks that the tests share."""

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

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (128, 128, 128)}


def bert(folder: Path) -> Path:
    """A random BERT with a tokenizer, as a sentence encoder's folder."""
    from transformers import BertConfig, BertModel

    words = tiny.tokenizer(folder, chat=False)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tiny.seeded(BertModel, config).save_pretrained(folder)
    return folder


def scene(seed: int, labels: Sequence[str], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixels_HWC, mask_HW): a rectangle of one label on another's ground, some pixels ignored."""
    draws = np.random.default_rng(seed)
    ground, thing = draws.choice(len(labels), 2, replace=False)
    mask_HW = np.full((height, width), ground, np.uint8)
    top, left = int(draws.integers(0, height // 2)), int(draws.integers(0, width // 2))
    mask_HW[top : top + height // 2, left : left + width // 2] = thing
    others = {name: tuple(np.random.default_rng(len(name)).integers(0, 255, 3)) for name in labels}
    colours = np.array([COLOURS.get(name.split("|")[0], others[name]) for name in labels])
    pixels_HWC = (
        (colours[mask_HW] + draws.integers(-25, 25, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )
    mask_HW[:, :1] = 255
    return pixels_HWC, mask_HW


def shard(
    path: Path, count: int = 21, labels: Sequence[str] = ("red", "green", "blue"), first: int = 0
) -> Path:
    """Samples of several sizes, each with a mask of these labels."""
    samples = []
    for number in range(first, first + count):
        width, height = (24, 20) if number % 3 else (40, 17)
        pixels_HWC, mask_HW = scene(number, labels, width, height)
        buffer = io.BytesIO()
        Image.fromarray(pixels_HWC).save(buffer, "PNG")
        members = {
            "png": buffer.getvalue(),
            "mask.png": encode_mask(mask_HW),
            "json": json.dumps({"labels": list(labels)}).encode(),
        }
        samples.append((f"m{number:04d}", members))
    return tiny.shard(path, samples)


def run_tree(folder: Path, output: str = "out", **changes: Any) -> dict[str, Any]:
    """A complete tiny run: ViT, dense head and BERT on two sets of masks with other labels, as plain values.

    Args:
        changes: dotted keys with `__` for the dots.
    """
    if not (folder / "masks.tar").exists():
        tiny.vit(folder / "vit4", size=32, patch=8, layers=4)
        bert(folder / "bert")
        shard(folder / "masks.tar")
        shard(folder / "more.tar", 9, ("grey", "blue"), first=100)
        shard(folder / "held.tar", 6, first=200)
    tree: dict[str, Any] = {
        "output_dir": str(folder / output),
        "model": {
            "kind": "segmenter",
            "vision": {"model": str(folder / "vit4"), "layers": [0, 1, 2, 3]},
            "head": {"channels": 16},
            "text": {"model": str(folder / "bert")},
        },
        "adapt": [
            {"method": "full", "where": "connector", "learning_rate": 2e-3},
            {"method": "lora", "where": "vision", "r": 4},
        ],
        "data": {
            "train": [{"shards": str(folder / "masks.tar")}, {"shards": str(folder / "more.tar")}],
            "evaluate": [],
            "lanes": 1,
        },
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-3,  # else a gradient that is but rounding moves a weight by a whole step
            "bf16": False,
            "deepspeed": "zero0",
        },
    }
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return tree
