"""Methods folded into the weights of a base, and the parts written in their libraries' formats.

Knows which methods fold and where each part's weights go; knows nothing about what methods compute. Folding
is done in float32, where it changes no logit but by the order of sums; that is checked here.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_adapt.adapt.full import Full
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.plan import flatten, make_line
from vlm_adapt.config.load import HERE
from vlm_adapt.config.schema import Adapt, Run
from vlm_adapt.errors import UserError
from vlm_adapt.export.adapter import copy_beside, read_trained, write_words
from vlm_adapt.export.probe import Probe
from vlm_adapt.export.tower import save_tower
from vlm_adapt.models.adapters import Adapters, labels_of, shared
from vlm_adapt.models.build import Assembled
from vlm_adapt.models.restore import build_base, load_method, load_statistics, plan_of, read_checkpoint
from vlm_adapt.quiet import quiet

# As a share of the largest logit: one product takes the place of three, summed in another order.
FOLDED = 1e-4
Labelled = list[tuple[Adapt, str]]


def split(folder: Path, run: Run, state: dict[str, Any]) -> tuple[Labelled, Labelled]:
    """Lines of the plan with their labels: those that fold into weights, and those that stay on top.

    A connector is written whole in any case: its lines fold together or not at all.

    Raises:
        UserError: none folds, or a file is damaged.
    """
    lines = flatten(plan_of(run, state))
    bare = build_base(run, folder, empty=True)
    own = {name for part in bare.model.parts().values() for name, _ in part.named_parameters()}
    assembled, _ = read_trained(folder, run, state)  # every file is read before anything heavy is done
    assert assembled.plan is not None
    ordered = sorted(range(len(lines)), key=lambda i: _order(lines[i]))
    folds: dict[str, tuple[Adapt, bool]] = {}
    for number, item in zip(ordered, assembled.plan.attached, strict=True):
        names = set(item.method.parameters)
        own_weights = bool(names) and names <= own and item.method.order == 0
        folds[item.label] = (lines[number], item.method.mergeable or own_weights)
    whole_connector = all(fold for line, fold in folds.values() if line.where == "connector")
    folded: Labelled = []
    kept: Labelled = []
    for label, (line, fold) in folds.items():
        # What draws masks has no folder of a library: it stays beside the weights.
        goes = fold and line.where != "masks" and (line.where != "connector" or whole_connector)
        (folded if goes else kept).append((line, label))
    if not any(line.where != "connector" for line, _ in folded):
        names_ = ", ".join(label for _, label in kept) or "only the connector was trained"
        raise UserError(
            f"nothing in '{folder}' can be folded into the tower or the language ({names_}): keep it as an "
            "adapter with `vlm-adapt adapt save`"
        )
    return folded, kept


class Merge:
    """A base in float32 with methods folded into it.

    Attributes:
        effect: the largest difference that the whole adapter makes to its base's logits.
        folding_difference: of any logit before and after folding.
        before_NV: logits of the unmerged model, in float32.

    Raises:
        UserError: the adapter does nothing, or folding changed the logits.
    """

    def __init__(self, folder: Path, run: Run, folded: Labelled, kept: Labelled, probe: Probe):
        self.folder, self.run, self.folded, self.kept = folder, run, folded, kept
        self.assembled = build_base(run, folder, torch.float32)
        self.assembled.model.requires_grad_(False)
        load_statistics(self.assembled, folder)
        adapters = Adapters(replace(self.assembled))
        adapters.add("whole", folder)
        base = probe.logits(self.assembled)
        adapters.use(["whole"])
        before = probe.logits(adapters.assembled)
        # Prompts make texts longer: then only the predictions of words can be compared.
        of = 0 if before[0].shape == base[0].shape else 1
        self.before_NV = before[0]
        self.effect = float((before[of] - base[of]).abs().max())
        if self.effect == 0:
            raise UserError(
                f"the adapter in '{folder}' does nothing: the base's logits are the same with and without "
                "it; train it first, or choose another checkpoint"
            )
        del adapters, base
        self._fold()
        after = probe.logits(self._with_kept())
        self.folding_difference = float((before[0] - after[0]).abs().max())
        if not self.folding_difference <= FOLDED * float(before[0].abs().max()):
            raise UserError(
                f"folding {', '.join(label for _, label in folded)} of '{folder}' changes a logit by "
                f"{self.folding_difference:.3g}, where only the order of sums should: these methods cannot "
                "be merged together; keep them as an adapter"
            )

    def _fold(self) -> None:
        parts = self.assembled.model.parts()
        before = {where: _sum(part) for where, part in parts.items()}
        lines = [line for line, _ in self.folded]
        labels = {id(line): label for line, label in self.folded}
        plan = self.assembled.adapt([lines])
        for line, item in zip(_sorted(lines), plan.attached, strict=True):
            load_method(item, self.folder / labels[id(line)])
        for item in reversed(plan.attached):  # what was put around the others comes off first
            if item.method.mergeable:
                item.method.merge()
        self.assembled.plan = None
        self.assembled.resize()
        self.assembled.model.penalties = []
        self.assembled.model.requires_grad_(False).eval()
        for where in sorted({line.where for line in lines}):
            if _sum(parts[where]) == before[where]:
                raise UserError(
                    f"what '{self.folder}' trained on the {where} changes no weight of it: it does nothing"
                )

    def _with_kept(self) -> Assembled:
        """The folded model with the other methods on top; the folded weights stay as they are."""
        ours = self.assembled
        if not self.kept:
            return ours
        made = replace(ours, model=shared(ours.model, ours.tokenizer), encoder=copy.copy(ours.encoder))
        lines = [line for line, _ in self.kept]
        labels = {id(line): label for line, label in self.kept}
        plan = made.adapt([lines])
        for line, item in zip(_sorted(lines), plan.attached, strict=True):
            for parameter in item.method.parameters.values():
                parameter.data = parameter.data.clone()
            load_method(item, self.folder / labels[id(line)])
        return made

    @quiet()
    def write(self, target: Path, state: dict[str, Any], kind: torch.dtype) -> dict[str, str]:
        """Write the parts, what stays on top, and the words; returns what became of tower and language."""
        assembled, run = self.assembled, self.run
        changed = {line.where for line, _ in self.folded}
        parts = {"vision": "as it was", "language": "as it was"}
        vision, language = run.language_model.vision, run.language_model.language
        lines = [line for line, _ in self.kept]
        if "vision" in changed:
            words = save_tower(assembled.model.vision, vision, target / "vision", kind)
            if words is None:
                lines.append(Adapt(method="full", where="vision"))
                parts["vision"] = "vision-full/, on top of the tower as it was"
            else:
                here = {key: value.replace(str(target), HERE) for key, value in words.items()}
                vision = vision.model_copy(update=here)
                parts["vision"] = "vision/, in its library's format"
        if not any(line.where == "connector" for line in lines):
            lines.append(Adapt(method="full", where="connector"))
        ordered = _sorted(lines)
        labels = [label for _, label in labels_of([("", line) for line in lines])]
        places = {id(line): label for line, label in self.kept}
        for line, label in zip(ordered, labels, strict=True):
            if id(line) in places:
                shutil.copytree(self.folder / places[id(line)], target / label)
            else:
                _save_whole(assembled, line.where, target / label)
        if "language" in changed:
            model: Any = assembled.model.language.model
            model.to(kind).save_pretrained(target / "language")
            assembled.tokenizer.save_pretrained(target / "language")
            language = language.model_copy(update={"model": f"{HERE}/language", "weights": "hub:"})
            parts["language"] = "language/, as transformers saves it"
        copy_beside(self.folder, target)
        named = run.model.model_copy(update={"vision": vision, "language": language})
        merged = run.model_copy(update={"model": named})
        about = {
            "from": f"step {state['step']} of a run, merged",
            "folded": [label for _, label in self.folded],
        }
        plain = {"step": state["step"], "stage": state["stage"], "base": None}
        write_words(target, merged, lines, plain, labels, about)
        again = build_base(read_checkpoint(target)[0], target, kind)
        write_words(target, merged, lines, plain | {"base": again.base}, labels, about)
        return parts


def _order(line: Adapt) -> int:
    return make_line(line).order


def _sorted(lines: Sequence[Adapt]) -> list[Adapt]:
    """In the order in which a plan attaches them."""
    return sorted(lines, key=_order)


def _save_whole(assembled: Assembled, where: str, folder: Path) -> None:
    """Every weight of a part that is used, as the method `full` saves it."""
    model = assembled.model
    unused = set(model.vision.unused_modules(model.layers)) if where == "vision" else set()
    method = Full()
    method.attach(Place(where, model.parts()[where], unused))
    tensors = {key: p.detach().float().cpu().clone() for key, p in method.parameters.items()}
    method.save(folder, tensors)


@torch.no_grad()
def _sum(part: nn.Module) -> float:
    """A number that changes with the weights."""
    total = 0.0
    for parameter in part.parameters():
        flat = parameter.detach().double().flatten()
        total += float(flat.sum() + flat.square().sum())
    return total
