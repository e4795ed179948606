"""Memory of a mask's loss and of its best labels, many labels at a time: in bands of rows, and the plain way.

One image's embeddings (512 channels, half the mask's side) and labels, random. Each measurement has a process
of its own: the highest resident memory of the step (loss and its gradient, or the best label of each
pixel), above what was resident before it; gradients of the embeddings and what comes out are in it on both
sides. The plain way holds labels x pixels several times and is measured at fewer labels by default.

    python scripts/bench/segment_memory.py
    python scripts/bench/segment_memory.py --labels 1000 --size 1024 --plain-labels 100 --json figures.json
    python scripts/bench/segment_memory.py --tiny        that all of this runs

Knows the loss; knows nothing about towers or texts. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else glibc keeps places of freed tensors, and the peak tells of its gaps.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
CHANNELS = 512
MEGABYTE = 2**20


def memory(name: str) -> int:
    """A figure of this process in bytes: `VmRSS` now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measure(side: str, what: str, labels: int, size: int) -> dict[str, Any]:
    """One measurement in this process."""
    import torch
    import torch.nn.functional as F

    from vlm_adapt.heads.bands import values_held
    from vlm_adapt.heads.dense_loss import dense_argmax, dense_cross_entropy, dense_logits

    torch.set_num_threads(1)
    torch.manual_seed(0)
    temperature, mask = 1 / 0.07, (size, size)

    def step(labels: int, side_of_map: int, mask: tuple[int, int]) -> Any:
        embeddings_Ehw = F.normalize(torch.randn(CHANNELS, side_of_map, side_of_map), dim=0)
        labels_LE = F.normalize(torch.randn(labels, CHANNELS), dim=1)
        targets_HW = torch.randint(0, labels, mask)

        def run() -> None:
            if what == "argmax":
                seen = (embeddings_Ehw[None], labels_LE, temperature, mask)
                if side == "plain":
                    dense_logits(*seen).softmax(1).max(1)
                else:
                    dense_argmax(*seen)
                return
            embeddings_Ehw.requires_grad_()
            if side == "plain":
                logits_1LHW = dense_logits(embeddings_Ehw[None], labels_LE, temperature, mask)
                loss = F.cross_entropy(logits_1LHW, targets_HW[None], ignore_index=-1)
            else:
                loss = dense_cross_entropy(embeddings_Ehw, labels_LE, targets_HW, temperature).mean()
            loss.backward()

        return run

    step(2, 8, (16, 16))()  # first-use code and its tables
    run = step(labels, size // 2, mask)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
    started = time.process_time()
    run()
    seconds = time.process_time() - started
    bound = values_held(labels, size // 2, size) * 4
    gradient = CHANNELS * (size // 2) ** 2 * 4 if what == "loss" else 0
    return {
        "side": side,
        "what": what,
        "labels": labels,
        "size": size,
        "peak": memory("VmHWM") - before,
        "gradient": gradient,
        "bound": bound,
        "seconds": seconds,
    }


def in_a_process(*arguments: Any) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--size", type=int, default=1024, help="side of the mask in pixels")
    parser.add_argument(
        "--plain-labels", type=int, default=100, help="labels of the plain way; 0 leaves it out"
    )
    parser.add_argument("--tiny", action="store_true", help="20 labels and 64 pixels: that all of this runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(*json.loads(given.child))))
        return
    if given.tiny:
        given.labels, given.size, given.plain_labels = 20, 64, 20
    sides = [("bands", given.labels)] + ([("plain", given.plain_labels)] if given.plain_labels else [])
    sides += [("bands", given.plain_labels)] if given.plain_labels not in (0, given.labels) else []
    print(f"{'':14}{'labels':>7}{'size':>6}{'peak MB':>9}{'gradients MB':>14}{'bound MB':>10}{'CPU s':>8}")
    figures = []
    for what in ("loss", "argmax"):
        for side, labels in sides:
            one = in_a_process(side, what, labels, given.size)
            figures.append(one)
            bound = f"{one['bound'] / MEGABYTE:10.0f}" if side == "bands" else " " * 10
            print(
                f"{what + ', ' + side:14}{labels:7}{given.size:6}{one['peak'] / MEGABYTE:9.0f}"
                f"{one['gradient'] / MEGABYTE:14.0f}{bound}{one['seconds']:8.1f}",
                flush=True,
            )
    logits = given.labels * given.size**2 * 4
    print(f"the logits of {given.labels} labels alone, once: {logits / MEGABYTE:.0f} MB")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
