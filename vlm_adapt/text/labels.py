"""Label names with synonyms and templates, and the vector of each: encoded once while the encoder is frozen.

Knows names, templates and the cache; knows nothing about libraries, images or pixels. A label is written
`car` or `car|automobile`: the first name is the one that is shown. Its vector is the mean over synonyms x
templates of vectors of length 1, brought to length 1 again (CLIP's prompt ensembling, Radford et al. 2021,
arXiv 2103.00020, section 3.1.4).

    L labels, D width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vlm_adapt.errors import UserError
from vlm_adapt.text.encoder import TextEncoder

TEXTS_AT_ONCE = 256  # of a frozen encoder: bounds memory at thousands of labels and templates


def synonyms(label: str) -> tuple[str, ...]:
    """The names of one label, stripped: "car | automobile" -> ("car", "automobile").

    Raises:
        UserError: a name is empty.
    """
    names = tuple(" ".join(name.split()) for name in label.split("|"))
    if not all(names):
        if len(names) == 1:
            raise UserError("a label is empty: give every label a name")
        raise UserError(f"label '{label.strip()}' has an empty synonym: write names between the bars")
    return names


def shown(label: str) -> str:
    """The name of a label that is shown: its first."""
    return synonyms(label)[0]


def read_labels(labels: str | Sequence[str]) -> tuple[str, ...]:
    """Labels of a list, or of one text with commas between ("cat, grass, other"), stripped and checked.

    Raises:
        UserError: no label, an empty name or synonym, or two labels of the same name.
    """
    if isinstance(labels, str):
        pieces = labels.split(",") if labels.strip() else []
        labels = pieces[:-1] if pieces and not pieces[-1].strip() else pieces  # "cat, grass," is two labels
    found = tuple("|".join(synonyms(label)) for label in labels)
    if not found:
        raise UserError("the list of labels is empty: name at least one")
    first: dict[str, str] = {}
    for written, label in zip(labels, found, strict=True):
        name = shown(label)
        if name in first:
            same = f"'{first[name]}' and '{written}'"
            raise UserError(f"two labels are the same: {same} are both '{name}' when stripped; leave one out")
        first[name] = written
    return found


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates, each with a place for the name.

    Raises:
        UserError: none at all, or one without `{}`.
    """
    if isinstance(templates, str):
        templates = [templates]
    if not templates:
        raise UserError('the list of templates is empty: "{}" alone stands for the plain name')
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template '{template}' has no {{}}: write it where the label's name goes")
    return tuple(templates)


class LabelEmbeddings:
    """Vectors of labels.

    While the encoder is frozen each label is encoded once and kept on `device`. While it trains (something
    in it requires gradients, and gradients are being recorded) all texts of a call go through it in one
    forward pass, nothing is kept, and what was kept is forgotten; then ranks that share the encoder's weights
    (ZeRO-3) must call equally often.

    Args:
        encoder: the text encoder.
        templates: with `{}` where a name goes.
        device: where vectors are kept and given; None is the encoder's own.
    Attributes:
        encoded: texts that were run so far.

    Raises:
        UserError: no template, or one without `{}`.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        templates: Sequence[str] = ("{}",),
        device: torch.device | str | None = None,
    ):
        self.encoder, self.templates = encoder, check_templates(templates)
        self.device = None if device is None else torch.device(device)
        self.encoded = 0
        self._kept: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Numbers of a vector (D)."""
        return self.encoder.width

    @property
    def trains(self) -> bool:
        """Whether the encoder is being trained."""
        return torch.is_grad_enabled() and self.encoder.trains

    def forget(self) -> None:
        """Encode every label again: the encoder's weights have changed."""
        self._kept.clear()

    def to(self, device: torch.device | str) -> LabelEmbeddings:
        """Give vectors on another device from now on."""
        self.device = torch.device(device)
        self._kept = {label: vector_D.to(self.device) for label, vector_D in self._kept.items()}
        return self

    def texts(self, label: str) -> list[str]:
        """All that is encoded for a label: synonyms x templates."""
        return [template.replace("{}", name) for name in synonyms(label) for template in self.templates]

    def __call__(self, labels: Sequence[str]) -> Tensor:
        """Labels to vectors_LD of length 1, in their order; a label may come twice.

        Raises:
            UserError: no label, an empty name, or a text that is longer than the encoder reads.
        """
        if isinstance(labels, str) or not labels:
            raise UserError("the list of labels is empty: name at least one")
        if self.trains:
            self.forget()
            distinct = list(dict.fromkeys(labels))
            vectors_LD = self._encode(distinct)
            where = {label: number for number, label in enumerate(distinct)}
            picked_L = torch.tensor([where[label] for label in labels], device=vectors_LD.device)
            vectors_LD = vectors_LD[picked_L]
            return vectors_LD if self.device is None else vectors_LD.to(self.device)
        new = [label for label in dict.fromkeys(labels) if label not in self._kept]
        if new:
            # Kept for the whole run: not in the lower precision that a forward pass may be in just now.
            with torch.no_grad(), torch.autocast(self.encoder.device.type, enabled=False):
                found_LD = self._encode(new, TEXTS_AT_ONCE)
            found_LD = found_LD if self.device is None else found_LD.to(self.device)
            self._kept |= dict(zip(new, found_LD.unbind(), strict=True))
        return torch.stack([self._kept[label] for label in labels])

    def _encode(self, labels: list[str], at_once: int | None = None) -> Tensor:
        """vectors_LD of distinct labels; texts go through the encoder `at_once` at a time, None for all."""
        texts = [self.texts(label) for label in labels]
        flat = [text for group in texts for text in group]
        step = at_once or len(flat)
        vectors = [self.encoder(flat[start : start + step]) for start in range(0, len(flat), step)]
        self.encoded += len(flat)
        groups = torch.cat(vectors).split([len(group) for group in texts])
        return functional.normalize(torch.stack([group_TD.mean(0) for group_TD in groups]), dim=-1)
