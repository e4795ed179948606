"""What every task is: a transform of a sample's record, with settings that are checked at the start.

Knows records of the schema and prompts with fields; knows nothing about tokens, pixels, templates or
which model reads the result. A task is a frozen dataclass: its fields are its settings.

Prompts follow PaLI (arXiv:2209.06794) or PaliGemma (arXiv:2407.07726), or are the user's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from vlm_adapt.choices import Choices, nearest
from vlm_adapt.config import schema
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks import MASK_TASKS, TASKS
from vlm_adapt.data.tasks.languages import name_of
from vlm_adapt.data.tasks.prompts import check_prompt, fields_of, fill
from vlm_adapt.errors import UserError

SETTINGS = ConfigDict(extra="forbid")
Sizes = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Told:
    """What a task made of a sample.

    Attributes:
        record: a record of the schema that holds captions or questions.
        prompt: asked of the captions; None leaves the source's own.
    """

    record: dict[str, Any]
    prompt: str | None = None


@dataclass(frozen=True, config=SETTINGS)
class Task:
    """The settings that all tasks share.

    Attributes:
        style: whose prompts are the default ones.
        prompt: the user's own prompt, with fields in braces.
        lang: the language of all samples; None leaves it to each sample's `lang`, "en" when left out.
    """

    style: Literal["pali", "paligemma"] = "pali"
    prompt: str | None = None
    lang: str | None = None

    name: ClassVar[str]
    prompts: ClassVar[dict[str, str]]  # by style
    fields: ClassVar[tuple[str, ...]] = ()  # of its prompt, besides {lang} and {language}
    required: ClassVar[tuple[str, ...]] = ()  # a prompt without them would leave out what is asked
    keeps_images: ClassVar[bool] = True
    needs_sizes: ClassVar[bool] = False  # of the images, (width, height) as they are seen
    needs_masks: ClassVar[bool] = False  # `shown` in the record: each label of the semantic mask, its share

    def __post_init__(self) -> None:
        check_prompt("prompt", self.template, ("lang", "language", *self.fields), self.required)

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        """What is learned from a sample, with draws by `generator`.

        Args:
            record: of our schema, checked.
            sizes: (width, height) of each image; empty unless `needs_sizes`.

        Raises:
            BadSample: the record lacks what the task needs.
        """
        raise AttributeError("a task says what it makes of a sample")

    def evaluation(self, record: dict[str, Any], sizes: Sizes = ()) -> Told:
        """What is asked of a held-out sample: the same every time."""
        return self.training(record, fixed(record), sizes)

    @property
    def template(self) -> str:
        """The prompt with its fields."""
        return self.prompts[self.style] if self.prompt is None else self.prompt

    def language_of(self, record: dict[str, Any]) -> str:
        """The language code of a sample."""
        return self.lang or record.get("lang", "en")

    def filled(self, record: dict[str, Any], **values: Any) -> str:
        """The prompt of a sample.

        Raises:
            BadSample: it names its language, and the code's name is not known.
        """
        lang = self.language_of(record)
        values["lang"] = lang
        if "language" in fields_of(self.template):
            values["language"] = name_of(lang)
        return fill(self.template, values)

    def lacks(self, record: dict[str, Any], what: str) -> BadSample:
        """The refusal of a record that has nothing for this task."""
        return BadSample(f"the task '{self.name}' needs {what}", f"the record has {', '.join(record)}")


def make_task(settings: schema.Task | None) -> Task | None:
    """The task that a source names, or None.

    Raises:
        UserError: an unknown task, setting or prompt field (the nearest is named), or a value that does
            not fit.
    """
    if settings is None:
        return None
    if settings.name in MASK_TASKS:
        raise UserError(
            f"task '{settings.name}' is for segmenters (model.kind): a model that answers in words takes "
            f"{', '.join(sorted(TASKS))}"
        )
    made: Task = from_settings(settings, TASKS)
    return made


def from_settings(settings: schema.Task, table: Choices) -> Any:
    """The task of a table with its settings. Raises UserError, as `make_task`."""
    kind = table.load(settings.name)
    known = [one.name for one in dataclasses.fields(kind)]
    for key in settings.options:
        if key not in known:
            raise UserError(
                f"task '{settings.name}' has no setting '{key}'"
                f"{nearest(key, known) or ': known are ' + ', '.join(known)}"
            )
    try:
        return kind(**settings.options)
    except ValidationError as error:
        raise UserError(f"task '{settings.name}': {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))  # the closest of a union
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, UserError):
        return str(inner)
    # Further words name the branch of a union, which the user did not write; numbers are places in a list.
    keys = [str(part) for place, part in enumerate(first["loc"]) if place == 0 or isinstance(part, int)]
    return f"{'.'.join(keys)}: {first['msg']} (it is {first['input']!r})"


def fixed(record: dict[str, Any]) -> np.random.Generator:
    """Draws that depend on a record alone."""
    text = json.dumps(record, sort_keys=True).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def carried(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record is not the task's to change."""
    return {key: record[key] for key in ("id", "kind", "state") if key in record}


def questions_in(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions of a record as entries of `questions`: question, answers, kind, id."""
    own = [record] if "question" in record else []
    entries = []
    for entry in (*own, *record.get("questions", ())):
        answers = entry["answers"] if "answers" in entry else [entry["answer"]]
        named = {key: entry[key] for key in ("kind", "id") if key in entry}
        entries.append({"question": entry["question"], "answers": answers} | named)
    return entries


def captions_in(record: dict[str, Any]) -> list[str]:
    """The captions of a record."""
    if "captions" in record:
        return list(record["captions"])
    return [record["caption"]] if "caption" in record else []
