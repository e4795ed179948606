"""`shards lint`: everything that the stream would refuse is named beforehand, with its key."""

from __future__ import annotations

import faulthandler
import io
import json
import os
import signal
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image

from vlm_adapt import cli
from vlm_adapt.data import lint as lint_module
from vlm_adapt.data import watched
from vlm_adapt.data.lint import Lint, lint, open_sets
from vlm_adapt.data.shards import ShardSet


def words(**record: Any) -> bytes:
    return json.dumps(record).encode()


def png(array: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


JPEG = tiny.image(0, 32, 24, "JPEG")
CAPTION = words(caption="a red square")
LABELLED = words(caption="x", labels=["road", "sky"])
ASKED = {"role": "user", "content": "what is it?"}
ANSWER = {"role": "assistant", "content": "red"}
HEADER = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
DOT = png(np.zeros((1, 1), np.uint8))
BOMB = DOT[:12] + HEADER + struct.pack(">I", zlib.crc32(HEADER)) + DOT[33:]  # says 30,000 x 30,000
# key -> members, and what is said of it; "" is clean
CASES: dict[str, tuple[dict[str, bytes], str]] = {
    "good": ({"jpg": JPEG, "json": CAPTION}, ""),
    "masked": ({"jpg": JPEG, "json": LABELLED, "mask.png": png(np.eye(24, 32, dtype=np.uint8))}, ""),
    "cut": ({"jpg": JPEG[:-80], "json": CAPTION}, "damaged JPEG image"),
    "second": ({"0.jpg": JPEG, "1.jpg": JPEG[:-80], "json": CAPTION}, "damaged JPEG image"),
    "text": ({"jpg": b"hello", "json": CAPTION}, "not an image"),
    "none": ({"jpg": b"", "json": CAPTION}, "empty image file"),
    "bomb": ({"png": BOMB, "json": CAPTION}, "image too large"),
    "silent": ({"jpg": JPEG, "json": words(question="q?", answer=" ")}, "empty answer"),
    "wordless": ({"jpg": JPEG, "json": words(caption="")}, "empty caption"),
    "bare": ({"jpg": JPEG}, "no json member"),
    "broken": ({"jpg": JPEG, "json": b"{"}, "json cannot be read"),
    "unshown": (
        {"jpg": JPEG, "json": words(messages=[ASKED, ANSWER])},
        "messages or images do not fit together",
    ),
    "unseen": (
        {"json": words(messages=[ASKED | {"content": "<image>"}, ANSWER])},
        "messages or images do not fit together",
    ),
    "small": (
        {"jpg": JPEG, "json": LABELLED, "mask.png": png(np.zeros((12, 32), np.uint8))},
        "mask and image differ in size",
    ),
    "value": (
        {"jpg": JPEG, "json": LABELLED, "mask.png": png(np.full((24, 32), 9, np.uint8))},
        "mask has a value without a label",
    ),
    "half": (
        {"jpg": JPEG, "json": CAPTION, "mask.0.png": png(np.zeros((24, 32), np.uint8))[:50]},
        "damaged mask",
    ),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lint")
    tiny.shard(folder / "0.tar", [(key, members) for key, (members, _) in CASES.items()])
    tiny.shard(folder / "1.tar", [("good", CASES["good"][0] | {"cls": b"1"}), ("twice", CASES["good"][0])])
    tiny.shard(folder / "2.tar", [("twins", {"jpg": JPEG, "json": CAPTION})] * 2)
    whole = (folder / "0.tar").read_bytes()
    (folder / "3.tar").write_bytes(whole[:1900])
    (folder / "4.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    return folder


def found_in(folder: Path | str, workers: int = 0, **more: Any) -> Lint:
    return lint(*open_sets(folder), workers=workers, **more)


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_wrong_is_named(bad: Path, workers: int) -> None:
    found = found_in(bad, workers)
    assert found.complete and found.checked == found.samples == 18
    first = {one.key: one.reason for one in found.findings if one.shard.endswith("0.tar")}
    assert first == {key: reason for key, (_, reason) in CASES.items() if reason}
    rest = [(Path(one.shard).name, one.key, one.reason) for one in found.findings if "0.tar" not in one.shard]
    assert ("1.tar", "good", "another sample has this key") in rest
    assert any(shard == "2.tar" and key == "twins" and "two members" in reason for shard, key, reason in rest)
    assert any(shard == "4.tar" for shard, _, _ in rest)  # compressed, and not even that
    assert any(shard == "3.tar" and "cut off" in reason for shard, _, reason in rest)
    assert found.unread == {"cls": 1}
    second = next(one for one in found.findings if one.key == "second")
    assert second.detail.startswith("image 1")
    json.dumps(found.to_dict())


def test_lint_agrees_with_the_stream(bad: Path) -> None:
    """What the reader refuses is what lint finds, masks and double keys aside (the stream reads those)."""
    found = {one.key for one in found_in(bad / "0.tar").findings}
    shards = ShardSet(bad / "0.tar")
    refused = set()
    for number in range(len(shards)):
        key, members = shards.read(number)
        try:
            sample = lint_module.parse_sample(key, members)
            for data in sample.images:
                lint_module.decode(data)
        except lint_module.BadSample:
            refused.add(key)
    assert refused <= found
    assert found - refused == {"unshown", "unseen", "small", "value", "half"}


def test_flipped_bytes_never_stop_it(tmp_path: Path) -> None:
    shard = tiny.questions_shard(tmp_path / "a.tar", 6)
    whole = bytearray(shard.read_bytes())
    generator = np.random.default_rng(0)
    for _ in range(40):
        flipped = whole.copy()
        for place in generator.integers(0, len(whole), 20):
            flipped[place] ^= 1 << int(generator.integers(8))
        shard.write_bytes(flipped)
        found = found_in(shard)
        named = {one.key for one in found.findings}
        assert found.complete and (found.checked == 6 or found.findings), named


def dies(number: int) -> int:
    if number == 5:
        faulthandler.disable()  # pytest's would print where we are
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 40:
        os._exit(7)
    if number == 70:
        time.sleep(60)
    return number


def test_a_process_that_dies_or_hangs_is_one_result() -> None:
    results = dict(watched.each(dies, 100, workers=2, patience=1.0))
    assert sorted(results) == list(range(100))
    lost = {number: one.why for number, one in results.items() if isinstance(one, watched.Death)}
    assert set(lost) == {5, 40, 70}
    assert "SIGSEGV" in lost[5] and "code 7" in lost[40] and "more than 1 s" in lost[70]
    assert all(results[number] == number for number in results if number not in lost)


def fails(number: int) -> int:
    raise ZeroDivisionError(str(number))


def test_a_mistake_of_ours_is_raised() -> None:
    with pytest.raises(ZeroDivisionError, match="0"):
        list(watched.each(fails, 3, workers=1))


def test_the_sample_that_kills_its_decoder_is_named(bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = lint_module.decode
    kill = CASES["none"][0]["jpg"]

    def deadly(data: bytes, *rest: Any) -> Any:
        if data == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(data, *rest)

    monkeypatch.setattr(lint_module, "decode", deadly)
    found = found_in(bad / "0.tar", workers=1)
    assert found.complete and found.checked == len(CASES)
    dead = [one for one in found.findings if "ends the process" in one.reason]
    assert [(Path(one.shard).name, one.key) for one in dead] == [("0.tar", "none")]
    assert {one.key for one in found.findings} == {key for key, (_, reason) in CASES.items() if reason}


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_leaves_a_partial_result(bad: Path, workers: int) -> None:
    def stop(done: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    found = found_in(bad / "0.tar", workers, tick=stop)
    assert not found.complete and found.checked == 8
    assert found.findings and found.to_dict()["complete"] is False


def test_an_unexpected_error_is_a_finding(bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(key: str, members: Any) -> Any:
        raise TypeError("unhashable")

    monkeypatch.setattr(lint_module, "parse_sample", odd)
    found = found_in(bad / "1.tar")
    assert {(one.reason, one.detail) for one in found.findings} == {
        ("the reader fails on it", "TypeError: unhashable")
    }


def test_the_verb_tells_by_its_exit_code(bad: Path, tmp_path: Path, capsys: Any) -> None:
    clean = tiny.questions_shard(tmp_path / "clean.tar", 3)
    assert cli.main(["shards", "lint", str(clean), "--workers", "1"]) == 0
    assert "3 samples in 1 shard(s): no problem" in capsys.readouterr().out
    output = tmp_path / "deep" / "report.json"
    assert cli.main(["shards", "lint", str(bad), "--workers", "0", "--output", str(output)]) == 1
    out = capsys.readouterr().out
    assert "problem: 2 x damaged JPEG image: cut in " in out and "not read: 1 x .cls" in out
    report = json.loads(output.read_text())
    assert report["complete"] and report["reasons"]["damaged JPEG image"] == 2
    assert {"shard", "key", "reason", "detail"} == set(report["problems"][0])
    assert cli.main(["shards", "lint", str(tmp_path / "gone.tar")]) == 2


def test_an_interrupted_verb_says_partial(bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def stopped(*some: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(lint_module, "each", stopped)
    assert cli.main(["shards", "lint", str(bad)]) == 130
    assert "PARTIAL, stopped after 0 of 18 samples" in capsys.readouterr().out


def test_with_a_run_it_knows_lengths(tmp_path: Path, capsys: Any) -> None:
    tree = tiny.run_tree(tmp_path, model__language__max_length=64)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    many = [{"question": "what color is the shape?", "answer": "red"}] * 9
    samples = [
        ("long", {"png": tiny.image(1), "json": words(caption="red " * 100)}),
        ("many", {"png": tiny.image(2), "json": words(questions=many)}),
        ("fine", {"png": tiny.image(3), "json": words(questions=many[:1])}),
    ]
    shard = tiny.shard(tmp_path / "x.tar", samples)
    assert cli.main(["shards", "lint", str(shard), "--workers", "0"]) == 0
    capsys.readouterr()
    words_ = ["shards", "lint", str(shard), "--workers", "1", "--config", str(tmp_path / "run.yaml")]
    assert cli.main(words_) == 1
    out = capsys.readouterr().out
    assert "problem: 1 x one turn alone is too long: long in" in out and "max_length 64" in out
    assert "truncated: 1 x longer than max_length: many in" in out
    assert "fine" not in out
