#!/usr/bin/env python
"""How granian serves: `make serve`, the production example and the benchmarks all run this file.

    python backend/server/serve.py [APPLICATION]

APPLICATION is server.wsgi, unless the benchmarks ask for another.
"""

from __future__ import annotations

import errno
import importlib
import logging
import logging.config
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import granian.wsgi
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from granian import Granian
from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels

from server import serving

# How long a stopping server goes on with the requests that it has accepted.
GRACE_SECONDS = 30
# The exit code of a process that could not load the application: another one could not either.
NOT_LOADED = 3
BACKLOG = 1024
CAN_MASK = hasattr(signal, "pthread_sigmask")
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} if CAN_MASK else set()
IS_LINUX = sys.platform == "linux"
# granian's lines go where the application's go.
THROUGH_THE_ROOT = {"formatters": {}, "handlers": {}, "loggers": {"_granian": {"propagate": True}}}


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

    def stop(self) -> None:
        """Let each finish the part that it is at; what is left of its job goes to whoever comes next."""
        running = [process for process in self._running if process is not None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


class Server(Granian):
    """granian, as this product needs it: quick at Ctrl-C, and never tired of replacing a process that died."""

    def __init__(self, application: str, host: str, port: int, workers: int, threads: int, batch_workers: BatchWorkers):
        self._batch_workers = batch_workers
        super().__init__(
            application,
            host,
            port,
            interface=Interfaces.WSGI,
            workers=workers,
            blocking_threads=threads,
            # A thread that ends takes its database connection with it; this is the longest that granian takes.
            blocking_threads_idle_timeout=600,
            http=HTTPModes.http1,
            # Counts for idle connections too: longer than nginx keeps them (60 s), so that it never writes into one
            # that closes.
            http1_settings=HTTP1Settings(header_read_timeout=75_000),
            websockets=False,
            backlog=BACKLOG,
            # Errors only; the application logs one line per request itself.
            log_level=LogLevels.error,
            log_dictconfig=THROUGH_THE_ROOT,
            respawn_failed_workers=True,
            workers_kill_timeout=GRACE_SECONDS,
        )

    def signal_handler_interrupt(self, number: int | None = None, frame: object = None) -> None:
        """Ctrl-C ends it at once, also while a client is slow; SIGTERM is what lets requests end first."""
        for worker in self.wrks:
            worker.interrupt_by_parent = True  # a supervisor may have told it too
            if number == signal.SIGINT:
                worker.kill()
        if number == signal.SIGINT:
            self.workers_kill_timeout = 1
        super().signal_handler_interrupt()

    def signal_handler_reload(self, number: int | None = None, frame: object = None) -> None:
        """In development a closed terminal ends the server as Ctrl-C does."""
        if settings.DEBUG:
            self.signal_handler_interrupt(signal.SIGINT)
        else:
            super().signal_handler_reload()

    def _serve_loop(self, spawn_target: Callable[..., None], target_loader: Callable[[], Any]) -> None:
        """Replace who dies, until told to stop. granian's own loop stops when one dies twice within seconds."""
        while not self.interrupt_signal:
            while self.interrupt_children and not self.interrupt_signal:
                index = self.interrupt_children[0]
                if self.wrks[index].inner.exitcode == NOT_LOADED:
                    return
                self.interrupt_children.remove(index)
                if time.monotonic() - self.wrks[index].birth < 5:
                    time.sleep(1)  # what killed it so soon may kill the next one too
                if self.interrupt_signal:
                    return
                self._respawn_workers([index], spawn_target, target_loader)
            if self.reload_signal:
                self._reload(spawn_target, target_loader)
            self._batch_workers.see_to()
            # At most a second, since a signal may come between the question and the waiting.
            self.main_loop_interrupt.wait(1)
            self.main_loop_interrupt.clear()


def block_signals_at_fork() -> None:
    """A signal to a process that has just been forked would go to its copy of this one's handlers, and be lost."""
    first = os.getpid()

    def mask(how: int) -> None:
        if os.getpid() == first:
            signal.pthread_sigmask(how, ENDING)

    os.register_at_fork(before=lambda: mask(signal.SIG_BLOCK), after_in_parent=lambda: mask(signal.SIG_UNBLOCK))


def work(host: str, port: int, number: int, name: str | None, loader: Any, sockets: Any, *more: Any) -> None:
    """What each process does, with what granian tells it."""
    if CAN_MASK:
        # A terminal tells everyone; the first process decides what it means.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    listener = None
    if IS_LINUX:
        bound = bind(host, port, shared=True)
        with socket.socket() as probe:
            probe.settimeout(1)  # a full queue does not answer
            # Where others answer it listens when it has loaded. Where nobody does it listens now: clients wait instead
            # of being refused, and another server sees that the port is in use.
            if probe.connect_ex((host, port)):
                bound.listen(BACKLOG)
        listener = bound.detach()
        sockets = (None, SocketHolder(listener, False, BACKLOG)), None
    if CAN_MASK:
        threading.Thread(target=end_when_told, args=[listener], daemon=True).start()
    threading.Thread(target=end_with_parent, daemon=True).start()
    # granian gives each request a copy of the environment, where HTTP_PROXY would pass for a header, and failures
    # would show passwords.
    granian.wsgi.os = SimpleNamespace(environ={})
    Granian._spawn_wsgi_worker(number, name, loader, sockets, *more)


def end_when_told(listener: int | None) -> None:
    """A signal that comes while granian's main thread is about to wait would be seen only when it has waited."""
    signal.sigwait({signal.SIGTERM})
    handler = signal.getsignal(signal.SIGTERM)
    if handler is signal.SIG_DFL:
        os._exit(0)  # it is still loading, and has accepted nothing
    if listener:
        # granian closes connections of which it has read nothing yet. So it gets another socket in place of its own, to
        # which nobody connects, and the time to read what it has taken.
        with socket.socket() as nobody:
            nobody.setblocking(False)  # granian may be about to accept, and would wait for nobody for ever
            nobody.bind(("127.0.0.1", 0))
            nobody.listen()
            os.dup2(nobody.fileno(), listener, inheritable=False)
        time.sleep(0.1)
    handler(signal.SIGTERM, None)


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


def load(application: str, address: str, unsaid: Any) -> Callable[..., Any]:
    """Import the application, and say where to look. unsaid: a lock that is taken by the one process that says it."""
    try:
        loaded = importlib.import_module(application).application
    except Exception:
        logging.getLogger("server").exception("%s cannot be loaded.", application)
        sys.exit(NOT_LOADED)
    if unsaid.acquire(block=False):
        serving.announce(address)
    return loaded


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
    """granian would share a port with any server of the same user. Raises SystemExit."""
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


def main(application: str = "server.wsgi") -> None:
    try:
        # Before any process is started, so that a setting that cannot be read stops it with a sentence.
        logging_config = settings.LOGGING
        asked = serving.wanted()
        batch_workers = BatchWorkers(serving.batch_workers())
    except ImproperlyConfigured as error:
        sys.exit(str(error))
    refuse_busy(asked.host, asked.port)
    if sys.platform == "win32":
        asked = asked._replace(workers=1)  # all that granian can do there
    if CAN_MASK:
        block_signals_at_fork()
    server = Server(application, *asked, batch_workers)
    logging.config.dictConfig(logging_config)
    loader = partial(load, application, asked.address, multiprocessing.Lock())
    try:
        server.serve(partial(work, asked.host, asked.port), loader, wrap_loader=False)
    finally:
        batch_workers.stop()


if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "server.settings")
    main(*sys.argv[1:])
