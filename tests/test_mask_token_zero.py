"""A chat model that draws masks under real DeepSpeed: one process, two with ZeRO-2, two with ZeRO-3.

Some samples ask for no mask, and the last batch of an epoch leaves a rank without a sample: every rank runs
the masks' tower and decoder all the same, else ZeRO would wait for ever.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import asking
import pytest
from forks import write

from vlm_adapt.train.journal import read_journal

STEPS = 7  # 21 samples by 4: the sixth step has one, the first rank's
# Sums of float32 in another order, carried on by Adam: worst seen 3e-6.
CLOSE = 1e-4


def losses(tree: dict[str, Any]) -> list[float]:
    """The curve of a run."""
    return [line["loss"] for line in read_journal(Path(tree["output_dir"])) if "event" not in line]


@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_curve(own: bool, server: Any, tmp_path: Path) -> None:
    whole = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else tiny parameters stay whole
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": whole}))

    def tree_of(output: str, ranks: int, zero: str) -> dict[str, Any]:
        return asking.run_tree(
            tmp_path,
            output,
            own,
            data__evaluate=[{"shards": str(tmp_path / "masks-test.tar")}],
            train__max_steps=STEPS,
            train__adam_epsilon=1e-3,  # else a gradient that is but rounding moves a weight by a whole step
            train__per_device_train_batch_size=4 // ranks,
            train__eval_steps=STEPS,
            train__deepspeed=zero,
        )

    alone = tree_of("alone", 1, "zero0")
    server.run(["train", write(alone)])
    want = losses(alone)
    assert len(want) == STEPS and want[-1] < want[0]
    for zero in ("zero2", str(tmp_path / "zero3.json")):
        tree = tree_of(Path(zero).stem, 2, zero)
        server.run(["train", write(tree)], ranks=2)
        assert losses(tree) == pytest.approx(want, rel=CLOSE, abs=CLOSE), zero
        found, mine = (
            next(line for line in read_journal(Path(one["output_dir"])) if line.get("event") == "evaluate")
            for one in (tree, alone)
        )
        assert found["metrics"]["loss"] == pytest.approx(mine["metrics"]["loss"], rel=CLOSE)
