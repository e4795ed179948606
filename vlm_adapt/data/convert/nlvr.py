"""NLVR: is a statement true of an image? Suhr et al. 2017, aclanthology.org/P17-2034."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlm_adapt.data.convert.common import Conversion, Recipe, checked_image, existing, image_sample
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

Span = tuple[str, int, int]  # a file, where in it an image begins, and its length (-1: all of the file)


def _span(path: str, offset: int, size: int, record: dict[str, Any]) -> dict[str, Any]:
    """An image that lies in a tar or alone. A recipe."""
    if size < 0:
        return image_sample([[path]], record)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            extension, data = checked_image(file.read(size), f"{path} at byte {offset:,}")
    except OSError as error:
        raise BadSample("image file cannot be read", f"{path}: {error.strerror}") from error
    return {extension: data, "json": record}


def _listed(source: Path, stack: ExitStack) -> tuple[dict[str, Span | None], Callable[[str], bytes]]:
    """Where the files of a folder or a tar lie by name (None: in a compressed tar, so not to be reached
    by a recipe), and how to read one of them until `stack` is closed."""
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.is_file())
        return (
            {str(path.relative_to(source)): (str(path), 0, -1) for path in paths},
            lambda name: (source / name).read_bytes(),
        )
    try:
        archive = stack.enter_context(tarfile.open(source))
        members = {member.name: member for member in archive if member.isreg()}
        plain = _is_plain(source)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{source} is neither a folder nor a tar of NLVR: {error}") from error
    spans: dict[str, Span | None] = {
        name: (str(source), member.offset_data, member.size) if plain and member.sparse is None else None
        for name, member in sorted(members.items())
    }
    return spans, lambda name: archive.extractfile(members[name]).read()  # type: ignore[union-attr]


def _is_plain(source: Path) -> bool:
    """Whether a tar is not compressed."""
    try:
        tarfile.open(source, "r:").close()
    except tarfile.ReadError:
        return False
    return True


def convert(
    conversion: Conversion,
    *,
    source: str,
    permutations: str = "all",
    question: str = "Is it true that: {statement}?",
) -> Iterator[Recipe | dict[str, Any]]:
    """Samples `{question, answers: ["true" | "false"], statement, id}`.

    Args:
        source: a folder or a tar with `*.json` (an object a line: sentence, identifier, label) and
            `images/N/SPLIT-IDENTIFIER-PERMUTATION.png`.
        permutations: `all` makes a sample of each of a statement's images (up to six, the same boxes in
            another order), a number makes one of that image only.
        question: how the statement is put; `{statement}` stands for it without its full stop.
    """
    if "{statement}" not in question:
        raise UserError(f"the question '{question}' does not contain {{statement}}")
    if permutations != "all" and not permutations.isdigit():
        raise UserError(f"permutations is '{permutations}': say all, or a number from 0 to 5")
    with ExitStack() as stack:
        spans, read = _listed(existing(source, "NLVR source"), stack)
        yield from _samples(conversion, source, spans, read, permutations, question)


def _samples(
    conversion: Conversion,
    source: str,
    spans: Mapping[str, Span | None],
    read: Callable[[str], bytes],
    permutations: str,
    question: str,
) -> Iterator[Recipe | dict[str, Any]]:
    pictures: dict[str, dict[int, str]] = {}
    for name in spans:
        parts = Path(name).stem.rsplit("-", 1)
        if name.endswith(".png") and len(parts) == 2 and parts[1].isdigit():
            pictures.setdefault(parts[0], {})[int(parts[1])] = name
    lists = [name for name in spans if name.endswith(".json") and "/." not in f"/{name}"]
    if not lists:
        raise UserError(f"{source} holds no NLVR statements (*.json)")
    entries = []
    for name in lists:
        split = Path(name).stem
        try:
            lines = [json.loads(line) for line in read(name).decode().splitlines() if line.strip()]
            entries += [(split, e["identifier"], e["sentence"].strip(), e["label"].lower()) for e in lines]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name} in {source} is not a list of NLVR statements: {error}") from error
    wanted = None if permutations == "all" else int(permutations)
    work = []
    for split, identifier, statement, label in entries:
        found = pictures.get(f"{split}-{identifier}", {})
        chosen = [number for number in sorted(found) if wanted in (None, number)]
        if not chosen:
            conversion.lose(f"{split}-{identifier}", "image file is missing")
        work += [(f"{split}-{identifier}-{number}", found[number], statement, label) for number in chosen]
    conversion.total = len(work)
    for key, name, statement, label in work:
        text = question.replace("{statement}", statement.rstrip(".").rstrip())
        record = {"question": text, "answers": [label], "statement": statement, "id": key}
        span = spans[name]
        try:
            if label not in ("true", "false"):
                raise BadSample("label is neither true nor false", label)
            if span is None:
                extension, data = checked_image(read(name), name)
                yield {"__key__": key, extension: data, "json": record}
            else:
                yield Recipe(key, _span, (*span, record))
        except BadSample as error:
            conversion.lose(key, error)
