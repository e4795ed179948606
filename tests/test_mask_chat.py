"""Replies with masks: a file beside the image, a picture in the terminal where it can, never garbage."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path
from typing import Any

import asking
import numpy as np
import pytest
import torch
from PIL import Image

from vlm_adapt.chat import inline, shown
from vlm_adapt.chat.masks import PALETTE, ReplyMask, overlay, write
from vlm_adapt.chat.session import Session
from vlm_adapt.chat.shown import check_mode, show_masks
from vlm_adapt.chat.terminal import Terminal, answer_once
from vlm_adapt.config.load import validate
from vlm_adapt.errors import UserError
from vlm_adapt.language.language import Generation
from vlm_adapt.models.build import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chat")
    asking.run_tree(made)
    return made


@pytest.fixture
def session(folder: Path, tmp_path: Path) -> Session:
    """A session whose model begins every reply with its mask token."""
    run = validate(asking.run_tree(folder), "x")
    assembled = build(run.model, torch.float32, 0)
    made = Session(assembled, settings=Generation(max_new_tokens=3))

    def always(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits, logits.new_full((*logits.shape[:-1], 1), 1e4)], -1)

    assembled.model.masks.row.score = always
    (tmp_path / "photo.png").write_bytes(asking.png(asking.picture(1, 40)[0]))
    return made


def test_a_reply_carries_masks_of_its_image(session: Session, tmp_path: Path) -> None:
    reply = "".join(session.ask("where is red?", [tmp_path / "photo.png"]))
    assert reply == "<seg>" * 3 and len(session.masks) == 3
    for mask in session.masks:
        assert mask.image == str(tmp_path / "photo.png")
        assert mask.mask_HW.shape == (40, 40) and mask.mask_HW.dtype == bool
    (tmp_path / "other.png").write_bytes(asking.png(asking.picture(2, 20)[0][:, :10]))
    list(session.ask("and here?", [tmp_path / "other.png"]))  # a second turn: its masks are of its image
    assert [mask.mask_HW.shape for mask in session.masks] == [(20, 10)] * 3
    list(session.ask("once more"))
    assert session.masks[0].image.endswith("other.png")
    session.reset()
    assert session.masks == []
    list(session.ask("without an image"))
    assert session.masks == [] and any("no image" in note for note in session.notes)


def test_one_question_writes_an_overlay(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_once(session, "where is red?", [str(tmp_path / "photo.png")])
    out, err = capsys.readouterr()
    assert out == "<seg><seg><seg>\n"  # a pipe: not a byte more
    name = re.search(r"\S+photo-mask-1\.png", err)
    assert name and Image.open(name[0]).size == (40, 40)
    answer_once(session, "where is red?", [str(tmp_path / "photo.png")], "off")
    assert not (tmp_path / "photo-mask-2.png").exists()
    terminal = Terminal(session)
    terminal.line("/mask file")
    terminal.line(f"/image {tmp_path / 'photo.png'}")
    terminal.line("where?")
    assert (tmp_path / "photo-mask-2.png").exists()  # never over another
    terminal.line("/mask off")
    terminal.line("where?")
    assert not (tmp_path / "photo-mask-3.png").exists()
    with pytest.raises(UserError, match="show, blocks, file, off"):
        check_mode("inlin")


def test_an_overlay_colours_the_mask_and_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.full((60, 80, 3), 100, np.uint8)
    (tmp_path / "grey.png").write_bytes(asking.png(pixels))
    inside = np.zeros((60, 80), bool)
    inside[10:50, 20:60] = True
    file = str(tmp_path / "grey.png")
    made = np.asarray(overlay([ReplyMask(file, inside)]))
    assert (made[0, 0] == 100).all() and (made[55, 75] == 100).all()
    towards = np.array(PALETTE[0]) - 100
    assert (np.sign(made[30, 40].astype(int) - 100) == np.sign(towards)).all()
    with pytest.raises(UserError, match="another size"):
        overlay([ReplyMask(file, inside[:-1])])
    (tmp_path / "grey.png").unlink()
    with pytest.raises(UserError, match="no longer be read"):
        overlay([ReplyMask(file, inside)])
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGB", (2, 2))
    assert write(picture, str(tmp_path / "nowhere" / "x.png")) == tmp_path / "x-mask-1.png"
    monkeypatch.setattr(Path, "cwd", lambda: tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither to"):
        write(picture, str(tmp_path / "nowhere" / "x.png"))


PICTURE = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None], 13, 0)).convert("RGB")


def test_kitty_gets_a_png_in_pieces() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
    text = inline.show(Image.fromarray(noise), "kitty")
    commands = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", text)
    assert len(commands) > 2 and "".join(f"\033_G{k};{v}\033\\" for k, v in commands) + "\n" == text
    assert all(len(data) <= 4096 for _, data in commands)
    assert [keys.rpartition("m=")[2] for keys, _ in commands] == ["1"] * (len(commands) - 1) + ["0"]
    assert commands[0][0].startswith("a=T,f=100,q=2,")
    sent = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in commands))))
    np.testing.assert_array_equal(np.asarray(sent), noise)


def test_iterm2_gets_a_file() -> None:
    text = inline.show(PICTURE, "iterm2")
    found = re.fullmatch(r"\033\]1337;File=inline=1;size=(\d+);[^:]*:([^\a]*)\a\n", text)
    assert found is not None
    data = base64.b64decode(found[2])
    assert len(data) == int(found[1]) and Image.open(io.BytesIO(data)).size == PICTURE.size


def test_sixels_say_every_pixel() -> None:
    """Read back by a small reader of the format: every pixel once, in its colour to within a percent."""
    text = inline.show(PICTURE, "sixel")
    head, body = re.fullmatch(r'\033Pq"1;1;24;13((?:#\d+;2;\d+;\d+;\d+)+)(.*)\033\\\n', text, re.S).groups()  # type: ignore[union-attr]
    colours = {int(n): np.array([int(v) for v in (r, g, b)]) for n, r, g, b in
               re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", head)}  # fmt: skip
    drawn = np.full((18, 24, 3), -1)
    for band, lines in enumerate(body.split("-")[:-1]):
        for line in lines.split("$"):
            number, cells = re.fullmatch(r"#(\d+)(.*)", line).groups()  # type: ignore[union-attr]
            signs = re.sub(r"!(\d+)(.)", lambda found: found[2] * int(found[1]), cells)
            assert len(signs) == 24
            for column, sign in enumerate(signs):
                for bit in range(6):
                    if (ord(sign) - 63) >> bit & 1:
                        assert (drawn[band * 6 + bit, column] == -1).all()
                        drawn[band * 6 + bit, column] = colours[int(number)]
    assert (drawn[13:] == -1).all()
    assert np.abs(drawn[:13] - np.asarray(PICTURE) / 2.55).max() <= 1.5


def test_blocks_are_two_pixels_a_character() -> None:
    text = inline.show(PICTURE, "blocks")
    lines = text.rstrip("\n").split("\n")
    assert all(line.endswith("\033[0m") and line.count("▀") == lines[0].count("▀") for line in lines)


@pytest.mark.parametrize(
    ("environment", "terminal", "wanted"),
    [
        ({"TERM": "xterm-kitty"}, True, "kitty"),
        ({"TERM": "xterm-ghostty"}, True, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, True, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, True, "iterm2"),
        ({"TERM": "xterm-256color"}, True, None),
        ({"TERM": "xterm-kitty"}, False, None),  # a pipe or a file
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, True, None),
        ({"KITTY_WINDOW_ID": "1"}, True, None),
        ({"TERM": "screen", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, True, None),
    ],
)
def test_only_what_says_that_it_can_is_sent_pictures(
    environment: dict[str, str], terminal: bool, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", type("Out", (io.StringIO,), {"isatty": lambda _: terminal})())
    assert inline.detect(environment, ask=False) == wanted
    assert sys.stdout.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(__import__("os"), "openpty"), reason="needs a pseudo terminal")
@pytest.mark.parametrize(
    ("reply", "wanted"), [(b"\033[?62;4;22c", "sixel"), (b"\033[?62;22c", None), (b"", None)]
)
def test_a_terminal_is_asked_what_it_is(
    reply: bytes, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers on its other side; one that keeps silent is not waited for."""
    import os

    ours, theirs = os.openpty()
    with os.fdopen(theirs, "r+b", buffering=0) as device:
        text_in = io.TextIOWrapper(device)
        written: list[str] = []

        class Out(io.StringIO):
            def isatty(self) -> bool:
                return True

            def write(self, text: str) -> int:
                written.append(text)
                os.write(ours, reply)
                return len(text)

        monkeypatch.setattr(sys, "stdin", text_in)
        monkeypatch.setattr(sys, "stdout", Out())
        inline.asked.cache_clear()
        assert inline.detect({"TERM": "xterm-256color"}) == wanted
        assert inline.detect({"TERM": "xterm-256color"}) == wanted  # it is asked once
        inline.asked.cache_clear()
        assert "".join(written) == "\033[c"
        text_in.detach()
    os.close(ours)


def test_a_terminal_that_can_is_shown_the_picture(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(session.ask("where is red?", [tmp_path / "photo.png"]))
    monkeypatch.setattr(inline, "detect", lambda: "kitty")
    (said,) = show_masks(session, "show")
    assert "\033_G" in capsys.readouterr().out and "3 masks of" in said
    monkeypatch.setattr(shown.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    list(show_masks(session, "blocks"))
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("TERM", "xterm")
    list(show_masks(session, "blocks"))
    assert "▀" in capsys.readouterr().out


def test_a_model_without_masks_says_nothing_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    plain: Any = type("Session", (), {"masks": [], "max_pixels": 1})()
    assert list(show_masks(plain, "show")) == [] and capsys.readouterr().out == ""
