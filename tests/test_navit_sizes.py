"""What becomes of images of native size before they are decoded, and settings that are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_navit import TINY, images, together, tower

from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import Native, TokenCount
from vlm_adapt.vision import build_tower


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 400),
    st.integers(1, 3),
    st.sampled_from(["own", "fill", 224, (64.0, 512.0)]),
)
@settings(max_examples=300, deadline=None)
def test_grids_stay_in_their_bounds(
    width: int, height: int, most: int, multiple: int, resolution: Any
) -> None:
    most = max(most, multiple**2)
    native = Native(16, most, max(1, most // 4), resolution, multiple=multiple, max_side=60)
    rows, columns = native.grid(width, height, None if isinstance(resolution, str) else 224.0)
    assert rows >= 1 and columns >= 1 and rows * columns <= most and max(rows, columns) <= max(60, multiple)
    assert rows % multiple == 0 and columns % multiple == 0
    if min(rows, columns) > multiple and max(rows, columns) < 60 - multiple and resolution != "fill":
        # Each side is within one rounding of the same scale.
        unit = 16 * multiple
        low = max((rows / multiple - 0.5) * unit / height, (columns / multiple - 0.5) * unit / width)
        high = min((rows / multiple + 0.5) * unit / height, (columns / multiple + 0.5) * unit / width)
        assert low <= high * (1 + 1e-9)


def test_resolutions_and_shares_are_drawn_as_said() -> None:
    generator = np.random.default_rng(0)
    native = Native(8, 10_000, resolution=(80, 240), drop={"mean": 0.5, "deviation": 0.1})
    plans = [native.plan(300, 300, generator) for _ in range(2000)]
    sides = np.array([math.sqrt(plan.rows * plan.columns) * 8 for plan in plans])
    # Uniform over side lengths: mean 160, deviation 160 / sqrt(12) = 46; of 2000, and rounded to 8.
    assert abs(sides.mean() - 160) < 5 and abs(sides.std() - 46.2) < 3
    shares = np.array([1 - plan.kept / (plan.rows * plan.columns) for plan in plans])
    assert abs(shares.mean() - 0.5) < 0.01 and abs(shares.std() - 0.1) < 0.01
    constant = Native(8, 10_000, drop=0.25)
    assert constant.plan(320, 160, generator).kept == 600 and constant.plan(320, 160).kept == 800
    assert native.plan(300, 300).rows == 30  # nothing drawn: the highest side, and all patches
    assert TokenCount(group=2)(4, 6) == 6 and TokenCount(fixed=5)(4, 6, 3) == 5 and TokenCount()(4, 6, 3) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"native": {"max_patch": 4}}, "'max_patch' of native, did you mean 'max_patches'"),
        ({"native": {"max_patches": 4, "min_patches": 5}}, "min_patches 5 is above max_patches 4"),
        ({"native": {"max_patches": 0}}, "max_patches is a whole number from 1, not 0"),
        ({"native": {"resolution": "big"}}, "resolution 'big' is none of"),
        ({"native": {"resolution": [300, 200]}}, r"resolution \(300, 200\) is none of"),
        ({"native": {"drop": 1.0}}, "share from 0 to below 1, not 1.0"),
        ({"native": {"drop": {"mean": 0.5}}}, "is no share, and not"),
        ({"native": {"drop": {"mean": 0.5, "deviation": 0.6}}}, "no Beta distribution has mean 0.5"),
        ({"native": {"attention": "flash"}}, "unknown attention 'flash'"),
        ({"native": {"max_patches": 64, "sequence": 50}}, "no room for an image of max_patches 64"),
        ({"native": "yes"}, "native is a mapping"),
        ({"positions": "learnt"}, "unknown positions 'learnt' of navit"),
        ({"coordinates": "x"}, "unknown coordinates 'x'"),
        ({"combine": "x"}, "unknown combine 'x'"),
        ({"heads": 5}, "width 32 is not a multiple of its 5 heads"),
        ({"depth": 0}, "depth is a whole number from 1"),
        ({"norm": "batch"}, "unknown norm 'batch'"),
        ({"width": 33, "heads": 3}, "width 33 does not split"),
        ({"patches": 3}, "unknown option 'patches' of 'navit:tiny', did you mean 'patch'"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tower(**options)


def test_names_that_cannot_work() -> None:
    with pytest.raises(UserError, match="unknown navit 'tini', did you mean 'tiny'"):
        build_tower("navit:tini", "random:")
    with pytest.raises(UserError, match="no published weights"):
        build_tower("navit:tiny")
    with pytest.raises(UserError, match="no one image_size"):
        build_tower("navit:tiny", "random:", image_size=64)


def test_weights_come_back_from_a_file(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    model = tower(pool=True)
    save_file(model.state_dict(), str(tmp_path / "w.safetensors"))
    again = build_tower(
        "navit:tiny", f"file:{tmp_path}/w.safetensors", options=TINY | {"native": {"max_patches": 40}}
    )
    assert "pool" in again.notes[0]
    assert torch.equal(again(together(images()))[0], tower()(together(images()))[0]) is False  # other weights
    whole = build_tower(
        "navit:tiny",
        f"file:{tmp_path}/w.safetensors",
        options=TINY | {"native": {"max_patches": 40}, "pool": True},
    )
    assert torch.equal(whole(together(images()))[0], model(together(images()))[0])
