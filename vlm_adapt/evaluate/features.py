"""Frozen features of images, one vector an image, with the label that its record gives.

Knows shards, towers and connectors; knows nothing about what is done with the vectors (probe.py). A vector is
the mean over an image's patches (of a tower's layer) or tokens (of a connector). Of a sample with several
images the first is read, and how many there were is counted.

    N images, D channels
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_adapt import dist
from vlm_adapt.config.load import load_run
from vlm_adapt.config.schema import Run
from vlm_adapt.connectors.connector import Connector
from vlm_adapt.connectors.packed import PackedFeatures
from vlm_adapt.data.patches import load, together, tokens_of
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.sample import parse_sample
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.scores import spread
from vlm_adapt.models.build import compute_dtype, vision_tower
from vlm_adapt.models.restore import restore
from vlm_adapt.models.vlm import features_of
from vlm_adapt.quiet import quiet
from vlm_adapt.vision.tower import Tower


@dataclass(frozen=True)
class Label:
    """Where a sample's label is in its record; one of the three is given.

    Attributes:
        path: a field by its name; `labels[0]` or `labels.0` reaches inside.
        question: words of a question (any case) whose answer is the label.
        kind: the kind of such a question.
    """

    path: str | None = None
    question: str | None = None
    kind: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"field '{self.path}'"
        what = f"of kind '{self.kind}'" if self.kind is not None else f"with '{self.question}'"
        return f"the answer to the first question {what}"

    def of(self, record: dict[str, Any]) -> str:
        """The label of a sample's record. Raises BadSample where it has none."""
        return self._field(record) if self.path is not None else self._answer(record)

    def _field(self, record: dict[str, Any]) -> str:
        value: Any = record
        for step in re.findall(r"[^.\[\]]+", self.path or ""):
            if isinstance(value, list) and step.lstrip("-").isdigit():
                if not -len(value) <= int(step) < len(value):
                    raise BadSample(f"field '{self.path}' is not there", f"its list has {len(value)} entries")
                value = value[int(step)]
            elif isinstance(value, dict) and step in value:
                value = value[step]
            else:
                names = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                raise BadSample(f"field '{self.path}' is not there", f"there is {names or 'nothing'}")
        if isinstance(value, str):
            return value
        if isinstance(value, bool | int | float):
            return json.dumps(value)
        raise BadSample(f"field '{self.path}' is no single value", f"it is a {type(value).__name__}")

    def _answer(self, record: dict[str, Any]) -> str:
        asked = [*record.get("questions", ()), *([record] if "question" in record else [])]
        for one in asked:
            right_kind = self.kind is None or one.get("kind") == self.kind
            if right_kind and (self.question is None or self.question.lower() in one["question"].lower()):
                answers = one.get("answers") or [one["answer"]]
                # Of several people's answers the one that most gave; the earlier of equals.
                return str(max(answers, key=answers.count)).strip().lower()
        raise BadSample(
            f"no {str(self).removeprefix('the answer to the first ')}", f"of {len(asked)} questions"
        )


@dataclass
class Features:
    """What was computed of one set of shards.

    Attributes:
        vectors: name -> float32 [N, D] on the CPU.
        labels: of the N images.
        several: samples with more images than the one that was read.
    """

    vectors: dict[str, Tensor]
    labels: list[str]
    account: Account
    several: int


@dataclass
class Pooled:
    """A frozen tower, perhaps with its connector, that gives one vector an image.

    Attributes:
        layers: depths of the tower, numbered from 0; those that the connector reads if there is one.
        connector: None to take the tower's own features.
    """

    tower: Tower
    layers: Sequence[int]
    connector: Connector | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def names(self) -> list[str]:
        """What each vector is called."""
        if self.connector is not None:
            return ["connector"]
        return [f"vision layer {layer}" for layer in self.layers]

    @torch.no_grad()
    def __call__(self, images: Sequence[Any]) -> list[Tensor]:
        """Loaded images to float32 vectors [N, D], one tensor a name."""
        with self.autocast():
            features = features_of(self.tower, together(images).to(self.device), self.layers)
            if self.connector is not None:
                tokens = self.connector(features)
                lengths = tokens_of(images, tokens.shape[1] if tokens.ndim == 3 else 0)
                return [_means(tokens, lengths)]
        if isinstance(features, PackedFeatures):
            return [_means(layer_TD, features.lengths) for layer_TD in features.layers]
        return [_means(layer_NPD, ()) for layer_NPD in features]

    def of(
        self,
        shards: ShardSet,
        label: Label,
        batch_size: int,
        limit: int | None = None,
        max_pixels: int = 100_000_000,
        tell: Callable[[int], None] = lambda done: None,
    ) -> Features:
        """Vectors and labels of all samples that have both image and label; the others are counted.

        Args:
            limit: only so many samples, spread evenly.
            tell: called with how many samples are done.

        Raises:
            UserError: no sample has both.
        """
        numbers = spread(len(shards), limit)
        account, labels, several = Account(), [], 0
        found: list[list[Tensor]] = []

        def read(number: int) -> tuple[Any, str, int]:
            key, members = shards.read(number)
            sample = parse_sample(key, members)
            value = label.of(sample.record)
            if not sample.images:
                raise BadSample("no image")
            return load(sample.images[0], self.tower.image_spec, max_pixels), value, len(sample.images)

        for done, part in _ahead(read, numbers, batch_size):
            images = []
            for number, coming in part:
                try:
                    image, value, count = coming.result()
                except BadSample as error:
                    account.refuse(shards.ref(number).key, error)
                    continue
                account.use()
                images.append(image)
                labels.append(value)
                several += count > 1
            if images:
                found.append([vectors.float().cpu() for vectors in self(images)])
            tell(done)
        account.lose_all(shards.problems)
        if not found:
            raise UserError(
                f"none of {len(numbers)} samples has an image and a label ({label}): {account.named()}"
            )
        joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return Features(dict(zip(self.names, joined, strict=True)), labels, account, several)


def open_pooled(
    path: Path, overrides: Sequence[str] = (), after: str = "vision", layers: str | None = None
) -> tuple[Pooled, Run]:
    """The frozen tower of a configuration as it is, or of a checkpoint as it was adapted; and the run.

    Args:
        overrides: changes of a configuration.
        after: `vision`, or `connector` for what a checkpoint's connector makes of it.
        layers: depths in words, `all` or `0,2,-1`; None takes those that `model.vision.layers` names.

    Raises:
        UserError: a connector that has not been trained, or a layer that is not there.
    """
    device = dist.device()
    connector: Connector | None = None
    if path.is_file():
        run = load_run(path, overrides)
        dtype = compute_dtype(run.train.bf16)
        with quiet():
            tower = vision_tower(run.model.vision, dtype).eval()
    else:
        assembled, run, _ = restore(path)
        assembled.model.eval()
        tower, dtype = assembled.model.vision, assembled.dtype
        connector = assembled.model.connector.to(device) if after == "connector" else None
    if after == "connector" and connector is None:
        raise UserError(f"probe: the connector of '{path}' has not been trained: give a checkpoint")
    wanted: Sequence[int] = run.model.vision.layers
    if layers is not None and layers != "all":
        wanted = [int(one) for one in layers.split(",")]
    chosen = list(range(tower.depth)) if layers == "all" else tower.resolve(wanted)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    return Pooled(tower.to(device), list(dict.fromkeys(chosen)), connector, device, autocast), run


def _ahead(
    read: Callable[[int], Any], numbers: Sequence[int], size: int
) -> Iterator[tuple[int, list[tuple[int, Future[Any]]]]]:
    """(samples done, the next batch of them): the following batch is read while this one is worked on."""
    pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) - 1)))
    try:
        parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        coming = [[(number, pool.submit(read, number)) for number in part] for part in parts[:1]]
        done = 0
        for after in range(1, len(parts) + 1):
            part = coming.pop()
            coming += [
                [(number, pool.submit(read, number)) for number in more] for more in parts[after : after + 1]
            ]
            done += len(part)
            yield done, part
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C need not wait for images that nobody will see


def _means(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean over places: [N, P, D], or packed [T, D] with the images' lengths, to [N, D]."""
    if values.ndim == 3:
        return values.float().mean(1)
    return torch.stack([part.float().mean(0) for part in values.split(list(lengths))])
