"""How long the evidence of a large A/B test takes, on SQLite and PostgreSQL.

    python bench/evidence.py [--requests 1000000]

Fills a split and a shadow test with so many requests, of customers of whom most ask once and of whom half are labelled,
and prints the seconds that a verdict and a report take, in this process; and for comparison those of one reading of the
test's rows that counts the customers and adds up a column. Then it stops the test while a client corrects an outcome a
hundred times a second, and prints the longest that one of these took.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

from databases import on_each

if TYPE_CHECKING:
    from apps.endpoints.models import ABTest

# Of the requests; the others are their copies, of other customers.
FIRST = 20_000
DAYS = 30
OTHER_LABEL = {"1": "0", "0": "1"}
READ = "SELECT COUNT(DISTINCT customer_key), SUM(probability) FROM endpoints_mlrequest WHERE abtest_id = %s"


def _fill(design: str, count: int) -> ABTest:
    from django.db import connection
    from django.utils import timezone

    from apps.endpoints import lifecycle
    from apps.endpoints.models import ABTest, MLRequest

    now = timezone.now()
    began = now - timedelta(days=DAYS)
    how = {"status": "testing", "owner": "bench", "now": now, "key": "none", "artifact": "", "artifact_sha256": ""}
    how |= {"schema_sha256": "", "target": {"name": "IsRetained", "positive": "1", "negative": "0"}}
    champion, challenger = (lifecycle.register(design, name, "1", **how) for name in ("champion", "challenger"))
    arms = {"parent_mlalgorithm_1": champion, "parent_mlalgorithm_2": challenger}
    plan = {"design": design, "policy": "evidence", "parent_endpoint": champion.parent_endpoint}
    test = ABTest.objects.create(title=design, created_by="bench", created_at=began, **arms, **plan)
    customer = {f"Column{number}": number * 1.5 for number in range(12)}
    draw = random.Random(0)
    first = min(count, FIRST)
    requests = []
    for number in range(first):
        who, probability = draw.randrange(2 * first), draw.random()
        label = "1" if probability >= 0.5 else "0"
        asked = began + (now - began) * (number / first)
        is_known = who % 4 < 2
        requests.append(
            MLRequest(
                input_data=customer,
                full_response={"probability": probability, "label": label},
                response=label,
                probability=probability,
                feedback=(label if draw.random() < 0.8 else OTHER_LABEL[label]) if is_known else None,
                labelled_at=asked if is_known else None,
                created_at=asked,
                latency_ms=draw.expovariate(1),
                customer_key=f"C{who}",
                parent_mlalgorithm=challenger if design == ABTest.Design.SPLIT and who % 2 else champion,
                abtest=test,
            )
        )
    MLRequest.objects.bulk_create(requests)
    copied = [field.column for field in MLRequest._meta.concrete_fields if not field.primary_key]
    copies = [{"customer_key": "customer_key || %s"}.get(column, column) for column in copied]
    with connection.cursor() as cursor:
        for start in range(first, count, first):
            cursor.execute(
                f"INSERT INTO endpoints_mlrequest ({', '.join(copied)}) SELECT {', '.join(copies)} "
                "FROM endpoints_mlrequest WHERE abtest_id = %s ORDER BY id LIMIT %s",
                [f"-{start}", test.pk, min(first, count - start)],
            )
        if design == ABTest.Design.SHADOW:
            cursor.execute(
                "INSERT INTO endpoints_shadowanswer "
                "(request_id, abtest_id, response, probability, latency_ms, failure, created_at) "
                "SELECT id, abtest_id, CASE WHEN id %% 20 > 0 THEN response WHEN response = '1' THEN '0' ELSE '1' END, "
                "probability, latency_ms, '', created_at FROM endpoints_mlrequest WHERE abtest_id = %s",
                [test.pk],
            )
    return test


def _stop(test: ABTest) -> tuple[float, float]:
    """Seconds that it takes to stop a test, and the longest that an outcome took to be recorded meanwhile."""
    from django.db import connection
    from django.utils import timezone

    from apps.endpoints import abtests, feedback

    known = test.requests.labelled().order_by("pk").values_list("pk", "feedback")[:FIRST]
    done = threading.Event()
    longest = 0.0

    def correct() -> None:
        nonlocal longest
        for pk, label in known:
            if done.wait(0.01):
                break
            began = time.perf_counter()
            feedback.record(pk, OTHER_LABEL[label], by="bench", now=timezone.now())
            longest = max(longest, time.perf_counter() - began)
        connection.close()

    with ThreadPoolExecutor(1) as pool:
        correcting = pool.submit(correct)
        began = time.perf_counter()
        try:
            abtests.stop(test, by="bench", now=timezone.now())
        finally:
            done.set()
        seconds = time.perf_counter() - began
        correcting.result()
    return seconds, longest


def _say(name: str, design: str, what: str, seconds: float) -> None:
    sys.stdout.write(f"{name:<11} {design:<7} {what:<17} {seconds:>7.2f} s\n")
    sys.stdout.flush()


def _measure(name: str, count: int) -> None:
    import django
    from django.core.management import call_command
    from django.db import connection
    from django.utils import timezone

    django.setup()
    call_command("migrate", verbosity=0)
    from apps.endpoints import evidence, kept_reports, verdict

    def read(test: ABTest) -> None:
        with connection.cursor() as cursor:
            cursor.execute(READ, [test.pk])
            cursor.fetchall()

    asked: dict[str, Callable[[ABTest], object]] = {
        "read once": read,
        "verdict": lambda test: verdict.judge(evidence.gather(test, timezone.now(), only_for_verdict=True)),
        "report": lambda test: kept_reports.look(test, now=timezone.now(), fresh=True),
        "report, kept": lambda test: kept_reports.look(test, now=timezone.now()),
    }
    import statsmodels.stats.proportion  # noqa: F401  so that no figure has the time of its import

    for design in ("split", "shadow"):
        test = _fill(design, count)
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")  # as PostgreSQL does by itself after some seconds
        for what, ask in asked.items():
            began = time.perf_counter()
            ask(test)
            _say(name, design, what, time.perf_counter() - began)
        for what, seconds in zip(("stop", "an outcome waits"), _stop(test), strict=True):
            _say(name, design, what, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--name", help=argparse.SUPPRESS)  # of the database that DATABASE_URL is, to measure there
    asked = parser.parse_args()
    if asked.name:
        _measure(asked.name, asked.requests)
    else:
        on_each(__file__)


if __name__ == "__main__":
    main()
