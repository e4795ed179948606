"""What the stream would refuse, found beforehand: every sample of some shards read and decoded in full.

Knows the schema, images, masks and keys; of a run it knows only a Reader, through which a sample goes as
in training. It changes nothing and stops at nothing: a sample that kills its process is a finding.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vlm_adapt.data.images import MAX_PIXELS, decode, image_size
from vlm_adapt.data.masks import check_mask, read_mask
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.reader import Reader
from vlm_adapt.data.sample import IMAGE_EXTENSIONS, Sample, parse_sample
from vlm_adapt.data.shards import Patterns, ShardSet, expand, joined
from vlm_adapt.data.watched import Death, each
from vlm_adapt.errors import UserError
from vlm_adapt.sentence import check_images
from vlm_adapt.template import plain_template

_MASK = re.compile(r"mask\.(\d+\.)?png")
_KNOWN = re.compile(rf"json|{_MASK.pattern}|(\d+\.)?({'|'.join(IMAGE_EXTENSIONS)})")


class Finding(NamedTuple):
    """One thing wrong: where, with which key ("" if unknown), the class of trouble, and what is special."""

    shard: str
    key: str
    reason: str
    detail: str = ""


@dataclass
class Lint:
    """What was found.

    Attributes:
        samples, checked: how many there are, and how many were looked at.
        findings: what the stream would refuse, and keys that come twice.
        truncated: samples that the stream would use shortened (known with a run's Reader only).
        unread: members that the schema does not know, and how many samples have them.
        complete: whether nothing was left out; False after Ctrl-C.
    """

    shards: int
    samples: int = 0
    checked: int = 0
    findings: list[Finding] = field(default_factory=list)
    truncated: list[Finding] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    complete: bool = False

    @property
    def account(self) -> Account:
        """The findings by reason, with a few examples of each."""
        return _account(self.findings)

    @property
    def shortened(self) -> Account:
        """The truncated by reason."""
        return _account(self.truncated)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report file: every key."""
        return {
            "complete": self.complete,
            "shards": self.shards,
            "samples": self.samples,
            "checked": self.checked,
            "reasons": self.account.refused,
            "problems": [finding._asdict() for finding in self.findings],
            "truncated": [finding._asdict() for finding in self.truncated],
            "unread_members": dict(self.unread.most_common()),
        }


def _account(findings: Sequence[Finding]) -> Account:
    account = Account()
    for one in findings:
        key = f"{one.key} in {one.shard}" if one.key else one.shard
        account.lose(key, BadSample(one.reason, one.detail))
    return account


class Look(NamedTuple):
    """What one sample shows: (reason, detail) of each fault, whether it is shortened, unknown members."""

    faults: tuple[tuple[str, str], ...]
    truncated: str = ""
    unread: tuple[str, ...] = ()


@dataclass
class _Refusals(Account):
    """An account that keeps the refusals as they were told."""

    faults: list[tuple[str, str]] = field(default_factory=list)

    def lose(self, key: str, why: str | BadSample, *more: Any) -> None:
        """As usual, and remembered."""
        self.faults.append((why.reason, why.detail) if isinstance(why, BadSample) else (why, ""))
        super().lose(key, why, *more)


class Check:
    """Looks at sample number n of several sets of shards laid end to end. Picklable.

    Args:
        reader: a run's, over the same shards, for tokens and tasks.
    """

    def __init__(self, sets: Sequence[ShardSet], max_pixels: int = MAX_PIXELS, reader: Reader | None = None):
        self.sets, self.max_pixels, self.reader = list(sets), max_pixels, reader
        self.starts = joined(sets)

    def place(self, number: int) -> tuple[str, str]:
        """(shard, key) of a sample."""
        ref = self.sets[self._set(number)].ref(number - self.starts[self._set(number)])
        return ref.shard, ref.key

    def _set(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def __call__(self, number: int) -> Look:
        """Look at a sample.

        Raises:
            UserError: the shard was changed meanwhile.
        """
        at = self._set(number)
        unread: tuple[str, ...] = ()
        try:
            key, members = self.sets[at].read(number - self.starts[at])
            sample = parse_sample(key, members)
            unread = unknown(members)
            faults = list(self._faults(sample, members))
            truncated = ""
            if not faults and self.reader is not None:
                faults, truncated = self._encoded(number)
        except BadSample as error:
            return Look(((error.reason, error.detail),), "", unread)
        except UserError:
            raise
        except Exception as error:  # whatever a sample makes the reader raise would stop a run
            return Look((("the reader fails on it", f"{type(error).__name__}: {error}"),), "", unread)
        return Look(tuple(faults), truncated, unread)

    def _faults(self, sample: Sample, members: dict[str, bytes]) -> Iterator[tuple[str, str]]:
        masks = {name: data for name, data in members.items() if _MASK.fullmatch(name)}
        sizes: list[tuple[int, int]] = []
        for number, data in enumerate(sample.images):
            try:
                if self.reader is None or masks:
                    height, width = decode(data, self.max_pixels).shape[:2]
                    sizes.append((width, height))
                else:  # decoded on its way to the tower
                    image_size(data, self.max_pixels)
            except BadSample as error:
                where = f"image {number}" if len(sample.images) > 1 else ""
                yield error.reason, ": ".join(word for word in (where, error.detail) if word)
        if masks and not sample.images:
            yield "mask without an image", ", ".join(masks)
        for name, data in masks.items() if sizes else ():
            try:
                labels = sample.record.get("labels") if name == "mask.png" else None
                check_mask(data, sizes[0], labels)
                read_mask(data)
            except BadSample as error:
                yield error.reason, ": ".join(word for word in (name, error.detail) if word)
        if "messages" in sample.record and self.reader is None:
            # Captions and questions get their images from the phrasing; conversations place them.
            try:
                sentence = plain_template("").conversation(sample.record["messages"])
                check_images(sentence, len(sample.images), sample.key)
            except UserError as error:
                yield "messages or images do not fit together", str(error)

    def _encoded(self, number: int) -> tuple[list[tuple[str, str]], str]:
        """Through a run's reader, as the stream would in its first epoch."""
        assert self.reader is not None
        account = _Refusals()
        rows = self.reader.training(number, 0, number, account)
        cut = sum(row.cut for row in rows)
        return account.faults, f"{cut} turns or questions left out" if cut else ""


def unknown(members: dict[str, bytes]) -> tuple[str, ...]:
    """Members that no part of the schema reads."""
    return tuple(name for name in members if not _KNOWN.fullmatch(name))


def open_sets(patterns: Patterns) -> tuple[list[ShardSet], list[Finding]]:
    """Each shard's samples, and what is wrong with shards as a whole.

    Raises:
        UserError: a pattern that stands for nothing.
    """
    sets, findings = [], []
    for path in expand(patterns):
        try:
            one = ShardSet([path])
        except UserError as error:
            findings.append(Finding(str(path), "", "the shard cannot be read", str(error)))
            continue
        sets.append(one)
        findings += [Finding(problem.shard, problem.key, problem.reason) for problem in one.problems]
    return sets, findings


def duplicates(sets: Sequence[ShardSet]) -> Iterator[Finding]:
    """Keys that another shard has too. (Within a shard the index finds them.)"""
    hashes = np.array([_hash(index.key(n)) for index in _indexes(sets) for n in range(len(index))], np.uint64)
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    same = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
    place = Check(sets).place
    first: dict[str, str] = {}
    for at in same.tolist():
        for number in (int(order[at - 1]), int(order[at])):
            shard, key = place(number)
            if number == int(order[at]) and key in first:
                yield Finding(shard, key, "another sample has this key", f"in {first[key]}")
            first.setdefault(key, shard)


def _indexes(sets: Sequence[ShardSet]) -> list[Any]:
    return [index for one in sets for index in one.indexes]


def _hash(key: str) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def lint(
    sets: Sequence[ShardSet],
    findings: Sequence[Finding] = (),
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    reader: Reader | None = None,
    tick: Callable[[int], None] | None = None,
) -> Lint:
    """Look at every sample; after Ctrl-C what was seen so far, as incomplete.

    Args:
        sets, findings: of `open_sets`.
        workers: processes; with none a sample that kills its decoder ends us too.
        reader: see Check; its samples must be those of `sets`, in their order.
        tick: called with the number of samples looked at so far.

    Raises:
        UserError: a shard changed meanwhile.
    """
    check = Check(sets, max_pixels, reader)
    found = Lint(len(sets), check.starts[-1], findings=[*findings])
    try:
        found.findings += duplicates(sets)
        for number, look in each(check, found.samples, workers):
            found.checked += 1
            if isinstance(look, Death):
                look = Look((("the sample ends the process that reads it", look.why),))
            if look.faults or look.truncated:
                place = check.place(number)
                found.findings += [Finding(*place, *fault) for fault in look.faults]
                if look.truncated:
                    found.truncated.append(Finding(*place, "longer than max_length", look.truncated))
            found.unread.update(look.unread)
            if tick:
                tick(found.checked)
        found.complete = True
    except KeyboardInterrupt:
        pass
    for some in (found.findings, found.truncated):
        some.sort()  # processes finish in any order; the report is the same every time
    return found
