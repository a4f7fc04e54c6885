"""Django's request handler, which no header that a client sends may bring down, and the short way past it."""

from __future__ import annotations

import io
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from django.conf import settings
from django.core.exceptions import SuspiciousOperation
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.http import HttpResponse

from server import logs

Environ = dict[str, Any]
Headers = list[tuple[str, str]]
StartResponse = Callable[[str, Headers], object]

# In the environment of a request for which the short way was no way.
WAS_TRIED = "retention.was_tried"


class Request(WSGIRequest):
    def _set_content_type_params(self, environ: Environ) -> None:
        """Django raises where no error handler is near; a header that cannot be read is taken for none.

        Once it knows a charset it reads the query by it, too, which may be more than it reads.
        """
        try:
            super()._set_content_type_params(environ)
        except (ValueError, LookupError, SuspiciousOperation):
            environ["CONTENT_TYPE"], self._encoding = "", None
            super()._set_content_type_params(environ)


class Passed(NamedTuple):
    """What became of a call that Django and its middleware let through to its view.

    answer_again: the answer to another call like it, given how to read its body; or None. answer_on_loop: the same on
    an event loop; raises BlockingIOError if it needs a thread. headers: those of the answer, but its length; head: the
    same as they are sent.
    """

    answer_again: Callable[[Environ, Callable[[], bytes]], bytes | None]
    answer_on_loop: Callable[[Environ, Callable[[], Awaitable[bytes]]], Awaitable[bytes | None]]
    path: str
    headers: Headers
    head: bytes


class Handler(WSGIHandler):
    """A view that can answer a call again without Django says so on its response, by `answer_again`.

    Everything on which it depends whether Django and its middleware let such a call through, and with which headers
    its answer leaves, is in `what_decides`. So what came of one holds for those after it, which go the short way.
    """

    request_class = Request

    MOST_PASSED = 1_000
    MOST_CHARACTERS = 2_000  # of what decides about one
    MOST_ON_LOOP = 16_384  # bytes of a body; to read many customers would keep others waiting

    def __init__(self) -> None:
        super().__init__()
        self._what_decides = what_decides()
        self._passed: dict[tuple[Any, ...], Passed] = {}

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """A whole answer as a list, which servers send at once, where they would ask anything else for its pieces."""
        decisive = self._decisive(environ)
        passed = None if WAS_TRIED in environ else self._passed.get(decisive)
        answer = passed and self._answer_again(passed, environ, start_response)
        if answer:
            return [answer]
        response = super().__call__(environ, start_response)
        if getattr(response, "streaming", True):  # or the server's own wrapper of a file
            return response
        if hasattr(response, "answer_again"):
            self._remember(decisive, response, environ)
        body = [response.content]
        response.close()
        return body

    async def answer_on_loop(
        self, environ: Environ, read: Callable[[], Awaitable[bytes]]
    ) -> tuple[Passed, bytes] | None:
        """The short way on an event loop: what is answered with 200, and in which way. After None a thread is to go.

        read: the whole body, as it was announced, or nothing if it breaks off.
        """
        passed = self._passed.get(self._decisive(environ))
        announced = announced_bytes(environ)
        if not passed or announced is None or announced > self.MOST_ON_LOOP:
            return None
        began = time.perf_counter()
        try:
            answer = await passed.answer_on_loop(environ, read)
        except BlockingIOError:
            return None
        if answer is None:
            environ[WAS_TRIED] = True
            return None
        logs.request("POST", passed.path, 200, began)
        return passed, answer

    def _answer_again(self, passed: Passed, environ: Environ, start_response: StartResponse) -> bytes | None:
        began = time.perf_counter()
        announced = announced_bytes(environ)
        if announced is None or announced > settings.MAX_BODY_BYTES:
            return None
        answer = passed.answer_again(environ, partial(_read, environ, announced))
        if answer is not None:
            start_response("200 OK", with_length(passed.headers, answer))
            logs.request("POST", passed.path, 200, began)
        return answer

    def _decisive(self, environ: Environ) -> tuple[Any, ...]:
        return tuple(map(environ.get, self._what_decides))

    def _remember(self, decisive: tuple[Any, ...], response: HttpResponse, environ: Environ) -> None:
        if sum(len(value) for value in decisive if value) > self.MOST_CHARACTERS:
            return
        if len(self._passed) >= self.MOST_PASSED:
            self._passed.clear()
        path = environ["SCRIPT_NAME"].rstrip("/") + environ["PATH_INFO"]
        headers = [(name, value) for name, value in response.items() if name != "Content-Length"]
        self._passed[decisive] = Passed(response.answer_again, response.answer_on_loop, path, headers, as_sent(headers))


def as_sent(headers: Headers) -> bytes:
    return "".join(f"{name.lower()}: {value}\r\n" for name, value in headers).encode("latin-1")


def with_length(headers: Headers, body: bytes) -> Headers:
    return [*headers, ("Content-Length", str(len(body)))]


def announced_bytes(environ: Environ) -> int | None:
    """How long a request says that its body is; None if it does not say, or not so that it can be read."""
    announced = environ.get("CONTENT_LENGTH", "")
    return int(announced) if announced.isdecimal() and len(announced) <= 18 else None


def what_decides() -> list[str]:
    """The names of all values in a request's environment by which it passes to an API view, or does not."""
    names = ["REQUEST_METHOD", "SCRIPT_NAME", "PATH_INFO", "QUERY_STRING", "CONTENT_TYPE", "HTTP_TRANSFER_ENCODING"]
    names += ["wsgi.url_scheme", "HTTP_HOST", "SERVER_NAME", "SERVER_PORT"]
    if settings.USE_X_FORWARDED_HOST:
        names.append("HTTP_X_FORWARDED_HOST")
    if settings.USE_X_FORWARDED_PORT:
        names.append("HTTP_X_FORWARDED_PORT")
    if settings.SECURE_PROXY_SSL_HEADER:
        names.append(settings.SECURE_PROXY_SSL_HEADER[0])
    if settings.DEBUG:  # from where, and from whose page
        names += ["REMOTE_ADDR", "HTTP_X_FORWARDED_FOR", "HTTP_X_REAL_IP", "HTTP_FORWARDED"]
        names += ["HTTP_ORIGIN", "HTTP_SEC_FETCH_SITE", "HTTP_SEC_FETCH_MODE", "HTTP_SEC_FETCH_DEST"]
    return names


def _read(environ: Environ, announced: int) -> bytes:
    """A request's body, which Django can read once more; empty if it breaks off."""
    body = b""
    with suppress(OSError):  # the client is gone, as Django will find out
        body = environ["wsgi.input"].read(announced)
    environ["wsgi.input"] = io.BytesIO(body)
    return body if len(body) == announced else b""
