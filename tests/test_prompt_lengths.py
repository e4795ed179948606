"""Texts with learned vectors are as long everywhere: measured, packed, shown, trained on, talked about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny
import tiny_chat
import torch
from test_prompt_road import PLANS, PROMPT, adapted
from test_show import text_of

from vlm_adapt.chat.session import Session
from vlm_adapt.config.load import validate
from vlm_adapt.data.problems import Account
from vlm_adapt.errors import UserError
from vlm_adapt.language.language import Generation
from vlm_adapt.models.build import build
from vlm_adapt.models.restore import restore
from vlm_adapt.report.feed import open_feed
from vlm_adapt.sentence import Sentence, Text
from vlm_adapt.train.feed import build_feed

torch.set_num_threads(1)


def test_as_much_is_learned(tmp_path: Path) -> None:
    """The same targets with and without, also where the first token of all is learned."""
    base = rows.assemble(tiny.vit(tmp_path / "vit"), tiny.llama(tmp_path / "llama"))
    ours = adapted(tmp_path, "llama", PLANS["both"])
    sentence = Sentence((Text("a photo of cats", learned=True),))
    rows_of = [one.encoder.encode(sentence, 0, "k") for one in (base, ours)]
    assert rows_of[0].targets.tolist() == rows_of[1].targets.tolist()
    assert (rows_of[0].predict_from + 5).tolist() == rows_of[1].predict_from.tolist()
    assert rows_of[1].plain and len(rows_of[1]) == len(rows_of[0]) + 5


def run_of(folder: Path, plan: list[dict[str, Any]], **changes: Any) -> Any:
    return validate(tiny.run_tree(folder, **({"adapt": plan} | changes)), "x")


def test_lengths_agree_everywhere(tmp_path: Path) -> None:
    """What is measured, packed, shown without weights and trained on is as long."""
    run = run_of(tmp_path, PLANS["both"], data__batching="packed", model__language__max_length=96)
    shown = open_feed(run, [str(tmp_path / "train.tar")])
    ours = build(run.model, torch.float32)
    ours.adapt([run.adapt])
    feed = build_feed(ours, run, run, 0)
    assert shown.reader.encoder.prompt_tokens == ours.encoder.prompt_tokens == 5
    bare = build(run.model, torch.float32).reader(run.data.train, run.seed, run.data)
    for number in range(4):
        lengths = feed.reader.measure(number, 0, number)
        account = Account()
        assert lengths == [len(row) for row in feed.reader.training(number, 0, number, account)]
        assert lengths == feed.reader.twin().measure(number, 0, number)
        assert lengths == [len(row) for row in shown.reader.training(number, 0, number, account)]
        assert lengths == [length + 5 + 2 for length in bare.measure(number, 0, number)]
    assert "<5 learned vectors>" in text_of(shown, shown.reader.key(0))
    batch = rows.batch(ours, [feed.reader.training(0, 0, 0, Account())])
    assert batch.prompt_positions_DP.shape[1] == 5


def test_too_many_places_are_told_without_weights(tmp_path: Path) -> None:
    run = run_of(tmp_path, [PROMPT | {"num_virtual_tokens": 40}], model__language__max_length=40)
    with pytest.raises(UserError) as caught:
        open_feed(run, [str(tmp_path / "train.tar")])
    assert "prompts take 40 places in every text, of 40 tokens at most" in tiny.sentence(caught)


@pytest.mark.parametrize("plan", ["projected", "both"])
def test_chat_restores_and_talks(tmp_path: Path, plan: str) -> None:
    """A checkpoint's vectors are read again, and a session's prompts have their places."""
    folder = tiny_chat.checkpoint(tmp_path, adapt=PLANS[plan])
    ours, _, made = restore(folder)
    torch.manual_seed(7)
    state = json.loads((made / "state.json").read_text(encoding="utf-8"))
    for item in ours.plan.attached:
        values = {key: torch.randn_like(p) for key, p in item.method.parameters.items()}
        item.method.save(made / item.label, values)
        state["labels"].append(item.label)
    (made / "state.json").write_text(json.dumps(state), encoding="utf-8")
    session = Session.open(folder, settings=Generation(max_new_tokens=6))
    picture = tiny_chat.picture(tmp_path / "a.png")
    reply = "".join(session.ask("what color is it?", [picture]))
    assert session.speed is not None and session.speed.tokens
    words = session.assembled
    row, _ = session.history.prompt(6)
    assert row.prompt_tokens == words.encoder.prompt_tokens
    again = Session.open(folder, settings=Generation(max_new_tokens=6))
    assert "".join(again.ask("what color is it?", [picture])) == reply
    # Other vectors say other things: what was read is what is used.
    for item in again.assembled.plan.attached:
        for parameter in item.method.parameters.values():
            parameter.data.normal_(0, 3)
    one, two = (rows.batch(s.assembled, [row]) for s in (session, again))
    row.pixels = session.history.turns[-1].pixels
    assert (session.assembled.model.logits(one) - again.assembled.model.logits(two)).abs().max() > 1e-3
