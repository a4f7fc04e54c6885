"""The reports of large A/B tests, which take seconds to count, kept in the database for whoever looks next.

Workers count them anew every few minutes, so that nobody waits. Each says as of when it is; nothing is decided by them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import Any

from django.db.models import Q

from apps.endpoints.models import ABTest, KeptReport
from apps.endpoints.report import report

logger = logging.getLogger(__name__)

# Requests of a test, of more than which a report takes a second or longer (bench/evidence.py).
LARGE = 100_000
# How long workers leave a report as it is; longer where counting would take more than a share of their time.
INTERVAL = timedelta(minutes=5)
MOST_OF_THE_TIME = 0.05
# A request that a test has answered may be committed so long after its end.
SETTLED = timedelta(minutes=1)
# Workers see to tests that ended since.
LATELY = timedelta(days=1)


def look(test: ABTest, *, now: datetime, fresh: bool = False) -> dict[str, Any]:
    """The report of a test; of a large one maybe as it was some minutes ago, unless it is to be fresh."""
    kept = None if fresh else KeptReport.objects.filter(abtest=test).first()
    if kept and _may_be_shown(kept, test, now):
        return _restored(kept.document)
    return _count(test, now)


def keep_up(now: datetime, is_stopping: Callable[[], bool] = lambda: False) -> int:
    """Count the reports of large tests that are due, and that no other worker counts; returns how many.

    Raises django.db.Error.
    """
    recent = ABTest.objects.filter(Q(ended_at=None) | Q(ended_at__gt=now - LATELY))
    counted = 0
    for test in recent.select_related("parent_mlalgorithm_1", "parent_mlalgorithm_2").order_by("pk"):
        if not is_stopping() and _is_large(test) and _claim(test, now):
            _count(test, now)
            counted += 1
    return counted


def _is_large(test: ABTest) -> bool:
    return test.requests.order_by()[LARGE : LARGE + 1].exists()


def _claim(test: ABTest, now: datetime) -> bool:
    kept, _ = KeptReport.objects.get_or_create(abtest=test)
    if kept.begun_at is not None:
        has_ended_since = test.ended_at is not None and kept.begun_at < test.ended_at
        is_due = has_ended_since or now - kept.begun_at > _interval(kept)
        if not is_due or _is_final(kept):
            return False
    return KeptReport.objects.filter(abtest=test, begun_at=kept.begun_at).update(begun_at=now) == 1


def _count(test: ABTest, now: datetime) -> dict[str, Any]:
    """A fresh report. That of a large test is kept, unless by now there is a fresher one."""
    began = time.monotonic()
    told = report(test, now=now)
    seconds = time.monotonic() - began
    if _is_large(test):
        logger.info("The report of A/B test %s, which is large, was counted in %.1f s.", test.pk, seconds)
        counted = {"begun_at": now, "counted_at": now, "seconds": seconds, "document": _stored(told)}
        KeptReport.objects.get_or_create(abtest=test)
        older = Q(counted_at=None) | Q(counted_at__lte=now)
        KeptReport.objects.filter(older, abtest=test).update(**counted)
    return told


def _may_be_shown(kept: KeptReport, test: ABTest, now: datetime) -> bool:
    """Where no worker sees to it, a report is shown for twice as long as one would leave it."""
    if kept.document is None or bool(kept.document["ended_at"]) != bool(test.ended_at):
        return False
    return _is_final(kept) or now - kept.counted_at <= 2 * _interval(kept)


def _interval(kept: KeptReport) -> timedelta:
    return max(INTERVAL, timedelta(seconds=kept.seconds / MOST_OF_THE_TIME))


def _is_final(kept: KeptReport) -> bool:
    ended_at = kept.document and kept.document["ended_at"]
    return bool(ended_at) and kept.counted_at > datetime.fromisoformat(ended_at) + SETTLED


def _stored(told: dict[str, Any]) -> dict[str, Any]:
    return _with_moments(told, lambda moment: moment.isoformat(), lambda day: day.isoformat())


def _restored(document: dict[str, Any]) -> dict[str, Any]:
    return _with_moments(document, datetime.fromisoformat, date.fromisoformat)


def _with_moments(told: dict[str, Any], moment: Callable[[Any], Any], day: Callable[[Any], Any]) -> dict[str, Any]:
    """The same, with what JSON has no form for in another one."""
    return {
        **told,
        "as_of": moment(told["as_of"]),
        "ended_at": told["ended_at"] and moment(told["ended_at"]),
        "days": [{**each, "day": day(each["day"])} for each in told["days"]],
    }
