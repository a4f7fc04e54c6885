#!/usr/bin/env python
"""How uvicorn serves: `make serve`, the production example and the benchmarks all run this file.

    python backend/server/serve.py [APPLICATION]

APPLICATION is server.asgi, unless the benchmarks ask for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import logging
import logging.config
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from itertools import chain
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import httptools
import uvicorn
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server import serving
from server.bridge import BREAKS_OFF, WHOLE_ANSWER

# How long a stopping server goes on with the requests that it has accepted.
GRACE_SECONDS = 30
# The exit code of a process that could not load the application: another one could not either.
NOT_LOADED = 3
BACKLOG = 1024
# Counts for connections on which nothing is asked, or not to its end: longer than nginx keeps idle ones (60 s), so that
# it never writes into one that closes.
IDLE_SECONDS = 75
# How often, during that time, it is looked whether a body still comes.
LOOKS = 5
# Of an address, and of all headers of a request.
MOST_BYTES = 65_536
MOST_HEADERS = 100
CAN_MASK = hasattr(signal, "pthread_sigmask")
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} if CAN_MASK else set()
IS_LINUX = sys.platform == "linux"
PROCESSES = multiprocessing.get_context("fork" if IS_LINUX else "spawn")

logger = logging.getLogger("server")


class Cycle(RequestResponseCycle):
    """uvicorn's, for whole answers too. Its own way checks and joins each header anew."""

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] != WHOLE_ANSWER:
            await super().send(message)
            return
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        content = [STATUS_LINE[200], *(b"%b: %b\r\n" % header for header in self.default_headers), message["head"]]
        if not self.keep_alive:
            content.append(b"connection: close\r\n")
        content += [b"\r\n", message["body"]]
        self.transport.write(b"".join(content))
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class Flow(FlowControl):
    """uvicorn's, but reads no more requests while some wait for their turn: a client could send ever more of them."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized):
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds for what comes before a body, and for how long one may ask.

    Offers to go on in another protocol are passed over; uvicorn would take the body for the next request.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        self._is_in_head, self._is_in_body, self._is_upgrade = True, False, False
        self._head_bytes = self._begun = 0
        self._data = self._rest = b""
        self._refusal = "400 Bad Request"
        self._end_at(self.loop.time() + IDLE_SECONDS)

    def data_received(self, data: bytes) -> None:
        timer = self.timeout_keep_alive_task
        end = timer.when() if timer else self.loop.time() + IDLE_SECONDS
        was_between = not (self._is_in_body or self._head_bytes)
        self._begun, self._rest = 0, data
        while self._rest and not self.transport.is_closing():
            self._data, self._rest = self._rest, b""
            super().data_received(self._data)
        self._data = b""  # which a connection may keep for long
        if self.transport.is_closing():
            return
        if self._is_in_head:  # of which all of the data is a part, if nothing else was in it
            is_all = self._begun == 0 or (self._begun == 1 and was_between)
            self._head_bytes += len(data) if is_all else 1
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self._head_bytes > MOST_BYTES:
            self._refuse("431 Request Header Fields Too Large" if self.headers else "414 URI Too Long")
        elif not is_answering:
            self._end_at(end)  # which uvicorn has put off
        elif self._is_in_body:
            self._wait_for_body()

    def _unsupported_upgrade_warning(self) -> None:
        """What uvicorn calls when a head offers another protocol, at which its parser stops."""
        if self._is_upgrade:  # else it is CONNECT, after which nothing is asked
            self._is_upgrade = False
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
            self._rest = self._head_without_offer() + self._data[sys.exc_info()[1].args[0] :]

    def _head_without_offer(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self._method, self.url, self._version.encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(word for word in map(bytes.strip, value.split(b",")) if word.lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def _wait_for_body(self, looks: int = LOOKS) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(IDLE_SECONDS / LOOKS, self._look_for_body, looks - 1)

    def _look_for_body(self, looks: int) -> None:
        """Give it up after so many more; what it is our own doing that nothing comes does not count."""
        if self.flow.read_paused or self.cycle.waiting_for_100_continue:
            self._wait_for_body()
        elif looks:
            self._wait_for_body(looks)
        elif self.cycle.more_body:
            self._break_off()

    def _break_off(self) -> None:
        """Whoever reads a body learns that there is no more of it."""
        self.cycle.keep_alive = False
        self.cycle.scope[BREAKS_OFF] = True
        self.cycle.more_body = False
        self.cycle.message_event.set()

    def eof_received(self) -> bool:
        """A client may say that it has sent everything, and wait for its answer. Whether the connection stays."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        self.cycle.keep_alive = False
        if self.cycle.more_body:
            self._break_off()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # which uvicorn leaves to itself where a connection was reset

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._head_bytes = True, 0
        self._begun += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        """Not those after a body in chunks, which would pass for such as came before it."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_message_complete(self) -> None:
        if self._is_upgrade:  # it has not begun yet
            return
        super().on_message_complete()
        self._is_in_body = False

    def on_headers_complete(self) -> None:
        method = self.parser.get_method()
        self._is_upgrade = self.parser.should_upgrade() and method != b"CONNECT"
        if self._is_upgrade:
            self._method, self._version = method, self.parser.get_http_version()
            return
        self._is_in_head, self._is_in_body, self._head_bytes = False, True, 0
        if len(self.url) > MOST_BYTES:
            self._refusal = "414 URI Too Long"
        elif len(self.headers) > MOST_HEADERS:
            self._refusal = "431 Request Header Fields Too Large"
        else:
            self.scope["extensions"] = {WHOLE_ANSWER: {}}
            super().on_headers_complete()
            # What may come after a body in chunks has no bounds.
            is_in_chunks = any(name == b"transfer-encoding" for name, _ in self.headers)
            if self.server_state.is_ending or is_in_chunks or method == b"CONNECT":
                self.cycle.keep_alive = False
            return
        raise ValueError(self._refusal)  # the parser ends with it, and uvicorn refuses

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_in_body and not self.cycle.response_complete:  # of the next one, which waited for its turn
            self._wait_for_body()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.__class__ = Cycle  # uvicorn has no place to say which class it is to make
        super()._start_asgi_task(cycle, app)

    def _refuse(self, why: str) -> None:
        self._refusal = why
        self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # which is owed, and comes first
            self.flow.pause_reading()
            if self.cycle.more_body:
                self._break_off()
            self.cycle.keep_alive = False
            return
        self.transport.write(f"HTTP/1.1 {self._refusal}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        self.transport.close()

    def _end_at(self, end: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(end, self.timeout_keep_alive_handler)


class Server(uvicorn.Server):
    """uvicorn in one process: when it is told to end, it first reads what it has accepted."""

    def __init__(self, config: uvicorn.Config, serves: Event):
        super().__init__(config)
        self.server_state.is_ending = False
        self._serves = serves

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._queues = [each.dup() for each in sockets or []]
        await super().startup(sockets)
        self._serves.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first process tells it by SIGTERM; uvicorn would die of the signal in the end."""
        signal.signal(signal.SIGTERM, self.handle_exit)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn closes connections of which it has read nothing yet, and the system those that nobody accepted."""
        self.server_state.is_ending = True
        for server in self.servers:
            server.close()
        await asyncio.sleep(0)  # in the next round of the loop they are closed
        for client in chain.from_iterable(map(accept_last, self._queues)):
            with contextlib.suppress(OSError):  # of one that is gone again; the others wait
                await asyncio.get_running_loop().connect_accepted_socket(self._protocol, client)
        await asyncio.sleep(0.1)
        await super().shutdown(sockets)

    def _protocol(self) -> Protocol:
        return Protocol(self.config, self.server_state, self.lifespan.state)


def accept_last(queue: socket.socket) -> list[socket.socket]:
    """Who waits to be accepted. The queue is closed at once then, as the system resets whoever comes in between."""
    queue.setblocking(False)
    clients = []
    with queue, contextlib.suppress(OSError):  # of whom none is left
        while True:
            clients.append(queue.accept()[0])
    return clients


class BatchWorkers:
    """The processes that score batch jobs. They end by themselves when this process has died."""

    def __init__(self, wanted: int):
        self._command = [sys.executable, str(Path(__file__).with_name("manage.py")), "batch_worker"]
        self._command += ["--parent", str(os.getpid())]
        self._began = [float("-inf")] * wanted
        self._running: list[subprocess.Popen | None] = [None] * wanted

    def see_to(self) -> None:
        """Start those that do not run; one that died soon after its start may do so again, and waits a little."""
        for index, process in enumerate(self._running):
            is_over = process is None or process.poll() is not None
            if is_over and time.monotonic() - self._began[index] > 5:
                self._began[index] = time.monotonic()
                self._running[index] = subprocess.Popen(self._command)

    def end(self) -> None:
        """Let each finish the part that it is at; what is left of its job goes to whoever comes next."""
        for process in filter(None, self._running):
            process.terminate()

    def wait(self, deadline: float) -> None:
        for process in filter(None, self._running):
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


class WebWorkers:
    """The processes that answer requests. They end by themselves when this process has died."""

    def __init__(self, work: Callable[[Event], None]):
        self._work = work
        self._running: list[WebWorker] = []
        self._others: list[WebWorker] = []  # that do not serve yet, or are to end

    def start(self, wanted: int) -> None:
        self._running += [self._started() for _ in range(wanted)]

    def _started(self) -> WebWorker:
        serves = PROCESSES.Event()
        process = PROCESSES.Process(target=self._work, args=[serves])
        process.start()
        return WebWorker(process, serves, time.monotonic())

    def see_to(self) -> None:
        """Replace those that have ended. Raises SystemExit if one could not load the application."""
        self._others = [worker for worker in self._others if worker.process.is_alive()]
        for index, (process, _, began) in enumerate(self._running):
            if process.is_alive():
                continue
            if process.exitcode == NOT_LOADED:
                sys.exit(1)
            logger.error("A process that answers requests has ended (%s); another one is started.", process.exitcode)
            if time.monotonic() - began < 5:
                time.sleep(1)  # what killed it so soon may kill the next one too
            self._running[index] = self._started()

    def renew(self, signals: Signals) -> set[int]:
        """Replace each, after another has begun to serve in its place; no more of them, if that one cannot.

        Nor if a signal comes meanwhile, which is returned.
        """
        for index, old in enumerate(self._running):
            new = self._started()
            self._others.append(new)
            while not new.serves.is_set():
                told = signals.wait([new.process.sentinel], 0.1)
                if told or not new.process.is_alive():
                    new.process.kill()  # nobody has asked it anything
                    return told
            self._others[-1], self._running[index] = old, new
            old.process.terminate()
        return set()

    def sentinels(self) -> list[int]:
        """Of each that runs what becomes ready when it ends."""
        return [worker.process.sentinel for worker in self._all() if worker.process.is_alive()]

    def end(self) -> None:
        """Let them answer what they have accepted."""
        for worker in self._all():
            worker.process.terminate()

    def kill(self) -> None:
        for worker in self._all():
            worker.process.kill()
            worker.process.join()

    def _all(self) -> list[WebWorker]:
        return self._running + self._others


class WebWorker(NamedTuple):
    """serves: set when it does."""

    process: BaseProcess
    serves: Event
    began: float


class Signals:
    """What this process is told from outside."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        if ENDING:
            read, self._write = os.pipe()
            os.set_blocking(read, False)
            self._ends.append(read)
        for each in ENDING:
            signal.signal(each, self._note)

    def _note(self, number: int, frame: object) -> None:
        os.write(self._write, bytes([number]))

    def wait(self, sentinels: Sequence[int], seconds: float) -> set[int]:
        """Wait for a signal or a sentinel, for so long at most; the signals that have come."""
        ready = multiprocessing.connection.wait([*sentinels, *self._ends], seconds)
        return {number for end in self._ends if end in ready for number in os.read(end, 100)}


def block_signals_at_fork() -> None:
    """A signal to a process that has just been forked would go to its copy of this one's handlers, and be lost."""
    first = os.getpid()

    def mask(how: int) -> None:
        if os.getpid() == first:
            signal.pthread_sigmask(how, ENDING)

    os.register_at_fork(before=lambda: mask(signal.SIG_BLOCK), after_in_parent=lambda: mask(signal.SIG_UNBLOCK))


def work(application: str, asked: serving.Serving, unsaid: Any, serves: Event) -> None:
    """What each process does. unsaid: a lock that is taken by the one process that says where to look."""
    if CAN_MASK:
        # A terminal tells everyone; the first process decides what it means. Until it serves, SIGTERM ends it at once:
        # it has read nothing.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    bound = bind(asked.host, asked.port, shared=IS_LINUX)
    if IS_LINUX:
        with socket.socket() as probe:
            probe.settimeout(1)  # a full queue does not answer
            # Where others answer it listens when it has loaded. Where nobody does it listens now: clients wait instead
            # of being refused, and another server sees that the port is in use.
            if probe.connect_ex((asked.host, asked.port)):
                bound.listen(BACKLOG)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        loaded = importlib.import_module(application).application
    except Exception:
        logger.exception("%s cannot be loaded.", application)
        sys.exit(NOT_LOADED)
    if unsaid.acquire(block=False):
        serving.announce(asked.address)
    config = uvicorn.Config(
        loaded,
        interface="asgi3",
        http=Protocol,
        ws="none",
        lifespan="off",
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        # Django sees to what a proxy says, and the application logs one line per request.
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        log_level=logging.ERROR,
    )
    Server(config, serves).run(sockets=[bound])
    logging.shutdown()
    os._exit(0)  # and waits for no thread whose time was over


def end_with_parent() -> None:
    """A process whose parent was killed would hold the port for ever."""
    parent = multiprocessing.parent_process()
    if os.name == "posix":
        # To join it would mean to wait for the younger workers, too, who inherit what tells that it lives.
        while os.getppid() == parent.pid:
            time.sleep(0.5)
    else:
        parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def bind(host: str, port: int, *, shared: bool) -> socket.socket:
    """A socket that does not listen yet. shared: beside others of this server, each with a part of the connections."""
    bound = socket.socket()
    if os.name == "posix":
        # Connections of an earlier server that are still closing are no hindrance. Windows would let any two share.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bound.bind((host, port))
    return bound


def refuse_busy(host: str, port: int) -> None:
    """The processes would share a port with any server of the same user. Raises SystemExit."""
    try:
        with bind(host, port, shared=False) as alone:
            alone.listen()
    except OverflowError:
        sys.exit(f"PORT must be a whole number from 1 to 65535, not '{port}'.")
    except PermissionError:
        sys.exit(f"Port {port} is reserved for the administrator. Choose another, such as PORT=8080.")
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            sys.exit(f"BIND_ADDRESS must be an IPv4 address of this machine, or 0.0.0.0 for all, not {host!r}.")
        sys.exit(f"Port {port} is in use by another program. Choose another, such as PORT=8080.")


def main(application: str = "server.asgi") -> None:
    try:
        # Before any process is started, so that a setting that cannot be read stops it with a sentence.
        logging_config = settings.LOGGING
        asked = serving.wanted()
        batch_workers = BatchWorkers(serving.batch_workers())
    except ImproperlyConfigured as error:
        sys.exit(str(error))
    refuse_busy(asked.host, asked.port)
    if not IS_LINUX:
        asked = asked._replace(workers=1)  # elsewhere processes cannot share a port so that each gets a part
    logging.config.dictConfig(logging_config)
    signals = Signals()
    if CAN_MASK:
        block_signals_at_fork()
    workers = WebWorkers(partial(work, application, asked, PROCESSES.Lock()))
    # In development a closed terminal ends the server as Ctrl-C does: at once.
    at_once = (ENDING - {signal.SIGTERM}) if settings.DEBUG else {signal.SIGINT}
    told: set[int] = set()
    try:
        workers.start(asked.workers)
        while not told & {*at_once, signal.SIGTERM}:
            workers.see_to()
            batch_workers.see_to()
            # What is left of the signals is SIGHUP.
            told = workers.renew(signals) if told else signals.wait(workers.sentinels(), 1)
    finally:
        workers.end()
        batch_workers.end()
        deadline = time.monotonic() + GRACE_SECONDS + 1  # they know how long they may take
        while not told & at_once and (sentinels := workers.sentinels()) and time.monotonic() < deadline:
            told = signals.wait(sentinels, 1)
        workers.kill()
        batch_workers.wait(deadline)


if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "server.settings")
    main(*sys.argv[1:])
