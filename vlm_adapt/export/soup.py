"""Model soups of adapters: several runs of one plan on one base made into one.

Wortsman et al. 2022, arXiv 2203.05482: uniform, the mean of all; greedy, sorted by held-out score, where the
next one is kept only if the soup becomes strictly better. Knows adapters' tensors and their scores; knows
nothing about what methods compute.

Updates that are a product, dW = s B A (LoRA), are averaged as products: the mean of k of them is s/k times
[B_1 .. B_k] times [A_1; ..; A_k], which is an update of rank k r, and exact. The mean of the factors apart
would be another update. With alpha/r as the scale, alpha stays; with rsLoRA's alpha/sqrt(r) it is divided by
sqrt(k). Everything else is averaged number by number (DoRA's magnitudes too: there B A is the exact mean and
the whole is not).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.plan import flatten, make_line
from vlm_adapt.config.schema import Adapt, Run
from vlm_adapt.errors import UserError
from vlm_adapt.export.adapter import LATENTS, copy_beside, read_trained, write_words
from vlm_adapt.export.folder import check_target, whole_folder
from vlm_adapt.models.adapters import check_words, labels_of
from vlm_adapt.models.fingerprint import check_base
from vlm_adapt.models.restore import STATISTICS, build_base, find_checkpoint, plan_of, read_checkpoint

# Methods whose update is a plain product, and the side on which each factor has the rank.
PRODUCTS = ("lora", "conv_lora", "qkv_lora")
SIDES = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
Tensors = dict[str, dict[str, Tensor]]
Score = Callable[[Path], float]


@dataclass(frozen=True)
class Ingredient:
    """An adapter that may go into a soup: its tensors by label and file key."""

    folder: Path
    run: Run
    state: dict[str, Any]
    lines: list[Adapt]
    methods: list[Method]
    tensors: Tensors

    @property
    def labels(self) -> list[str]:
        """In the order in which a plan attaches them."""
        return [label for _, label in labels_of([("", line) for line in self.lines])]


def soup(
    checkpoints: Sequence[str | Path], target: Path, score: Score | None = None, greater: bool = True
) -> dict[str, Any]:
    """Write the soup of some adapters or checkpoints as an adapter.

    Args:
        score: of an adapter's folder on held-out samples; with it the soup is greedy, without it uniform.
        greater: whether a greater score is better.

    Returns:
        what `soup.json` says: the ingredients, which were kept, and the scores.

    Raises:
        UserError: fewer than two, other plans or bases, damaged files, or a folder that cannot be written.
    """
    check_target(target)
    if len(checkpoints) < 2:
        raise UserError("a soup needs two adapters or more")
    found = [read_ingredient(path) for path in checkpoints]
    for other in found[1:]:
        _check_equal(found[0], other)
    with whole_folder(target) as temporary:
        told: dict[str, Any] = {"kind": "uniform" if score is None else "greedy"}
        told["ingredients"] = [str(one.folder) for one in found]
        kept = found
        if score is not None:
            kept, told["scores"] = _greedy(found, score, greater, temporary)
        told["kept"] = [str(one.folder) for one in kept]
        write_soup(kept, temporary, {"from": f"a {told['kind']} soup of {len(kept)}"})
        (temporary / "soup.json").write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
    return told


def read_ingredient(checkpoint: str | Path) -> Ingredient:
    """A checkpoint's tensors, checked against its plan; no weights of the base are read.

    Raises:
        UserError: no checkpoint, or damaged files.
    """
    folder = find_checkpoint(checkpoint)
    run, state = read_checkpoint(folder)
    assembled, tensors = read_trained(folder, run, state)
    assert assembled.plan is not None
    lines = flatten(plan_of(run, state))
    methods = [item.method for item in assembled.plan.attached]
    return Ingredient(folder, run, state, lines, methods, tensors)


def write_soup(kept: Sequence[Ingredient], folder: Path, about: dict[str, Any]) -> None:
    """Write the mean of some ingredients as an adapter into a folder that is there."""
    first = kept[0]
    ordered = sorted(first.lines, key=lambda line: make_line(line).order)
    lines = []
    for line, label, method in zip(ordered, first.labels, first.methods, strict=True):
        found = [one.tensors[label] for one in kept]
        if any(some.keys() != found[0].keys() for some in found):
            raise UserError(
                f"'{label}' was saved to go on in one adapter and for use in another: make adapters of all "
                "with `vlm-adapt adapt save` first"
            )
        if line.method in PRODUCTS and len(kept) > 1:
            line, tensors = join(line, method, found)
            method = _attached(first, line)
        else:
            tensors = {key: mean([some[key] for some in found], key) for key in found[0]}
        lines.append(line)
        _save(method, [one.folder / label for one in kept], folder / label, tensors)
    copy_beside(first.folder, folder)
    if (folder / STATISTICS).is_file():
        statistics = [load_file(one.folder / STATISTICS) for one in kept]
        save_file(
            {key: mean([s[key] for s in statistics], key) for key in statistics[0]}, folder / STATISTICS
        )
    write_words(folder, first.run, lines, first.state, first.labels, about)


def join(line: Adapt, method: Any, tensors: Sequence[dict[str, Tensor]]) -> tuple[Adapt, dict[str, Tensor]]:
    """The mean of k products as one of k times the rank, and the plan's line that fits it.

    Raises:
        UserError: the first B A was taken out of the base, so that a wider one would take out another.
    """
    count = len(tensors)
    if getattr(method, "changes_base", False):
        begun = line.options.get("init_lora_weights")
        raise UserError(
            f"no soup of '{line.method}' begun as '{begun}' can be made: each took its start out of the "
            "base's weights; average runs that began from zero, or merge them"
        )
    settings: dict[str, Any] = getattr(method, "settings", {})
    rank = settings.get("r") or method.r
    alpha = settings["lora_alpha"] if "lora_alpha" in settings else method.scale * method.r
    root = math.sqrt(count) if settings.get("use_rslora") else 1.0
    # alpha / (k r) has the 1 / k of the mean in it already.
    changed: dict[str, Any] = {"r": rank * count, "lora_alpha": alpha / root}
    if ranks := settings.get("rank_pattern"):
        changed["rank_pattern"] = {name: one * count for name, one in ranks.items()}
    if alphas := settings.get("alpha_pattern"):
        changed["alpha_pattern"] = {name: one / root for name, one in alphas.items()}
    joined = {}
    for key in tensors[0]:
        side = next((side for name, side in SIDES.items() if name in key.split(".")), None)
        values = [some[key] for some in tensors]
        joined[key] = mean(values, key) if side is None else torch.cat(values, side)
    return Adapt.model_validate(line.model_dump() | changed), joined


def _attached(first: Ingredient, line: Adapt) -> Method:
    """A line's method on the model's shapes alone."""
    return build_base(first.run, first.folder, empty=True).adapt([[line]]).attached[0].method


def _save(method: Any, sources: Sequence[Path], target: Path, tensors: dict[str, Tensor]) -> None:
    """Write a method's folder; what it saves and does not train must be the same everywhere.

    Raises:
        UserError: random projections, say, that differ.
    """
    fixed = list(getattr(method, "fixed", ()))
    if not fixed:
        method.save(target, tensors)
        return
    shutil.copytree(sources[0], target, ignore=shutil.ignore_patterns(*LATENTS))
    found = [load_file(source / method.file_name) for source in sources]
    for key in fixed:
        if any(not torch.equal(found[0][key], other[key]) for other in found[1:]):
            raise UserError(
                f"the adapters' '{key}' of '{method.name}' are drawn at random or counted, and differ: a "
                "mean of what was trained beside them means nothing; train with one seed"
            )
    save_file(tensors | {key: found[0][key] for key in fixed}, target / method.file_name)


def mean(values: Sequence[Tensor], key: str = "") -> Tensor:
    """The mean in float64, in the tensors' own dtype; of whole numbers only if they are equal.

    Raises:
        UserError: whole numbers that differ (chosen places, say).
    """
    first = values[0]
    if all(torch.equal(first, other) for other in values[1:]):
        return first.clone()
    if not first.is_floating_point():
        raise UserError(f"'{key}' holds whole numbers that differ between the adapters: they have no mean")
    return torch.stack([value.double() for value in values]).mean(0).to(first.dtype)


def _check_equal(first: Ingredient, other: Ingredient) -> None:
    """Raises UserError where two ingredients have another plan, model or base."""
    here, there = (
        [line.model_dump(exclude={"start", "learning_rate"}) for line in one.lines] for one in (first, other)
    )
    if here != there:
        raise UserError(
            f"'{first.folder}' and '{other.folder}' have other plans: a soup is made of runs with the same "
            "lines in `adapt`"
        )
    check_words(other.run.language_model, first.run.language_model, str(other.folder))
    check_base(other.state.get("base"), first.state.get("base"), f"'{other.folder}'", first.labels)


def _greedy(
    found: Sequence[Ingredient], score: Score, greater: bool, room: Path
) -> tuple[list[Ingredient], list[dict[str, Any]]]:
    """What a greedy soup keeps, and every score on the way.

    Raises:
        UserError: a score is no number.
    """

    def scored(kept: Sequence[Ingredient]) -> float:
        with whole_folder(room / "tried") as folder:
            write_soup(kept, folder, {})
        value = score(room / "tried")
        for path in sorted((room / "tried").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (room / "tried").rmdir()
        if not math.isfinite(value):
            raise UserError(f"the score of '{kept[-1].folder}' is {value}: nothing can be sorted by it")
        return value

    sign = 1.0 if greater else -1.0
    alone = [(scored([one]), one) for one in found]
    alone.sort(key=lambda pair: -sign * pair[0])  # stable: of equal ones the first given goes first
    told = [{"adapters": [str(one.folder)], "score": value, "kept": False} for value, one in alone]
    told[0]["kept"] = True
    best, kept = alone[0][0], [alone[0][1]]
    for _, one in alone[1:]:
        value = scored([*kept, one])
        better = sign * value > sign * best
        told.append({"adapters": [str(x.folder) for x in (*kept, one)], "score": value, "kept": better})
        if better:
            best, kept = value, [*kept, one]
    return kept, told
