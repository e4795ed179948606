"""A converter for tests of the engine: numbered samples of a given size, slow, bad or deadly where asked."""

import os
import time

from vlm_adapt.data.convert import CONVERTERS
from vlm_adapt.data.convert.common import Recipe
from vlm_adapt.data.problems import BadSample


def row(number: int, size: int, delay: float, kind: str) -> dict:
    """A sample; `kind` says what is special about it."""
    time.sleep(delay)
    if kind == "bad":
        raise BadSample("marked as bad", str(number))
    if kind == "bug":
        raise ZeroDivisionError("a bug of the converter")
    if kind == "die":
        os.kill(os.getpid(), 9)
    # Not compressible and not the same: a shard that mixes up two samples differs.
    return {
        "bin": bytes((number * 7 + place) % 251 for place in range(size)),
        "json": {"caption": f"row {number}"},
    }


def convert(
    conversion, *, sizes: str = "100", delay: str = "0", special: str = "", start: str = "0", keys: str = ""
):
    """Samples of these sizes (`1000x5,50000x2`); `special` is like `3=bad,7=die`."""
    kinds = dict(pair.split("=") for pair in special.split(",") if pair)
    keys_of = dict(pair.split("=") for pair in keys.split(",") if pair)
    number = int(start)
    for part in sizes.split(","):
        size, _, count = part.partition("x")
        for _ in range(int(count or 1)):
            name = keys_of.get(str(number), f"{number:05d}")
            yield Recipe(name, row, (number, int(size), float(delay), kinds.get(str(number), "")))
            number += 1


def register() -> None:
    """Make it known as `rows`."""
    CONVERTERS.table["rows"] = "write_rows:convert"
