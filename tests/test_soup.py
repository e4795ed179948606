"""Soups: the mean of products and not of factors, greedy ones that only get better, and what has no mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_adapters import copied, full, logits, lora, several_runs, trained
from tiny import sentence

from vlm_adapt.cli import main
from vlm_adapt.errors import UserError
from vlm_adapt.export.merge import merge_checkpoint
from vlm_adapt.export.soup import mean, soup
from vlm_adapt.models.restore import restore

FILE = "language-lora/adapter_model.safetensors"
CONNECTOR = "connector-full/model.safetensors"


@pytest.fixture(scope="module")
def runs(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See small_adapters.several_runs."""
    return several_runs(parts, tmp_path_factory.mktemp("runs"))


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """s B A of each layer of a folder's LoRA, its settings read off its own adapter_config.json."""
    words = json.loads((folder / "language-lora" / "adapter_config.json").read_text())
    scale = words["lora_alpha"] / (words["r"] ** 0.5 if words["use_rslora"] else words["r"])
    tensors = load_file(folder / FILE)
    return {
        key: scale * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        for key in tensors
        if "lora_A" in key
    }


@pytest.mark.parametrize("times", [2, 3])
def test_soup_of_equals_is_itself(runs: Path, tmp_path: Path, times: int) -> None:
    soup([runs / "a"] * times, tmp_path / "soup")
    # The sum over k times as many columns is in another order.
    torch.testing.assert_close(logits(tmp_path / "soup"), logits(runs / "a"), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_products_are_averaged(parts: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """dW of the soup is the mean of dW; the mean of factors would be something else."""
    one = trained(parts, tmp_path / "one", adapt=[full(), lora(**more)])
    two = trained(parts, tmp_path / "two", adapt=[full(), lora(**more)], seed=1)
    soup([one, two], tmp_path / "soup")
    line = yaml.safe_load((tmp_path / "soup" / "run.yaml").read_text())["adapt"][1]
    assert line["r"] == 8 and line["lora_alpha"] == pytest.approx(8 / 2**0.5 if "use_rslora" in more else 8)
    if "rank_pattern" not in more:  # the file of settings alone does not say a layer's own rank here
        first, second, made = deltas(one), deltas(two), deltas(tmp_path / "soup")
        for key, delta in made.items():
            torch.testing.assert_close(delta, (first[key] + second[key]) / 2, atol=1e-8, rtol=1e-5)
        factors = {
            key: (load_file(one / FILE)[key] + load_file(two / FILE)[key]) / 2
            for key in load_file(one / FILE)
        }
        key = next(key for key in made if "down_proj" in key)
        wrong = 2.0 * factors[key.replace("lora_A", "lora_B")] @ factors[key]
        assert (wrong - made[key]).abs().max() > 1e-3
    # The merged soup is the mean of the merged models.
    for name, folder in (("x", one), ("y", two), ("z", tmp_path / "soup")):
        merge_checkpoint(folder, tmp_path / name, "float32")
    x, y, z = (load_file(tmp_path / name / "language" / "model.safetensors") for name in "xyz")
    for key in z:
        torch.testing.assert_close(z[key], (x[key] + y[key]) / 2, atol=1e-6, rtol=1e-5)


def test_other_methods_average_their_numbers(runs: Path, tmp_path: Path) -> None:
    told = soup([runs / "a", runs / "b"], tmp_path / "soup")
    one, two, made = (load_file(folder / CONNECTOR) for folder in (runs / "a", runs / "b", tmp_path / "soup"))
    for key in made:
        torch.testing.assert_close(made[key], (one[key] + two[key]) / 2)
    assert told["kind"] == "uniform" and len(told["kept"]) == 2
    assert json.loads((tmp_path / "soup" / "soup.json").read_text()) == told
    about = json.loads((tmp_path / "soup" / "adapter.json").read_text())
    assert about["from"] == "a uniform soup of 2" and about["methods"]["language-lora"]["numbers"] == 8192


def test_a_soup_is_an_adapter_like_any(parts: Path, runs: Path, tmp_path: Path) -> None:
    """peft reads it, a soup of soups is one, and training goes on from it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    soup([runs / "plain", runs / "plain"], tmp_path / "soup")
    base = AutoModelForCausalLM.from_pretrained(parts / "llama", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path / "soup" / "language-lora").eval()
    ours = restore(runs / "plain")[0].model
    ids_BT = torch.arange(5, 17)[None]
    with torch.no_grad():
        mine = ours.language.model(input_ids=ids_BT).logits
        torch.testing.assert_close(theirs(input_ids=ids_BT).logits, mine, atol=2e-5, rtol=1e-5)
    line = yaml.safe_load((tmp_path / "soup" / "run.yaml").read_text())["adapt"][0]
    trained(parts, tmp_path / "run", adapt=[line], adapter=str(tmp_path / "soup"), train__max_steps=1)
    soup([tmp_path / "soup", tmp_path / "soup"], tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(runs / "plain"), atol=4e-5, rtol=1e-5)


# Greedy --------------------------------------------------------------------------------------------------


def scorer(values: dict[str, float]) -> Callable[[Path], float]:
    """By which runs are in a soup: known by the first number of its connector."""

    def score(folder: Path) -> float:
        first = float(next(iter(load_file(folder / CONNECTOR).values())).flatten()[0])
        return next(value for name, value in values.items() if abs(float(name) - first) < 1e-6)

    return score


@pytest.fixture
def three(runs: Path, tmp_path: Path) -> list[Path]:
    """Connectors whose first number is 1, 2 and 4: a mean tells who is in it."""
    made = []
    for number in (1, 2, 4):
        folder = copied(runs / "a", tmp_path / f"in{number}")
        tensors = load_file(folder / CONNECTOR)
        next(iter(tensors.values())).flatten()[0] = number
        save_file(tensors, folder / CONNECTOR)
        made.append(folder)
    return made


@pytest.mark.parametrize(
    ("values", "greater", "kept"),
    [
        # Sorted 2, 4, 1. 2+4 is better, 2+4+1 is worse.
        ({"1": 0.1, "2": 0.9, "4": 0.5, "3": 0.95, str(7 / 3): 0.94}, True, ["in2", "in4"]),
        # A tie leaves out: 2+4 equals 2 alone; then 2+1 is better.
        ({"1": 0.1, "2": 0.9, "4": 0.5, "3": 0.9, "1.5": 0.91}, True, ["in2", "in1"]),
        # Losses: smaller is better; all go in.
        ({"1": 3.0, "2": 2.0, "4": 1.0, "3": 0.9, str(7 / 3): 0.8}, False, ["in4", "in2", "in1"]),
        # Of equals the first given goes first; nothing is better than it alone.
        ({"1": 0.5, "2": 0.5, "4": 0.5, "1.5": 0.5, "2.5": 0.5}, True, ["in1"]),
    ],
)
def test_greedy(
    three: list[Path], tmp_path: Path, values: dict[str, float], greater: bool, kept: list[str]
) -> None:
    told = soup(three, tmp_path / "soup", scorer(values), greater)
    assert [Path(one).name for one in told["kept"]] == kept
    assert len(told["scores"]) == 5 and told["kind"] == "greedy"
    assert not list((tmp_path / "soup").glob("*tried*"))
    # What is kept is what was scored best.
    best = max(value for value in values.values()) if greater else min(values.values())
    assert scorer(values)(tmp_path / "soup") == best


def test_greedy_by_held_out_score(parts: Path, runs: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["adapt", "soup", str(runs / "a"), str(runs / "b"), "--output", str(tmp_path / "soup")]
    held = f"data.evaluate={parts / 'test.tar'}"
    assert main([*words, held]) == 2
    assert "is for the scores of --greedy" in capsys.readouterr().err
    assert main([*words, "--greedy", held, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    alone = sorted(row["score"] for row in told["scores"][:2])
    assert told["scores"][0]["score"] == alone[0] and told["scores"][0]["kept"]  # the loss: smaller is better
    assert told["scores"][2]["kept"] == (told["scores"][2]["score"] < alone[0])


# Refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_averaged(parts: Path, runs: Path, tmp_path: Path) -> None:
    def refused(*folders: Path) -> str:
        with pytest.raises(UserError) as caught:
            soup(folders, tmp_path / "soup")
        assert not (tmp_path / "soup").exists() and not list(tmp_path.glob(".*"))
        return sentence(caught)

    assert "needs two adapters or more" in refused(runs / "a")
    assert "have other plans: a soup is made of runs with the same lines" in refused(
        runs / "a", runs / "plain"
    )
    elsewhere = {"model__language": {"model": str(parts / "llama"), "weights": "random:3"}}
    other = trained(parts, tmp_path / "other", adapt=[full(), lora()], **elsewhere)
    assert "was trained on the language" in refused(runs / "a", other)
    pissa = [lora(init_lora_weights="pissa", target_modules="q_proj")]
    one = trained(parts, tmp_path / "pissa", adapt=pissa, train__max_steps=1)
    assert "begun as 'pissa' can be made" in refused(one, one)
    cut = copied(runs / "b", tmp_path / "cut")
    (cut / FILE).write_bytes((cut / FILE).read_bytes()[:-9])
    assert "is cut off" in refused(runs / "a", cut)


def test_random_projections_must_be_the_same(parts: Path, tmp_path: Path) -> None:
    """VeRA's matrices are drawn, saved, and not trained: with another draw a mean means nothing."""
    line = {"method": "vera", "where": "language", "r": 4, "learning_rate": 1e-2, "target_modules": "q_proj"}
    first = trained(parts, tmp_path / "first", adapt=[line])
    soup([first, first], tmp_path / "soup")
    torch.testing.assert_close(logits(tmp_path / "soup"), logits(first), atol=1e-6, rtol=0)
    other = trained(parts, tmp_path / "other", adapt=[line | {"projection_prng_key": 7}])
    with pytest.raises(UserError, match="have other plans"):
        soup([first, other], tmp_path / "no")


def test_mean() -> None:
    half = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    assert mean([half, half + 2]).tolist() == [2.0, 4.0] and mean([half, half]).dtype == torch.bfloat16
    assert mean([torch.tensor([3])] * 2).tolist() == [3]
    with pytest.raises(UserError, match="'x' holds whole numbers that differ"):
        mean([torch.tensor([3]), torch.tensor([4])], "x")
