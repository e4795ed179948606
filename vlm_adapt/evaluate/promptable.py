"""Scores of a promptable model on held-out masks: IoU by kind of prompt, of the mask shown and of the best.

Knows how samples are shared out and which figures are reported; prompts are data/prompt_reader.py's. Knows
nothing about training.

Every mask that is drawn from a sample (the same ones every time) is prompted by one point, by three, by its
box and, where the model reads words, by its name. IoU is taken at the image's own size and averaged over
masks, as SAM's is (arXiv 2304.02643, section 7.1). `best` is the best of the masks that one point
gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_adapt import dist
from vlm_adapt.config.schema import Data, Evaluate
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.prompt_batch import STAND_IN
from vlm_adapt.data.prompt_reader import MEASURED, PromptReader, PromptRow
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.scores import Scores, spread
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.objectives.promptable import intersection_over_union, predict, prompt_losses


def evaluate(
    assembled: AssembledModel,
    data: Data,
    settings: Evaluate,
    limit: int | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    device: torch.device | None = None,
    synced: bool = False,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Score a promptable model on `data.evaluate`.

    Args:
        limit: only so many samples, spread evenly over the sources; the metrics name both numbers.
        autocast: context of the forward passes.
        synced: every rank makes as many passes as the busiest (for collectives inside the model).
        tell: called with samples done and in all.

    Raises:
        UserError: nothing is held out, or no sample could be used.
    """
    if not data.evaluate:
        raise UserError("there is nothing to evaluate on: give data.evaluate shards")
    reader: PromptReader = assembled.reader(data.evaluate, seed, data.model_copy(update={"augment": None}))
    count = len(reader)
    chosen = spread(count, limit)
    assembled.model.eval()
    account = Account()
    account.lose_all(reader.problems if dist.is_main() else [])
    mine = chosen[dist.rank() :: dist.world_size()]
    passes = math.ceil(len(chosen) / dist.world_size()) if synced else len(mine)
    found: list[dict[str, Any]] = []
    labels = assembled.model.labels
    shared = synced and labels is not None and labels.encoder.trains
    if shared:
        labels.forget()  # so that all ranks know the same names
    for place in range(passes):
        number = mine[place] if place < len(mine) else None
        row = None if number is None else _read(reader, number, account)
        if shared:  # the encoder's weights are gathered: every rank encodes the names of all
            own = [STAND_IN, *(one.words for one in (row.targets if row else ()) if one.words)]
            with autocast(), torch.no_grad():
                labels(list(dict.fromkeys(name for part in dist.gather(own) for name in part)))
        if row is not None or synced:
            with autocast(), torch.no_grad():
                found += _judge(assembled, row, number, device or torch.device("cpu"))
        tell(place + 1, passes)
    rows = sorted((row for part in dist.gather(found) for row in part), key=lambda row: row["number"])
    whole = Account()
    for part in dist.gather(account.to_dict()):
        whole.merge(Account.from_dict(part))
    if not rows:
        raise UserError(f"none of {len(chosen)} held-out samples could be used: {whole.named()}")
    metrics = figures(rows)
    metrics |= {"samples": len(chosen), "samples_available": count}
    metrics |= {"samples_in_shards": sum(map(len, reader.sets)), "account": whole.to_dict()}
    return Scores(metrics, rows)


def _read(reader: PromptReader, number: int, account: Account) -> PromptRow | None:
    name = reader.source_of(number)
    try:
        row = reader.judged(number)
    except BadSample as error:
        account.refuse(reader.key(number), error, name)
        return None
    account.use(False, name, len(row.targets))
    return row


def _judge(
    assembled: AssembledModel, row: PromptRow | None, number: int | None, device: torch.device
) -> list[dict[str, Any]]:
    """A line for each prompt of a sample; a stand-in is run where there is none."""
    model: Any = assembled.model
    options = assembled.collate_options
    batch = assembled.collate([] if row is None else [row], **options).to(device)
    lines = []
    for kind, (logits_NPMhw, iou_NPM) in predict(model, batch).items():
        if row is None:
            continue
        group = batch.groups[kind]
        losses_P = prompt_losses(logits_NPMhw, iou_NPM, group.targets_NPhw)[0]
        for place, target in enumerate(one for one in row.targets if one.kind == kind):
            assert target.truth_HW is not None
            full_MHW = model.full_size(logits_NPMhw[:1, place], row.frame)[0]
            true_M = _iou(full_MHW, target.truth_HW)
            believed_M = iou_NPM[0, place]
            shown = int(believed_M.argmax())
            lines.append(
                {
                    "number": number,
                    "key": row.key,
                    "kind": kind,
                    "words": target.words,
                    "iou": float(true_M[shown]),
                    "best": float(true_M.max()),
                    "believed": float(believed_M[shown]),
                    "loss": float(losses_P[place]),
                }
            )
    return lines


def _iou(logits_MHW: Tensor, truth_HW: np.ndarray) -> Tensor:
    truth_1X = torch.from_numpy(np.ascontiguousarray(truth_HW)).to(logits_MHW.device).flatten()[None]
    known_1X, inside_1X = truth_1X <= 1, truth_1X == 1
    return intersection_over_union(logits_MHW.flatten(1) > 0, inside_1X, known_1X)


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over masks of each kind of prompt; `miou` is the mean over point, points and box.

    Args:
        rows: with kind, iou (of the mask shown), best, believed and loss.
    """
    metrics: dict[str, Any] = {}
    means = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        metrics[f"miou_{kind}"] = mean = float(np.mean([row["iou"] for row in own]))
        if kind == "point":
            metrics["miou_point_best"] = float(np.mean([row["best"] for row in own]))
        metrics.setdefault("masks", {})[kind] = len(own)
        if kind in MEASURED:
            means.append(mean)
    metrics["miou"] = float(np.mean(means)) if means else metrics["miou_text"]
    metrics["iou_error"] = float(np.mean([abs(row["believed"] - row["iou"]) for row in rows]))
    metrics["loss"] = float(np.mean([row["loss"] for row in rows]))
    return metrics
