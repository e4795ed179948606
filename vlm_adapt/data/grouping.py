"""Members of a tar gathered in samples as webdataset gathers them, and what is lost on the way.

Knows keys and extensions (adjacent members, key up to the first dot of the base name); knows nothing
about where archives lie or what members mean. A sample that cannot be whole is left out and named:
beside damage, with members that are not adjacent, with two members of one name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vlm_adapt.data.problems import Problem
from vlm_adapt.data.tar import Damage, Member, Read, scan

_METADATA = re.compile(r"__[^/]*__($|/)")  # webdataset's own members, not samples


def split_name(name: str) -> tuple[str, str] | None:
    """`"dir/a.0.jpg" -> ("dir/a", "0.jpg")`: key and extension, as webdataset cuts them; None if neither.

    A base name that begins with a dot borrows its folder (`"dir/.x" -> ("dir/", "x")`), unless the
    folder's name has a dot itself: webdataset's pattern does so, and an index must agree with it.
    """
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot < 0 or dot == 0:
        return None
    if dot == start and "." in name[name.rfind("/", 0, start - 1) + 1 : start]:
        return None
    return name[:dot], name[dot + 1 :]


@dataclass
class Group:
    """The members of a key that lie together: `(extension, offset, size)` each."""

    key: str
    members: list[tuple[str, int, int]] = field(default_factory=list)
    fault: str = ""


def group(path: str, read: Read, length: int) -> tuple[list[Group], list[Problem]]:
    """The whole samples of an archive in order, and every loss by name.

    Args:
        path: for the problems.
        read: `read(size, offset)` of the archive.
        length: its bytes.
    """
    groups: list[Group] = []
    problems: list[Problem] = []
    current: Group | None = None
    suspect = ""
    for event in scan(read, length):
        if isinstance(event, Damage):
            suspect = f"incomplete: the shard is damaged here, {event.reason}"
            problems.append(Problem(path, "", f"damaged at byte {event.offset:,}: {event.reason}"))
            cut = split_name(event.name)
            if cut and (current is None or current.key != cut[0]):  # the sample before was complete
                current = Group(cut[0])
                groups.append(current)
            if current:
                current.fault = suspect
            current = None
            continue
        if _METADATA.match(event.name):
            continue
        parts = split_name(event.name)
        if parts is None:
            problems.append(Problem(path, event.name, "a member without an extension belongs to no sample"))
            continue
        key, extension = parts[0], parts[1].lower()
        if current is None or current.key != key:
            current = Group(key, fault=suspect)
            suspect = ""
            groups.append(current)
        if not isinstance(event, Member):
            current.fault = event.reason
        elif any(extension == known for known, _, _ in current.members):
            current.fault = f"two members are called '{extension}'"
        else:
            current.members.append((extension, event.offset, event.size))
    by_key: dict[str, list[Group]] = {}
    for one in groups:
        by_key.setdefault(one.key, []).append(one)
    for key, pieces in by_key.items():
        fault = next((piece.fault for piece in pieces if piece.fault), "")
        if len(pieces) > 1 and not fault:
            fault = "members of this key are not adjacent: sort the archive by name"
        if fault:
            problems.append(Problem(path, key, fault))
            for piece in pieces:
                piece.fault = fault
    return [one for one in groups if not one.fault], problems
