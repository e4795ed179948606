"""What a run would make of shards, with its tokenizer, template and image sizes but none of its weights.

Knows how to assemble a model that has shapes and no numbers; knows nothing about drawing or wording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vlm_adapt.config.schema import Model, Run, Source
from vlm_adapt.data.reader import Reader
from vlm_adapt.data.shards import expand
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import Assembled, build


@dataclass
class Feed:
    """Shards as a stage of a run would read them.

    Attributes:
        stage: its name.
        run: the run with the stage's differences written in.
        source: the run's own source for these shards where it has one, else its defaults.
        named: whether the run has one.
    """

    stage: str
    run: Run
    source: Source
    named: bool
    assembled: Assembled
    reader: Reader


def open_feed(run: Run, shards: Sequence[str]) -> Feed:
    """A run's reader over these shard files, in this order; no weight is loaded or fetched.

    The phrasing (prompt, draws of questions, task) is that of the stage's source that holds the first of
    them, later stages first; its limits and scores do not count, since every sample is looked at.

    Raises:
        UserError: a part of the run cannot be found.
    """
    stage, staged, source, named = _source_of(run, shards)
    source = source.model_copy(update={"shards": tuple(shards), "limit": None, "keep": None})
    assembled = build_without_weights(staged.language_model)
    stages = run.stage_runs()
    last = next(number for number, (name, _) in enumerate(stages) if name == stage)
    assembled.expect([one.adapt for _, one in stages[: last + 1]])
    reader = assembled.reader([source], staged.seed, staged.data)
    return Feed(stage, staged, source, named, assembled, reader)


def described(feed: Feed) -> str:
    """Which stage reads the shards, and how it phrases them."""
    source = feed.source
    words = [f"stage '{feed.stage}'", f"task {source.task.name}" if source.task else "no task"]
    words += [] if feed.named else ["the run does not name these shards, so with its defaults"]
    return ", ".join(words)


def _source_of(run: Run, shards: Sequence[str]) -> tuple[str, Run, Source, bool]:
    stages = run.stage_runs()
    for name, staged in reversed(stages):
        for source in (*staged.data.train, *staged.data.evaluate):
            try:
                if shards[0] in expand(source.shards):
                    return name, staged, source, True
            except UserError:
                continue  # shards that are not here are none of these
    name, staged = stages[-1]
    return name, staged, Source(shards=tuple(shards)), False


def build_without_weights(config: Model) -> Assembled:
    """The assembly of `models.build` with parameters that have a shape and no storage (torch's meta device).

    Seconds, and no memory to speak of, for any size of model. The model cannot be run.
    """
    unloaded = config.model_copy(
        update={
            "vision": config.vision.model_copy(update={"weights": "random:"}),
            "language": config.language.model_copy(update={"weights": "random:"}),
        }
    )
    with torch.device("meta"), _Unreadable():
        return build(unloaded, torch.float32)


class _Unreadable(TorchFunctionMode):
    """Numbers read off tensors without storage are 1, and such tensors stay where they are.

    Libraries do both while they build a model: timm reads its rates of stochastic depth off a tensor,
    open_clip moves its model to a device, a connector asks for the scale of the embeddings.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None and tensor.is_meta:
            if func in (Tensor.__float__, Tensor.item):
                return 1.0
            if func is Tensor.to:
                dtypes = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.dtype)]
                return func(tensor, dtypes[0]) if dtypes else tensor
        return func(*args, **kwargs)
