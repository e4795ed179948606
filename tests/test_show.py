"""`shards show`: every token of a row is told once, with what is learned, for every kind of language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from vlm_adapt import cli
from vlm_adapt.config.load import validate
from vlm_adapt.data.problems import Account
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import build
from vlm_adapt.report.feed import Feed, open_feed
from vlm_adapt.report.show import find, show
from vlm_adapt.report.tokens import learned_places, parts, piece_text
from vlm_adapt.sentence import Sentence, Text

TALK = [
    {"role": "user", "content": "<image>\nwhat color is it? <image> and this?"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "is it a circle?"},
    {"role": "assistant", "content": "yes, a red circle"},
]


def words(**record: Any) -> bytes:
    return json.dumps(record).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    tiny.run_tree(folder)
    tiny.t5(folder / "t5")
    many = [{"question": f"what color is shape {n}?", "answer": "red"} for n in range(4)]
    samples = [
        ("talk", {"0.png": tiny.image(0), "1.png": tiny.image(1), "json": words(messages=TALK)}),
        ("many", {"png": tiny.image(2), "json": words(questions=many, id=7)}),
        ("plain", {"json": words(question="is red a color?", answer="yes")}),
        ("long", {"png": tiny.image(3), "json": words(caption="red " * 600)}),
        ("torn", {"png": tiny.image(4)[:60], "json": words(caption="red")}),
        ("bad", {"png": tiny.image(4), "json": b"["}),
    ]
    tiny.shard(folder / "some.tar", samples)
    return folder


def feed_of(folder: Path, **changes: Any) -> Feed:
    return open_feed(validate(tiny.run_tree(folder, **changes), "x"), [str(folder / "some.tar")])


def text_of(feed: Feed, key: str, **more: Any) -> str:
    number = find(feed.reader.sets[0], key)[0]
    return "\n".join(line.plain for line in show(feed, number, **more))


KINDS = {
    "causal": {},
    "prefix": {"model__language__prefix_lm": True},
    "seq2seq": "t5",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_and_every_target_is_told_once(folder: Path, kind: str) -> None:
    changes: Any = KINDS[kind]
    feed = feed_of(folder, **({"model__language__model": str(folder / "t5")} if changes == "t5" else changes))
    seen = 0
    for number in range(3):
        for row in feed.reader.training(number, 0, number, Account()):
            found = parts(row, feed.assembled.tokenizer)
            read = [part for part in found if part.how != "decoder"]
            assert sum(part.tokens for part in read) == len(row)
            assert sum(part.learned for part in found) == len(row.targets) > 0
            learned = [piece.id for part in found for piece in part.pieces if piece.learned]
            assert sorted(learned) == sorted(row.targets.tolist())
            assert {part.how for part in found} == {
                "causal": {"causal"},
                "prefix": {"both ways", "causal"},
                "seq2seq": {"both ways", "decoder"},
            }[kind]
            seen += 1
    assert seen >= 3


def test_what_is_learned_is_the_answers_and_their_end(folder: Path) -> None:
    feed = feed_of(folder)
    row = feed.reader.training(0, 0, 0, Account())[0]
    ids = [int(row.ids[place]) for place in sorted(learned_places(row))]
    assert feed.assembled.tokenizer.decode(ids) == "red<|im_end|>yes, a red circle<|im_end|>"


def test_a_row_in_words(folder: Path) -> None:
    feed = feed_of(folder)
    text = text_of(feed, "talk")
    per_image = feed.assembled.encoder.tokens_per_image
    assert "image 0: 24 x 20 in the file -> 16 x 16 for the tower (squash), 4 tokens" in text
    assert text.count(f"<image 0: {per_image} tokens>") == text.count(f"<image 1: {per_image} tokens>") == 1
    assert '"role": "assistant"' in text and "the run does not name these shards" in text
    end = feed.assembled.tokenizer.eos_token_id
    assert f"«<|im_end|>·{end}»" in text and "«red" in text
    assert "prefix of all branches" not in text and "branch" not in text.partition("row 1")[2]
    many = text_of(feed, "many")
    assert "prefix of all branches, positions 0 to" in many
    first = [line.split(",")[1] for line in many.splitlines() if line.startswith("  branch ")]
    assert len(first) == 4 and len({one.split()[1] for one in first}) == 1  # all go on after the prefix
    assert "1 row(s)" in many
    several = feed_of(folder, model__language__prefix_lm=True)
    assert "row 4 of 4" in text_of(several, "many")


def test_colour_takes_the_place_of_marks(folder: Path) -> None:
    feed = feed_of(folder)
    number = find(feed.reader.sets[0], "plain")[0]
    lines = list(show(feed, number, colour=True))
    assert not any("«" in line.plain for line in lines)
    green = [
        line.plain[span.start : span.end] for line in lines for span in line.spans if "green" in span.style
    ]
    assert green == ["yes", "<|im_end|>", "learned"]


def test_what_was_cut_is_shown(folder: Path) -> None:
    whole = feed_of(folder).reader.training(1, 0, 1, Account())[0]
    limit = len(whole) - 5
    feed = feed_of(folder, model__language__max_length=limit)
    text = text_of(feed, "many")
    assert f"CUT: 1 turns or questions left out, max_length is {limit}" in text
    left = text.partition("left out, ")[2]
    assert "branch 4" in left and "branch 3" not in left
    assert feed.reader.encoder.max_length == limit  # put back


def test_refused_samples_say_why(folder: Path) -> None:
    feed = feed_of(folder)
    assert "REFUSED: one turn alone is too long" not in text_of(feed, "many")
    short = feed_of(folder, model__language__max_length=40)
    text = text_of(short, "long")
    assert "REFUSED: one turn alone is too long" in text and "if it were not refused" in text
    assert "REFUSED: damaged" in text_of(feed, "torn")
    assert "REFUSED: json cannot be read" in text_of(feed, "bad")


def test_keys_and_numbers(folder: Path, tmp_path: Path) -> None:
    shards = ShardSet(folder / "some.tar")
    assert find(shards, "many") == find(shards, "#1") == [1]
    with pytest.raises(UserError, match="no sample has the key 'mani', the nearest is 'many'"):
        find(shards, "mani")
    with pytest.raises(UserError, match="numbered from #0 to #5"):
        find(shards, "#6")
    two = tiny.shard(tmp_path / "two.tar", [("many", {"json": b"{}"}), ("twin", {"json": b"{}"})])
    assert find(ShardSet([folder / "some.tar", two]), "many") == [1, 6]
    torn = tiny.shard(tmp_path / "torn.tar", [("twin", {"json": b"{}"})] * 2 + [("one", {"json": b"{}"})])
    with pytest.raises(UserError, match="sample 'twin' cannot be read"):
        find(ShardSet(torn), "twin")


def test_no_weight_is_loaded_and_the_rows_are_the_runs(folder: Path) -> None:
    run = validate(tiny.run_tree(folder), "x")
    feed = feed_of(folder)
    assert all(parameter.is_meta for parameter in feed.assembled.model.parameters())
    import torch

    loaded = build(run.model, torch.float32).reader([feed.source], run.seed, run.data)
    for number in range(3):
        mine = feed.reader.training(number, 2, number, Account())
        theirs = loaded.training(number, 2, number, Account())
        assert [row.ids.tolist() for row in mine] == [row.ids.tolist() for row in theirs]
        assert [[p.tolist() for p in row.pixels] for row in mine] == [
            [p.tolist() for p in row.pixels] for row in theirs
        ]


def test_a_runs_own_source_phrases_it(folder: Path) -> None:
    source = {"shards": str(folder / "some.tar"), "questions_per_image": 1, "prompt": "say:", "limit": 1}
    feed = feed_of(folder, data__train=[source])
    assert feed.named and feed.source.prompt == "say:" and len(feed.reader) == 6  # its limit does not count
    assert len(feed.reader.training(1, 0, 1, Account())[0].targets) < 6


def test_pieces_show_what_cannot_be_seen(folder: Path) -> None:
    tokenizer = feed_of(folder).assembled.tokenizer
    assert piece_text(tokenizer, tokenizer.encode("\n")[0]) == "\\n"
    assert piece_text(tokenizer, tokenizer.encode(" red")[0]).startswith("␣")
    first = tokenizer.encode("é")[0]  # two bytes, two tokens
    assert "\ufffd" not in piece_text(tokenizer, first)


def test_the_verb(folder: Path, capsys: Any) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny.run_tree(folder)), encoding="utf-8")
    some = str(folder / "some.tar")
    assert cli.main(["shards", "show", "plain", some, "--config", str(folder / "run.yaml")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("plain  (#2 of 6") and "«yes" in out
    assert cli.main(["shards", "show", "plan", some, "--config", str(folder / "run.yaml")]) == 2
    assert "the nearest is 'plain'" in capsys.readouterr().err
    assert cli.main(["shards", "show", "plain", some]) == 2


def test_an_answer_may_open_its_branch(folder: Path) -> None:
    """Its first token is predicted by the last of the prefix, as is that of every other branch."""
    answers = (Text("red", learned=True, branch=1), Text("red", learned=True, branch=2))
    row = feed_of(folder).reader.encoder.encode(Sentence((Text("what color"), *answers)), 0, "k")
    assert learned_places(row) == {place for place, branch in enumerate(row.branches) if branch > 0}
