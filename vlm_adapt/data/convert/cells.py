"""Images as sources name them: a file, bytes in a table, bytes in base64.

Knows the forms that one image takes in JSON and in tables; knows nothing about any one dataset.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_adapt.data.convert.common import checked_image, image_members, read_first
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

_ADDRESS = re.compile(r"[a-z][a-z0-9+]*://", re.IGNORECASE)


def read_cell(cell: Any, folders: Sequence[str]) -> tuple[str, bytes]:
    """`(extension, bytes)` of an image, not decoded.

    Args:
        cell: a path, relative to one of the folders or absolute; `data:image/...;base64,...`; bytes; or
            what `datasets` has in a column of images, `{"bytes": ..., "path": ...}`.

    Raises:
        BadSample: missing, no image, an address in a network, or something else.
        UserError: a file is named and no folder is known.
    """
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        cell = path if data is None else data
    if isinstance(cell, bytes | bytearray | memoryview):
        return checked_image(bytes(cell), f"{len(cell):,} bytes")
    if not isinstance(cell, str) or not cell:
        raise BadSample("image is neither a file name nor bytes", f"it is {cell!r:.60}")
    if cell.startswith("data:"):
        try:
            return checked_image(base64.b64decode(cell.partition(",")[2], validate=True), "base64")
        except binascii.Error as error:
            raise BadSample("image written as text cannot be read", f"base64: {error}") from error
    name = cell.removeprefix("file://")
    if _ADDRESS.match(name):
        raise BadSample("image is an address, not a file", name)
    if not folders and not os.path.isabs(name):
        raise UserError(f"the source names images ({name}): say in which folder they are, images=...")
    return read_first([os.path.join(folder, name) for folder in folders] or [name])


def cells_sample(cells: Sequence[Any], folders: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a sample with these images. A recipe."""
    return {**image_members([read_cell(cell, folders) for cell in cells]), "json": record}
