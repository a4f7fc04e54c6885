"""What becomes of an ASGI request on its way to the WSGI application, and of its answer on the way back."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from itertools import pairwise

import pytest
from asgiref.testing import ApplicationCommunicator
from hypothesis import given
from hypothesis import strategies as st

from server.bridge import WHOLE_ANSWER, Bridge, environ_of
from server.handler import Passed

SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "raw_path": b"/",
    "query_string": b"",
    "headers": [],
    "server": ("127.0.0.1", 8000),
    "client": ("127.0.0.1", 50_000),
}


class Application:
    """A WSGI application that a test tells what to do. quickly: what it answers on the loop."""

    def __init__(self, answer=None, quickly=None):
        self._answer, self._quickly = answer, quickly
        self.environ = {}

    async def answer_on_loop(self, environ, read):
        answer = await self._quickly(environ, read) if self._quickly else None
        if answer is None:
            return None
        name = threading.current_thread().name
        return Passed(None, None, "/", [("X-Thread", name)], f"x-thread: {name}\r\n".encode()), answer

    def __call__(self, environ, start_response):
        self.environ = environ
        if self._answer is None:  # it wants the body
            environ["wsgi.input"].read()
        start_response("201 Created", [("X-Thread", threading.current_thread().name)])
        return self._answer(environ) if self._answer else []


def asked(application, *pieces, breaks_off=False, **scope):
    """Status, headers and the pieces of the answer to a body that comes in pieces."""

    async def ask():
        communicator = ApplicationCommunicator(Bridge(application, threads=2), {**SCOPE, **scope})
        for number, piece in enumerate(pieces or [b""], 1):
            message = {"type": "http.request", "body": piece, "more_body": breaks_off or number < len(pieces)}
            await communicator.send_input(message)
        if breaks_off:
            await communicator.send_input({"type": "http.disconnect"})
        head = await communicator.receive_output(5)
        bodies, more = [], True
        while more:
            message = await communicator.receive_output(5)
            bodies.append(message["body"])
            more = message["more_body"]
        await communicator.wait(5)
        return head["status"], dict(head["headers"]), bodies

    return asyncio.run(ask())


def headers(*pairs):
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]


# --- The way in -----------------------------------------------------------------------------------------------------
@given(st.binary(max_size=300), st.lists(st.integers(0, 300)), st.sampled_from(["all", "pieces", "lines"]))
def test_a_thread_reads_the_body_as_it_was_sent_in_whatever_pieces(body, cuts, how):
    ends = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    pieces = [body[begin:end] for begin, end in pairwise(ends)]

    def answer(environ):
        stream = environ["wsgi.input"]
        if how == "all":
            return [stream.read()]
        return [b"".join(iter((lambda: stream.read(7)) if how == "pieces" else stream.readline, b""))]

    assert b"".join(asked(Application(answer), *pieces)[2]) == body


def test_what_was_read_on_the_loop_can_be_read_again_in_a_thread():
    read_on_loop = []

    async def declines(environ, read):
        read_on_loop.append(await read())

    application = Application(lambda environ: [environ["wsgi.input"].read()], declines)

    status, _, bodies = asked(application, b"ab", b"", b"cd", headers=headers(("content-length", "4")))
    assert (status, read_on_loop, bodies) == (201, [b"abcd"], [b"abcd"])


def test_a_body_that_breaks_off_is_never_taken_for_a_whole_one():
    read_on_loop = []

    async def declines(environ, read):
        read_on_loop.append(await read())

    def answer(environ):
        try:
            return [environ["wsgi.input"].read()]
        except OSError:
            return [b"it broke off"]

    four = headers(("content-length", "4"))
    assert asked(Application(answer), b"abc", breaks_off=True, headers=four)[2] == [b"it broke off"]
    assert asked(Application(answer, declines), b"abc", breaks_off=True, headers=four)[2] == [b"it broke off"]
    asked(Application(answer, declines), b"abc", headers=four)  # as no server would pass it on
    assert read_on_loop == [b"", b""]


@pytest.mark.parametrize(
    ("raw", "path"), [(b"/a/b", "/a/b"), (b"/caf%C3%A9", "/caf\xc3\xa9"), (b"/%FF%2f", "/\xff/"), (b"/%zz", "/%zz")]
)
def test_a_path_is_its_bytes_as_pep_3333_says(raw, path):
    assert environ_of({**SCOPE, "raw_path": raw})["PATH_INFO"] == path


def test_a_header_with_underscores_cannot_pass_for_the_one_with_hyphens():
    sent = headers(("x-forwarded-proto", "https"), ("x_forwarded_proto", "http"), ("x_forwarded_for", "10.0.0.1"))
    environ = environ_of({**SCOPE, "headers": sent})

    assert environ["HTTP_X_FORWARDED_PROTO"] == "https"
    assert "HTTP_X_FORWARDED_FOR" not in environ


def test_cookies_that_come_in_several_headers_are_all_there():
    sent = headers(("cookie", "a=1"), ("cookie", "b=2"))

    assert environ_of({**SCOPE, "headers": sent})["HTTP_COOKIE"] == "a=1; b=2"


def test_headers_that_come_twice_are_one_and_none_takes_the_place_of_another_value():
    sent = headers(("accept", "a"), ("accept", "b"), ("content-length", "3"), ("wsgi.input", "x"), ("host", "h"))
    environ = environ_of({**SCOPE, "headers": sent})

    assert (environ["HTTP_ACCEPT"], environ["CONTENT_LENGTH"], environ["HTTP_HOST"]) == ("a,b", "3", "h")
    assert "wsgi.input" not in environ
    assert (environ["REMOTE_ADDR"], environ["SERVER_PORT"], environ["SERVER_PROTOCOL"]) == (
        *("127.0.0.1", "8000"),
        "HTTP/1.1",
    )


def test_anything_but_http_is_no_request():
    with pytest.raises(ValueError, match="websocket"):
        asked(Application(), type="websocket")


# --- The way back ---------------------------------------------------------------------------------------------------
def test_what_the_loop_can_answer_it_does_and_the_rest_a_thread():
    async def quickly(environ, read):
        return b"quickly"

    def name_of_thread(application):
        status, told, bodies = asked(application)
        return status, told[b"X-Thread"].partition(b"_")[0], bodies

    assert name_of_thread(Application(None, quickly)) == (200, b"MainThread", [b"quickly"])
    assert name_of_thread(Application(lambda environ: [b"slow", b"ly"])) == (201, b"request", [b"slowly"])


def test_a_server_that_takes_whole_answers_gets_one_with_its_headers_as_they_are_sent():
    async def quickly(environ, read):
        return b"quickly"

    async def ask():
        scope = {**SCOPE, "extensions": {WHOLE_ANSWER: {}}}
        communicator = ApplicationCommunicator(Bridge(Application(None, quickly), threads=2), scope)
        await communicator.send_input({"type": "http.request", "body": b"", "more_body": False})
        return await communicator.receive_output(5)

    head = b"x-thread: MainThread\r\ncontent-length: 7\r\n"
    assert asyncio.run(ask()) == {"type": WHOLE_ANSWER, "head": head, "body": b"quickly"}


def test_a_file_comes_in_large_blocks_and_is_closed_and_whole():
    file = io.BytesIO(b"0123456789" * 60_000)

    _, _, bodies = asked(Application(lambda environ: environ["wsgi.file_wrapper"](file, 4096)))

    assert b"".join(bodies) == b"0123456789" * 60_000
    assert len(bodies) <= 4
    assert file.closed


def test_of_a_file_head_is_told_nothing_but_the_headers():
    file = io.BytesIO(b"0123456789")

    status, _, bodies = asked(Application(lambda environ: environ["wsgi.file_wrapper"](file)), method="HEAD")

    assert (status, bodies, file.closed) == (201, [b""], True)


def test_who_left_is_sent_nothing_more():
    sent = []

    def pieces():
        for number in range(1_000):
            sent.append(number)
            yield b"x"
            time.sleep(0.01)

    asked_once = Application(lambda environ: pieces())

    async def ask():
        communicator = ApplicationCommunicator(Bridge(asked_once, threads=2), {**SCOPE})
        await communicator.send_input({"type": "http.request", "body": b"", "more_body": False})
        await communicator.receive_output(5)
        await communicator.send_input({"type": "http.disconnect"})
        await communicator.wait(5)

    asyncio.run(ask())
    assert len(sent) < 100


def test_who_waits_to_be_told_to_send_a_body_that_nobody_wants_is_told_that_it_is_over():
    def told(answer):
        expecting = headers(("expect", "100-continue"), ("content-length", "4"))
        return asked(Application(answer), b"abcd", headers=expecting)[1].get(b"Connection")

    assert told(lambda environ: [b"no"]) == b"close"
    assert told(None) is None


def test_what_fails_half_way_is_closed_and_is_not_taken_for_whole():
    closed = []

    class Pieces:
        def __iter__(self):
            yield b"first"
            raise OSError("the disk is gone")

        def close(self):
            closed.append(True)

    with pytest.raises(OSError, match="the disk is gone"):
        asked(Application(lambda environ: Pieces()))
    assert closed
