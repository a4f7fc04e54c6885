"""From ASGI to WSGI: what the handler can answer on the event loop it answers there, and all else in threads."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes
from wsgiref.util import FileWrapper

from server.handler import Environ, Handler, Headers, Passed, announced_bytes, with_length

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Of a file, from a thread to the loop at a time.
BLOCK_BYTES = 262_144
# Of a header; others are dropped, as each would be remembered.
LONGEST_NAME = 100
# In the scope of a request that has ended before its body has.
BREAKS_OFF = "retention.breaks_off"
# An extension of ASGI: a message of this type is a whole answer, with 200. head: its headers as they are sent, but for
# those that are the server's to say.
WHOLE_ANSWER = "retention.whole_answer"
# For a piece of an answer to be taken, before the thread that waits is set free. For a body the server has a bound.
PATIENCE_SECONDS = 75


class Bridge:
    """The ASGI application of a WSGI application. threads: how many requests these answer at a time."""

    def __init__(self, application: Handler, threads: int):
        self._application = application
        self._threads = ThreadPoolExecutor(threads, "request")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"This is no application for {scope['type']}.")
        exchange = _Exchange(scope, receive, send)
        answered = await self._application.answer_on_loop(exchange.environ, exchange.read)
        if answered:
            await exchange.send_whole(*answered)
        else:
            body = await exchange.loop.run_in_executor(self._threads, self._in_thread, exchange)
            await exchange.send(body, more=False)

    def _in_thread(self, exchange: _Exchange) -> bytes:
        """The body, or what is left of it where it comes in pieces."""
        exchange.environ.setdefault("wsgi.input", io.BufferedReader(_Body(exchange), BLOCK_BYTES))
        pieces = self._application(exchange.environ, exchange.start)
        if isinstance(pieces, list):
            return b"".join(pieces)
        try:
            if exchange.environ["REQUEST_METHOD"] != "HEAD":
                exchange.send_from_thread(pieces)
        finally:
            if hasattr(pieces, "close"):
                pieces.close()
        return b""


class _Exchange:
    """A request, and where its answer goes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.loop = asyncio.get_running_loop()
        self._scope, self._receive, self._send = scope, receive, send
        self._head: Message | None = None
        self._has_asked = self._is_gone = False
        self.environ = environ_of(scope)

    async def read(self) -> bytes:
        """The whole body, which can then be read again; nothing if it breaks off."""
        try:
            body, more = await self.receive()
            while more:
                piece, more = await self.receive()
                body += piece
        except ConnectionResetError:
            return b""
        self.environ["wsgi.input"] = io.BytesIO(body)
        return body if len(body) == announced_bytes(self.environ) else b""

    async def receive(self) -> tuple[bytes, bool]:
        """A piece of the body, and whether there are more. Raises ConnectionResetError."""
        self._has_asked = True
        if not self._is_gone:
            message = await self._receive()
            self._is_gone = message["type"] == "http.disconnect" or BREAKS_OFF in self._scope
        if self._is_gone:
            raise ConnectionResetError
        return message.get("body", b""), message.get("more_body", False)

    def start(self, status: str, headers: Headers, exc_info: object = None) -> None:
        if "HTTP_EXPECT" in self.environ and not self._has_asked:
            # Nobody has told the client to send its body, and what it sends next need not be that.
            headers = [*headers, ("Connection", "close")]
        self._head = {
            "type": "http.response.start",
            "status": int(status[:3]),
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        }

    async def send_whole(self, passed: Passed, body: bytes) -> None:
        if WHOLE_ANSWER in (self._scope.get("extensions") or ()):
            head = b"%bcontent-length: %d\r\n" % (passed.head, len(body))
            await self._send({"type": WHOLE_ANSWER, "head": head, "body": body})
        else:
            self.start("200 OK", with_length(passed.headers, body))
            await self.send(body, more=False)

    async def send(self, piece: bytes, *, more: bool) -> None:
        if self._head is not None:
            await self._send(self._head)
            self._head = None
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})

    def send_from_thread(self, pieces: Iterable[bytes]) -> None:
        """Until the client is gone. Raises TimeoutError if it takes nothing for long."""
        leaving = asyncio.run_coroutine_threadsafe(self._wait_until_gone(), self.loop)
        try:
            for piece in pieces:
                if leaving.done():
                    return
                sending = asyncio.wait_for(self.send(piece, more=True), PATIENCE_SECONDS)
                asyncio.run_coroutine_threadsafe(sending, self.loop).result()
        finally:
            leaving.cancel()

    async def _wait_until_gone(self) -> None:
        with suppress(ConnectionResetError):
            while True:
                await self.receive()


class _Body(io.RawIOBase):
    """A request's body for a thread that reads it. Raises OSError if it breaks off."""

    def __init__(self, exchange: _Exchange):
        self._exchange = exchange
        self._piece, self._more = memoryview(b""), True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while self._more and not self._piece:
            received = asyncio.run_coroutine_threadsafe(self._exchange.receive(), self._exchange.loop)
            piece, self._more = received.result()
            self._piece = memoryview(piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


def environ_of(scope: Scope) -> Environ:
    """A request as PEP 3333 has it, but for its body."""
    path = scope["raw_path"]
    server, port = scope["server"] or ("localhost", 80)
    environ: Environ = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": server,
        "SERVER_PORT": str(port),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope["scheme"],
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": _file_wrapper,
    }
    if scope["client"]:
        environ["REMOTE_ADDR"] = scope["client"][0]
    for name, value in scope["headers"]:
        key = _key_of(name) if len(name) <= LONGEST_NAME else None
        if key in environ:
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value.decode("latin-1")
        elif key:
            environ[key] = value.decode("latin-1")
    return environ


@lru_cache(1_000)
def _key_of(name: bytes) -> str | None:
    """None for a name with an underscore, which could not be told from the one with a hyphen: X_Forwarded_Proto."""
    if b"_" in name:
        return None
    key = name.decode("latin-1").upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"


def _file_wrapper(file: Any, block_bytes: int = 0) -> Iterable[bytes]:
    """In blocks of our own size: Django and WhiteNoise would have files read by 4 and 8 KB."""
    return FileWrapper(file, BLOCK_BYTES)
