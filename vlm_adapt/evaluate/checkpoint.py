"""The verb `evaluate`: a checkpoint alone, scored on held-out samples.

Knows checkpoints, overrides and where results go; the scoring is that of the model's kind (kinds.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from vlm_adapt import dist
from vlm_adapt.config.load import load_run
from vlm_adapt.config.schema import Run
from vlm_adapt.evaluate.files import write_scores
from vlm_adapt.evaluate.kinds import EVALUATIONS
from vlm_adapt.evaluate.progress import Told
from vlm_adapt.evaluate.scores import Scores
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.restore import restore_any


def evaluate_checkpoint(
    path: str | Path, overrides: Sequence[str] = (), limit: int | None = None, output: Path | None = None
) -> Scores:
    """Score a checkpoint.

    Args:
        path: a checkpoint folder or a run's output folder.
        overrides: `key=value` changes of the saved run (its data.evaluate, evaluate.blind, …).
        limit: only so many samples.
        output: folder for `metrics.json` and `predictions.jsonl`; by default `evaluation` in the
            checkpoint's folder.

    Raises:
        UserError: no checkpoint, or nothing to score on.
    """
    dist.start()
    scores, assembled, stage_run, folder = score(path, overrides, limit)
    if dist.is_main():
        target = output or folder / "evaluation"
        write_scores(target, scores, assembled, stage_run)
        print("\n\n".join(part for part in (scores.table(), scores.line()) if part))
        print(f"written to {target}", file=sys.stderr)
    return scores


def score(
    path: str | Path, overrides: Sequence[str] = (), limit: int | None = None
) -> tuple[Scores, AssembledModel, Run, Path]:
    """As `evaluate_checkpoint`, and nothing is written: the scores, the model, its run, and its folder."""
    assembled, _, folder = restore_any(path)
    run = load_run(folder / "run.yaml", overrides)
    stage_run = run.stage_runs()[-1][1]
    device = dist.device()
    assembled.model.to(device)

    @contextmanager
    def autocast() -> Iterator[None]:
        with torch.autocast(device.type, assembled.dtype, enabled=assembled.dtype != torch.float32):
            yield

    scores: Scores = EVALUATIONS.load(stage_run.model.kind)(
        assembled,
        stage_run.data,
        stage_run.evaluate,
        limit=limit,
        autocast=autocast,
        device=device,
        seed=run.seed,
        tell=Told(),
    )
    return scores, assembled, stage_run, folder
