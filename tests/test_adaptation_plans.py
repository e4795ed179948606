"""The comparison of methods leaves none out: each has a plan, or a reason why it has no place there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vlm_adapt.adapt import METHODS
from vlm_adapt.adapt.method import make_method
from vlm_adapt.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "bench"))
from adaptation_table import BEGIN, END, into_page, read_results
from plans import FAMILIES, NOT_HERE, PLANS  # noqa: E402

KEYS = {"method", "where", "learning_rate"}


def test_every_method_has_a_plan_or_a_reason() -> None:
    planned = {line["method"] for plan in PLANS.values() for line in plan}
    assert planned | set(NOT_HERE) == set(METHODS)
    assert not planned & set(NOT_HERE)
    assert all(NOT_HERE.values())


def test_no_name_stands_for_two_plans() -> None:
    assert len(PLANS) == sum(map(len, FAMILIES.values()))


@pytest.mark.parametrize("name", PLANS)
def test_the_settings_of_a_plan_are_taken(name: str) -> None:
    for line in PLANS[name]:
        method = make_method(METHODS, line["method"], {k: v for k, v in line.items() if k not in KEYS})
        assert line["where"] in method.sides


def test_a_misspelt_setting_would_be_seen() -> None:
    with pytest.raises(UserError):
        make_method(METHODS, "miss", {"rank": 20})


def test_a_page_gets_its_tables_and_its_plot(tmp_path: Path) -> None:
    """Of what there is: one with costs and two seeds, one counted alone, one that only ran."""
    costs = {"trained": 10, "share": 0.1, "stored": 4e6, "saved_activations": 2e8, "peak_memory": 1e9}
    (tmp_path / "costs-lora.json").write_text(json.dumps(costs | {"cpu_seconds_a_step": 1.5}))
    (tmp_path / "counts-oft.json").write_text(json.dumps({"trained": 7, "share": 0.5, "stored": 28}))
    for name, accuracy in (("lora-0", 0.9), ("lora-1", 0.8), ("houlsby-0", 0.5)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"accuracy": accuracy}))
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    results = read_results(tmp_path, list(PLANS))
    into_page(results, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert "| lora | language | 10 | 10.000% | 4 MB | 200 MB | 1 GB | 1.50 | 85.0 (90, 80) |" in text
    assert "| oft | language | 7 | 50.000% | 28 B |  |  |  |  |" in text
    assert "| houlsby | language |  |  |  |  |  |  | 50.0 (50) |" in text
    assert (tmp_path / "adaptation.png").stat().st_size > 1000
    into_page(results, page)
    assert page.read_text() == text
