"""Bytes saved for the backward pass: how they are counted, and what memory-saving methods leave of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from vlm_adapt.adapt.plan import apply_plan
from vlm_adapt.adapt.saved_memory import saved_bytes
from vlm_adapt.adapt.sparse_saved import WATCHERS
from vlm_adapt.attention import register
from vlm_adapt.config.schema import Adapt
from vlm_adapt.language.causal import CausalLanguage
from vlm_adapt.language.language import LanguageInput
from vlm_adapt.language.layout import Layout

torch.set_num_threads(1)
SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "memory.py"
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def test_each_memory_is_counted_once_and_weights_not_at_all() -> None:
    first, second = nn.Linear(8, 4, bias=False), nn.Linear(8, 6, bias=False)
    model = nn.ModuleList([first, second])
    x = torch.randn(5, 8)
    with saved_bytes(model) as saved:
        (first(x).sum() + second(x).sum()).backward()  # both save x
    assert (saved.dense, saved.sparse, saved.bytes) == (x.nbytes, 0, x.nbytes)
    with saved_bytes() as saved:
        y = first(x.clone().requires_grad_()).exp()
    assert saved.bytes == x.nbytes + first.weight.nbytes + y.nbytes
    with saved_bytes(model) as saved, torch.no_grad():
        first(x)
    assert saved.bytes == 0 and not WATCHERS


def saved_by(sizes: dict[str, Any], tokens: int, *lines: dict[str, Any]) -> int:
    """Bytes that a step of a random language saves with this plan."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.set_attn_implementation(register())
    language = CausalLanguage(model)
    apply_plan(
        {"language": language}, [[Adapt.model_validate({"where": "language", **one}) for one in lines]]
    )
    language.train()
    ids_BT = torch.randint(0, sizes["vocab_size"], (1, tokens))
    ones, positions_BT = torch.ones_like(ids_BT), torch.arange(tokens)[None]
    layout = Layout(ones, positions_BT + 1, ones * 0, positions_BT, plain=True)
    with saved_bytes(language) as saved:
        inputs = LanguageInput(language.embed(ids_BT), ones > 0, layout=layout)
        language(inputs, torch.arange(tokens - 9, tokens - 1), ids_BT[0, -8:])
    return saved.bytes


FULL, LORA, RAZOR = {"method": "full"}, {"method": "lora", "r": 16}, {"method": "back_razor"}
SIDE = {"method": "side_tuning", "r": 8}


def test_shares_of_a_small_model() -> None:
    """About the proportions of SmolLM2's, two blocks of half its width."""
    sizes = SMOLLM2 | {
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "vocab_size": 512,
    }
    full = saved_by(sizes, 64, FULL)
    assert saved_by(sizes, 64, SIDE) < 0.3 * full
    assert saved_by(sizes, 64, FULL, RAZOR) < 0.2 * full
    assert saved_by(sizes, 64, LORA, RAZOR) < 0.2 * saved_by(sizes, 64, LORA)


@pytest.mark.slow  # 135 M random weights, twice
def test_ladder_on_the_135_m_model() -> None:
    """At most 40 % of what full fine-tuning saves."""
    assert saved_by(SMOLLM2, 128, SIDE) <= 0.4 * saved_by(SMOLLM2, 128, FULL)


@pytest.mark.slow  # seven processes that import torch and transformers
def test_the_benchmark_runs(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--tiny",
        "--batch",
        "2",
        "--length",
        "64",
        "--json",
        str(written),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(written.read_text())
    assert "| side_tuning |" in done.stdout and len(found) == 7
    assert found["side_tuning"]["saved"] < 0.4 * found["full"]["saved"]
    assert found["full + back_razor"]["saved"] < 0.25 * found["full"]["saved"]
    assert found["full"]["loss"] == pytest.approx(found["full + back_razor"]["loss"], abs=1e-6)
