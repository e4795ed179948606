"""What a terminal does with the masks of a reply: a file beside the image, a picture in place, or nothing.

Knows modes and wording; knows nothing about models. What draws is imported when there is something to draw,
so that a chat without masks starts as fast as ever.

    show     a file, and in the terminal where it can show pictures
    blocks   a file, and in coloured characters on any terminal with 24-bit colours
    file     a file
    off      nothing
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    from vlm_adapt.chat.session import Session

MODES = ("show", "blocks", "file", "off")


def check_mode(text: str) -> str:
    """A mode by name.

    Raises:
        UserError: there is none of this name.
    """
    if text not in MODES:
        raise UserError(f"masks are shown as {', '.join(MODES)}, not '{text}'{nearest(text, MODES)}")
    return text


def show_masks(session: Session, mode: str) -> Iterator[str]:
    """Write and show the masks of the last reply; lines to tell about them.

    Raises:
        UserError: the image is gone, or the file cannot be written.
    """
    if mode == "off" or not session.masks:
        return
    from vlm_adapt.chat import inline
    from vlm_adapt.chat.masks import overlay, write

    picture = overlay(session.masks, session.max_pixels)
    graphics = None
    if mode == "blocks" and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb"):
        graphics = "blocks"
    elif mode == "show":
        graphics = inline.detect()
    if graphics is not None:
        print(inline.show(picture, graphics), end="", flush=True)
    shares = " and ".join(f"{mask.share:.1%}" for mask in session.masks)
    count = "a mask" if len(session.masks) == 1 else f"{len(session.masks)} masks"
    yield f"({count} of {shares} of the image: {write(picture, session.masks[0].image)})"
