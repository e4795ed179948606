"""Chat templates as a handful of strings, and conversations as Sentences.

Knows the words around a turn; knows nothing about token ids, pixels or models. Training, evaluation
and chat all come through here, so what chat shows the model is a prefix of what training showed it.

    opening  [system]  user_start  CONTENT  user_end  ANSWER end  between  user_start  CONTENT ...
    |------------ not learned ------------------|  |-- learned --|

A tokenizer's Jinja template is rendered once over marker words and cut at them. Templates that
rewrite earlier turns when a new one arrives (Qwen3 drops old reasoning) thus cannot break the
property: a turn is always written the way it was first written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm_adapt.errors import UserError
from vlm_adapt.sentence import IMAGE_PLACEHOLDER, Image, Segment, Sentence, State, Text

Message = dict[str, Any]

# Some templates (Llama 3, SmolLM3) tell the date. A run must not depend on its day: chat, weeks later,
# says what training said. This macro stands before transformers' function of the same name.
_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday"}
_REPLACED = "".join(f".replace({code!r}, {text!r})" for code, text in _DATE.items())
_ONE_DAY = "{%- macro strftime_now(form) -%}{{ form" + _REPLACED + " }}{%- endmacro -%}"


@dataclass(frozen=True)
class Template:
    """The strings around the turns of a conversation.

    Attributes:
        opening: before everything when no system message is given (may hold a default one).
        system_start, system_end: around an explicit system message.
        user_start, user_end: around a user's content; `user_end` opens the answer.
        answer_start: learned, before the answer (the space that base models write with a word).
        end: what closes an answer. It is learned, and generation stops at it.
        between: after `end`, before the next user's turn.
        system_in_turn: the system message stands inside the first user's turn (Llama 2, Gemma 3), which
            `system_start` then opens: `user_start` is left out there.
        prompt_is_causal: False reads everything before the first answer both ways (prefix-LM).
    """

    opening: str = ""
    system_start: str = ""
    system_end: str = ""
    user_start: str = ""
    user_end: str = ""
    answer_start: str = ""
    end: str = ""
    between: str = ""
    prompt_is_causal: bool = True
    system_in_turn: bool = False

    def conversation(
        self, messages: Sequence[Message], state: Sequence[float] = (), first_image: int = 0
    ) -> Sentence:
        """Turn messages into a Sentence.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": str}`; `<image>` in a
                content stands for the next image. A last user message without an answer is a prompt.
            state: a state vector, placed before the first user's content.
            first_image: the number of the first image.

        Raises:
            UserError: roles do not alternate, or a role is unknown.
        """
        writer = _Writer(self.prompt_is_causal, first_image)
        messages = list(messages)
        has_system = bool(messages) and messages[0].get("role") == "system"
        before = self._before(_content(messages.pop(0)) if has_system else None)
        if not messages:
            writer.text(before.removesuffix(self.user_start))
        for position, message in enumerate(messages):
            expected = "assistant" if position % 2 else "user"
            if message.get("role") != expected:
                raise UserError(
                    f"message {position + 1} has role '{message.get('role')}' where '{expected}' is due: "
                    "user and assistant take turns, after at most one system message"
                )
            if expected == "user":
                if position:
                    writer.turn += 1
                writer.text(self.between + self.user_start if position else before)
                writer.flush()  # as `questions` does, so that both tokenize alike
                if position == 0 and len(state):
                    writer.add(State(tuple(float(value) for value in state), causal=writer.causal))
                writer.content(_content(message))
                writer.text(self.user_end)
            else:
                writer.answer(self.answer_start + _content(message) + self.end)
        return writer.sentence()

    def questions(
        self,
        pairs: Sequence[tuple[str, str | None]],
        images: int,
        system: str | None = None,
        state: Sequence[float] = (),
        separator: str = "\n",
    ) -> Sentence:
        """Several questions about the same images as branches over one shared prefix.

        Branch by branch it reads exactly as `conversation` with the content
        `<image>...<image>{separator}{question}` and its answer.

        Args:
            pairs: (question, answer); an answer of None leaves a prompt.
        """
        writer = _Writer(self.prompt_is_causal, 0)
        writer.text(self._before(system))
        if len(state):
            writer.add(State(tuple(float(value) for value in state), causal=writer.causal))
        for _ in range(images):
            writer.image()
        if images:
            writer.text(separator)
        writer.flush()
        prompt_causal = writer.causal
        for branch, (question, answer) in enumerate(pairs, start=1):
            writer.branch, writer.causal = branch, prompt_causal
            writer.text(question + self.user_end)
            if answer is not None:
                writer.answer(self.answer_start + answer + self.end)
            writer.flush()
        return writer.sentence()

    def _before(self, system: str | None) -> str:
        """Everything before the first user's content."""
        if system is None:
            return self.opening + self.user_start
        before = self.system_start + system + self.system_end
        return before if self.system_in_turn else before + self.user_start


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise UserError(f"a message's content is {type(content).__name__}, and must be a string")
    return content


class _Writer:
    """Collects segments; joins neighbouring unlearned text, so that tokens do not split needlessly."""

    def __init__(self, prompt_is_causal: bool, first_image: int):
        self.causal, self.turn, self.branch = prompt_is_causal, 0, 0
        self.pending, self.next_image = "", first_image
        self.segments: list[Segment] = []

    def text(self, text: str) -> None:
        self.pending += text

    def flush(self) -> None:
        if self.pending:
            self.segments.append(Text(self.pending, causal=self.causal, turn=self.turn, branch=self.branch))
            self.pending = ""

    def add(self, segment: Segment) -> None:
        self.flush()
        self.segments.append(replace(segment, turn=self.turn, branch=self.branch))

    def image(self) -> None:
        self.add(Image(self.next_image, causal=self.causal))
        self.next_image += 1

    def content(self, content: str) -> None:
        pieces = content.split(IMAGE_PLACEHOLDER)
        for number, piece in enumerate(pieces):
            if number:
                self.image()
                if piece.startswith("\n"):  # cut where `questions` cuts, so that both tokenize alike
                    self.text("\n")
                    self.flush()
                    piece = piece[1:]
            self.text(piece)

    def answer(self, text: str) -> None:
        self.flush()
        self.segments.append(Text(text, learned=True, turn=self.turn, branch=self.branch))
        self.causal = True  # what follows an answer has a past that must not see it coming

    def sentence(self) -> Sentence:
        self.flush()
        return Sentence(tuple(self.segments))


def plain_template(end: str) -> Template:
    """`User: {content}\\nAssistant: {answer}{end}\\n`, for base models without a template of their own."""
    return Template(
        system_end="\n", user_start="User: ", user_end="\nAssistant:", answer_start=" ", end=end, between="\n"
    )


def bare_template(end: str, prompt_is_causal: bool = True) -> Template:
    """`{content}\\n{answer}{end}`: PaliGemma's form, and PaLI's when the language is encoder-decoder."""
    return Template(system_end="\n", user_end="\n", end=end, between="\n", prompt_is_causal=prompt_is_causal)


def tokenizer_template(tokenizer: Any) -> Template:
    """Cut a tokenizer's own chat template into strings.

    Raises:
        UserError: the template does not render one user and one assistant message in order.
    """
    markers = ["\u2045U1\u2046", "\u2045A1\u2046", "\u2045U2\u2046", "\u2045A2\u2046"]
    user, answer, user2, answer2 = markers
    turns = [
        {"role": role, "content": marker}
        for role, marker in zip(("user", "assistant", "user", "assistant"), markers, strict=True)
    ]

    def render(messages: list[Message], prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=False,
                chat_template=_ONE_DAY + tokenizer.get_chat_template(),
            )
        except Exception as error:  # Jinja templates raise what they like
            raise UserError(
                f"the tokenizer's chat template refuses a plain conversation ({error}): "
                "set model.language.template to 'plain'"
            ) from error

    whole, once, asked = render(turns), render(turns[:2]), render(turns[:1], prompt=True)
    places = [whole.find(marker) for marker in markers]
    in_order = places[0] >= 0 and places == sorted(places)
    if not in_order or user not in asked or not 0 <= once.find(user) < once.find(answer):
        raise UserError(
            "the tokenizer's chat template does not keep the messages in order: "
            "set model.language.template to 'plain'"
        )
    head = whole[: whole.index(user)]
    middle = whole[whole.index(answer) + len(answer) : whole.index(user2)]
    tail = whole[whole.index(answer2) + len(answer2) :]
    # Phi-3 goes on with <|user|> or <|endoftext|>: half a token in common is none.
    common = _common_prefix(middle, tail)
    common = common if common == tail else re.sub(r"[<\[][^>\]]*$", "", common)
    end = common.rstrip("\n") or tail.rstrip("\n") or tokenizer.eos_token or ""
    between_and_user = middle.removeprefix(end)
    # The opening may hold a default system text; what precedes each later user turn is the turn's own.
    user_start = _common_suffix(head, between_and_user)
    opening = head.removesuffix(user_start)
    system_start, system_end, system_in_turn = _system_strings(render, turns[0], opening, user_start)
    user_end = asked[asked.index(user) + len(user) :]
    before_answer = once[once.index(user) + len(user) : once.index(answer)]
    return Template(
        opening=opening,
        system_start=system_start,
        system_end=system_end,
        user_start=user_start,
        user_end=user_end,
        # Llama 2's prompt ends with "[/INST]", and its answers begin with a space.
        answer_start=before_answer.removeprefix(user_end) if before_answer.startswith(user_end) else "",
        end=end,
        between=between_and_user.removesuffix(user_start),
        system_in_turn=system_in_turn,
    )


def _system_strings(render: Any, turn: Message, opening: str, user_start: str) -> tuple[str, str, bool]:
    """system_start, system_end and system_in_turn."""
    marker = "\u2045S\u2046"
    try:  # one turn only: some templates move the system message into the last one
        text = render([{"role": "system", "content": marker}, turn], prompt=True)
    except UserError:
        text = ""
    head = text[: text.find(turn["content"])]
    if marker not in head:  # Gemma has no system message: it then opens the first user's content
        return opening + user_start, "\n\n", True
    rest = head[head.index(marker) + len(marker) :]
    in_turn = not rest.endswith(user_start)
    return head[: head.index(marker)], rest if in_turn else rest.removesuffix(user_start), in_turn


def _common_prefix(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return first[:length]


def _common_suffix(first: str, second: str) -> str:
    return _common_prefix(first[::-1], second[::-1])[::-1]
