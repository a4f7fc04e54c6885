"""How best to record answers durably: four ways, on SQLite and PostgreSQL, with 1, 8 and 64 callers in two processes.

    python bench/journal.py [--seconds 2] [--rounds 3]

orm: each caller inserts its own row by the ORM. alone: the same by SQL that is compiled once. together: as the
product does, whoever may write next writes for all that wait. writer: a thread of its own writes for all.
Prints rows per second and the 99th percentile of a call, the median of the rounds, and the ratio to `orm`.
"""

from __future__ import annotations

import argparse
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
from typing import Any

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


WAYS: dict[str, Callable[[], Callable[[list[Any]], list[int]]]] = {
    "orm": lambda: _orm,
    "alone": lambda: _alone,
    "together": lambda: _together,
    "writer": _Writer,
}


def _load(way: str, callers: int, seconds: float, algorithm: int, ready: Any, told: Any) -> None:
    """One process: callers that record until time is over; tells how long each call took, in seconds."""
    import django

    django.setup()
    from django.utils import timezone

    from apps.endpoints import checkpoints
    from apps.endpoints.journal import NewRequest

    checkpoints.begin()
    record, times = WAYS[way](), []
    customer = {f"Column{number}": number * 1.5 for number in range(12)}

    def call() -> None:
        now = timezone.now()
        row = NewRequest(customer, {"probability": 0.5, "label": "0"}, "0", 0.5, now, 1.0, "key", algorithm, None)
        began = time.perf_counter()
        record([row])
        times.append(time.perf_counter() - began)

    def caller() -> None:
        call()  # opens the connection
        ready.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            call()

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.put(times)


def _measure(way: str, callers: int, seconds: float, algorithm: int) -> tuple[float, float]:
    """Rows per second, and the 99th percentile of a call in milliseconds."""
    context = multiprocessing.get_context("spawn")
    shares = [callers // PROCESSES + (number < callers % PROCESSES) for number in range(PROCESSES)]
    ready, told = context.Barrier(callers), context.Queue()
    processes = [
        context.Process(target=_load, args=(way, share, seconds, algorithm, ready, told)) for share in shares if share
    ]
    for process in processes:
        process.start()
    times = sorted(each for _ in processes for each in told.get(timeout=60 + seconds))
    for process in processes:
        process.join()
    return len(times) / seconds, times[int(len(times) * 0.99)] * 1000


def _an_algorithm() -> int:
    """The id of an algorithm in a new database, to which the requests belong."""
    make = (
        "from apps.endpoints import lifecycle; from django.utils import timezone; import sys;"
        "sys.stdout.write(str(lifecycle.register('bench', 'none', '1', status='testing', owner='bench',"
        "now=timezone.now(), key='none', artifact='', artifact_sha256='', schema_sha256='').pk))"
    )
    for arguments in (["migrate", "--verbosity", "0"], ["shell", "--no-imports", "-c", make]):
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments], cwd=BACKEND, check=True, capture_output=True, text=True
        )
    return int(done.stdout)


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
            algorithm = _an_algorithm()
            for callers in CALLERS:
                figures: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
                for _ in range(asked.rounds):
                    for way, found in figures.items():
                        found.append(_measure(way, callers, asked.seconds, algorithm))
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
