"""What training keeps in memory, by method: bytes saved for the backward pass, and the peak of a step.

SmolLM2-135M in float32 on one thread, random token ids, each row's last tokens learned. Every method runs in
a process of its own: first a step whose peak is read off the system (activations, gradients, AdamW's moments,
above the loaded weights), then another whose saved tensors are counted (each memory once, weights not).

    python scripts/bench/memory.py
    python scripts/bench/memory.py --only full,side_tuning --batch 8 --json figures.json
    python scripts/bench/memory.py --tiny        a random model of two blocks: that all of this runs

Knows languages and plans; knows nothing about images or data.
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
MODEL = "package:smollm2-135m-instruct"
# Else glibc keeps the places of large freed tensors for small ones that live on, and the peak tells of those
# gaps: lora + back_razor at 4 x 256 tokens 1069 MB instead of 261 MB.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
RAZOR = {"method": "back_razor", "sparsity": 0.9}
LORA = {"method": "lora", "r": 16, "target_modules": "all-linear"}
PLANS: dict[str, list[dict[str, Any]]] = {
    "full": [{"method": "full"}],
    "full + back_razor": [{"method": "full"}, RAZOR],
    "lora": [LORA],
    "lora + back_razor": [LORA, RAZOR],
    "lora, checkpointed": [LORA],
    "side_tuning": [{"method": "side_tuning", "r": 8}],
    "side_tuning, drop": [{"method": "side_tuning", "r": 8, "drop": True}],
}


def load(tiny: bool) -> Any:
    """The language, in float32."""
    import torch
    import transformers

    from vlm_adapt import weights
    from vlm_adapt.attention import register
    from vlm_adapt.language.causal import CausalLanguage
    from vlm_adapt.language.load import load_language

    if not tiny:
        folder = weights.resolve(MODEL)
        assert folder is not None
        return load_language(folder)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation(register())
    return CausalLanguage(model).eval()


def memory(name: str) -> int:
    """A figure of this process in bytes: `VmRSS` now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measure(name: str, batch: int, length: int, targets: int, tiny: bool) -> dict[str, Any]:
    """One method's figures: bytes saved, peak above the weights, CPU-seconds, weights that train."""
    import torch

    from vlm_adapt.adapt.plan import apply_plan
    from vlm_adapt.adapt.saved_memory import saved_bytes
    from vlm_adapt.config.schema import Adapt
    from vlm_adapt.language.language import LanguageInput
    from vlm_adapt.language.layout import Layout

    torch.set_num_threads(1)
    language = load(tiny)
    torch.manual_seed(0)
    lines = [Adapt.model_validate({"where": "language", **line}) for line in PLANS[name]]
    apply_plan({"language": language}, [lines])
    checkpointed = "checkpointed" in name
    (language.ladder or language).set_activation_checkpointing(checkpointed)
    parameters = [p for p in language.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    vocabulary = language.model.get_input_embeddings().num_embeddings
    ids_BT = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    ones, positions_BT = torch.ones_like(ids_BT), torch.arange(length).expand(batch, length)
    layout = Layout(ones, positions_BT + 1, ones * 0, positions_BT, plain=True)
    ends = torch.arange(1, batch + 1)[:, None] * length - 1 - targets + torch.arange(targets)
    predict_from_N = ends.flatten()
    targets_N = ids_BT.flatten()[predict_from_N + 1]
    language.train()

    def loss() -> Any:
        inputs = LanguageInput(language.embed(ids_BT), ones > 0, layout=layout)
        return language(inputs, predict_from_N, targets_N)[0] / len(targets_N)

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
    started = time.process_time()
    first = loss()
    first.backward()
    optimizer.step()
    seconds, peak = time.process_time() - started, memory("VmHWM")
    optimizer.zero_grad()
    with saved_bytes(language) as saved:
        again = loss()
    again.backward()
    return {
        "trainable": sum(p.numel() for p in parameters),
        "saved": None if checkpointed else saved.bytes,
        "peak": peak - before,
        "seconds": seconds,
        "loss": float(first.detach()),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown, with shares of the first row's."""
    first = next(iter(found.values()))
    lines = [
        "| method | weights that train | saved for backward | share | peak of a step above the weights "
        "| share | CPU-s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        saved, share = "not counted", ""
        if row["saved"] is not None:
            saved = f"{row['saved'] / 1e6:.1f} MB"
            share = f"{row['saved'] / first['saved']:.1%}"
        lines.append(
            f"| {name} | {row['trainable']:,} | {saved} | {share} | {row['peak'] / 1e6:.0f} MB "
            f"| {row['peak'] / first['peak']:.1%} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="methods, by comma; the first is what shares are of")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--targets", type=int, default=16, help="learned tokens at a row's end")
    parser.add_argument("--tiny", action="store_true", help="a random model of two blocks")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a process measures one method
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one, asked.batch, asked.length, asked.targets, asked.tiny)))
        return 0
    names = [name.strip() for name in asked.only.split(",")] if asked.only else list(PLANS)
    unknown = [name for name in names if name not in PLANS]
    if unknown:
        parser.error(f"unknown method '{unknown[0]}': there are {'; '.join(PLANS)}")
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        command = [sys.executable, __file__, "--one", name, "--batch", str(asked.batch)]
        command += ["--length", str(asked.length), "--targets", str(asked.targets)]
        done = subprocess.run(
            command + ["--tiny"] * asked.tiny,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | ALLOCATOR,
        )
        if done.returncode:
            sys.stderr.write(done.stderr[-3000:])
            return 1
        found[name] = json.loads(done.stdout.splitlines()[-1])
    print(f"batch {asked.batch} x {asked.length} tokens, {asked.targets} of each row learned, float32\n")
    print(table(found))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
