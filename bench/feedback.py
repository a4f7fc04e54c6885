"""How long it takes to record outcomes in bulk, on SQLite and PostgreSQL.

    python bench/feedback.py [--lines 100000] [--others 400000]

Posts a CSV of outcomes to /api/v1/feedback, in this process, about requests between which lie others: by request_id,
the same file again, and by customer_key with other outcomes. Prints the seconds until each was answered.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

from databases import on_each

FIRST, OUTCOME_AT = datetime(2026, 1, 1, tzinfo=UTC), "2026-03-01"
CHUNK = 10_000


def _fill(lines: int, others: int) -> list[int]:
    """Log requests of as many customers as there are lines, and others, in random order; the ids of the former."""
    import numpy as np
    from django.utils import timezone

    from apps.endpoints import journal, lifecycle
    from apps.endpoints.journal import NewRequest

    how = {"status": "testing", "owner": "bench", "now": timezone.now(), "key": "none", "artifact": ""}
    target = {"name": "IsRetained", "positive": "1", "negative": "0"}
    algorithm = lifecycle.register("bench", "none", "1", **how, artifact_sha256="", schema_sha256="", target=target)
    customer = {f"Column{number}": number * 1.5 for number in range(12)}
    numbers = np.random.default_rng(0).permutation(lines + others).tolist()
    ids = []
    for at in range(0, len(numbers), CHUNK):
        some = numbers[at : at + CHUNK]
        rows = [
            NewRequest(
                customer,
                {"probability": 0.5, "label": "0"},
                "0",
                0.5,
                FIRST + timedelta(seconds=number),
                1.0,
                f"C{number:08d}",
                algorithm.pk,
                None,
            )
            for number in some
        ]
        ids += [pk for pk, number in zip(journal.insert(rows), some, strict=True) if number < lines]
    return ids


def _measure(lines: int, others: int) -> Iterator[tuple[str, float, str]]:
    """What was sent, the seconds, and what was answered."""
    import django
    from django.core.management import call_command
    from django.db import connection

    django.setup()
    call_command("migrate", verbosity=0)
    ids = _fill(lines, others)
    connection.cursor().execute("ANALYZE")  # as PostgreSQL does by itself after some seconds
    by_id = "\n".join(["request_id,outcome", *(f"{pk},{pk % 2}" for pk in ids)])
    by_key = "\n".join(
        [
            "customer_key,outcome_at,outcome,acted_on",
            *(f"C{number:08d},{OUTCOME_AT},{number % 3 % 2},{'yes' if number % 4 else ''}" for number in range(lines)),
        ]
    )
    for what, content in [("by id", by_id), ("again", by_id), ("by customer", by_key)]:
        yield what, *_timed(lambda content=content: _post(content))


def _timed(call: Callable[[], str]) -> tuple[float, str]:
    began = time.perf_counter()
    answer = call()
    return time.perf_counter() - began, answer


def _post(content: str) -> str:
    from django.test import Client

    response = Client(SERVER_NAME="localhost").post("/api/v1/feedback", content.encode(), content_type="text/csv")
    if response.status_code != 200:
        raise SystemExit(response.content.decode())
    return response.json()["message"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--others", type=int, default=400_000)
    parser.add_argument("--name", help=argparse.SUPPRESS)  # of the database that DATABASE_URL is, to measure there
    asked = parser.parse_args()
    if asked.name:
        for what, seconds, answer in _measure(asked.lines, asked.others):
            sys.stdout.write(f"{asked.name:<11} {what:<12} {seconds:>6.1f} s  {answer}\n")
            sys.stdout.flush()
        return
    on_each(__file__)


if __name__ == "__main__":
    main()
