"""A small HTTP server on loopback that can be told to misbehave, and shards to serve.

Knows ranges, ETags and a list of faults; knows nothing about what is tested with it.
"""

from __future__ import annotations

import io
import random
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[["Handler", bytes], bool]  # (request, the body meant for it) -> whether it answered


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def members(samples: int, size: int = 3000, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    source = random.Random(f"{samples} {prefix}")
    for number in range(samples):
        yield f"{prefix}{number:04d}.jpg", source.randbytes(size)
        yield f"{prefix}{number:04d}.json", b'{"caption": "%d"}' % number


class Handler(BaseHTTPRequestHandler):
    """Answers ranges of the files of a folder, unless a fault is due."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        span = self.headers.get("Range")
        self.server.asked.append((self.path, span))
        self.server.clients.add(self.client_address)
        file = self.server.folder / self.path.partition("?")[0].lstrip("/")
        fault = self.server.next_fault(self.path)
        content = file.read_bytes() if file.is_file() else None
        if fault and fault(self, content or b""):
            return
        if content is None:
            self.answer(404, b"no such file")
            return
        headers = {} if self.server.etag is None else {"ETag": self.server.etag}
        if span is None or not self.server.ranges:
            self.answer(200, content, headers)
            return
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content)), len(content) - 1)
        if start >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(206, content[start : end + 1], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """`faults` are due in turn, one a request; `always` is due at every request whose path it is given."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults = folder, list[Fault | None]()
        self.always: Fault | None = None
        self.asked: list[tuple[str, str | None]] = []
        self.clients: set[tuple[str, int]] = set()
        self.ranges, self.etag = True, '"one"'
        self.over = threading.Event()

    def next_fault(self, path: str) -> Fault | None:
        return self.always or (self.faults.pop(0) if self.faults else None)

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def handle_error(self, *words: object) -> None:
        pass  # a client that hangs up is what many tests do


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, **headers: str) -> Fault:
    def fault(handler: Handler, body: bytes) -> bool:
        handler.answer(code, b"trouble", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def stall(handler: Handler, body: bytes) -> bool:
    """Says nothing until the test is over."""
    handler.server.over.wait(60)
    return True


def drip(handler: Handler, body: bytes) -> bool:
    """A byte every 20 ms: never silent, never done."""
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
    handler.send_header("ETag", str(handler.server.etag))
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"\0")
        handler.wfile.flush()
    return True


def reset(after: int = 0) -> Fault:
    """Sends the head of the answer and so many bytes, then resets the connection."""

    def fault(handler: Handler, body: bytes) -> bool:
        ranged = handler.server.ranges and "Range" in handler.headers
        span = handler.headers["Range"].removeprefix("bytes=") if ranged else "0-"
        first, _, last = span.partition("-")
        start, end = int(first), min(int(last or len(body)), len(body) - 1)
        handler.send_response(206 if ranged else 200)
        if ranged:
            handler.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
        handler.send_header("ETag", str(handler.server.etag))
        handler.send_header("Content-Length", str(end + 1 - start))
        handler.end_headers()
        handler.wfile.write(body[start : min(end + 1, start + after)])
        handler.wfile.flush()
        time.sleep(0.02)
        linger = struct.pack("ii", 1, 0)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.close_connection = True
        handler.connection.close()
        return True

    return fault


def hang_up(after: int) -> Fault:
    """Promises all, sends so many bytes, and ends the connection in good order."""

    def fault(handler: Handler, body: bytes) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:after])
        handler.close_connection = True
        return True

    return fault


def short(by: int) -> Fault:
    """An answer whose length fits its header, and not the range that was asked for."""

    def fault(handler: Handler, body: bytes) -> bool:
        first, _, last = (handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(body)), len(body) - 1)
        part = body[start : max(start, end + 1 - by)]
        headers = {"Content-Range": f"bytes {start}-{end}/{len(body)}", "ETag": str(handler.server.etag)}
        handler.answer(206, part, headers)
        return True

    return fault
