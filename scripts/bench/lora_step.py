"""CPU-seconds of a LoRA step on a real language model: our layers against peft's own, in one process.

One model with one adapter; between two steps its LoRA layers change hands, so weights, tokens, attention and
optimizer are the same on every side. Sides take turns on one thread, and a round's steps are compared with
each other. The losses of the first round must agree. Knows language models; knows nothing about towers.

    python scripts/bench/lora_step.py                      SmolLM2-135M, rank 16, 8 rows of 281 tokens
    python scripts/bench/lora_step.py --model FOLDER --rank 8 --batch 4 --json figures.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

WARM_UP = 2  # rounds that are not counted: allocators and kernels that are made on their first use
# bf16 keeps 8 bits; through 30 layers, with sums rounded in other places, the mean of some thousand losses
# of about 10 differs by less than this.
LOSS_TOLERANCE = 0.02
SIDES = {
    "ours": "ours",
    "peft": "peft's layers",
    "peft_cast": "peft's layers with its input cast (its default)",
}


def prepare(model: str, rank: int) -> tuple[Any, list[Any], Any]:
    """A language in bf16 with LoRA on all linear layers: (language, peft's layers, their optimizer)."""
    import torch
    from peft.tuners.lora.layer import Linear

    from vlm_adapt import weights
    from vlm_adapt.adapt.lora import Lora
    from vlm_adapt.adapt.place import Place
    from vlm_adapt.language.load import load_language

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = weights.resolve(model) if model.startswith("package:") else Path(model)
    assert folder is not None
    language = load_language(folder, f"file:{folder}", dtype=torch.bfloat16)
    language.requires_grad_(False)
    method = Lora(r=rank)
    method.attach(Place("language", language))
    for parameter in method.parameters.values():
        parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(True)
    layers = [module for module in language.modules() if isinstance(module, Linear)]
    return language.train(), layers, torch.optim.AdamW(method.parameters.values(), lr=1e-5, fused=True)


def take(side: str, layers: list[Any]) -> None:
    """Give the layers to a side."""
    from peft.tuners.lora.layer import Linear

    from vlm_adapt.adapt.fast_lora import FastLinear

    for layer in layers:
        layer.__class__ = FastLinear if side == "ours" else Linear
        layer.cast_input_dtype_enabled = side == "peft_cast"


def step(language: Any, optimizer: Any, ids_BT: Any) -> tuple[float, float]:
    """One step on plain causal text, half of each row learned: (CPU-seconds, mean loss)."""
    import torch

    from vlm_adapt.language.language import LanguageInput

    before = time.process_time()
    batch, length = ids_BT.shape
    with torch.autocast("cpu", torch.bfloat16):
        inputs = LanguageInput(language.embed(ids_BT), torch.ones_like(ids_BT, dtype=torch.bool))
        places_BT = torch.arange(batch * length).view(batch, length)
        total, losses_N = language(
            inputs, places_BT[:, length // 2 : -1].flatten(), ids_BT[:, length // 2 + 1 :].flatten()
        )
    (total / len(losses_N)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - before, float(total.detach()) / len(losses_N)


def measure(model: str, rank: int, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds and losses of every side, and the ratio of peft's to ours round by round."""
    import torch

    language, layers, optimizer = prepare(model, rank)
    vocabulary = language.model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        ids_BT = torch.randint(vocabulary, (batch, length), generator=generator)
        order = list(SIDES)[number % len(SIDES) :] + list(SIDES)[: number % len(SIDES)]
        for side in order:
            take(side, layers)
            taken, loss = step(language, optimizer, ids_BT)
            seconds[side].append(taken)
            losses[side].append(loss)
    counted = slice(WARM_UP if rounds > WARM_UP else 0, None)
    result: dict[str, Any] = {
        "layers": len(layers),
        "rank": rank,
        "batch": batch,
        "length": length,
        "sides": {},
    }
    for side in SIDES:
        mine = seconds[side][counted]
        ratios = [theirs / ours for theirs, ours in zip(mine, seconds["ours"][counted], strict=True)]
        result["sides"][side] = {
            "seconds": statistics.median(mine),
            "lowest": min(mine),
            "highest": max(mine),
            "over_ours": statistics.median(ratios),
            "losses": losses[side],
        }
    firsts = [losses[side][0] for side in SIDES]
    result["loss_difference"] = max(firsts) - min(firsts)
    return result


def main() -> int:
    """Measure and print; 1 when the losses of the first round differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:smollm2-135m-instruct", help="a package or a folder")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=281, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each side")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    asked = parser.parse_args()
    result = measure(asked.model, asked.rank, asked.batch, asked.length, asked.rounds)
    print(
        f"{result['layers']} layers, rank {asked.rank}, {asked.batch} x {asked.length} tokens, bf16, 1 thread"
    )
    print()
    print("| layers | CPU-s a step (median, range) | over ours | loss, first and last |")
    print("|---|---|---|---|")
    for name, side in result["sides"].items():
        print(
            f"| {SIDES[name]} | {side['seconds']:.2f} ({side['lowest']:.2f} to {side['highest']:.2f}) "
            f"| {side['over_ours']:.2f} | {side['losses'][0]:.4f}, {side['losses'][-1]:.4f} |"
        )
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if result["loss_difference"] > LOSS_TOLERANCE:
        print(f"the losses of the first round differ by {result['loss_difference']:.4f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
