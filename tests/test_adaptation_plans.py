"""The comparison of methods leaves none out: each has a plan, or a reason why this model cannot take it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlm_adapt.adapt import METHODS
from vlm_adapt.adapt.method import make_method
from vlm_adapt.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "bench"))
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
