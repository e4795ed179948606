"""CPU-seconds of one optimizer step: vlm-adapt against transformers' Trainer with peft.

All sides hold the same weights, see the same token ids and pixels, train the same parameters (LoRA on
every linear layer of the language, the connector whole) and take turns on one thread. The loss of the
first step must agree: LoRA's B is zero then, so all compute the bare model's loss.

    python scripts/bench/training_step.py            fixed lengths
    python scripts/bench/training_step.py --variable lengths of a real mixture: padded on the right, and a
                                                     third side with the same samples packed into rows
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from material import TINY, Sizes, make_rows, save_model

HERE = Path(__file__).resolve().parent
WARM_UP = 3  # steps whose time is not counted: allocators, first-use kernels, the contract's checks
# bf16 keeps 8 bits. Through a dozen layers with other kernels a token's loss differs by about 1 % of a
# logit's spread (below 1 here); over a hundred tokens and more the mean differs by less than this.
LOSS_TOLERANCE = 0.01


class Side:
    """One of the processes."""

    def __init__(self, name: str, given: dict[str, Any]):
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.name, self.answers = name, []
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "sides.py"), name, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )

    def step(self) -> None:
        """Take a step. The first was already asked for by starting the process."""
        assert self.process.stdin and self.process.stdout
        if self.answers:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise SystemExit(f"{self.name} stopped:\n{self.errors.read()[-3000:]}")
        self.answers.append(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(sizes: Sizes, steps: int, variable: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Run both sides in turn.

    Args:
        steps: optimizer steps of each side, WARM_UP of which are not counted when there are more.
        options: by side, `attention`; for ours `deepspeed`, and `row_length` where rows are packed.

    Returns:
        parameters, useful tokens a step (median), by side the figures of the table and the ratio to theirs
        (median over steps), and the largest difference between losses of the first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_model(Path(folder), sizes)
        given = {
            "sizes": asdict(sizes),
            "steps": steps,
            "variable": variable,
            "folder": folder,
            "options": options,
        }
        sides = []
        try:
            for name in options:
                sides.append(Side(name, given))
                sides[-1].step()
            for _ in range(steps - 1):
                for side in sides:
                    side.step()
        finally:
            for side in sides:
                side.close()
    rows = make_rows(sizes, sizes.batch * steps, variable)
    counted = range(WARM_UP if steps > WARM_UP else 0, steps)
    tokens = [
        sum(sizes.image_tokens + len(row.text) for row in rows[step * sizes.batch : (step + 1) * sizes.batch])
        for step in range(steps)
    ]
    result: dict[str, Any] = {"parameters": parameters, "sides": {}}
    for side in sides:
        seconds = [side.answers[step]["seconds"] for step in counted]
        result["sides"][side.name] = {
            "seconds": statistics.median(seconds),
            "lowest": min(seconds),
            "highest": max(seconds),
            "tokens_per_second": sum(tokens[step] for step in counted) / sum(seconds),
            "first": side.answers[0]["seconds"],
            "peak": max(answer["peak"] for answer in side.answers),
            "steps": seconds,
            "useful": statistics.mean(side.answers[step]["useful"] for step in counted),
            "losses": [answer["loss"] for answer in side.answers],
        }
    other = result["sides"]["theirs"]
    for found in result["sides"].values():
        # Step by step, since both sides took a step's samples one after the other: on a shared machine
        # CPU-seconds too rise and fall with what else runs.
        pairs = zip(other["steps"], found["steps"], strict=True)
        found["ratio"] = statistics.median(theirs / mine for theirs, mine in pairs)
    firsts = [found["losses"][0] for found in result["sides"].values()]
    result["ratio"] = result["sides"]["ours"]["ratio"]
    result["loss_difference"] = max(firsts) - min(firsts)
    return result


def surroundings() -> str:
    """Hardware, versions and commit, in one line."""
    names = ("torch", "transformers", "peft", "accelerate", "deepspeed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{processor}, 1 of {os.cpu_count()} cores; {versions}; commit {commit or 'unknown'}"


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| trainer | CPU-s a step (median, range) | useful tokens per CPU-s | ratio | places used "
        "| first step, CPU-s | peak RSS | loss, first and last step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    labels = {"ours": "vlm-adapt", "packed": "vlm-adapt, packed rows", "theirs": "HF Trainer + peft"}
    for name, side in result["sides"].items():
        lines.append(
            f"| {labels[name]} | {side['seconds']:.3f} ({side['lowest']:.3f} to {side['highest']:.3f}) "
            f"| {side['tokens_per_second']:.0f} | {side['ratio']:.2f} | {side['useful']:.1%} "
            f"| {side['first']:.1f} | {side['peak'] / 1e9:.2f} GB "
            f"| {side['losses'][0]:.5f}, {side['losses'][-1]:.5f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure and print; 1 when the losses of the first step differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=13, help="optimizer steps of each side")
    parser.add_argument("--variable", action="store_true", help="lengths of a real mixture")
    parser.add_argument("--row-length", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--tiny", action="store_true", help="a model that only shows that all of this runs")
    parser.add_argument("--batch", type=int, help="samples a step")
    parser.add_argument("--vocabulary", type=int, help="words; the head is applied to answers only by us")
    parser.add_argument("--deepspeed", default="zero2", help="our ZeRO stage")
    parser.add_argument("--attention", default="auto", help="our attention")
    parser.add_argument("--their-attention", default="auto", help="theirs: sdpa by default")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    asked = parser.parse_args()
    changes = {name: value for name in ("batch", "vocabulary") if (value := getattr(asked, name))}
    sizes = replace(TINY if asked.tiny else Sizes(), **changes)
    ours = {"attention": asked.attention, "deepspeed": asked.deepspeed}
    options: dict[str, Any] = {"ours": ours}
    if asked.variable:
        options["packed"] = ours | {"row_length": asked.row_length}
    options["theirs"] = {"attention": asked.their_attention}
    result = measure(sizes, asked.steps, asked.variable, options)
    print(surroundings())
    kind = "variable lengths" if asked.variable else f"{sizes.length} tokens a sample"
    print(f"{result['parameters'] / 1e6:.1f} M parameters, batch {sizes.batch}, {kind}, {asked.deepspeed}\n")
    print(table(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if result["loss_difference"] > LOSS_TOLERANCE:
        print(f"the losses of the first step differ by {result['loss_difference']:.4f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
