"""From a sample's record to Sentences: what is asked, what is learned, what counts as right.

Knows captions, questions and conversations; knows nothing about tokens, pixels or tar files.
Training and evaluation phrase a question with the same words, through the same template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_adapt.data.problems import BadSample
from vlm_adapt.sentence import IMAGE_PLACEHOLDER, Sentence
from vlm_adapt.template import Template

QUESTIONS_A_ROW = 16  # in evaluation: more share the image's cost, fewer waste less on masked attention


@dataclass(frozen=True)
class Question:
    """One thing asked of a sample.

    Attributes:
        answers: every reference; training learns the commonest (the first of equals).
        kind: a label by which scores are broken down.
    """

    text: str
    answers: tuple[str, ...]
    kind: str | None = None
    id: str | None = None

    @property
    def answer(self) -> str:
        """The answer that is learned."""
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True)
class Asked:
    """A prompt for evaluation: one sentence, and the question that each of its branches asks."""

    sentence: Sentence
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Phrasing:
    """How a source's samples are put into words.

    Attributes:
        branches: several questions on an image share one row; needs a causal prompt, since a prompt
            read both ways would see every question.
    """

    template: Template
    system: str | None = None
    prompt: str = "Describe the image."
    questions_per_image: int | None = None
    questions_per_kind: Mapping[str, int] | None = None
    branches: bool = True

    def training(self, record: dict[str, Any], images: int, generator: np.random.Generator) -> list[Sentence]:
        """The sentences to learn from a sample, drawn by `generator` where there is a choice.

        Raises:
            UserError: roles of `messages` do not alternate.
        """
        state = record.get("state") or ()
        if "messages" in record:
            return [self.template.conversation(self._with_system(record["messages"]), state)]
        questions = questions_of(record, self.prompt)
        if "caption" in record or "captions" in record:
            captions = questions[0].answers
            chosen = captions[int(generator.integers(len(captions)))]
            return [self._pairs([(self.prompt, chosen)], images, state)]
        drawn = _draw(questions, self.questions_per_image, self.questions_per_kind, generator)
        if not drawn:
            raise BadSample("no question of the kinds asked for")
        pairs = [(question.text, question.answer) for question in drawn]
        if self.branches:
            return [self._pairs(pairs, images, state)]
        return [self._pairs([pair], images, state) for pair in pairs]

    def evaluation(self, record: dict[str, Any], images: int) -> list[Asked]:
        """Every question of a sample as prompts; a conversation is asked its last question."""
        state = record.get("state") or ()
        if "messages" in record:
            *before, last = self._with_system(record["messages"])
            prompt = self.template.conversation(before, state)
            asked = before[-1]["content"] if before else ""
            question = Question(asked, (last["content"],), record.get("kind"), _text(record.get("id")))
            return [Asked(prompt, (question,))]
        questions = questions_of(record, self.prompt)
        size = QUESTIONS_A_ROW if self.branches else 1
        groups = [questions[i : i + size] for i in range(0, len(questions), size)]
        return [
            Asked(self._pairs([(q.text, None) for q in group], images, state), tuple(group))
            for group in groups
        ]

    def _pairs(
        self, pairs: Sequence[tuple[str, str | None]], images: int, state: Sequence[float]
    ) -> Sentence:
        if self.branches:
            return self.template.questions(pairs, images, self.system, state)
        ((question, answer),) = pairs
        content = IMAGE_PLACEHOLDER * images + ("\n" if images else "") + question
        messages = self._with_system([{"role": "user", "content": content}])
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self.template.conversation(messages, state)

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.system is None or (messages and messages[0].get("role") == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]


def questions_of(record: dict[str, Any], prompt: str) -> list[Question]:
    """The questions of a record; a caption is the answer to the source's prompt."""
    kind, identity = record.get("kind"), record.get("id")
    identity = None if identity is None else str(identity)
    if "captions" in record or "caption" in record:
        captions = record.get("captions") or [record["caption"]]
        return [Question(prompt, tuple(captions), kind, identity)]
    if "questions" in record:
        return [
            Question(q["question"], _answers(q), q.get("kind", kind), _text(q.get("id")))
            for q in record["questions"]
        ]
    return [Question(record["question"], _answers(record), kind, identity)]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(record["answers"]) if "answers" in record else (record["answer"],)


def _draw(
    questions: list[Question],
    count: int | None,
    per_kind: Mapping[str, int] | None,
    generator: np.random.Generator,
) -> list[Question]:
    """Questions in random order without repetition, at most so many of each kind and in all."""
    order = [questions[i] for i in generator.permutation(len(questions))]
    if per_kind is not None:
        left = dict(per_kind)
        drawn = []
        for question in order:
            kind = question.kind or ""
            if left.get(kind, 0) > 0:
                left[kind] -= 1
                drawn.append(question)
        order = drawn
    return order if count is None else order[:count]
