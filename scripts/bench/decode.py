"""Images a second from JPEG files to a batch at 224: our road against open_clip's, on one thread.

Both sides take turns over the same files in one process, so a noisy machine is noisy for both. Ours reads
the file's bytes, decodes with libjpeg-turbo, resizes uint8 with antialias and stacks uint8 (normalised on
the device later; `--normalise` counts that too); open_clip's opens with PIL, resizes bicubic, crops, turns
to float, normalises and stacks, as its training does.

    python scripts/bench/decode.py                 synthetic photographs of 200 to 640 pixels
    python scripts/bench/decode.py --images DIR    the JPEG files of a folder
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402  after the number of threads is set
import torch  # noqa: E402
from PIL import Image  # noqa: E402

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
BATCH, SIZE = 32, 224


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """JPEG files with about the entropy of photographs: smooth fields, edges and a little grain."""
    draws = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        width, height = draws.integers(200, 641, 2)
        coarse = draws.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3)).astype(np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        image = image.astype(np.int16) + draws.normal(0, 6, image.shape).astype(np.int16)
        for _ in range(12):
            top, left = draws.integers(0, height - 20), draws.integers(0, width - 20)
            image[top : top + draws.integers(8, 80), left : left + draws.integers(8, 80)] += draws.integers(
                -60, 61, 3, dtype=np.int16
            )
        buffer = io.BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    return files


def ours(normalise: bool) -> Callable[[list[bytes]], torch.Tensor]:
    """Our road, as the reader and the tower walk it."""
    from vlm_adapt.data.patches import load_images, together
    from vlm_adapt.image_spec import ImageSpec

    spec = ImageSpec((SIZE, SIZE), MEAN, STD, "crop", "bicubic")
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]

    def batch(files: list[bytes]) -> torch.Tensor:
        pixels = together(load_images(files, spec))
        return (pixels.float().div_(255) - mean) / std if normalise else pixels

    return batch


def open_clips() -> Callable[[list[bytes]], torch.Tensor]:
    """open_clip's own transform."""
    import open_clip

    transform: Any = open_clip.image_transform(SIZE, is_train=False, mean=MEAN, std=STD)

    def batch(files: list[bytes]) -> torch.Tensor:
        return torch.stack([transform(Image.open(io.BytesIO(data))) for data in files])

    return batch


def main() -> None:
    """Print images per CPU-second of both sides, their ratio, and how far their pixels lie apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--normalise", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = photographs(given.count)
    if given.images:
        found = sorted(given.images.rglob("*.jpg"))[: given.count]
        files = [path.read_bytes() for path in found]
    sides = {"vlm_adapt": ours(given.normalise), "open_clip": open_clips()}
    spent = {name: [0.0] for name in sides}
    for place in range(given.rounds + 1):
        for name, batch in sides.items():
            started = time.process_time()
            for first in range(0, len(files), BATCH):
                batch(files[first : first + BATCH])
            if place:  # the first round warms up
                spent[name].append(time.process_time() - started)
    speeds = {name: len(files) / min(times[1:]) for name, times in spent.items()}
    # The reference resize is PIL's; compare on its own decoder's pixels, so that only resizing differs.
    from vlm_adapt.data.images import resize
    from vlm_adapt.image_spec import ImageSpec

    spec, apart = ImageSpec((SIZE, SIZE), MEAN, STD, "squash", "bicubic"), []
    for data in files[:64]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        wanted = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        apart.append(int(np.abs(resize(np.asarray(image), spec).astype(int) - wanted.astype(int)).max()))
    print(
        json.dumps(
            {
                "images_per_cpu_second": {name: round(speed) for name, speed in speeds.items()},
                "ratio": round(speeds["vlm_adapt"] / speeds["open_clip"], 2),
                "largest_difference_of_resize": max(apart),
                "images": len(files),
            }
        )
    )


if __name__ == "__main__":
    main()
