"""What every adaptation method is: it attaches to a place, names what trains, and saves itself.

Knows places and parameters by their names; knows nothing about towers, languages or engines.

How a method reaches a layer: it replaces the layer by one that holds it (peft's way), or it adds a module
of its own to the layer and calls that from a forward hook. Nobody's `forward` is reassigned, and names of
the library's own weights stay what they are, so files of other methods keep their keys. What trains lives in
modules that are called (`module(x)`), never in bare parameters that a hook reads: ZeRO-3 gathers a module's
weights when it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlm_adapt.adapt.place import Place
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

Gathered = Mapping[str, Tensor]


class Method:
    """One line of an adaptation plan, attached to one part.

    A subclass's constructor takes the method's own settings by keyword: its signature is what the
    configuration is checked against. Class attributes are plain literals: `vlm-adapt adapt list` reads them
    off the source.

    Attributes:
        name: the method's name in the table.
        summary, paper: one line for the list of methods, and where it comes from.
        sides: the parts it can be put on.
        order: when it attaches: 0 chooses among weights as they are, 1 replaces layers, 2 adds around them.
            A lower one goes first, so that names do not depend on the order of the plan's lines.
        mergeable: whether `merge` can fold it into the base's weights.
        alone: whether it can share its part with no other method; `alone_because` says why.
        trains: whether it trains something itself, or changes how others train.
        identity: whether the part computes, right after `attach`, exactly what it did before.
        example: settings that fit a very small model; the grid of tests and the benchmark take them.
        part: what it is attached to.
        parameters: file key -> parameter, filled by `attach`; what the method trains and saves.
        active: whether it acts; several adapters of one model are switched by it.
        adds_tokens: whether its settings may make texts longer, by the two numbers that follow.
        virtual_tokens: places that it takes at the start of every text while it is active.
        image_tokens: tokens that it adds to every image while it is active.
        resized: called when it has become active or inactive and one of these numbers counts.
    """

    name: str
    summary = ""
    paper = ""
    sides: tuple[str, ...] = ("vision", "connector", "language")
    order = 2
    mergeable = False
    alone = False
    alone_because = "already trains every weight there"
    trains = True
    identity = True
    adds_tokens = False
    example: dict[str, Any] = {}  # noqa: RUF012
    file_name = "model.safetensors"

    def __init__(self) -> None:
        self.part: nn.Module | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.active = True
        self.virtual_tokens = 0
        self.image_tokens = 0
        self.resized: Callable[[], None] = lambda: None

    def attach(self, place: Place) -> None:
        """Choose, replace or add layers at `place`; fill `part` and `parameters`.

        New parameters are made on `place.device` (which may be `meta`), in float32. At the start the part
        computes what it did before, unless the paper says otherwise.

        Raises:
            UserError: nothing there fits the method, or its settings do not fit the part.
        """
        raise AttributeError("a method says how it attaches")

    # Files ---------------------------------------------------------------------------------------

    def save(self, folder: Path, tensors: Gathered) -> None:
        """Write what was trained: `tensors` by the keys of `parameters`, on the CPU."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / self.file_name)

    def save_latent(self, folder: Path, tensors: Gathered) -> None:
        """Write what only going on with training needs, where `save` keeps less than was trained (one bit
        of a float, say); nothing for most methods. `read` prefers it where it is."""

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The saved tensors, by the keys of `parameters`.

        Raises:
            UserError: the file is missing, is no safetensors file, or holds other keys or shapes.
        """
        return read_tensors(folder / self.file_name, self.parameters)

    def bytes_stored(self) -> int:
        """Bytes of tensors that `save` writes."""
        return sum(
            int(getattr(p, "ds_numel", p.numel())) * p.element_size() for p in self.parameters.values()
        )

    # Together with others ------------------------------------------------------------------------

    def set_active(self, active: bool) -> None:
        """Let the method act, or leave the part as it was without it (its weights stay attached).

        Methods with modules of their own need only read `self.active` there; those that change the base's
        own weights keep both and put one or the other in place.
        """
        self.active = active
        self.resized()

    def check_length(self, max_length: int) -> None:
        """Told how long texts may be, once it is attached.

        Raises:
            UserError: it does not work at that length.
        """

    def merge(self) -> None:
        """Fold what was trained into the part's own weights and take the method's modules off.

        Raises:
            UserError: the method is no change of weights.
        """
        raise UserError(
            f"'{self.name}' cannot be merged: it is no change of the base's weights; keep it as an adapter"
        )

    def watch(self) -> Any:
        """What looks at the model while it runs over the first batches, before any training: it has `done`
        and `finish()`, which gives parameters their first values. None for methods that need no data."""
        return None

    # While training ------------------------------------------------------------------------------

    def penalty(self) -> Tensor | None:
        """A term added to the loss of a step (AdaLoRA's orthogonality), on the method's own parameters."""
        return None

    def before_step(self, step: int, total: int, gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        """Called on every rank before the optimizer's step, numbered from 0.

        Args:
            gradient: the whole, averaged gradient of a parameter (None where it has none); every rank calls
                it for the same parameters in the same order.
        """

    def after_step(self, step: int, total: int) -> None:
        """Called on every rank after the optimizer's step, numbered from 0."""


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a safetensors file that must hold exactly `expected`'s keys.

    Raises:
        UserError: missing file, another format, or other keys (the first few are named).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"there is no '{path}': the checkpoint is not complete")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"'{path}' is cut off or is no safetensors file ({error})") from error
    missing, extra = set(expected) - set(tensors), set(tensors) - set(expected)
    if missing or extra:
        some = ", ".join(sorted(missing or extra)[:3])
        raise UserError(
            f"'{path}' lacks {len(missing)} and has {len(extra)} unknown tensors ({some}): "
            "it belongs to another model or plan"
        )
    return tensors


def make_method(table: Any, name: str, options: dict[str, Any]) -> Method:
    """A method of the table with its own settings.

    Raises:
        UserError: unknown method, or a setting that its constructor does not take.
    """
    kind = table.load(name)
    known = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "settings")]
    known += list(getattr(kind, "extra_settings", lambda: [])())
    for key in options:
        if key not in known:
            raise UserError(
                f"adapt: method '{name}' has no setting '{key}'"
                f"{nearest(key, known) or ': known are ' + ', '.join(known)}"
            )
    return kind(**options)
