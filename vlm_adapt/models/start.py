"""A method's module begins from the one that another run has trained (`start:` of a plan's line).

PVP (Song et al. 2023, arXiv 2304.13639) trains prompts, adapters or LoRA on a large task first, and those
of a small task go on from there. Knows labels and tensors of a checkpoint; knows nothing about what methods
compute. The checks import no torch.

Done once, when the stage that brings the method begins: a later checkpoint holds the values themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.models.locate import find_checkpoint

if TYPE_CHECKING:
    from vlm_adapt.models.assembled import AssembledModel


def starts(stages: Sequence[Sequence[Adapt]]) -> dict[str, str]:
    """The checkpoint that each labelled method of a plan begins from, by label.

    Of equal lines of several stages the first one's `start` counts: they are one method.
    """
    seen: list[dict[str, object]] = []
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    for stage in stages:
        earlier = list(seen)  # equal lines of one stage are two methods
        for line in stage:
            plain = line.model_dump(exclude={"start", "learning_rate"})
            if plain in earlier:
                continue
            seen.append(plain)
            label = f"{line.where}-{line.method}"
            counts[label] = counts.get(label, 0) + 1
            if line.start is not None:
                found[label + (f"-{counts[label]}" if counts[label] > 1 else "")] = line.start
    return found


def source_folder(start: str, label: str) -> Path:
    """The folder of a checkpoint that holds a method of this label's part and name; imports no model.

    Raises:
        UserError: no checkpoint, or none of its methods is of that part and name.
    """
    folder = find_checkpoint(start)
    try:
        there = list(json.loads((folder / "state.json").read_text(encoding="utf-8"))["labels"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"'{folder / 'state.json'}' cannot be read: {error!r}") from error
    base = re.sub(r"-\d+$", "", label)
    for name in (label, base):
        if name in there:
            return folder / name
    raise UserError(
        f"adapt: start '{start}' holds no '{base}' to begin from: it has {', '.join(there) or 'nothing'}"
    )


def check_starts(stages: Sequence[Sequence[Adapt]]) -> None:
    """Whether every checkpoint that is begun from is there and holds such a method.

    Raises:
        UserError: as `source_folder`.
    """
    for label, start in starts(stages).items():
        source_folder(start, label)


def begin_from(
    assembled: AssembledModel, stages: Sequence[Sequence[Adapt]], before: Path | None = None
) -> list[str]:
    """Copy the tensors that plan lines with `start` begin from into the model's plan.

    Args:
        stages: the plan lines of the stages so far.
        before: the checkpoint that the stage goes on from; methods that it holds are left alone.

    Returns:
        A line for each method that began elsewhere.

    Raises:
        UserError: the checkpoint lacks tensors, or has other shapes.
    """
    import torch  # not above: the checks of this file answer without it

    assert assembled.plan is not None
    wanted, held = starts(stages), set()
    if before is not None:
        held = set(json.loads((before / "state.json").read_text(encoding="utf-8"))["labels"])
    lines = []
    for item in assembled.plan.attached:
        if item.label not in wanted or item.label in held:
            continue
        folder = source_folder(wanted[item.label], item.label)
        tensors = item.method.read(folder)
        other = next((k for k, p in item.method.parameters.items() if p.shape != tensors[k].shape), None)
        if other is not None:
            ours = tuple(item.method.parameters[other].shape)
            raise UserError(
                f"adapt: '{item.label}' cannot begin from '{folder}': '{other}' has shape "
                f"{tuple(tensors[other].shape)} there and {ours} here; give both the same settings and model"
            )
        with torch.no_grad():
            for key, parameter in item.method.parameters.items():
                parameter.copy_(tensors[key])
        item.begun = True
        lines.append(f"{item.label} begins from {folder}")
    return lines
