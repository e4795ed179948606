"""Sentences become numbers: what is learned, what is cut, who sees whom, and every number of a refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
from rows import chat

from vlm_adapt.data.collate import collate
from vlm_adapt.data.encode import FILLER_ID, Encoder
from vlm_adapt.data.phrase import Phrasing, questions_of
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.sentence import Sentence, State, Text
from vlm_adapt.template import bare_template, plain_template

K = 3
PLAIN = plain_template("</s>")
TWO_WAY = bare_template("</s>", prompt_is_causal=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=False)


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that opens every text with <s>."""
    return tiny.tokenizer(tmp_path_factory.mktemp("opening"), chat=False, bos=True)


def encode(encoder: Encoder, sentence: Sentence, learn: bool = True) -> Any:
    return encoder.encode(sentence, sentence.image_count, "key", learn)


def test_learned_are_the_answers_alone(tokenizer: Any) -> None:
    row = encode(Encoder(tokenizer, K, 500), PLAIN.conversation(chat("<image>a", "red", "b", "two cats")))
    assert tokenizer.decode(row.targets) == " red</s> two cats</s>"
    np.testing.assert_array_equal(row.ids[row.predict_from + 1], row.targets)
    assert row.image_starts.tolist() == [len(tokenizer.encode("User: "))] and row.image_order == [0]
    start = row.image_starts[0]
    assert (row.ids[start : start + K] == FILLER_ID).all()
    assert row.plain and row.cut == 0
    np.testing.assert_array_equal(row.positions, np.arange(len(row)))
    np.testing.assert_array_equal(row.blocks, np.arange(1, len(row) + 1))
    assert row.ends() == [len(row) - 1]


def test_a_first_token_is_never_a_target(tokenizer: Any) -> None:
    """Nothing comes before it, so nothing predicts it."""
    row = encode(Encoder(tokenizer, K, 500), Sentence((Text("red? no", learned=True),)))
    assert row.targets.tolist() == row.ids[1:].tolist()


def test_two_way_prompt(tokenizer: Any) -> None:
    row = encode(Encoder(tokenizer, K, 500), TWO_WAY.conversation(chat("<image>a", "red", "b", "no")))
    prompt = K + len(tokenizer.encode("a\n"))
    np.testing.assert_array_equal(row.blocks[:prompt], 0)
    np.testing.assert_array_equal(row.blocks[prompt:], np.arange(1, len(row) - prompt + 1))
    assert not row.plain


def test_branches(tokenizer: Any) -> None:
    sentence = PLAIN.questions([("a", "red"), ("bb", "no"), ("c", "yes")], images=1)
    row = encode(Encoder(tokenizer, K, 500), sentence)
    prefix = int((row.branches == 0).sum())
    for branch in (1, 2, 3):
        mine = row.branches == branch
        np.testing.assert_array_equal(row.positions[mine], prefix + np.arange(mine.sum()))
    assert row.ends() == [int(np.flatnonzero(row.branches == b)[-1]) for b in (1, 2, 3)]
    assert not row.plain and tokenizer.decode(row.targets) == " red</s> no</s> yes</s>"


def test_begins_once(opening: Any) -> None:
    """A tokenizer that opens texts with <s> opens the row, unless the template's own words do."""
    encoder = Encoder(opening, K, 500)
    own = bare_template("</s>")
    for template, system in ((own, []), (own, [{"role": "system", "content": "<s>"}])):
        row = encode(encoder, template.conversation([*system, *chat("<image>a", "red", "b", "no")]))
        assert row.ids.tolist().count(opening.bos_token_id) == 1 and row.ids[0] == opening.bos_token_id
    assert encode(encoder, TWO_WAY.conversation(chat("a", "red"))).blocks[0] == 0
    assert encode(encoder, own.questions([("a", "b"), ("c", "d")], 1)).ids[0] == opening.bos_token_id


@pytest.fixture(scope="module")
def turns(tokenizer: Any) -> list[int]:
    """Lengths of LONG after each of its turns."""
    encoder = Encoder(tokenizer, K, 500)
    return [len(encode(encoder, PLAIN.conversation(LONG[: 2 * n]))) for n in (1, 2, 3)]


LONG = chat("<image>a", "red", "<image>b", "blue", "<image>c <image>", "no")


@pytest.mark.parametrize("spare", [0, 1, K])
def test_cut_between_turns(tokenizer: Any, turns: list[int], spare: int) -> None:
    """Too long a sample loses whole turns from the end, with their images, and says how many."""
    whole = encode(Encoder(tokenizer, K, 500), PLAIN.conversation(LONG))
    for kept in (1, 2, 3):
        limit = turns[kept - 1] + (spare if kept < 3 else 0)
        row = encode(Encoder(tokenizer, K, limit), PLAIN.conversation(LONG))
        assert len(row) == turns[kept - 1] and row.cut == 3 - kept
        np.testing.assert_array_equal(row.ids, whole.ids[: len(row)])
        assert row.image_order == [0, 1, 2, 3][: kept if kept < 3 else 4]
        assert (row.image_starts + K <= len(row)).all()


def test_one_turn_too_long(tokenizer: Any, turns: list[int]) -> None:
    with pytest.raises(BadSample) as caught:
        encode(Encoder(tokenizer, K, turns[0] - 1), PLAIN.conversation(LONG))
    assert str(caught.value) == f"one turn alone is too long: {turns[0]} tokens, max_length {turns[0] - 1}"


def test_branches_leave_from_the_end(tokenizer: Any) -> None:
    pairs = [("a", "red"), ("bb", "no"), ("c", "yes")]
    lengths = [len(encode(Encoder(tokenizer, K, 500), PLAIN.questions(pairs[:n], 1))) for n in (1, 2, 3)]
    for kept in (1, 2, 3):
        row = encode(Encoder(tokenizer, K, lengths[kept - 1]), PLAIN.questions(pairs, 1))
        assert row.cut == 3 - kept and row.branches.max() == kept
    with pytest.raises(BadSample, match=f"{lengths[0]} tokens, max_length {lengths[0] - 1}"):
        encode(Encoder(tokenizer, K, lengths[0] - 1), PLAIN.questions(pairs, 1))


@pytest.mark.parametrize(("shown", "there"), [(0, 1), (1, 0), (2, 1), (1, 3)])
def test_placeholders_and_images(tokenizer: Any, shown: int, there: int) -> None:
    sentence = PLAIN.conversation(chat("<image>" * shown + "a", "b"))
    with pytest.raises(UserError, match=f"'k' has {shown} image placeholder.* and {there} image") as caught:
        Encoder(tokenizer, K, 500).encode(sentence, there, "k")
    assert "\n" not in str(caught.value)


def test_nothing_learned(tokenizer: Any) -> None:
    prompt = PLAIN.conversation(chat("a"))
    with pytest.raises(BadSample, match="nothing in it is learned: it has no answer"):
        encode(Encoder(tokenizer, K, 500), prompt)
    assert len(encode(Encoder(tokenizer, K, 500), prompt, learn=False).targets) == 0


def test_states(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, K, 500, state_size=2)
    sentence = PLAIN.conversation(chat("<image>a", "b"), state=[1.5, -2.0])
    row = encode(encoder, sentence)
    assert isinstance(sentence.segments[1], State)
    assert row.states.tolist() == [[1.5, -2.0]]
    assert row.state_starts.tolist() == [row.image_starts[0] - 1]
    assert row.ids[row.state_starts[0]] == FILLER_ID
    with pytest.raises(BadSample, match="2 numbers, model.state_size is 3"):
        encode(Encoder(tokenizer, K, 500, state_size=3), sentence)


def test_encoder_decoder(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, K, 40, seq2seq=True, start_id=0)
    template = bare_template("</s>")
    row = encode(encoder, template.conversation(chat("<image>a", "red", "b", "no")))
    end = tokenizer.eos_token_id
    assert row.ids.tolist() == [FILLER_ID] * K + tokenizer.encode("a\n") + [end]
    read = tokenizer.encode("red</s>") + tokenizer.encode("\nb\n") + tokenizer.encode("no</s>")
    assert row.decoder_ids.tolist() == [0, *read[:-1]]
    assert tokenizer.decode(row.targets) == "red</s>no</s>"
    assert [[*row.decoder_ids, end][i + 1] for i in row.predict_from] == row.targets.tolist()
    prompt = encode(encoder, template.conversation(chat("<image>a", "red", "b")), learn=False)
    assert prompt.decoder_ids.tolist() == [0, *read[: len(prompt.decoder_ids) - 1]]
    assert tokenizer.decode(prompt.decoder_ids[-1:]) == "\n" and prompt.ends() == [
        len(prompt.decoder_ids) - 1
    ]
    with pytest.raises(BadSample, match="an image after the first answer"):
        encode(encoder, template.conversation(chat("a", "b", "<image>", "c")))
    with pytest.raises(BadSample, match="one turn alone is too long: .* max_length 40"):
        encode(encoder, template.conversation(chat("a", "red " * 60)))


def test_collate(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, K, 500)
    rows = [
        encode(encoder, PLAIN.conversation(chat("<image>a", "red"))),
        encode(encoder, PLAIN.conversation(chat("a", "two<image> cats", "<image>b<image>", "no"))),
    ]
    rows[0].pixels = [np.full((3, 4, 4), 9, np.uint8)]
    rows[1].pixels = [np.full((3, 4, 4), n, np.uint8) for n in range(2)]
    batch = collate(rows, (4, 4), K, multiple=8)
    longest = max(map(len, rows))
    assert batch.ids_BT.shape == (2, -(-longest // 8) * 8) and batch.plain
    assert batch.tokens == sum(map(len, rows)) and batch.keys == ("key", "key") and batch.samples == 2
    assert batch.pixels_ICHW[:, 0, 0, 0].tolist() == [9, 0, 1]
    assert (batch.ids_BT.flatten()[batch.image_positions_K] == FILLER_ID).all()
    length = batch.ids_BT.shape[1]
    assert (batch.image_positions_K[K:] >= length).all() and (batch.image_positions_K[:K] < length).all()
    assert batch.image_lengths_I.tolist() == [K, K, K]
    assert batch.ids_BT.flatten()[batch.predict_from_N + 1].tolist() == batch.targets_N.tolist()
    assert batch.writers_BW.tolist() == [[len(rows[0]) - 1], [len(rows[1]) - 1]]


def test_answers_hold_no_images(tokenizer: Any) -> None:
    """`<image>` in an answer is a word of it, not a place for one: answers are text."""
    row = encode(Encoder(tokenizer, K, 500), PLAIN.conversation(chat("a", "see <image>")))
    assert tokenizer.decode(row.targets) == " see <image></s>"


def test_collate_of_nothing() -> None:
    """A rank without samples still runs every part: one row of padding and one black image."""
    batch = collate([], (4, 6), K, state_size=2)
    assert batch.ids_BT.shape == (1, 1) and batch.tokens == 0 and batch.plain and batch.samples == 0
    assert batch.pixels_ICHW.shape == (1, 3, 4, 6) and batch.pixels_ICHW.sum() == 0
    assert (
        batch.image_positions_K.shape == (0,)
        and len(batch.image_lengths_I) == 0
        and batch.states_SF.shape == (0, 2)
    )
    assert len(batch.targets_N) == 0 and collate([], (4, 6), K, seq2seq=True).decoder_ids_BU.shape == (1, 1)


def test_phrasing() -> None:
    """Two-way prompts get a row a question; the commonest answer is learned; so many of each kind."""
    record = {
        "questions": [
            {"question": f"q{n}", "answers": ["a", "b", "b"], "kind": "rare" if n == 5 else "often"}
            for n in range(6)
        ]
    }
    generator = np.random.default_rng(0)
    assert [question.answer for question in questions_of(record, "p")] == ["b"] * 6
    assert len(Phrasing(PLAIN).training(record, 1, generator)) == 1
    assert len(Phrasing(TWO_WAY, branches=False).training(record, 1, generator)) == 6
    two = Phrasing(PLAIN, questions_per_image=2)
    assert len({s.branch for s in two.training(record, 1, generator)[0]} - {0}) == 2
    kinds = Phrasing(PLAIN, questions_per_kind={"rare": 3, "often": 2})
    (sentence,) = kinds.training(record, 1, generator)
    said = [segment.text for segment in sentence if isinstance(segment, Text) and not segment.learned]
    assert sum("Assistant" in text for text in said) == 3 and sum("q5" in text for text in said) == 1
    with pytest.raises(BadSample, match="no question of the kinds asked for"):
        Phrasing(PLAIN, questions_per_kind={"other": 1}).training(record, 1, generator)
    captions = {"captions": ["one", "two"]}
    drawn = {Phrasing(PLAIN).training(captions, 1, generator)[0].segments[-1].text for _ in range(20)}
    assert drawn == {" one</s>", " two</s>"}
