"""Reads pickles of plain data without running anything they name.

A pickle is a program; Python's own reader imports and calls whatever it says. This one knows lists,
dictionaries, texts, numbers and the few names that Python 2 wrote for them, and refuses all else.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

from vlm_adapt.data.convert.common import existing
from vlm_adapt.errors import UserError


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """What Python 3 writes for bytes in old protocols; no other codec is let in."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"a text in the encoding {encoding!r}")
    return text.encode("latin1")


_PLAIN = {
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in {"list": list, "dict": dict, "set": set, "unicode": str, "str": str}.items()
    },
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what is in the table; nothing is imported."""
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _PLAIN[module, name]


def read_pickle(path: str | Path, what: str) -> Any:
    """The content of a pickle of plain data, with texts of Python 2 as text; UserError otherwise."""
    file = existing(str(path), what)
    reason = ""
    for encoding in ("utf-8", "latin-1"):
        try:
            with open(file, "rb") as stream:
                return _Plain(stream, fix_imports=False, encoding=encoding).load()
        except UnicodeDecodeError as error:
            reason = str(error)
        except Exception as error:  # hostile pickles make the reader raise almost anything
            reason = f"{error}"
            break
    raise UserError(
        f"{what} {path} is not a pickle of plain lists, dictionaries, texts and numbers ({reason}); "
        "nothing in it was run: give the same content as JSON"
    )
