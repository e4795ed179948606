"""Ranges and streams of HTTP addresses, asked for again where that helps, and one sentence where not.

Knows what servers answer and which answers are worth another try; knows nothing about blocks or the
cache (blocks.py) or about connections (client.py).
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import ssl
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from vlm_adapt.data.storage import Settings, client, shown
from vlm_adapt.data.storage.notes import note
from vlm_adapt.errors import UserError

_AGAIN = (408, 425, 429)  # and all from 500
_CHUNK = 1 << 18
_SLOWEST = 10.0  # seconds between two attempts, at most
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


class Fault(Exception):
    """An answer that may be better the next time."""


_FAULTS = (OSError, http.client.HTTPException, Fault)


def _words(error: Exception) -> str:
    if isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError):
        return "the server hung up"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut short"
    if isinstance(error, socket.gaierror):
        return "the name of the server is not known"
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__


class Patience:
    """How long a server is given: `retry_seconds` from the start, or from the last progress."""

    def __init__(self, address: str, settings: Settings):
        self.address, self.seconds, self.step = address, settings.retry_seconds, settings.block_bytes
        self.deadline = time.monotonic() + self.seconds
        self.attempts = self.arrived = 0
        self.reason = ""

    def failed(self, error: Exception) -> None:
        """Wait before another attempt. UserError when there is no time left for one, or no sense in it."""
        self.attempts += 1
        if not (isinstance(error, client.TooSlow) and self.reason):  # else what came before says more
            self.reason = _words(error)
        name, reason = shown(self.address), self.reason
        unknown = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
        if unknown or isinstance(error, ssl.SSLCertVerificationError):
            raise UserError(f"cannot read {name}: {reason}") from error
        pause = min(_SLOWEST, 0.1 * 2 ** (self.attempts - 1)) * random.uniform(0.5, 1.5)
        pause = max(pause, getattr(error, "wait", 0.0))
        if time.monotonic() + pause >= self.deadline:
            raise UserError(
                f"{name} could not be read in {self.seconds:.0f} s ({self.attempts} attempts): {reason}; "
                "see to the server or the network, then start again to go on"
            ) from error
        note(name, "a request was repeated", reason)
        time.sleep(pause)

    def progress(self, size: int) -> None:
        """So many bytes have come: each `block_bytes` of them has its own time."""
        self.arrived += size
        if self.arrived >= self.step:
            self.arrived, self.attempts, self.reason = 0, 0, ""
            self.deadline = time.monotonic() + self.seconds


@dataclass(frozen=True)
class Content:
    """What an address holds today. `tag` is its ETag, else its time of change, else empty."""

    size: int | None
    tag: str
    ranges: bool = True

    def __str__(self) -> str:
        size = "?" if self.size is None else self.size
        return f"{'' if self.ranges else 'whole '}{size} {self.tag}"

    @classmethod
    def parse(cls, text: str) -> Content:
        """The inverse of `str`."""
        size, _, tag = text.removeprefix("whole ").partition(" ")
        return cls(int(size) if size != "?" else None, tag, not text.startswith("whole "))


def _content(answer: client.Answer) -> Content:
    tag = answer.headers.get("ETag", "").removeprefix("W/") or answer.headers.get("Last-Modified", "")
    length = answer.headers.get("Content-Length")
    if answer.status != 200:
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        length = found.group(3) if found else None
    return Content(int(length) if length and length.isdigit() else None, tag, answer.status != 200)


def _changed(address: str) -> UserError:
    return UserError(f"shard {shown(address)} was changed while in use: start again to read it anew")


def _check(address: str, answer: client.Answer, known: Content | None) -> None:
    """Raises Fault for answers worth repeating, UserError for others that are not the content."""
    status = answer.status
    if status in (200, 206, 416):
        encoding = answer.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise UserError(
                f"{shown(address)} is sent as '{encoding}' without being asked: give another server"
            )
        found = _content(answer)
        if known and known.tag != found.tag and status != 416:
            raise _changed(address)
        if known and None not in (known.size, found.size) and known.size != found.size:
            raise _changed(address)
        return
    words = f"the server answered {status} {answer.response.reason}".rstrip()
    if status >= 500 or status in _AGAIN:
        fault = Fault(words)
        wait = answer.headers.get("Retry-After", "")
        fault.wait = float(wait) if wait.isdigit() else 0.0  # type: ignore[attr-defined]
        raise fault
    raise UserError(f"cannot read {shown(address)}: {words}")


def _last_byte(address: str, answer: client.Answer, start: int) -> int:
    """Where the range of an answer ends, which must begin at `start`."""
    if answer.status == 416:
        raise _changed(address)
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
    if found is None or found.group(1) != str(start):
        raise Fault("the server answered with another range")
    return int(found.group(2))


def _ask(address: str, span: str, settings: Settings, patience: Patience) -> client.Answer:
    headers = {"Range": f"bytes={span}"} if span else {}
    return client.get(address, headers, settings.stall_seconds, patience.deadline)


def look(address: str, settings: Settings) -> Content:
    """What an address holds, by asking for its first byte. UserError if it cannot be had."""
    patience = Patience(address, settings)
    while True:
        try:
            answer = _ask(address, "0-0", settings, patience)
            try:
                _check(address, answer, None)
                if answer.status != 200:
                    answer.read(_CHUNK)
            finally:
                answer.close()
            content = _content(answer)
            return content if content.size is not None else Content(None, content.tag, False)
        except _FAULTS as error:
            patience.failed(error)


def read_range(address: str, start: int, size: int, settings: Settings, known: Content) -> bytearray:
    """`size` bytes from `start`; what had come before a fault is kept, and only the rest asked again."""
    data, have, patience = bytearray(size), 0, Patience(address, settings)
    view = memoryview(data)
    while have < size:
        try:
            answer = _ask(address, f"{start + have}-{start + size - 1}", settings, patience)
            try:
                if answer.status == 200:
                    raise Fault("the server ignored the range that was asked for")
                _check(address, answer, known)
                last = _last_byte(address, answer, start + have)
                before = have
                while have < size and (came := answer.readinto(view[have : have + _CHUNK])):
                    have += came
                all_promised = last >= start + size - 1  # a server may limit a range
                if have == before or (all_promised and have < size):
                    raise Fault("the answer was cut short")
            finally:
                answer.close()
        except _FAULTS as error:
            patience.failed(error)
    return data


def stream(address: str, settings: Settings, known: Content) -> Iterator[bytes]:
    """All bytes of an address in order. After a fault it goes on where it was."""
    position, checksum, patience = 0, 0, Patience(address, settings)
    while True:
        try:
            span = f"{position}-" if position and known.ranges else ""
            answer = _ask(address, span, settings, patience)
            try:
                _check(address, answer, Content(known.size, known.tag))
                again, seen = position, 0
                if answer.status != 200:
                    again = 0
                    _last_byte(address, answer, position)
                while chunk := answer.read(_CHUNK):
                    if again:  # the server began anew: it must begin with the same bytes
                        old, chunk = chunk[:again], chunk[again:]
                        again, seen = again - len(old), zlib.crc32(old, seen)
                        if not again and seen != checksum:
                            raise _changed(address)
                    if chunk:
                        position, checksum = position + len(chunk), zlib.crc32(chunk, checksum)
                        patience.progress(len(chunk))
                        yield chunk
                        answer.extend(patience.deadline)
                if again or (known.size is not None and position != known.size):
                    raise Fault("the answer was cut short")
                return
            finally:
                answer.close()
        except _FAULTS as error:
            patience.failed(error)


def read_small(address: str, settings: Settings) -> bytes | None:
    """The whole of a small file; None if the server does not have it."""
    patience = Patience(address, settings)
    while True:
        try:
            answer = _ask(address, "", settings, patience)
            try:
                if answer.status in (403, 404, 410):  # some stores answer 403 for what is not there
                    return None
                _check(address, answer, None)
                size = _content(answer).size
                data = b""
                while chunk := answer.read(_CHUNK):
                    data += chunk
                if size is not None and len(data) < size:
                    raise Fault("the answer was cut short")
                return data
            finally:
                answer.close()
        except _FAULTS as error:
            patience.failed(error)
