"""From a sample's record to Sentences: what is asked, what is learned, what counts as right.

Knows captions, questions and conversations, and applies a source's task; knows nothing about tokens,
pixels or tar files. Training and evaluation phrase a question with the same words, through the same
template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks.task import Sizes, Task, Told, captions_in
from vlm_adapt.sentence import IMAGE_PLACEHOLDER, Sentence
from vlm_adapt.template import Template

QUESTIONS_A_ROW = 16  # in evaluation: more share the image's cost, fewer waste less on masked attention

Images = int | Sizes  # how many images a sample has, or the (width, height) of each as it is seen


@dataclass(frozen=True)
class Question:
    """One thing asked of a sample.

    Attributes:
        answers: every reference; training learns the commonest (the first of equals).
        kind: a label by which scores are broken down.
        masks: what the answer's mask tokens mean (see data/token_masks.py).
    """

    text: str
    answers: tuple[str, ...]
    kind: str | None = None
    id: str | None = None
    masks: tuple[Mapping[str, Any], ...] = ()

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
        task: what is made of each sample first.
    """

    template: Template
    system: str | None = None
    prompt: str = "Describe the image."
    questions_per_image: int | None = None
    questions_per_kind: Mapping[str, int] | None = None
    branches: bool = True
    task: Task | None = None

    @property
    def needs_sizes(self) -> bool:
        """Whether `training`, `evaluation` and `references` want the sizes of a sample's images."""
        return self.task is not None and self.task.needs_sizes

    @property
    def needs_masks(self) -> bool:
        """Whether they want `shown` in the record: which labels the semantic mask shows."""
        return self.task is not None and self.task.needs_masks

    def images(self, record: dict[str, Any], images: int) -> list[int]:
        """Which of a sample's images its sentences show, by number."""
        return list(range(images)) if self.task is None or self.task.keeps_images else []

    def training(
        self, record: dict[str, Any], images: Images, generator: np.random.Generator
    ) -> list[Sentence]:
        """The sentences to learn from a sample, drawn by `generator` where there is a choice.

        Args:
            images: how many images the sample has; their sizes where `needs_sizes`.

        Raises:
            BadSample: there is nothing to ask, or the task finds nothing to ask.
            UserError: roles of `messages` do not alternate.
        """
        told, count = self._told(record, images, generator)
        state = told.record.get("state") or ()
        if "messages" in told.record:
            return [self._conversation(told.record["messages"], state)]
        questions = questions_of(told.record, told.prompt or self.prompt)
        captions = captions_in(told.record)
        if captions:
            chosen = captions[int(generator.integers(len(captions)))]
            return [self._pairs([(questions[0].text, chosen)], count, state)]
        drawn = _draw(questions, self.questions_per_image, self.questions_per_kind, generator)
        if not drawn:
            raise BadSample("no question of the kinds asked for")
        sentences = self._sentences([(question.text, question.answer) for question in drawn], count, state)
        return _with_masks(sentences, [question.masks for question in drawn])

    def references(self, record: dict[str, Any], images: Images) -> list[Sentence]:
        """Sentences that hold every reference of a sample, for its held-out loss.

        A caption's references are all its captions; a question's is its commonest answer.
        """
        told, count = self._told(record, images)
        state = told.record.get("state") or ()
        if "messages" in told.record:
            return [self._conversation(told.record["messages"], state)]
        questions = questions_of(told.record, told.prompt or self.prompt)
        pairs = [(questions[0].text, caption) for caption in captions_in(told.record)]
        if pairs:
            return self._sentences(pairs, count, state)
        sentences = self._sentences([(q.text, q.answer) for q in questions], count, state)
        return _with_masks(sentences, [question.masks for question in questions])

    def evaluation(self, record: dict[str, Any], images: Images) -> list[Asked]:
        """Every question of a sample as prompts; a conversation is asked its last question."""
        told, count = self._told(record, images)
        state = told.record.get("state") or ()
        if "messages" in told.record:
            *before, last = self._with_system(told.record["messages"])
            prompt = self.template.conversation(before, state)
            asked = before[-1]["content"] if before else ""
            kind, identity, masks = record.get("kind"), _text(record.get("id")), _masks(last)
            question = Question(asked, (last["content"],), kind, identity, masks)
            return [Asked(prompt, (question,))]
        questions = questions_of(told.record, told.prompt or self.prompt)
        size = QUESTIONS_A_ROW if self.branches else 1
        groups = [questions[i : i + size] for i in range(0, len(questions), size)]
        return [
            Asked(self._pairs([(q.text, None) for q in group], count, state), tuple(group))
            for group in groups
        ]

    def _told(
        self, record: dict[str, Any], images: Images, generator: np.random.Generator | None = None
    ) -> tuple[Told, int]:
        """What the task makes of a record, with no draw of ours in evaluation; and how many images stay."""
        count, sizes = (images, ()) if isinstance(images, int) else (len(images), images)
        if self.task is None:
            return Told(record), count
        if generator is None:
            told = self.task.evaluation(record, sizes)
        else:
            told = self.task.training(record, generator, sizes)
        return told, len(self.images(record, count))

    def _conversation(self, messages: list[dict[str, Any]], state: Sequence[float]) -> Sentence:
        sentence = self.template.conversation(self._with_system(messages), state)
        masks = [_masks(message) for message in messages if message.get("role") == "assistant"]
        return _with_masks([sentence], masks)[0]

    def _sentences(
        self, pairs: Sequence[tuple[str, str | None]], images: int, state: Sequence[float]
    ) -> list[Sentence]:
        """Questions with answers: branches of one row, or a row each."""
        if self.branches:
            return [self._pairs(pairs, images, state)]
        return [self._pairs([pair], images, state) for pair in pairs]

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
    """The questions of a record; a caption is the answer to the source's prompt.

    Raises:
        BadSample: the record holds only what a task could make questions of.
    """
    kind, identity = record.get("kind"), _text(record.get("id"))
    captions = captions_in(record)
    if captions:
        return [Question(prompt, tuple(captions), kind, identity)]
    if "questions" in record:
        return [
            Question(q["question"], _answers(q), q.get("kind", kind), _text(q.get("id")), _masks(q))
            for q in record["questions"]
        ]
    if "question" not in record:
        raise BadSample("nothing is asked of it: give the source a task", f"it has {', '.join(record)}")
    return [Question(record["question"], _answers(record), kind, identity, _masks(record))]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _masks(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """What the mask tokens of an answer mean."""
    return tuple(record.get("masks") or ())


def _with_masks(
    sentences: Sequence[Sentence], answers: Sequence[Sequence[Mapping[str, Any]]]
) -> list[Sentence]:
    """The sentences with the masks of their answers, in order."""
    if not any(answers):
        return list(sentences)
    each = iter(answers)
    return [sentence.with_masks(each) for sentence in sentences]


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
