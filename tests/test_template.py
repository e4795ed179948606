"""Templates say what the tokenizer's own would, and a prompt's ids are a prefix of training's ids."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from chat_templates import CHATML, NO_SYSTEM, REWRITES, SYSTEM_MOVES, TEMPLATES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from rows import chat, written

from vlm_adapt.data.encode import Encoder
from vlm_adapt.errors import UserError
from vlm_adapt.sentence import Image, State, Text
from vlm_adapt.template import Template, bare_template, plain_template, tokenizer_template

TALK = chat("Hello there?", "Hi.", "What is <image>?", "A cat: two, even.", "Why", "No idea")
SYSTEM = {"role": "system", "content": "Answer in one word."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=False, bos=True)


def cut(tokenizer: Any, name: str) -> Template:
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer_template(tokenizer)


def render(tokenizer: Any, messages: Any, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=prompt,
        enable_thinking=False,
    )


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["default", "system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_reproduces_the_tokenizers_own_words(tokenizer: Any, name: str, system: list[Any]) -> None:
    """Word for word, at every length of the conversation and for prompts; but for what closes it all."""
    if system and name in NO_SYSTEM:
        pytest.skip("it refuses system messages: test_without_a_system_role")
    template = cut(tokenizer, name)
    longest = 2 if name in REWRITES or (system and name in SYSTEM_MOVES) else len(TALK)
    for length in range(1, longest + 1):
        messages = system + TALK[:length]
        ours, theirs = written(template, messages), render(tokenizer, messages, prompt=length % 2 == 1)
        theirs = re.sub("Today: .*", "Today: 26 Jul 2024", theirs)
        if length % 2:
            assert ours == theirs
        else:  # the line break (Phi-3: and the end of text) that close a whole text teach nothing
            assert theirs.startswith(ours)
            assert theirs.removeprefix(ours).strip() in ("", tokenizer.eos_token)


def test_rewritten_turns_stay_as_first_written(tokenizer: Any) -> None:
    template = cut(tokenizer, "qwen_3")
    whole = written(template, TALK)
    assert whole.count("<think>\n\n</think>\n\n") == 3
    assert render(tokenizer, TALK).count("<think>") == 1
    moved = written(cut(tokenizer, "mistral"), [SYSTEM, *TALK])
    assert moved.startswith("<s>[INST] Answer in one word.\n\nHello there?[/INST] Hi.</s>[INST] What")


def test_without_a_system_role(tokenizer: Any) -> None:
    """Gemma refuses system messages: the text opens the first user's content."""
    opened = written(cut(tokenizer, "gemma"), [SYSTEM, *TALK[:1]])
    assert opened == (
        "<s><start_of_turn>user\nAnswer in one word.\n\nHello there?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_strings_of_known_templates(tokenizer: Any) -> None:
    """What closes an answer is learned, and is what generation stops at."""
    ends = {name: cut(tokenizer, name).end for name in TEMPLATES}
    assert ends == {
        "chatml": "<|im_end|>",
        "llama_2": " </s>",
        "llama_3": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "gemma_3": "<end_of_turn>",
        "mistral": "</s>",
        "qwen_3": "<|im_end|>",
        "zephyr": "</s>",
        "phi_3": "<|end|>",
        "vicuna": "</s>",
    }
    assert {name for name in TEMPLATES if cut(tokenizer, name).answer_start == " "} == {
        "llama_2",
        "mistral",
        "vicuna",
    }


def test_the_day_does_not_matter(tokenizer: Any) -> None:
    assert "Today: 26 Jul 2024" in cut(tokenizer, "llama_3").opening


def all_templates(tokenizer: Any) -> list[Template]:
    made = [cut(tokenizer, name) for name in TEMPLATES]
    bare = [bare_template("</s>", causal) for causal in (True, False)]
    return [*made, plain_template("</s>"), *bare]


contents = some.lists(
    some.one_of(some.just("<image>"), some.text("ab \n?é<|", max_size=6), some.sampled_from(TALK[2:4])),
    max_size=4,
).map(lambda pieces: "".join(p if isinstance(p, str) else p["content"] for p in pieces))
talks = some.lists(contents, min_size=1, max_size=7)


@pytest.fixture(scope="module")
def everything(tokenizer: Any) -> tuple[Encoder, list[Template]]:
    return Encoder(tokenizer, tokens_per_image=3, max_length=10_000, state_size=2), all_templates(tokenizer)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=talks, system=some.booleans(), state=some.booleans(), which=some.integers(0, 100))
def test_prompt_is_a_prefix_of_training(
    everything: tuple[Encoder, list[Template]], talk: list[str], system: bool, state: bool, which: int
) -> None:
    """At every answer: what chat shows is what training showed before it, id for id, sight for sight."""
    encoder, templates = everything
    template = templates[which % len(templates)]
    vector = (0.5, 2.0) if state else ()
    messages = ([SYSTEM] if system else []) + chat(*talk, *([] if len(talk) % 2 == 0 else ["an answer"]))

    def encode(part: list[Any]) -> Any:
        sentence = template.conversation(part, vector)
        return encoder.encode(sentence, sentence.image_count, "s", learn=False)

    whole = encode(messages)
    for length in range(1 + system, len(messages), 2):
        prompt = encode(messages[:length])
        end = len(prompt)
        for name in ("ids", "positions", "branches", "blocks"):
            assert (getattr(prompt, name) == getattr(whole, name)[:end]).all()
        images = len(prompt.image_starts)
        assert (prompt.image_starts == whole.image_starts[:images]).all()
        assert prompt.image_order == whole.image_order[:images]
        assert end - 1 in whole.predict_from  # the prompt's last token predicts the answer's first
        assert end - 1 not in prompt.predict_from


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=some.lists(some.tuples(some.text("ab \n?", max_size=5), some.text("xy", max_size=3)), min_size=1),
    images=some.integers(0, 3),
    system=some.booleans(),
    which=some.integers(0, 100),
)
def test_questions_read_as_conversations(
    everything: tuple[Encoder, list[Template]], pairs: Any, images: int, system: bool, which: int
) -> None:
    """Prefix and branch have the ids of the conversation that asks the question alone."""
    encoder, templates = everything
    template = [t for t in templates if t.prompt_is_causal][which % (len(templates) - 1)]
    row = encoder.encode(
        template.questions(pairs, images, SYSTEM["content"] if system else None), images, "s"
    )
    for number, (question, answer) in enumerate(pairs, start=1):
        opening = "<image>" * images + ("\n" if images else "")
        messages = ([SYSTEM] if system else []) + chat(opening + question, answer)
        alone = encoder.encode(template.conversation(messages), images, "s")
        mine = (row.branches == 0) | (row.branches == number)
        assert row.ids[mine].tolist() == alone.ids.tolist()


def test_plain_and_bare() -> None:
    assert written(plain_template("</s>"), TALK[:3]) == (
        "User: Hello there?\nAssistant: Hi.</s>\nUser: What is <image>?\nAssistant:"
    )
    assert written(plain_template("</s>"), [SYSTEM, *TALK[:1]]) == (
        "Answer in one word.\nUser: Hello there?\nAssistant:"
    )
    assert written(bare_template("</s>"), TALK[:3]) == "Hello there?\nHi.</s>\nWhat is <image>?\n"


def test_segments() -> None:
    """Learned are the answers with their ends; a two-way prompt turns causal after the first answer."""
    sentence = bare_template("</s>", prompt_is_causal=False).conversation(
        chat("see <image>now", "yes", "and <image>", "no"), state=[1.0]
    )
    assert list(sentence) == [
        State((1.0,), causal=False),
        Text("see ", causal=False),
        Image(0, causal=False),
        Text("now\n", causal=False),
        Text("yes</s>", learned=True),
        Text("\n", turn=1),
        Text("and ", turn=1),
        Image(1, turn=1),
        Text("\n", turn=1),
        Text("no</s>", learned=True, turn=1),
    ]
    assert sentence.turns == 2 and sentence.image_count == 2 and len(sentence.prompt().segments) == 4


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (chat("a", "b")[::-1], "message 1 has role 'assistant' where 'user' is due"),
        ([*chat("a"), *chat("b")], "message 2 has role 'user' where 'assistant' is due"),
        ([*chat("a", "b"), SYSTEM], "message 3 has role 'system' where 'user' is due"),
        ([SYSTEM, {"role": "User", "content": "a"}], "message 1 has role 'User' where 'user' is due"),
        ([{"content": "a"}], "message 1 has role 'None' where 'user' is due"),
        ([{"role": "user", "content": ["a"]}], "a message's content is list, and must be a string"),
        ([{"role": "user"}], "a message's content is NoneType, and must be a string"),
    ],
)
def test_bad_messages(messages: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        plain_template("</s>").conversation(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['role'] }}{% endfor %}",  # leaves the contents out
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}",
        CHATML.replace("{% endfor %}", "", 1),  # no valid Jinja
    ],
)
def test_templates_that_cannot_be_cut(tokenizer: Any, broken: str) -> None:
    tokenizer.chat_template = broken
    with pytest.raises(UserError, match="set model.language.template to 'plain'") as caught:
        tokenizer_template(tokenizer)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_file_keeps_its_template(tmp_path: Path) -> None:
    from vlm_adapt.language.load import choose_template, load_tokenizer

    tiny.tokenizer(tmp_path / "chat")
    tiny.tokenizer(tmp_path / "base", chat=False)
    talking, base = load_tokenizer(tmp_path / "chat"), load_tokenizer(tmp_path / "base")
    assert choose_template("auto", talking, seq2seq=False, prefix_lm=False).user_start == "<|im_start|>user\n"
    assert choose_template("auto", base, False, False) == plain_template("</s>")
    assert choose_template("auto", talking, True, False) == bare_template("<|im_end|>")
    assert choose_template("auto", talking, False, True) == bare_template("<|im_end|>", False)
    with pytest.raises(UserError, match="has no chat template: set model.language.template to 'plain'"):
        choose_template("tokenizer", base, False, False)
