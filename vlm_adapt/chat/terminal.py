"""A conversation in a terminal: lines, commands, Ctrl-C.

Knows keys and wording; what is shown to the model is the session's business. Replies go to standard
output, everything else to standard error, so that a reply can be piped.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_adapt.chat.shown import check_mode, show_masks
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError
from vlm_adapt.weights import cache

if TYPE_CHECKING:
    from vlm_adapt.chat.session import Session

HELP = """\
  /image FILE...    show images with your next question (quote names with spaces)
  /system TEXT      change the system message (no text: the template's own)
  /temperature X    0 always writes the likeliest word, 1 draws as the model believes
  /adapter A + B    let these adapters answer (none: the base; no name: shows which there are)
  /mask MODE        masks of replies: show (in the terminal where it can, and as a file), blocks
                    (in coloured characters), file, or off
  /reset            forget the conversation
  /save FILE        write it as JSON, which `vlm-adapt shards write llava` reads
  /quit             leave (so do Ctrl-D, and Ctrl-C twice); Ctrl-C stops a reply
A question may say <image> where an image stands; otherwise images come before it."""
HISTORY_LINES = 1000
CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def dim(text: str) -> str:
    """Text in a fainter colour, where standard error is a terminal that shows colours."""
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[2m{text}\033[0m"


def tell(text: str) -> None:
    """A line beside the conversation."""
    print(dim(text), file=sys.stderr, flush=True)


def show(piece: str) -> None:
    """A piece of a reply; on a terminal without the control characters that could drive it."""
    if sys.stdout.isatty():
        piece = piece.translate(CONTROLS)
    print(piece, end="", flush=True)


def answer_once(session: Session, prompt: str, images: Sequence[str], masks: str = "show") -> None:
    """One question; only its answer goes to standard output, and pictures where that is a terminal.

    Args:
        masks: what becomes of a reply's masks (see chat/shown.py).

    Raises:
        UserError: an image cannot be used, or a mask cannot be written.
    """
    for piece in session.ask(prompt, images):
        show(piece)
    print(flush=True)
    for line in show_masks(session, masks):
        tell(line)
    for note in session.notes:
        tell(f"({note})")


class Terminal:
    """The loop of a conversation.

    Args:
        images: files that go with the first question; the session has checked them.
    """

    def __init__(self, session: Session, images: Sequence[str] = ()):
        self.session, self.images = session, list(images)
        self.masks = "show"
        self.interrupted = False  # by Ctrl-C, with nothing asked since
        self.saved: set[Path] = set()
        self.commands: dict[str, Callable[[str], None]] = {
            "image": self.image,
            "system": self.system,
            "temperature": self.temperature,
            "adapter": self.adapter,
            "mask": self.mask,
            "reset": self.reset,
            "save": self.save,
            "help": lambda _: print(HELP, file=sys.stderr),
        }

    def run(self) -> None:
        """Ask and answer until the user leaves."""
        if isinstance(sys.stdin.errors, str) and hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        interactive = sys.stdin.isatty()
        if interactive:
            _line_editing(self.commands)
            tell("Ask something; /help shows the commands, Ctrl-D leaves.")
        if self.images:
            tell(f"{len(self.images)} image(s) go with your next question.")
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                if interactive:
                    print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
                if _typed():  # it only clears the line
                    continue
                if self.interrupted:
                    return
                self.interrupted = True
                tell("Ctrl-C once more leaves.")
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            self.interrupted = False
            try:
                self.line(line)
            except UserError as error:
                tell(str(error))

    def line(self, line: str) -> None:
        """Do what one line says: a command, or a question.

        Raises:
            UserError: it cannot be done; the conversation stays as it was.
        """
        if not line.strip():
            return
        if line.startswith("/"):
            name, _, rest = line[1:].partition(" ")
            if name not in self.commands:
                near = nearest(f"/{name}", [f"/{known}" for known in self.commands])
                raise UserError(
                    f"there is no command '/{name}'{near or ':'} /help "
                    "shows all; a question that begins with / needs a space before it"
                )
            self.commands[name](rest.strip())
            return
        reply = self.session.ask(line, self.images)
        self.images = []
        try:
            for piece in reply:
                show(piece)
            print(flush=True)
        except KeyboardInterrupt:
            self.interrupted = True
            reply.close()  # type: ignore[attr-defined]
            print(flush=True)
            tell("(stopped; Ctrl-C once more leaves)")
        for said in show_masks(self.session, self.masks):
            tell(said)
        for note in self.session.notes:
            tell(f"({note})")
        if self.session.speed is not None:
            tell(f"[{self.session.speed}]")

    def image(self, text: str) -> None:
        """`/image FILE...`: checked now, shown with the next question."""
        try:
            files = shlex.split(text)
        except ValueError as error:
            raise UserError(f"/image: a quotation mark is not closed in: {text}") from error
        if not files:
            raise UserError("/image needs one or more files: /image photo.jpg")
        for file in files:
            self.session.load_image(file)
        self.images += files
        tell(f"{len(self.images)} image(s) go with your next question.")

    def system(self, text: str) -> None:
        """`/system TEXT`: the system message from now on."""
        self.session.history.system = text or None
        tell("system message set" if text else "system message: the template's own")

    def temperature(self, text: str) -> None:
        """`/temperature X`."""
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < 100:
            now = self.session.settings.temperature
            raise UserError(f"/temperature needs a number of 0 or more, as in /temperature 0.7 (it is {now})")
        self.session.settings.temperature = value
        tell(f"temperature {value:g}")

    def adapter(self, text: str) -> None:
        """`/adapter NAME [+ NAME]`: which adapters act; `none` is the base alone."""
        if text:
            names = text.replace("+", " ").split()
            self.session.use([] if names == ["none"] else names)
            for note in self.session.notes:
                tell(f"({note})")
        adapters = self.session.adapters
        if adapters is None:
            raise UserError(
                "there are no adapters: start with vlm-adapt chat CHECKPOINT --adapter NAME=FOLDER"
            )
        tell(f"adapters: {', '.join(adapters.names)}; in use: {' + '.join(adapters.active) or 'none'}")

    def mask(self, text: str) -> None:
        """`/mask MODE`: what becomes of a reply's masks; without a mode, what does."""
        self.masks = check_mode(text) if text else self.masks
        tell(f"masks of replies: {self.masks}")

    def reset(self, text: str) -> None:
        """`/reset`."""
        self.session.reset()
        self.images = []
        tell("The conversation begins anew.")

    def save(self, text: str) -> None:
        """`/save FILE`: a JSON list with this conversation; with `.jsonl`, one more line of the file."""
        if not text:
            raise UserError("/save needs a file: /save chat.json")
        path = Path(text).expanduser()
        transcript = self.session.transcript()
        if not self.session.history.turns:
            raise UserError("there is nothing to save yet")
        try:
            if path.suffix == ".jsonl":
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(transcript, ensure_ascii=False) + "\n")
            elif path.exists() and path.resolve() not in self.saved:
                raise UserError(f"'{path}' is there already: choose another name")
            else:
                temporary = path.with_name(f".{path.name}.part")
                temporary.write_text(json.dumps([transcript], ensure_ascii=False, indent=1), encoding="utf-8")
                os.replace(temporary, path)
                self.saved.add(path.resolve())
        except OSError as error:
            raise UserError(f"'{path}' cannot be written: {error.strerror}") from error
        tell(f"saved to {path.resolve()}")


def _typed() -> bool:
    """Whether something stands on the line being edited."""
    readline = sys.modules.get("readline")
    return bool(readline and readline.get_line_buffer().strip())


def _line_editing(commands: Sequence[str] | dict[str, Callable[[str], None]]) -> None:
    """Arrow keys, a history that lasts, and Tab for commands and file names, where readline is built in."""
    try:
        import readline
    except ImportError:
        return
    import atexit
    import glob

    def complete(text: str, state: int) -> str | None:
        if readline.get_begidx() == 0:
            found = [f"/{name} " for name in [*commands, "quit"] if f"/{name}".startswith(text)]
        else:
            places = sorted(glob.glob(os.path.expanduser(text) + "*"))
            found = [place + os.sep if os.path.isdir(place) else place for place in places]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    file = cache.root() / "chat_history"
    with suppress(OSError):  # a history that cannot be kept must not keep anyone from talking
        file.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)

    def keep() -> None:
        with suppress(OSError):
            readline.write_history_file(file)

    atexit.register(keep)
