"""Text of a reply, token by token, is the text of all its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as some

from vlm_adapt.chat.words import PATIENCE, UNFINISHED, Words


def sentencepiece() -> Any:
    """A tokenizer that writes spaces as SentencePiece does and unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁red", "▁a", "re", "d", "a", "▁circle"]
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)] + [(word, -2.0) for word in words]
    raw = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return {"bytes": tiny.tokenizer(folder), "sentencepiece": sentencepiece()}


def stream(words: Words, ids: list[int]) -> list[str]:
    return [words.add(token) for token in ids] + [words.finish()]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@settings(deadline=None, max_examples=150)
@given(text=some.text(some.characters(codec="utf-8", exclude_characters=UNFINISHED), max_size=24))
def test_pieces_join_to_the_decoded_whole(tokenizers: dict[str, Any], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    words = Words(tokenizer)
    pieces = stream(words, ids)
    assert "".join(pieces) == words.text == whole
    assert UNFINISHED not in "".join(pieces) or UNFINISHED in whole


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_character_of_several_tokens_comes_out_whole(tokenizers: dict[str, Any], kind: str) -> None:
    ids = tokenizers[kind].encode("a 🦜 red", add_special_tokens=False)
    pieces = stream(Words(tokenizers[kind]), ids)
    assert [piece for piece in pieces if "🦜" in piece] != []
    assert not any(UNFINISHED in piece for piece in pieces)


def test_spaces_between_words_stay(tokenizers: dict[str, Any]) -> None:
    ids = tokenizers["sentencepiece"].encode("red circle a red", add_special_tokens=False)
    assert stream(Words(tokenizers["sentencepiece"]), ids)[:4] == ["red", " circle", " a", " red"]


def test_broken_bytes_are_not_held_for_ever(tokenizers: dict[str, Any]) -> None:
    start = tokenizers["bytes"].encode("é", add_special_tokens=False)[0]
    words = Words(tokenizers["bytes"])
    pieces = [words.add(start) for _ in range(3 * PATIENCE)]
    assert any(pieces)


def test_lead_is_dropped_and_stop_text_ends_the_reply(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bytes"]
    words = Words(tokenizer, lead=" ", stop="##END")
    pieces = stream(words, tokenizer.encode(" red ##E ##END green", add_special_tokens=False))
    assert "".join(pieces) == words.text == "red ##E "
    assert words.stopped


def test_an_unfinished_stop_text_is_text(tokenizers: dict[str, Any]) -> None:
    words = Words(tokenizers["bytes"], stop="##END")
    stream(words, tokenizers["bytes"].encode("red ##E", add_special_tokens=False))
    assert words.text == "red ##E" and not words.stopped
