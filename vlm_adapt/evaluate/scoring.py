"""The verb `scores`: checkpoints score the training samples of a run, and a sidecar keeps the scores.

Knows checkpoints, overrides and where the file goes; the scoring is in difficulty.py, the file in
data/score_file.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_adapt import __version__, dist
from vlm_adapt.config.load import load_run
from vlm_adapt.config.schema import Run, Source
from vlm_adapt.data.score_file import Group, ScoreFile, check_output
from vlm_adapt.data.select import keys_of
from vlm_adapt.data.storage import shown
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.difficulty import Scored, score_samples
from vlm_adapt.models.build import compute_dtype
from vlm_adapt.models.restore import find_checkpoint, read_checkpoint, restore

FILE = "scores.safetensors"
Counting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def _silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def score_checkpoints(
    checkpoints: Sequence[str | Path],
    overrides: Sequence[str] = (),
    shards: Sequence[str] = (),
    output: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    counting: Counting = _silent,
) -> tuple[Scored, Path]:
    """Score training samples by one checkpoint, or by the mean over several, and write the sidecar.

    All samples are scored, whatever the sources' `keep` and `limit` say, so that a range of quantiles
    can be chosen later.

    Args:
        checkpoints: checkpoint folders or output folders of runs.
        overrides: `key=value` changes of the first one's run.
        shards: scored in place of the run's data.train, phrased as its first source is.
        output: the file; by default `scores.safetensors` in the checkpoint's folder.
        limit: only so many samples, spread evenly (to look at; too few to select by).
        batch_size: samples at once; by default evaluate.batch_size.
        counting: `counting(what, samples)` opens a progress display, which is told how many are done.

    Raises:
        UserError: no checkpoint, nothing to score, or the file cannot be written.
    """
    dist.start()
    folders = [find_checkpoint(path) for path in checkpoints]
    if output is None and len(folders) > 1:
        raise UserError("the mean over several checkpoints needs a file to be written to: give --output")
    target = output or folders[0] / FILE
    if dist.is_main():
        check_output(target)
    run = load_run(folders[0] / "run.yaml", overrides)
    stage_run = _stage_run(run, folders[0])
    sources = _sources(stage_run, shards)
    made: list[Scored] = []
    steps = []
    for number, folder in enumerate(folders):
        assembled, _, _ = restore(folder, compute_dtype(stage_run.train.bf16))
        device = dist.device()
        assembled.model.to(device)
        autocast = _autocast(device, assembled.dtype)
        reader = assembled.reader(sources, run.seed, stage_run.data)
        total = min(len(reader), limit or len(reader))
        what = f"scores {number + 1} of {len(folders)}" if len(folders) > 1 else "scores"
        with (counting if dist.is_main() else _silent)(what, total) as tell:
            size = batch_size or stage_run.evaluate.batch_size
            made.append(score_samples(assembled, reader, size, limit, autocast, device, tell))
        made[-1].account.lose_all(reader.problems)
        steps.append({"checkpoint": str(folder), "step": read_checkpoint(folder)[1]["step"]})
        del assembled
    scored = _mean(made)
    if dist.is_main():
        words = {
            "checkpoints": steps,
            "overrides": list(overrides),
            "limit": limit,
            "model": run.model.model_dump(mode="json"),
            "account": scored.account.to_dict(),
            "version": __version__,
        }
        score_file(scored, sources, words).write(target)
    return scored, target


def _stage_run(run: Run, folder: Path) -> Run:
    """The run of the stage that the checkpoint stands in: its data are what it was trained on last."""
    stages = run.stage_runs()
    return stages[min(int(read_checkpoint(folder)[1]["stage"]), len(stages) - 1)][1]


def _sources(run: Run, shards: Sequence[str]) -> list[Source]:
    """What is scored: all samples of each source.

    Raises:
        UserError: there is none.
    """
    train = list(run.data.train)
    if shards:
        like = train[0] if train else Source(shards="")
        train = [like.model_copy(update={"shards": one, "name": None}) for one in shards]
    if not train:
        raise UserError("there is nothing to score: give --shards, or data.train shards")
    return [source.model_copy(update={"keep": None, "limit": None}) for source in train]


def _autocast(device: torch.device, dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    if dtype == torch.float32:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype)


def _mean(made: Sequence[Scored]) -> Scored:
    """The mean over checkpoints; a sample that one of them refused has no score."""
    first = made[0]
    scores = {name: np.mean([one.scores[name] for one in made], axis=0) for name in first.scores}
    for other in made[1:]:
        first.account.merge(other.account)
    return replace(first, scores=scores)


def score_file(scored: Scored, sources: Sequence[Source], made: dict[str, Any]) -> ScoreFile:
    """The sidecar of a pass: the samples that it came to, shard after shard."""
    groups: list[Group] = []
    keys: list[bytes] = []
    group_of: list[np.ndarray] = []
    for number, shards in enumerate(scored.reader.sets):
        for index in shards.indexes:
            keys += keys_of(index)
            group_of.append(np.full(len(index), len(groups), np.int32))
            groups.append(Group(number, shown(index.path), index.file_bytes))
    place = scored.looked_at
    return ScoreFile(
        keys=[keys[number] for number in place.tolist()],
        group=np.concatenate(group_of)[place],
        groups=groups,
        scores={name: values[place].astype(np.float32) for name, values in scored.scores.items()},
        sources=[source.model_dump(mode="json", include={"name", "prompt", "task"}) for source in sources],
        made=made,
    )
