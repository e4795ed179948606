"""A run from its first stage to its last, found again where it was stopped.

Knows stages, output folders and how a run ends; the steps themselves are in loop.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from vlm_adapt import dist
from vlm_adapt.adapt.plan import check_plan
from vlm_adapt.config.load import dump
from vlm_adapt.config.schema import Adapt, Run, Source
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.files import write_scores
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.build import build, compute_dtype
from vlm_adapt.models.restore import LATEST, find_checkpoint, load_trained, plan_of, read_checkpoint
from vlm_adapt.models.start import begin_from
from vlm_adapt.train import checkpoint
from vlm_adapt.train.budget import FILE as REFUSED
from vlm_adapt.train.engine import zero_settings
from vlm_adapt.train.journal import Journal, rewind
from vlm_adapt.train.lock import OutputLock
from vlm_adapt.train.loop import StageLoop, Totals
from vlm_adapt.train.signals import Signals

DONE = "finished"


def train(run: Run, fresh: bool = False) -> int:
    """Train a run, or go on with it.

    Args:
        fresh: start over, whatever the output folder holds.

    Returns:
        0 when it finished (or had finished before), 130 or 143 when a signal stopped it.

    Raises:
        UserError: the configuration does not fit the folder's run, or something it names is missing.
    """
    stages = [stage for _, stage in run.stage_runs()]
    check_plan([stage.adapt for stage in stages])
    for stage in stages:
        zero_settings(stage.train.deepspeed)
    output = Path(run.output_dir)
    _check_output(output)
    if run.adapter is not None and not (output / LATEST).is_file():  # a run that goes on needs it no more
        find_checkpoint(run.adapter)
    dist.start()
    lock = OutputLock(output)
    journal = Journal(output, dist.is_main(), run.train.report_to, output.name)
    try:
        checkpoint.on_main(lock.take, f"output_dir '{output}'")
        found = None if fresh else find_state(run, output)
        if found is not None and found[0].get(DONE):
            say(f"this run has finished: {found[1]} (start over with --fresh)")
            return 0
        # What an earlier run left is cleared, and anything written, only when this one has been built:
        # a mistake in it costs nothing.
        write = partial(_begin, run, output, found, fresh, journal, lock)
        with Signals() as signals:
            begin = partial(checkpoint.on_main, write, f"output_dir '{output}'")
            return _stages(run, output, found, journal, signals, begin)
    finally:
        journal.close()
        lock.release()


def _begin(
    run: Run,
    output: Path,
    found: tuple[dict[str, Any], Path] | None,
    fresh: bool,
    journal: Journal,
    lock: OutputLock,
) -> None:
    """Make the output folder this run's own; on the main rank."""
    output.mkdir(parents=True, exist_ok=True)
    lock.take()
    if fresh:
        _clear(output)
    for left in output.glob(".checkpoint-*.partial"):  # a kill came in the middle of writing
        shutil.rmtree(left)
    dropped = rewind(output, found[0]["step"] if found else 0)
    if (output / REFUSED).is_file():
        rewind(output, found[0]["step"] if found else -1, REFUSED)
    checkpoint.write_atomically(output / "run.yaml", dump(run))
    journal.open()
    if found is not None:
        journal.event("resume", step=found[0]["step"], checkpoint=found[1].name, lines_dropped=dropped)


def _stages(
    run: Run,
    output: Path,
    found: tuple[dict[str, Any], Path] | None,
    journal: Journal,
    signals: Signals,
    begin: Callable[[], None],
) -> int:
    names = {field.name for field in fields(Totals)}
    totals = Totals(**{k: v for k, v in found[0].items() if k in names}) if found else Totals()
    folder = found[1] if found else None
    stages = run.stage_runs()
    if folder is not None:
        say(f"going on from {folder} (step {totals.step}, stage '{stages[totals.stage][0]}')")
    before: list[list[Adapt]] = []  # the plan of the adapter that this run builds on
    if found is not None:
        before = plan_of(run, found[0])[: -totals.stage - 1]
    elif run.adapter is not None:
        folder = find_checkpoint(run.adapter)
        before = plan_of(*read_checkpoint(folder))
        say(f"building on {folder}")
    started, begun = time.monotonic(), False
    while totals.stage < len(stages):
        name, stage_run = stages[totals.stage]
        assembled: AssembledModel = build(run.model, compute_dtype(stage_run.train.bf16), run.seed)
        lines = [*before, *(list(one.adapt) for _, one in stages[: totals.stage + 1])]
        plan = assembled.adapt(lines)
        if folder is not None:
            load_trained(assembled, folder)
        table = plan.table()
        resume = (found[0], found[1]) if found and found[0]["stage"] == totals.stage else None
        if resume is None:
            for line in begin_from(assembled, lines, folder):
                say(line)
        loop = StageLoop(run, name, stage_run, assembled, totals, journal, signals, resume)
        if not begun:
            begin()
            begun = True
        _announce(name, table, assembled, loop, journal, output)
        if not loop.train():
            say(f"stopped after step {totals.step}; the same command goes on from there")
            journal.event("stop", step=totals.step, signal=signals.received)
            return 128 + (signals.received or 2)
        folder, found = output / f"checkpoint-{totals.step}", None
        if totals.stage == len(stages) - 1:
            return _finish(run, loop, output, folder, journal, started)
        totals.stage, totals.stage_step = totals.stage + 1, 0
        del loop, assembled
    return 0


def _finish(run: Run, loop: StageLoop, output: Path, folder: Path, journal: Journal, started: float) -> int:
    say("scoring held-out samples" if loop.stage_run.data.evaluate else "no held-out samples to score")
    scores = loop.score(None)
    account = loop.account

    def write() -> None:
        if scores is not None:
            # `chat` and `evaluate` on the run's folder take the best checkpoint, if one was chosen.
            scores.metrics["checkpoint"] = folder.name
            best = output / "best"
            if best.is_file() and (name := best.read_text(encoding="utf-8").strip()) != folder.name:
                say(f"these are the scores of {folder.name}; the best by its own was {name}")
            write_scores(output, scores, loop.assembled, loop.stage_run)
            say(scores.line())
        state = json.loads((folder / "state.json").read_text(encoding="utf-8")) | {DONE: True}
        checkpoint.write_atomically(folder / "state.json", json.dumps(state, indent=1))

    checkpoint.on_main(write, f"the scores in '{output}'")
    if account.refusals or account.truncated or account.split:
        counts = f"{account.used} used, {account.truncated} truncated, {account.split} split, "
        counts += f"{account.refusals} refused"
        say(f"samples: {counts}{'; refused ' + account.named() if account.refusals else ''}")
    if account.mended:
        say("mended on the way: " + "; ".join(f"{n:,} x {what}" for what, n in account.mended.items()))
    seconds = round(time.monotonic() - started, 1)
    journal.event("finish", step=loop.totals.step, seconds=seconds, account=account.to_dict())
    dist.barrier()
    say(f"done in {seconds} s: {folder}")
    return 0


def find_state(run: Run, output: Path) -> tuple[dict[str, Any], Path] | None:
    """State and folder of the newest checkpoint of this run, if it has one.

    Raises:
        UserError: the folder belongs to a run with another model, plan, data or seed.
    """
    pointer = output / LATEST
    if not pointer.is_file():
        return None
    folder = output / pointer.read_text(encoding="utf-8").strip()
    before, state = read_checkpoint(folder)
    for key in ("model", "adapt", "adapter", "seed", "stages"):
        if getattr(before, key) != getattr(run, key):
            raise UserError(
                f"'{output}' holds a run with another '{key}': choose another output_dir, or start over "
                "with --fresh"
            )
    if _content(before) != _content(run):
        raise UserError(
            f"'{output}' holds a run on other data.train: choose another output_dir, or start over "
            "with --fresh"
        )
    if state.get(DONE) and before.train.max_steps != run.train.max_steps:
        raise UserError(
            f"'{output}' holds a finished run of {state['step']} steps: choose another output_dir, or --fresh"
        )
    return state, folder


def _content(run: Run) -> list[Source]:
    """The sources that are trained on, without what may change on the way: names and limits."""
    return [source.model_copy(update={"name": None, "max_refused": None}) for source in run.data.train]


def _check_output(output: Path) -> None:
    """Whether a folder can be made and written there, before anything is loaded."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"output_dir '{output}' cannot be written: '{there}' is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir '{output}' cannot be written: there is no permission in '{there}'")


def _clear(output: Path) -> None:
    """Forget an earlier run: pointers first, so that a kill leaves nothing that looks like a run."""
    for name in (LATEST, "best", "journal.jsonl", REFUSED, "metrics.json", "predictions.jsonl"):
        (output / name).unlink(missing_ok=True)
    for path in output.glob("checkpoint-*"):
        shutil.rmtree(path)


def _announce(
    name: str,
    table: list[dict[str, Any]],
    assembled: AssembledModel,
    loop: StageLoop,
    journal: Journal,
    output: Path,
) -> None:
    """Say what trains: freezing is an explicit, printed act."""
    rows = [
        *table,
        {"part": "all", "method": "", **{k: sum(r[k] for r in table) for k in ("trainable", "frozen")}},
    ]
    say(
        f"stage '{name}': {loop.total} steps, {assembled.dtype}, {dist.world_size()} process(es), "
        f"{loop.stage_run.train.deepspeed}"
    )
    for row in rows:
        say(
            f"  {row['part']:<10} {row['method']:<14} "
            f"trainable {row['trainable']:>13,}  frozen {row['frozen']:>15,}"
        )
    taught = assembled.model.teacher.notes if getattr(assembled.model, "teacher", None) else []
    for note in taught:
        say(f"  {note}")
    for told in loop.begun:
        say(f"  {told}")
    for source, kept in loop.selections.items():
        say(f"  {source}: {kept}")
    write = partial(checkpoint.write_atomically, output / "parts.json", json.dumps(rows, indent=1))
    checkpoint.on_main(write, f"'{output / 'parts.json'}'")
    journal.event(
        "stage",
        step=loop.totals.step,
        name=name,
        steps=loop.total,
        parts=rows,
        dtype=str(assembled.dtype).removeprefix("torch."),
        device=str(loop.engine.device),
        world_size=dist.world_size(),
        notes=[*assembled.notes, *taught],
        selections={source: kept.to_dict() for source, kept in loop.selections.items()},
    )


def say(text: str) -> None:
    """A line for the person who watches; from the main rank only."""
    if dist.is_main():
        print(text, file=sys.stderr, flush=True)
