"""HTTP requests that end: connections kept open, redirects, proxies, and a time for everything.

Knows HTTP/1.1 through the standard library; knows nothing about retries, blocks or shards. Every wait on
the network, byte by byte if need be, is bounded by the request's deadline.
"""

from __future__ import annotations

import base64
import http.client
import io
import os
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_SMALL = 1 << 14
_MOST_CONNECTIONS = 8  # a thread's; shards usually lie with one or two servers


class TooSlow(TimeoutError):
    """The deadline has come."""


class _Deadlined(io.RawIOBase):
    """A socket's bytes; each wait ends at the deadline, or when nothing comes for `stall` seconds."""

    def __init__(self, sock: socket.socket, raw: Any, stall: float, deadline: float):
        self.sock, self.raw, self.stall, self.deadline = sock, raw, stall, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TooSlow("too slow")
        self.sock.settimeout(min(left, self.stall))
        try:
            return self.raw.readinto(buffer)
        except TimeoutError as error:
            if left < self.stall:
                raise TooSlow("too slow") from error
            raise TimeoutError(f"nothing came for {self.stall:g} s") from error

    def close(self) -> None:
        self.raw.close()
        super().close()


class Answer:
    """A response whose body has not been read: its `status` and its `headers`."""

    def __init__(self, response: http.client.HTTPResponse, connection: _Connection):
        self.response, self.connection = response, connection
        self.status, self.headers, self.broken = response.status, response.headers, False

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer where the body ends, b"" after it."""
        try:
            return self.response.read(size)
        except BaseException:
            self.broken = True
            raise

    def readinto(self, buffer: memoryview) -> int:
        """How many bytes were read into a buffer; fewer than it holds only where the body ends."""
        try:
            return self.response.readinto(buffer)
        except BaseException:
            self.broken = True
            raise

    def extend(self, deadline: float) -> None:
        """Give the rest of the body until another time."""
        if self.response.fp is not None:
            self.response.fp.raw.deadline = deadline  # type: ignore[attr-defined]

    def close(self) -> None:
        """Keep the connection if the body came whole, or nearly so; else hang up."""
        if not self.broken and 0 < (self.response.length or 0) <= _SMALL:
            with suppress(OSError, http.client.HTTPException):
                self.read(_SMALL)
        ended = self.response.isclosed() and not self.response.length
        if self.broken or not ended or self.response.will_close:
            self.connection.drop()


class _Connection:
    """One kept connection to a server, straight or through a proxy."""

    def __init__(self, scheme: str, host: str, port: int | None):
        self.scheme, self.prefix = scheme, ""
        self.proxy_headers: dict[str, str] = {}
        proxy = None if proxy_bypass(host) else getproxies().get(scheme)
        made: http.client.HTTPConnection
        if proxy:
            at = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            if at.username is not None:
                self.proxy_headers["Proxy-Authorization"] = basic(at.username, at.password or "")
            made = _plain_or_tls(scheme, at.hostname or "", at.port or 8080)
            if scheme == "https":
                made.set_tunnel(host, port, self.proxy_headers)
            else:
                self.prefix = f"http://{host}{f':{port}' if port else ''}"
        else:
            made = _plain_or_tls(scheme, host, port)
        self.made = made

    def drop(self) -> None:
        """Hang up; the next request connects anew."""
        with suppress(OSError):
            self.made.close()

    def request(self, target: str, headers: dict[str, str], stall: float, deadline: float) -> Answer:
        try:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TooSlow("too slow")
            self.made.timeout = min(stall, left)
            if self.made.sock is None:
                self.made.response_class = http.client.HTTPResponse
                self.made.connect()
            self.made.sock.settimeout(min(stall, left))

            def respond(given: Any, *more: Any, **named: Any) -> http.client.HTTPResponse:
                response = http.client.HTTPResponse(given, *more, **named)
                raw = response.fp.detach()  # type: ignore[attr-defined]
                response.fp = io.BufferedReader(_Deadlined(given, raw, stall, deadline), 1 << 16)
                return response

            self.made.response_class = respond  # type: ignore[assignment]
            own = self.proxy_headers if self.prefix else {}
            self.made.request("GET", self.prefix + target, headers=headers | own)
            return Answer(self.made.getresponse(), self)
        except BaseException:
            self.drop()
            raise


def _plain_or_tls(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    if scheme == "https":
        return http.client.HTTPSConnection(host, port, context=ssl.create_default_context())
    return http.client.HTTPConnection(host, port)


def basic(user: str, password: str) -> str:
    """The value of an `Authorization` header."""
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()


class _Connections(threading.local):
    """The connections of a thread of a process; a forked child makes its own."""

    def __init__(self) -> None:
        self.pid, self.kept = os.getpid(), dict[tuple[str, str, int | None], _Connection]()

    def get(self, scheme: str, host: str, port: int | None) -> _Connection:
        if self.pid != os.getpid():  # the parent goes on talking through those: leave them, unclosed
            self.pid, _inherited[:] = os.getpid(), [*_inherited, self.kept]
            self.kept = {}
        key = (scheme, host, port)
        if key not in self.kept:
            while len(self.kept) >= _MOST_CONNECTIONS:
                self.kept.pop(next(iter(self.kept))).drop()
            self.kept[key] = _Connection(scheme, host, port)
        return self.kept[key]


_connections = _Connections()
_inherited: list[Any] = []  # a TLS connection that is collected would say goodbye in the parent's name


def get(address: str, headers: dict[str, str], stall: float, deadline: float) -> Answer:
    """GET an address, following redirects. The caller reads and closes the answer.

    Raises OSError (TimeoutError, ConnectionError, ssl.SSLError among them) or http.client.HTTPException.
    """
    credentials: tuple[str, str] | None = None
    first_host = None
    for _ in range(_MOST_REDIRECTS + 1):
        parts = urlsplit(address)
        host = parts.hostname or ""
        if parts.username is not None:
            credentials, first_host = (parts.username, parts.password or ""), host
        sent = {"Accept-Encoding": "identity", "User-Agent": "vlm-adapt", **headers}
        if credentials and host == first_host:  # and no other: it was not meant to see them
            sent["Authorization"] = basic(*credentials)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection = _connections.get(parts.scheme.lower(), host, parts.port)
        answer = connection.request(target, sent, stall, deadline)
        location = answer.headers.get("Location")
        if answer.status not in REDIRECTS or not location:
            return answer
        while answer.read(1 << 16):
            pass
        answer.close()
        address = urljoin(address, location)
        if urlsplit(address).scheme not in ("http", "https"):
            raise http.client.HTTPException("redirected to what is not an http address")
    raise http.client.HTTPException("redirected in a circle")
