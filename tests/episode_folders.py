"""Tiny folders laid out as VOC 2012, COCO 2014 and FSS-1000 are for few-shot work, for zero-shot tests."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import flat_segmenter as flat
import numpy as np

SIDE = 480


def blocks(*rows: str, side: int = SIDE) -> np.ndarray:
    """Digits as values; `.` is 255."""
    small = np.array([[255 if one == "." else int(one) for one in row] for row in rows])
    return small.repeat(side // small.shape[0], 0).repeat(side // small.shape[1], 1)


def jpeg(classes_HW: np.ndarray) -> bytes:
    """An image in which FlatSegmenter sees these classes; blocks are even, so JPEG keeps them."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(flat.picture(classes_HW)).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def put(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def pascal(
    root: Path, samples: dict[str, tuple[np.ndarray, np.ndarray]], pairs: list[str], fold: int
) -> Path:
    """VOC2012 with `splits`; samples are (classes seen, mask) by image."""
    for name, (seen_HW, mask_HW) in samples.items():
        put(root / "VOC2012" / "JPEGImages" / f"{name}.jpg", jpeg(seen_HW))
        put(root / "VOC2012" / "SegmentationClassAug" / f"{name}.png", flat.png(mask_HW.astype(np.uint8)))
    text = "".join(f"{pair}\n" for pair in pairs)
    put(root / "VOC2012" / "splits" / "pascal" / "val" / f"fold{fold}.txt", text.encode())
    return root


def coco(root: Path, lists: dict[int, list[str]], mask_HW: dict[str, np.ndarray], fold: int) -> Path:
    """COCO2014 with `splits`; every image looks like class 1 as a whole."""
    for name, values_HW in mask_HW.items():
        put(root / "COCO2014" / name, jpeg(np.ones((SIDE, SIDE), int)))
        put(
            (root / "COCO2014" / "annotations" / name).with_suffix(".png"),
            flat.png(values_HW.astype(np.uint8)),
        )
    (root / "COCO2014" / "val2014").mkdir(parents=True, exist_ok=True)
    (root / "COCO2014" / "annotations" / "val2014").mkdir(parents=True, exist_ok=True)
    put(root / "COCO2014" / "splits" / "coco" / "val" / f"fold{fold}.pkl", pickle.dumps(lists))
    return root


def fss(root: Path, classes: dict[str, list[tuple[np.ndarray, np.ndarray]]], others: list[str]) -> Path:
    """FSS-1000 with `splits`; samples are (classes seen, mask as a picture's grey values)."""
    for name, samples in classes.items():
        for number, (seen_HW, grey_HW) in enumerate(samples, start=1):
            put(root / "FSS-1000" / name / f"{number}.jpg", jpeg(seen_HW))
            grey = grey_HW.astype(np.uint8)
            put(root / "FSS-1000" / name / f"{number}.png", flat.png(np.stack([grey] * 3, -1)))
    put(root / "FSS-1000" / "splits" / "fss" / "test.txt", "\r\n".join([*classes, ""]).encode())
    put(root / "FSS-1000" / "splits" / "fss" / "trn.txt", "\n".join([*others, ""]).encode())
    return root
