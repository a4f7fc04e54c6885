"""How best to record answers durably: five ways, on SQLite and PostgreSQL, with 1, 8 and 64 callers in two processes.

    python bench/journal.py [--seconds 2] [--rounds 3]

orm: each caller inserts its own row by the ORM. alone: the same by SQL that is compiled once. together: as the
product does in threads, whoever may write next writes for all that wait. writer: a thread of its own writes for all.
loop: as the product does on an event loop, whose tasks the callers are; only this one also has the database confirm
who asks and what serves.
Prints rows per second and the 99th percentile of a call, the median of the rounds, and the ratio to `orm`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

BACKEND = Path(__file__).resolve().parents[1] / "backend/server"
sys.path.insert(0, str(BACKEND))

from tests import postgresql  # noqa: E402

PROCESSES = 2
CALLERS = (1, 8, 64)


def _orm(rows: list[Any]) -> list[int]:
    from apps.endpoints.models import MLRequest

    return [request.pk for request in MLRequest.objects.bulk_create([MLRequest(**row._asdict()) for row in rows])]


def _alone(rows: list[Any]) -> list[int]:
    from apps.endpoints import journal

    return journal.insert(rows)


def _together(rows: list[Any]) -> list[int]:
    from apps.endpoints.journal import journal

    return journal.record(rows)


class _Writer:
    """A thread that writes what lies in its queue, all of it at once."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[list[Any], Future]] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()

    def __call__(self, rows: list[Any]) -> list[int]:
        done: Future = Future()
        self._queue.put((rows, done))
        return done.result()

    def _write(self) -> None:
        while True:
            calls = [self._queue.get()]
            while not self._queue.empty():
                calls.append(self._queue.get())
            ids = iter(_alone([row for rows, _ in calls for row in rows]))
            for rows, done in calls:
                done.set_result([next(ids) for _ in rows])


class _Known(NamedTuple):
    """Whose requests are recorded, of whom, and on what they rest."""

    algorithm: int
    premise: tuple[Any, ...]


WAYS: dict[str, Callable[[], Callable[[list[Any]], list[int]]]] = {
    "orm": lambda: _orm,
    "alone": lambda: _alone,
    "together": lambda: _together,
    "writer": _Writer,
}
LOOP = "loop"


def _load(way: str, callers: int, seconds: float, known: _Known, ready: Any, told: Any) -> None:
    """One process: callers that record until time is over; tells how long each call took, in seconds."""
    import django

    django.setup()
    from django.utils import timezone

    from apps.endpoints import checkpoints
    from apps.endpoints.journal import NewRequest

    checkpoints.begin()
    customer = {f"Column{number}": number * 1.5 for number in range(12)}

    def row() -> NewRequest:
        now, answer = timezone.now(), {"probability": 0.5, "label": "0"}
        return NewRequest(customer, answer, "0", 0.5, now, 1.0, "key", known.algorithm, None)

    load = _load_of_tasks if way == LOOP else _load_of_threads
    told.put(load(way, callers, seconds, known, row, ready.wait))


def _load_of_threads(
    way: str, callers: int, seconds: float, known: _Known, row: Callable[[], Any], ready: Callable[[], object]
) -> list[float]:
    record, times = WAYS[way](), []
    begin = threading.Barrier(callers, action=ready)

    def call() -> None:
        one = row()
        began = time.perf_counter()
        record([one])
        times.append(time.perf_counter() - began)

    def caller() -> None:
        call()  # opens the connection
        begin.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            call()

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def _load_of_tasks(
    way: str, callers: int, seconds: float, known: _Known, row: Callable[[], Any], ready: Callable[[], object]
) -> list[float]:
    import uvloop

    from apps.endpoints.loop_journal import record_if
    from apps.endpoints.premise import Premise

    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"  # as server.asgi does it
    premise, times = Premise(*known.premise), []

    async def call() -> None:
        one = row()
        began = time.perf_counter()
        if await record_if(premise, one) is None:
            raise RuntimeError("The premise does not hold.")
        times.append(time.perf_counter() - began)

    async def caller(end: float) -> None:
        while time.perf_counter() < end:
            await call()

    async def main() -> None:
        await call()  # opens the connection
        ready()
        end = time.perf_counter() + seconds
        await asyncio.gather(*[caller(end) for _ in range(callers)])

    uvloop.run(main())
    return times


def _measure(way: str, callers: int, seconds: float, known: _Known) -> tuple[float, float]:
    """Rows per second, and the 99th percentile of a call in milliseconds."""
    context = multiprocessing.get_context("spawn")
    shares = [callers // PROCESSES + (number < callers % PROCESSES) for number in range(PROCESSES)]
    shares = [share for share in shares if share]
    ready, told = context.Barrier(len(shares)), context.Queue()
    processes = [context.Process(target=_load, args=(way, share, seconds, known, ready, told)) for share in shares]
    for process in processes:
        process.start()
    times = sorted(each for _ in processes for each in told.get(timeout=60 + seconds))
    for process in processes:
        process.join()
    return len(times) / seconds, times[int(len(times) * 0.99)] * 1000


MAKE = """
import json, sys
from django.contrib.auth.models import User
from django.utils import timezone
from knox.models import AuthToken
from apps.endpoints import lifecycle
from apps.endpoints.models import MLAlgorithmStatus
made = lifecycle.register("bench", "none", "1", status="testing", owner="bench", now=timezone.now(), key="none",
                          artifact="", artifact_sha256="", schema_sha256="")
digest = AuthToken.objects.create(User.objects.create_user("bench"))[0].digest
step = MLAlgorithmStatus.objects.latest("id").pk
json.dump([made.pk, [digest, made.parent_endpoint_id, "bench", step]], sys.stdout)
"""


def _known() -> _Known:
    """What is in a new database."""
    for arguments in (["migrate", "--verbosity", "0"], ["shell", "--no-imports", "-c", MAKE]):
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments], cwd=BACKEND, check=True, capture_output=True, text=True
        )
    algorithm, premise = json.loads(done.stdout)
    return _Known(algorithm, tuple(premise))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    os.environ |= {"DJANGO_SETTINGS_MODULE": "server.settings", "DEBUG": "1", "LOG_LEVEL": "WARNING"}
    tempfile.tempdir = "/var/tmp"  # /tmp may be memory, in which a durable write costs nothing
    with ExitStack() as stack:
        databases = {"SQLite": f"sqlite:///{stack.enter_context(tempfile.TemporaryDirectory())}/bench.sqlite3"}
        if postgresql.binaries():
            databases["PostgreSQL"] = postgresql.new_database(stack.enter_context(postgresql.running(durable=True)))
        for name, url in databases.items():
            os.environ["DATABASE_URL"] = url
            known = _known()
            for callers in CALLERS:
                figures: dict[str, list[tuple[float, float]]] = {way: [] for way in (*WAYS, LOOP)}
                for _ in range(asked.rounds):
                    for way, found in figures.items():
                        found.append(_measure(way, callers, asked.seconds, known))
                medians = {
                    way: [statistics.median(one) for one in zip(*of, strict=True)] for way, of in figures.items()
                }
                for way, (rate, p99) in medians.items():
                    sys.stdout.write(
                        f"{name:<10} {callers:>3} callers  {way:<9} {rate:>7,.0f} rows/s"
                        f"  x{rate / medians['orm'][0]:.2f}  p99 {p99:>7.1f} ms\n"
                    )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
