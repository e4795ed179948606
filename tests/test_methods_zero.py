"""Every method under real DeepSpeed: one process, two with ZeRO-2, two with ZeRO-3. One loss curve.

Generated from the table of methods. One method of each kind is tried by default, all of them with the slow
tests. 21 samples an epoch leave a batch of one, so that a rank has no sample at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from forks import write
from grid import ABOUT, METHODS, marks, trains

from vlm_adapt.train.journal import read_journal

STEPS = 6
USUAL = {"lora", "prefix_tuning", "visual_prompt", "houlsby", "side_tuning"}
DRAWS = {"pvera"}  # noise while it trains, on every rank its own
# Float32 sums are taken in another order, and Adam carries the difference on: worst seen 3e-5 (RandLoRA,
# whose two factors scale large fixed matrices), most below 2e-6.
CLOSE = 1e-4


def tree_of(parts: Path, output: Path, method: str, side: str, ranks: int, zero: str) -> dict[str, Any]:
    """Some steps of four samples, of which the ranks take their shares."""
    line = {"method": method, "where": side, **ABOUT[method]["example"]}
    lines = [line] if trains(method) else [line, {"method": "full", "where": side}]
    return tiny.run_tree(
        parts,
        str(output),
        adapt=lines,
        data__lanes=1,
        data__train=[{"shards": str(parts / "train.tar"), "limit": 21}],
        train__max_steps=STEPS,
        train__learning_rate=5e-3,
        train__adam_epsilon=1e-3,  # else a gradient that is but rounding moves a weight by a whole step
        train__per_device_train_batch_size=4 // ranks,
        train__deepspeed=zero,
    )


def losses(tree: dict[str, Any]) -> list[float]:
    """The curve of a run."""
    return [line["loss"] for line in read_journal(Path(tree["output_dir"])) if "event" not in line]


@pytest.mark.parametrize(
    "method",
    [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n not in DRAWS],
)
def test_one_curve(parts: Path, server: Any, tmp_path: Path, method: str) -> None:
    """The same losses on every side, whatever the processes and the stage."""
    whole = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else tiny parameters stay whole
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": whole}))
    wants = {}
    sides = ABOUT[method]["sides"]
    for side in sides[-1:] if marks(method) else sides:  # peft's many tuners go the same way on every side
        tree = tree_of(parts, tmp_path / f"{side}-alone", method, side, 1, "zero0")
        alone = server.start(["train", write(tree)])
        code = alone.wait()
        if code == [2] and "Traceback" not in alone.text():
            continue  # the tiny parts have nothing for it: one sentence
        assert code == [0], alone.text()
        wants[side] = losses(tree)
    if not wants:
        pytest.skip("refused on every side of the tiny parts")
    together = {
        (side, Path(stage).stem): tree_of(
            parts, tmp_path / f"{side}-{Path(stage).stem}", method, side, 2, stage
        )
        for side in wants
        for stage in ("zero2", str(tmp_path / "zero3.json"))
    }
    server.run(*(["train", write(tree)] for tree in together.values()), ranks=2)
    for (side, stage), tree in together.items():
        want = wants[side]
        assert len(want) == STEPS and want[0] != want[-1]
        assert losses(tree) == pytest.approx(want, rel=CLOSE, abs=CLOSE), (side, stage)
