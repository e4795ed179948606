"""The conversation loop: commands, mistakes and Ctrl-C, on a session that only echoes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_adapt.chat import terminal
from vlm_adapt.chat.terminal import Terminal, answer_once
from vlm_adapt.errors import UserError


class Echo:
    """Answers with the question, a word a piece; `interrupt` presses Ctrl-C after the first word."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.notes: list[str] = []
        self.speed = None
        self.masks: list[Any] = []
        self.interrupt = False
        self.closed = False
        self.history = type("History", (), {"turns": [], "system": None})()
        self.settings = type("Settings", (), {"temperature": 0.0})()

    def load_image(self, file: str) -> None:
        if not Path(file).exists():
            raise UserError(f"there is no image '{file}'")

    def ask(self, text: str, images: Any = ()) -> Iterator[str]:
        self.asked.append((text, list(images)))
        self.history.turns.append(text)
        return self.reply(text)

    def reply(self, text: str) -> Iterator[str]:
        try:
            for word in text.split(" "):
                yield word + " "
                if self.interrupt:
                    raise KeyboardInterrupt
        finally:
            self.closed = True

    def reset(self) -> None:
        self.history.turns.clear()

    def transcript(self) -> dict[str, Any]:
        return {"id": "chat", "images": [], "messages": []}


@pytest.fixture
def session() -> Echo:
    return Echo()


@pytest.fixture
def talk(session: Echo, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a conversation of lines; an exception class among them is raised in place of a line."""

    def run(*lines: Any, images: Any = ()) -> Terminal:
        coming = iter([*lines, EOFError])

        def read(prompt: str = "") -> str:
            line = next(coming)
            if isinstance(line, type):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        loop = Terminal(session, images)  # type: ignore[arg-type]
        loop.run()
        loop.left = len(list(coming))  # type: ignore[attr-defined]
        return loop

    return run


def test_replies_go_to_stdout_and_everything_else_does_not(talk: Any, session: Echo, capsys: Any) -> None:
    session.notes = ["a note"]
    talk("one two", "", "/help", "/nonsense")
    seen = capsys.readouterr()
    assert seen.out == "one two \n"
    for words in ("a note", "/image FILE", "there is no command '/nonsense'"):
        assert words in seen.err


def test_images_go_with_the_next_question_only(talk: Any, session: Echo, tmp_path: Path, capsys: Any) -> None:
    for name in ("a.png", "b c.png"):
        (tmp_path / name).touch()
    first, second = f"{tmp_path}/a.png", f"{tmp_path}/b c.png"
    talk(
        f"/image {first} '{second}'",
        "what?",
        "and?",
        "/image no.png",
        "/image 'x",
        "/image",
        images=["start.png"],
    )
    assert session.asked == [("what?", ["start.png", first, second]), ("and?", [])]
    errors = capsys.readouterr().err
    assert "no image 'no.png'" in errors and "quotation mark" in errors and "needs one or more" in errors


def test_a_refused_question_keeps_the_images(talk: Any, session: Echo, capsys: Any) -> None:
    def refuse(text: str, images: Any = ()) -> Any:
        raise UserError("placeholders differ")

    session.ask = refuse  # type: ignore[method-assign]
    loop = talk("what <image>?", images=["a.png"])
    assert loop.images == ["a.png"] and "placeholders differ" in capsys.readouterr().err


def test_settings(talk: Any, session: Echo, capsys: Any) -> None:
    talk("/temperature 0.7", "/temperature hot", "/temperature -1", "/temperature nan", "/system be brief")
    assert session.settings.temperature == 0.7 and session.history.system == "be brief"
    assert capsys.readouterr().err.count("needs a number") == 3
    talk("/system", "hello", "/reset")
    assert session.history.system is None and session.history.turns == []


def test_ctrl_c_stops_a_reply_and_a_second_one_leaves(talk: Any, session: Echo, capsys: Any) -> None:
    session.interrupt = True
    loop = talk("one two three", KeyboardInterrupt, "never")
    assert loop.left == 2 and session.closed
    seen = capsys.readouterr()
    assert seen.out == "one \n" and "stopped" in seen.err


def test_ctrl_c_at_the_prompt_leaves_the_second_time(talk: Any, session: Echo) -> None:
    loop = talk(KeyboardInterrupt, "still here", KeyboardInterrupt, KeyboardInterrupt, "never")
    assert loop.left == 2 and [text for text, _ in session.asked] == ["still here"]


def test_quit_leaves(talk: Any, session: Echo) -> None:
    assert talk("/quit", "never").left == 2 and session.asked == []


def test_save(talk: Any, session: Echo, tmp_path: Path, capsys: Any) -> None:
    file, lines, other = tmp_path / "t.json", tmp_path / "t.jsonl", tmp_path / "mine.txt"
    other.write_text("precious")
    talk("/save x.json", "hello", "/save", f"/save {file}", f"/save {file}", f"/save {other}")
    talk(f"/save {lines}", f"/save {lines}", f"/save {tmp_path}/no/t.json")
    assert json.loads(file.read_text()) == [session.transcript()]
    assert len(lines.read_text().splitlines()) == 2 and other.read_text() == "precious"
    errors = capsys.readouterr().err
    for words in ("nothing to save", "needs a file", "is there already", "cannot be written"):
        assert words in errors
    assert not list(tmp_path.glob(".*.part"))


def test_one_shot_prints_the_answer_alone(session: Echo, capsys: Any) -> None:
    session.notes = ["cut"]
    answer_once(session, "one two", [])  # type: ignore[arg-type]
    seen = capsys.readouterr()
    assert seen.out == "one two \n" and "(cut)" in seen.err


def test_control_characters_do_not_reach_a_terminal(
    session: Echo, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    terminal.show("a\x1b[2Jb\x07\n\té\x9b")
    assert capsys.readouterr().out == "a[2Jb\n\té"
