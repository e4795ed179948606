"""Connections to servers of shards: redirects, credentials, proxies and certificates."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
import time

import pytest
from test_http_shards import local, server, settings

from vlm_adapt.data.shards import ShardSet
from vlm_adapt.data.storage import shown
from vlm_adapt.errors import UserError

__all__ = ["local", "server"]  # fixtures


def test_redirects_and_credentials(server, local, tmp_path):
    asked = []

    def move(handler, body):
        asked.append(handler.headers.get("Authorization"))
        if "moved" in handler.path:
            return False
        target = server.address("s.tar?moved=1").replace("127.0.0.1", "localhost")
        handler.answer(302, b"look there", {"Location": target})
        return True

    server.always = move
    address = server.address("s.tar").replace("127", "me:a%20word@127") + "?key=hidden"
    assert list(ShardSet(address, settings=settings(tmp_path))) == local
    assert set(asked) == {"Basic bWU6YSB3b3Jk", None}  # for the first host only
    assert shown(address) == server.address("s.tar")
    server.always = lambda handler, body: handler.answer(302, b"", {"Location": handler.path}) or True
    with pytest.raises(UserError, match="in a circle") as caught:
        ShardSet(address, settings=settings(tmp_path, retry_seconds=0.1))
    assert "hidden" not in str(caught.value) and "word" not in str(caught.value)


def test_a_proxy_is_used_where_one_is_set(server, local, tmp_path, monkeypatch):
    """It gets the whole address, and its own credentials."""
    asked = []

    def through(handler, body):
        asked.append((handler.path.partition("s.tar")[0], handler.headers.get("Proxy-Authorization")))
        handler.path = handler.path.removeprefix("http://shards.example:81")
        handler.server.always = None
        try:
            handler.do_GET()
        finally:
            handler.server.always = through
        return True

    server.always = through
    monkeypatch.setenv("http_proxy", server.address("").replace("127", "me:word@127"))
    monkeypatch.delenv("no_proxy", raising=False)
    assert list(ShardSet("http://shards.example:81/s.tar", settings=settings(tmp_path))) == local
    assert set(asked) == {("http://shards.example:81/", "Basic bWU6d29yZA==")}


def test_a_certificate_that_is_not_trusted(server, tmp_path):
    """TLS is spoken and checked; there is no sense in another attempt."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command to make a certificate")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*words, *names, "-days", "2"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    address = server.address("s.tar").replace("http://127.0.0.1", "https://localhost")
    started = time.monotonic()
    with pytest.raises(UserError, match="certificate"):
        ShardSet(address, settings=settings(tmp_path))
    assert time.monotonic() - started < 5
    code = f"import vlm_adapt.data.shards as s; print(len(list(s.ShardSet({address!r}, {str(tmp_path)!r}))))"
    environment = {**os.environ, "SSL_CERT_FILE": certificate}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "20", done.stderr
