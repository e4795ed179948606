"""Pictures in a terminal, where it can show them: kitty's, iTerm2's and sixel graphics, or coloured blocks.

Knows escape sequences and how terminals tell what they are; knows nothing about masks or models. A terminal
that does not say that it can is sent nothing: a pipe, a file and a dumb terminal stay clean.

    kitty       https://sw.kovidgoyal.net/kitty/graphics-protocol
    iTerm2      https://iterm2.com/documentation-images.html
    sixel       six pixels a character, from 64 colours; told by "4" in the reply to "what are you?"
    blocks      two pixels a character, upper and lower; only where a user asks for them
"""

from __future__ import annotations

import base64
import io
import os
import select
import shutil
import sys
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vlm_adapt.choices import Choices

COLUMNS = 60  # a picture's width in characters, at most
CELL = 10  # pixels of a character's width, about
CHUNK = 4096  # bytes of a kitty command
PATIENCE = 0.2  # seconds for a terminal's answer
GRAPHICS = Choices(
    "way to show pictures",
    {name: f"vlm_adapt.chat.inline:{name}" for name in ("kitty", "iterm2", "sixel", "blocks")},
)


def detect(environment: Mapping[str, str] | None = None, ask: bool = True) -> str | None:
    """What standard output can show: a name of GRAPHICS, or None.

    Args:
        environment: by default this process's.
        ask: whether the terminal may be asked, where its environment does not say.
    """
    words = os.environ if environment is None else environment
    term, program = words.get("TERM", ""), words.get("TERM_PROGRAM", "")
    if not sys.stdout.isatty() or term in ("", "dumb"):
        return None
    if "TMUX" in words or term.startswith(("screen", "tmux")):
        return None  # in between, pictures are lost or end up in the wrong place
    if "kitty" in term or "KITTY_WINDOW_ID" in words or "ghostty" in (program, term.removeprefix("xterm-")):
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or words.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return "sixel" if ask and 4 in asked() else None


@cache
def asked() -> set[int]:
    """`attributes`, asked for once: what is typed in that moment would be taken for the answer."""
    return attributes()


def attributes() -> set[int]:
    """What the terminal says of itself (primary device attributes); nothing if it keeps silent."""
    try:
        import termios
        import tty
    except ImportError:
        return set()
    if not sys.stdin.isatty():
        return set()
    source = sys.stdin.fileno()
    try:
        before = termios.tcgetattr(source)
    except termios.error:
        return set()
    answer = b""
    try:
        tty.setcbreak(source)
        sys.stdout.write("\033[c")
        sys.stdout.flush()
        until = time.monotonic() + PATIENCE
        while not answer.endswith(b"c") and (left := until - time.monotonic()) > 0:
            if select.select([source], [], [], left)[0]:
                answer += os.read(source, 64)
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
    inside = answer.decode("ascii", "replace").rpartition("\033[?")[2].removesuffix("c")
    return {int(word) for word in inside.split(";") if word.isdigit()} if answer.endswith(b"c") else set()


def show(picture: PILImage.Image, graphics: str) -> str:
    """The characters that show a picture, with a line end."""
    columns = max(1, min(COLUMNS, shutil.get_terminal_size().columns - 1))
    draw: Any = GRAPHICS.load(graphics)
    text: str = draw(picture.convert("RGB"), columns)
    return text


def kitty(picture: PILImage.Image, columns: int) -> str:
    """A PNG in pieces, `columns` characters wide; the terminal is told not to answer."""
    data = base64.b64encode(_png(_fitted(picture, columns * CELL))).decode()
    pieces = [data[place : place + CHUNK] for place in range(0, len(data), CHUNK)]
    text = ""
    for number, piece in enumerate(pieces):
        keys = f"a=T,f=100,q=2,c={columns}," if number == 0 else ""
        text += f"\033_G{keys}m={int(number < len(pieces) - 1)};{piece}\033\\"
    return text + "\n"


def iterm2(picture: PILImage.Image, columns: int) -> str:
    """A PNG as a file that is shown in place."""
    data = _png(_fitted(picture, columns * CELL))
    keys = f"inline=1;size={len(data)};width={columns};preserveAspectRatio=1"
    return f"\033]1337;File={keys}:{base64.b64encode(data).decode()}\a\n"


def sixel(picture: PILImage.Image, columns: int) -> str:
    """Bands of six rows; each colour of a band in a line of its own over the one before."""
    small = _fitted(picture, columns * CELL).quantize(64, dither=PILImage.Dither.NONE)
    colours = np.array(small.getpalette() or [], np.int64).reshape(-1, 3)
    pixels_HW = np.asarray(small)
    height, width = pixels_HW.shape
    text = [f'\033Pq"1;1;{width};{height}']
    text += [
        f"#{number};2;{';'.join(str(value) for value in (colour * 100 + 127) // 255)}"
        for number, colour in enumerate(colours)
    ]
    for top in range(0, height, 6):
        band = pixels_HW[top : top + 6]
        bits = 1 << np.arange(len(band))
        lines = []
        for number in np.unique(band).tolist():
            values = ((band == number) * bits[:, None]).sum(0) + 63
            lines.append(f"#{number}" + _repeated(values.tolist()))
        text.append("$".join(lines) + "-")
    return "".join(text) + "\033\\\n"


def _repeated(values: list[int]) -> str:
    """Characters of these codes, runs written as `!count`."""
    text, start = "", 0
    for place in range(1, len(values) + 1):
        if place == len(values) or values[place] != values[start]:
            count, sign = place - start, chr(values[start])
            text += f"!{count}{sign}" if count > 3 else sign * count
            start = place
    return text


def blocks(picture: PILImage.Image, columns: int) -> str:
    """Upper half blocks in 24-bit colours: two rows of pixels a line."""
    height = max(2, round(picture.height * columns / picture.width / 2) * 2)
    pixels_HWC = np.asarray(picture.resize((columns, height), PILImage.Resampling.BOX)).tolist()
    lines = []
    for upper, lower in zip(pixels_HWC[::2], pixels_HWC[1::2], strict=True):
        cells = (
            f"\033[38;2;{';'.join(map(str, top))};48;2;{';'.join(map(str, bottom))}m▀"
            for top, bottom in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\033[0m")
    return "\n".join(lines) + "\n"


def _fitted(picture: PILImage.Image, width: int) -> PILImage.Image:
    """At most so many pixels wide; small pictures stay as they are."""
    if picture.width <= width:
        return picture
    height = max(1, round(picture.height * width / picture.width))
    return picture.resize((width, height), PILImage.Resampling.LANCZOS)


def _png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
