"""Raw samples a second from tar shards on one core: vlm-adapt against webdataset, on the same files.

Both sides yield the key and the bytes of every member, undecoded, and take turns; the shards lie in the
page cache. A sample is a small "image" and a short JSON, random bytes in place of the picture, so the
figure is of the reader and not of the disk or a decoder. Ours reads in order and in a shuffled order.

    python scripts/bench/raw_read.py [--samples 20000] [--shards 10] [--bytes 2048] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import random
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import webdataset

from vlm_adapt.data.shards import ShardSet
from vlm_adapt.data.storage import Settings


def write_shards(folder: Path, shards: int, samples: int, size: int) -> list[str]:
    """Tars of `samples` samples in all."""
    source, names = random.Random(1), []
    for shard in range(shards):
        names.append(str(folder / f"{shard:04d}.tar"))
        with tarfile.open(names[-1], "w") as archive:
            for number in range(shard, samples, shards):
                words = json.dumps({"caption": f"a picture of the number {number}"}).encode()
                for extension, data in (("jpg", source.randbytes(size)), ("json", words)):
                    info = tarfile.TarInfo(f"{number:08d}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return names


def timed(read: Callable[[], tuple[int, int]], expected: tuple[int, int]) -> float:
    """Samples a CPU-second; the samples and their bytes must be all there."""
    start = time.process_time()
    found = read()
    seconds = time.process_time() - start
    if found != expected:
        raise SystemExit(f"read {found} samples and bytes instead of {expected}")
    return found[0] / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--bytes", type=int, default=2048, help="of a picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args()
    warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves files to the collector
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    with tempfile.TemporaryDirectory() as place:
        names = write_shards(Path(place), given.shards, given.samples, given.bytes)
        began = time.process_time()
        ours = ShardSet(names, settings=Settings(cache=str(Path(place) / "cache")))
        indexing = given.samples / (time.process_time() - began)
        order = list(range(len(ours)))
        random.Random(2).shuffle(order)

        def read_ours(numbers: list[int] | range) -> tuple[int, int]:
            count = size = 0
            for number in numbers:
                _, members = ours.read(number)
                count += 1
                size += sum(map(len, members.values()))
            return count, size

        def read_theirs() -> tuple[int, int]:
            count = size = 0
            for sample in webdataset.WebDataset(names, shardshuffle=False):
                count += 1
                size += sum(len(data) for name, data in sample.items() if not name.startswith("__"))
            return count, size

        expected = read_ours(range(len(ours)))
        sides = {
            "vlm-adapt, in order": lambda: read_ours(range(len(ours))),
            "vlm-adapt, shuffled": lambda: read_ours(order),
            "webdataset, in order": read_theirs,
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(given.rounds):
            for name, read in sides.items():
                rates[name].append(timed(read, expected))
    middle = {name: statistics.median(found) for name, found in rates.items()}
    theirs = middle["webdataset, in order"]
    print(
        f"Python {platform.python_version()}, one core, "
        f"webdataset {importlib.metadata.version('webdataset')}; "
        f"{given.samples:,} samples of {given.bytes:,} + ~45 bytes in {given.shards} shards; "
        f"median of {given.rounds} rounds"
    )
    print("\n| reader | samples/CPU-s | slowest to fastest | against webdataset |\n|---|---|---|---|")
    for name, rate in middle.items():
        spread = f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
        print(f"| {name} | {rate:,.0f} | {spread} | {rate / theirs:.1f}x |")
    print(f"| vlm-adapt, building the index | {indexing:,.0f} | | |")
    if given.json:
        figures = {"rates": rates, "indexing": indexing, "ratio": middle["vlm-adapt, in order"] / theirs}
        given.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
