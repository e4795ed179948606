"""Chat goes training's road: its prompts are prefixes of training's rows, and its history behaves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_chat
from hypothesis import given, settings
from hypothesis import strategies as some

from vlm_adapt.chat.history import History, place_images
from vlm_adapt.chat.session import Session
from vlm_adapt.data.encode import Encoder
from vlm_adapt.data.phrase import Phrasing
from vlm_adapt.errors import UserError
from vlm_adapt.language.language import Generation
from vlm_adapt.template import bare_template, plain_template, tokenizer_template

PIXELS = np.zeros((3, 2, 2), np.uint8)
TEXT = some.text(some.characters(codec="utf-8"), max_size=12).filter(lambda text: "<image>" not in text)
TURN = some.tuples(some.lists(TEXT, min_size=1, max_size=3), some.integers(0, 2), TEXT)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    return {bos: tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=bos) for bos in (False, True)}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", ["tokenizer", "plain", "bare", "prefix"])
@settings(deadline=None, max_examples=60)
@given(turns=some.lists(TURN, min_size=1, max_size=4), system=some.none() | TEXT)
def test_every_prompt_is_a_prefix_of_training(
    tokenizers: dict[bool, Any], bos: bool, kind: str, turns: list[Any], system: str | None
) -> None:
    tokenizer = tokenizers[bos]
    template = {
        "tokenizer": lambda: tokenizer_template(tokenizer),
        "plain": lambda: plain_template("<|im_end|>"),
        "bare": lambda: bare_template("<|im_end|>"),
        "prefix": lambda: bare_template("<|im_end|>", prompt_is_causal=False),
    }[kind]()
    encoder = Encoder(tokenizer, tokens_per_image=3, max_length=4096)
    history = History(template, encoder, system)
    prompts = []
    for pieces, before, answer in turns:
        # images inside the text where it has several pieces, else before it
        inside = len(pieces) - 1
        turn = history.ask("<image>".join(pieces), [PIXELS] * (inside or before), [])
        prompts.append(history.prompt(64)[0])
        turn.answer = answer
    images = sum(len(turn.pixels) for turn in history.turns)
    # what training makes of the same messages, as they would lie in a shard
    messages = json.loads(json.dumps(history.messages()))
    whole = encoder.encode(template.conversation(messages), images, "sample", learn=False)
    for prompt in prompts:
        length = len(prompt)
        assert length < len(whole) or kind == "bare" and not history.turns[-1].answer
        for name in ("ids", "blocks", "branches", "positions"):
            np.testing.assert_array_equal(getattr(prompt, name), getattr(whole, name)[:length], name)
        shown = len(prompt.image_starts)
        np.testing.assert_array_equal(prompt.image_starts, whole.image_starts[:shown])
        assert prompt.image_order == whole.image_order[:shown] and len(prompt.pixels) == shown
        # the first thing learned of this turn is predicted by the prompt's last token
        assert length - 1 in whole.predict_from


@pytest.mark.parametrize("kind", ["tokenizer", "plain"])
def test_a_question_reads_as_evaluation_phrases_it(tokenizers: dict[bool, Any], kind: str) -> None:
    tokenizer = tokenizers[False]
    template = tokenizer_template(tokenizer) if kind == "tokenizer" else plain_template("<|im_end|>")
    encoder = Encoder(tokenizer, tokens_per_image=3, max_length=512)
    history = History(template, encoder, "be brief")
    history.ask("what color is it?", [PIXELS, PIXELS], [])
    phrasing = Phrasing(template, "be brief")
    asked = phrasing.evaluation({"question": "what color is it?", "answer": "red"}, 2)
    row = encoder.encode(asked[0].sentence, 2, "sample", learn=False)
    np.testing.assert_array_equal(history.prompt(16)[0].ids, row.ids)


def test_images_come_first_unless_the_text_places_them() -> None:
    assert place_images("what?", 2) == "<image><image>\nwhat?"
    assert place_images("what?", 0) == "what?"
    assert place_images("is <image> like <image>?", 2) == "is <image> like <image>?"
    with pytest.raises(UserError, match=r"has 2 <image> and comes with 1 image"):
        place_images("is <image> like <image>?", 1)


def history_of(tokenizer: Any, max_length: int, turns: int, seq2seq: bool = False) -> History:
    encoder = Encoder(tokenizer, tokens_per_image=3, max_length=max_length, seq2seq=seq2seq)
    history = History(plain_template("<|im_end|>"), encoder, "be brief")
    for number in range(turns):
        history.ask(f"what is {number}?", [PIXELS + number], [f"{number}.png"]).answer = "red"
    return history


def test_oldest_turns_leave_with_their_images_and_the_system_message_stays(tokenizers: Any) -> None:
    history = history_of(tokenizers[False], max_length=150, turns=12)
    history.ask("and now?", [], [])
    row, dropped = history.prompt(new_tokens=50)
    assert 0 < dropped < 12 and len(row) <= 100
    assert len(row.pixels) == 12 - dropped == len(row.image_starts)
    assert row.pixels[0].max() == dropped  # the images that stay are those of the turns that stay
    text = tokenizers[False].decode(row.ids[row.ids != 0])
    assert "be brief" in text and f"is {dropped}?" in text and f"is {dropped - 1}?" not in text
    assert history.prompt(new_tokens=50)[1] == 0  # told once
    one_more = history.first - 1
    assert len(history._encode(one_more) or []) > 100  # no turn left that would have fitted


def test_a_generous_length_does_not_empty_a_short_memory(tokenizers: Any) -> None:
    history = history_of(tokenizers[False], max_length=150, turns=1)
    history.ask("and now?", [], [])
    assert history.prompt(new_tokens=1000)[1] == 0


def test_a_question_that_is_too_long_alone_is_refused(tokenizers: Any) -> None:
    history = history_of(tokenizers[False], max_length=60, turns=1)
    history.ask("x " * 100, [], [])
    with pytest.raises(UserError, match="room for 60 tokens"):
        history.prompt(8)


def test_an_encoder_decoder_is_shown_one_turn_with_the_last_images(tokenizers: Any) -> None:
    history = history_of(tokenizers[False], max_length=150, turns=2, seq2seq=True)
    turn = history.ask("and now?", [], [])
    row, dropped = history.prompt(16)
    assert turn.content == "<image>\nand now?" and turn.names == ["1.png"]
    assert dropped == 0 and len(row.pixels) == 1 and row.pixels[0].max() == 1


# --- a session on a model of random weights


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def opened(run_folder: Path) -> Session:
    return Session.open(run_folder, settings=Generation(8))


@pytest.fixture
def session(opened: Session) -> Session:
    opened.reset()
    opened.history.system = None
    opened.settings = Generation(8)
    return opened


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tiny_chat.picture(tmp_path / "a.png")


def test_a_reply_streams_the_greedy_answer_and_grows_the_history(session: Session, image: Path) -> None:
    seen = []
    generate = session.assembled.model.generate

    def spy(batch: Any, settings: Any, stops: Any) -> Any:
        seen.append((batch, generate(batch, settings, stops)))
        return seen[-1][1]

    session.assembled.model.generate = spy  # type: ignore[method-assign]
    try:
        pieces = list(session.ask("what color is the shape?", [image]))
        list(session.ask("and the circle?"))
    finally:
        del session.assembled.model.generate
    batch, ids = seen[0]
    decoded = session.assembled.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert "".join(pieces) == decoded and len(pieces) > 1
    assert session.speed is not None and session.speed.tokens == len(seen[1][1][0])
    messages = session.history.messages()
    assert messages[0]["content"] == "<image>\nwhat color is the shape?" and messages[1]["content"] == decoded
    # the second prompt begins with the first one, and shows the image again
    second = seen[1][0]
    assert second.ids_BT[0, : batch.ids_BT.shape[1]].tolist() == batch.ids_BT[0].tolist()
    assert second.pixels_ICHW.shape[0] == 1


def test_the_image_is_seen(session: Session, image: Path, tmp_path: Path) -> None:
    other = tiny_chat.picture(tmp_path / "b.png", seed=5)
    replies = []
    for file in (image, image, other):
        session.reset()
        replies.append("".join(session.ask("what is it?", [file])))
    assert replies[0] == replies[1] != replies[2]


def test_closing_the_iterator_stops_and_keeps_what_was_said(session: Session) -> None:
    session.settings = Generation(200)
    reply = session.ask("hello")
    first = next(reply)
    reply.close()  # type: ignore[attr-defined]
    assert session.history.turns[-1].answer.startswith(first)  # type: ignore[union-attr]
    assert session.speed is not None and session.speed.tokens < 150


def test_interrupted_before_the_first_word_leaves_no_trace(session: Session) -> None:
    reply = session.ask("hello")
    assert len(session.history.turns) == 1
    reply.close()  # type: ignore[attr-defined]
    list(session.ask("hello again"))
    assert [turn.content for turn in session.history.turns] == ["hello again"]


def test_bad_images_leave_the_conversation_as_it_was(session: Session, image: Path, tmp_path: Path) -> None:
    list(session.ask("what?", [image]))
    before = copy.copy(session.history.turns)
    fake = tmp_path / "fake.jpg"
    fake.write_text("I am a text")
    for files, message in (
        ([fake], "not an image"),
        ([tmp_path / "no.png"], "there is no image"),
        ([tmp_path], "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            session.ask("and this?", files)
    with pytest.raises(UserError, match="2 <image> and comes with 1"):
        session.ask("<image> <image>", [image])
    assert session.history.turns == before


def test_an_error_while_generating_is_raised_and_leaves_no_turn(session: Session) -> None:
    def broken(*arguments: Any) -> Any:
        raise MemoryError("no more")

    session.assembled.model.generate = broken  # type: ignore[method-assign]
    try:
        with pytest.raises(MemoryError):
            list(session.ask("what?"))
    finally:
        del session.assembled.model.generate
    assert session.history.turns == []


def test_seed_and_temperature(session: Session) -> None:
    def reply(seed: int) -> str:
        session.reset()
        session.settings = Generation(12, temperature=1.5, seed=seed)
        return "".join(session.ask("what?"))

    assert reply(1) == reply(1) != reply(2)


def test_a_cut_reply_is_told(session: Session) -> None:
    session.settings = Generation(2)
    list(session.ask("what?"))
    assert session.notes == ["the reply was cut after 2 tokens (the length asked for)"]


def test_the_transcript_is_a_llava_sample(session: Session, image: Path, tmp_path: Path) -> None:
    from vlm_adapt.data.convert.run import write_dataset

    session.history.system = "be brief"
    list(session.ask("is <image> like <image>?", [image, image]))
    list(session.ask("why?"))
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([session.transcript()]), encoding="utf-8")
    options = {"conversations": str(file), "images": str(tmp_path)}
    done = write_dataset("llava", tmp_path / "shards", options, progress=False)
    assert done["samples"] == 1 and done["refused"] == {}


def test_an_encoder_decoder_talks(tmp_path: Path, image: Path) -> None:
    session = Session.open(tiny_chat.checkpoint(tmp_path, kind="t5"))
    session.settings = Generation(6, temperature=5.0, seed=1)  # greedy, these weights write padding
    assert "".join(session.ask("what color?", [image]))
    list(session.ask("and the shape?"))
    assert session.notes[0].startswith("this encoder-decoder reads one turn at a time")
    assert session.history.messages()[-2]["content"] == "<image>\nand the shape?"
