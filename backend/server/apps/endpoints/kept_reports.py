"""The reports of large A/B tests, which take seconds to count, kept in the database for whoever looks next.

Workers count them anew every few minutes, so that nobody waits. Each says as of when it is; nothing is decided by them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import Any

from django.db import DatabaseError, InterfaceError
from django.db.models import F, Q

from apps.endpoints.models import ABTest, KeptReport
from apps.endpoints.report import report

logger = logging.getLogger(__name__)

# Of documents: one that was kept with another is not read, so raise it with whatever changes in a report.
FORMAT = 1
# Requests of a test, of more than which a report takes a second or longer (bench/evidence.py).
LARGE = 100_000
# How long workers leave a report as it is; longer where counting it would take more than this share of their time.
INTERVAL = timedelta(minutes=5)
SHARE_OF_TIME = 0.05
# A request that a test has answered may be committed so long after its end; and clocks may differ by as much.
SETTLED = timedelta(minutes=1)
# Workers see to tests that ended since.
LATELY = timedelta(days=1)


def look(test: ABTest, *, now: datetime, fresh: bool = False) -> dict[str, Any]:
    """The report of a test; of a large one maybe as it was some minutes ago, unless it is to be fresh."""
    kept = KeptReport.objects.filter(abtest=test).first()
    if kept and not fresh and _may_be_shown(kept, test, now):
        return _restored(kept.document)
    told, seconds = _counted(test, now)
    if kept or _is_large(test):
        try:
            _keep(test, told, seconds, now)
        except (DatabaseError, InterfaceError) as error:  # who asked is to have it all the same
            logger.warning("The report of A/B test %s cannot be kept: %s", test.pk, str(error).strip())
    return told


def keep_up(now: datetime) -> bool:
    """Count the report of a large test that is due and that no other worker counts, if there is one.

    Returns whether there was. Raises django.db.Error.
    """
    recent = ABTest.objects.filter(Q(ended_at=None) | Q(ended_at__gt=now - LATELY))
    # One that fails comes last after that, and keeps no other waiting.
    longest_ago = F("kept_report__begun_at").asc(nulls_first=True)
    tests = recent.select_related("parent_mlalgorithm_1", "parent_mlalgorithm_2", "kept_report")
    for test in tests.order_by(longest_ago, "pk"):
        if (hasattr(test, "kept_report") or _is_large(test)) and _claim(test, now):
            told, seconds = _counted(test, now)
            _keep(test, told, seconds, now)
            logger.info("The report of A/B test %s, which is large, was counted in %.1f s.", test.pk, seconds)
            return True
    return False


def _is_large(test: ABTest) -> bool:
    return test.requests.order_by()[LARGE : LARGE + 1].exists()


def _counted(test: ABTest, now: datetime) -> tuple[dict[str, Any], float]:
    """A report, and the seconds that it took."""
    began = time.monotonic()
    return report(test, now=now), time.monotonic() - began


def _claim(test: ABTest, now: datetime) -> bool:
    """Whether a worker is to count now. Of several who ask at once one is."""
    kept, _ = KeptReport.objects.get_or_create(abtest=test)
    has_ended = test.ended_at is not None
    is_at_rest = kept.begun_at is not None and _is_recent(kept.begun_at, now, _interval(kept))
    if _is_final(kept) or (is_at_rest and kept.begun_after_end == has_ended):
        return False
    as_seen = KeptReport.objects.filter(abtest=test, begun_at=kept.begun_at, begun_after_end=kept.begun_after_end)
    return as_seen.update(begun_at=now, begun_after_end=has_ended) == 1


def _keep(test: ABTest, told: dict[str, Any], seconds: float, now: datetime) -> None:
    """Unless by now a fresher one is kept."""
    KeptReport.objects.get_or_create(abtest=test)
    is_fresher = Q(format=FORMAT, counted_at__gt=now, counted_at__lte=now + SETTLED)
    older = KeptReport.objects.filter(abtest=test).exclude(is_fresher)
    older.update(counted_at=now, seconds=seconds, document=_stored(told), format=FORMAT)


def _may_be_shown(kept: KeptReport, test: ABTest, now: datetime) -> bool:
    """Where no worker sees to it, a report is shown for twice as long as one would leave it."""
    if kept.format != FORMAT or bool(kept.document["ended_at"]) != bool(test.ended_at):
        return False
    return _is_final(kept) or _is_recent(kept.counted_at, now, 2 * _interval(kept))


def _is_recent(moment: datetime, now: datetime, interval: timedelta) -> bool:
    """A moment that is yet to come was told by a clock that is wrong."""
    return -SETTLED <= now - moment <= interval


def _interval(kept: KeptReport) -> timedelta:
    return max(INTERVAL, timedelta(seconds=kept.seconds / SHARE_OF_TIME))


def _is_final(kept: KeptReport) -> bool:
    ended_at = kept.document["ended_at"] if kept.format == FORMAT else None
    return ended_at is not None and kept.counted_at > datetime.fromisoformat(ended_at) + SETTLED


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
