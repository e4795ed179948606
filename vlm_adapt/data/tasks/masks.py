"""Label sets of masks: which classes of a source are learned, and under which names.

Knows names and numbers of classes; knows nothing about files of masks or models. Used by segmenters:
LSeg (arXiv:2201.03546) learns from datasets with different labels, each image from its own dataset's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm_adapt.choices import nearest
from vlm_adapt.config import schema
from vlm_adapt.data.masks import empty_synonym
from vlm_adapt.data.tasks import MASK_TASKS, TASKS
from vlm_adapt.data.tasks.task import SETTINGS, from_settings
from vlm_adapt.errors import UserError

_NO_LABEL = 255


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """What the values of a mask become.

    Attributes:
        labels: the classes by number, each once.
        classes: the class of each value; -1 is ignored, None has no label and must not occur.
    """

    labels: tuple[str, ...]
    classes: tuple[int | None, ...]

    @property
    def kind(self) -> type[np.signedinteger]:
        """The type of masks of classes, -1 included."""
        return np.int16 if len(self.labels) <= np.iinfo(np.int16).max else np.int32

    def codes(self, values_HW: np.ndarray) -> np.ndarray | None:
        """Classes plus one; 0 is ignored. None: a value has no label.

        Args:
            values_HW: uint8 or uint16, as `read_mask` returns it; the last value of the type is ignored.

        Returns:
            codes_HW, uint8 where they fit, else int32.
        """
        # The last value of that depth is the ignored one, whatever labels there are.
        if values_HW.itemsize == 1 and self._table is not None:
            mapped = values_HW.tobytes().translate(self._table)
            if _NO_LABEL in mapped:
                return None
            return np.frombuffer(mapped, np.uint8).reshape(values_HW.shape)
        lookup_V = np.full(2 ** (8 * values_HW.itemsize), -1, np.int32)
        count = min(len(self.classes), len(lookup_V) - 1)
        lookup_V[:count] = [-1 if one is None else one + 1 for one in self.classes[:count]]
        lookup_V[-1] = 0
        codes_HW = lookup_V[values_HW]
        return None if codes_HW.min() < 0 else codes_HW

    @cached_property
    def _table(self) -> bytes | None:
        """For `bytes.translate`, a tenth of the cost of numpy's indexing; None where codes need more bits."""
        if len(self.labels) >= _NO_LABEL:
            return None
        codes = [_NO_LABEL if one is None else one + 1 for one in self.classes[:255]]
        return bytes([*codes, *[_NO_LABEL] * (255 - len(codes)), 0])


@dataclass(frozen=True, config=SETTINGS)
class Masks:
    """A semantic mask with the labels of its sample.

    Values of one name are one class. A name may hold synonyms, `car|automobile`; the first is shown.

    Attributes:
        rename: {name in the data: name that is learned}; several may get the same.
        merge: {name that is learned: names in the data}.
        leave_out: labels that are not in the set; their pixels are ignored.
        keep: the only labels that are in the set.
        background: what labels outside the set become, in place of being ignored.
        only_present: the set of a training sample holds only what its mask shows, after the crop.
    """

    rename: dict[str, str] = Field(default_factory=dict)
    merge: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    keep: tuple[str, ...] | None = None
    background: str | None = None
    only_present: bool = False

    name: ClassVar[str] = "masks"

    def __post_init__(self) -> None:
        if not all(name.strip() for name in (*self.rename.values(), *self.merge)):
            raise UserError("a label is renamed to nothing: leave_out takes a label out")
        if self.background is not None and not self.background.strip():
            raise UserError("background is the name of a label, and it is empty")
        wrong = empty_synonym((*self.rename.values(), *self.merge, self.background or ""))
        if wrong is not None:
            raise UserError(f"label '{wrong}' has an empty synonym: write names between the bars")
        if self.keep is not None and not self.keep:
            raise UserError("keep names no label: name some, or leave it out to keep all")
        given: set[str] = set(self.rename)
        for new, olds in self.merge.items():
            for old in olds:
                if old in given:
                    raise UserError(f"label '{old}' gets two names, one of them '{new}': rename it once")
                given.add(old)
        both = sorted(set(self.leave_out) & set(self.keep or ()))
        if both:
            raise UserError(f"label '{both[0]}' is in keep and in leave_out: name it in one of them")

    def renamed(self, name: str) -> str:
        """The name under which a label of the data is learned."""
        merged = (new for new, olds in self.merge.items() if name in olds)
        return self.rename.get(name) or next(merged, name)

    def label_set(self, names: Sequence[str]) -> LabelSet:
        """What becomes of masks with these names by value; "" is a value without a label."""
        own = [name.strip() for name in names]
        found: dict[str, int] = {}
        classes: list[int | None] = []
        for name in own:
            new = self.renamed(name)
            if not name:
                classes.append(None)
            elif self._outside(name, new):
                classes.append(-1)
            else:
                classes.append(found.setdefault(new, len(found)))
        if self.background is not None and -1 in classes:
            rest = found.setdefault(self.background, len(found))
            classes = [rest if one == -1 else one for one in classes]
        return LabelSet(tuple(found), tuple(classes))

    def _outside(self, name: str, new: str) -> bool:
        spoken = {name, new, shown(new)}
        return bool(spoken & set(self.leave_out)) or (self.keep is not None and not spoken & set(self.keep))

    @property
    def wanted(self) -> bool:
        """Whether the settings name labels that the data must have."""
        return bool(self.rename or self.merge or self.leave_out or self.keep)

    def check(self, names: Iterable[str], source: str) -> None:
        """Check the settings against the labels of a source.

        Raises:
            UserError: a name that the data do not have (the nearest is named), or no label is left.
        """
        own = [name for name in dict.fromkeys(map(str.strip, names)) if name]
        learned = [self.renamed(name) for name in own]
        spoken = dict.fromkeys([*own, *learned, *map(shown, learned)])
        olds = [old for group in self.merge.values() for old in group]
        wanted = {
            "rename": (self.rename, own),
            "merge": (olds, own),
            "leave_out": (self.leave_out, spoken),
            "keep": (self.keep or (), spoken),
        }
        for setting, (asked, known) in wanted.items():
            for name in asked:
                if name not in known:
                    listed = ", ".join(list(known)[:20]) + (", ..." if len(known) > 20 else "")
                    raise UserError(
                        f"{setting} of task 'masks': source '{source}' has no label '{name}'"
                        f"{nearest(name, known) or f': it has {listed}'}"
                    )
        if own and not self.label_set(own).labels:
            raise UserError(f"task 'masks' leaves no label of source '{source}': keep one at least")


def shown(label: str) -> str:
    """The first of a label's synonyms."""
    return label.split("|")[0].strip()


def make_masks(settings: schema.Task | None) -> Masks:
    """The task of a segmenter's source; without one all labels are learned as they are.

    Raises:
        UserError: another task, an unknown setting (the nearest is named), or a value that does not fit.
    """
    if settings is None:
        return Masks()
    if settings.name in TASKS:
        raise UserError(
            f"task '{settings.name}' makes words of samples, and a segmenter learns from masks: its task is "
            "'masks'"
        )
    made: Masks = from_settings(settings, MASK_TASKS)
    return made
