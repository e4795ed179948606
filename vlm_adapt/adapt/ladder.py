"""A ladder: a small network that climbs beside a frozen one, and takes a rung at each of its blocks.

    state = start(input of the first block)
    state = block_i(mu_i * state + (1 - mu_i) * down_i(output of block i)),   mu_i = sigmoid(alpha_i / T)
    what the backbone goes on with after its last block: up(state)

LST, Sung et al. 2022, arXiv 2206.06522, section 3.2. The backbone is handed its input without its history:
nothing in it needs a gradient, and it keeps nothing for the backward pass but the outputs of its blocks,
which are the inputs of `down`. What led to its input (a connector, a tower) gets its gradient by `start`
alone: the rest of it, back through the frozen blocks, is what is saved here. Knows blocks by their calls;
knows nothing about towers, languages or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Translate = Callable[["Rung", tuple[Any, ...], dict[str, Any], Any], Arguments]


class Gate(nn.Module):
    """mu * state + (1 - mu) * rung, where mu = sigmoid(alpha / temperature) and alpha starts at 0."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, state: Tensor, rung: Tensor) -> Tensor:
        """Both [..., d/r]."""
        mu = torch.sigmoid(self.alpha / self.temperature).to(state.dtype)
        return mu * state + (1 - mu) * rung


class Rung(nn.Module):
    """The side network's part at one block of the backbone.

    Args:
        width, reduced: channels of the backbone and of the side network.
        block: the side block; called as the backbone's was.
        heads: of the backbone's block, those that the side block starts from (T5's distances are by head).
    """

    def __init__(
        self, width: int, reduced: int, block: nn.Module, temperature: float, heads: Sequence[int] = ()
    ):
        super().__init__()
        self.down = nn.Linear(width, reduced, bias=False)
        self.gate = Gate(temperature)
        self.block = block
        self.heads = tuple(heads)

    def forward(self, state: Tensor, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One step up: state [..., d/r] and the backbone's hidden [..., d] to the next state."""
        output = self.block(self.gate(state, self.down(hidden)), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class Ladder(nn.Module):
    """A side network along one stack of blocks.

    Args:
        width, reduced: channels of the backbone and of the side network.
        rungs: by number of the backbone's block.
        translate: the arguments of a side block, given the rung and the arguments and output of the
            backbone's; None for blocks that take their state alone.
        end: applied to the last state where the backbone goes on without it (an encoder, whose output the
            backbone's own decoder reads); its result is `result`.

    Attributes:
        wanted: numbers of the blocks after which the backbone's features are replaced by `up(state)`.
        active: whether it acts.
        checkpointing: whether a rung's activations are computed again in the backward pass.
    """

    def __init__(
        self,
        width: int,
        reduced: int,
        rungs: dict[int, Rung],
        translate: Translate | None = None,
        end: nn.Module | None = None,
    ):
        super().__init__()
        self.start = nn.Linear(width, reduced, bias=False)
        self.rungs = nn.ModuleDict({str(number): rung for number, rung in rungs.items()})
        self.up = nn.Linear(reduced, width, bias=False) if end is None else None
        self.end = end
        self.translate = translate
        self.wanted: set[int] = set()
        self.active, self.checkpointing = True, False
        self.state: Tensor | None = None
        self.result: Tensor | None = None
        self.hidden: Tensor | None = None  # the backbone's own, where its features were replaced

    def climb(self, blocks: Sequence[tuple[int, nn.Module]]) -> None:
        """Listen to the backbone's blocks, all that run, in order."""
        last = blocks[-1][0]
        for place, (number, block) in enumerate(blocks):
            before = self._enter if place == 0 else self._go_on
            block.register_forward_pre_hook(before, with_kwargs=True)
            block.register_forward_hook(partial(self._step, number, number == last), with_kwargs=True)

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if not self.active:
            return None
        self.state, self.hidden = self.start(self._fit(args[0])), None
        return (args[0].detach(), *args[1:]), kwargs

    def _go_on(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if not self.active or self.hidden is None:
            return None
        hidden, self.hidden = self.hidden, None
        return (hidden, *args[1:]), kwargs

    def _step(
        self, number: int, last: bool, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self.active:
            return None
        assert self.state is not None
        hidden = output[0] if isinstance(output, tuple) else output
        if str(number) in self.rungs:
            rung: Any = self.rungs[str(number)]
            given: Arguments = ((), {})
            if self.translate is not None:
                given = self.translate(rung, args, kwargs, output)
            self.state = self._up_one(rung, self._fit(hidden), *given)
        if last and self.end is not None:
            self.result = self.end(self.state)
        if number not in self.wanted:
            return None
        assert self.up is not None
        features, self.hidden = self.up(self.state).to(hidden.dtype), None if last else hidden
        if last:
            self.state = None
        return (features, *output[1:]) if isinstance(output, tuple) else features

    def _up_one(self, rung: Rung, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self.state is not None
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(rung, self.state, hidden, *args, use_reentrant=False, **kwargs)
        return rung(self.state, hidden, *args, **kwargs)

    def _fit(self, hidden: Tensor) -> Tensor:
        """In the side network's own dtype, where autocast does not see to it."""
        if torch.is_autocast_enabled(hidden.device.type):
            return hidden
        return hidden.to(self.start.weight.dtype)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the side network in the backward pass; of the backbone there is nothing to recompute."""
        self.checkpointing = enabled
