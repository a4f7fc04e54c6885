"""Shadow tests: what the challenger says of the requests that the champion has answered.

It scores them from the log, in another process than the one that answers. So nothing that it does can harm an answer,
and what a crash has left unscored is found again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Exists, OuterRef, QuerySet, Subquery

from apps.endpoints import prediction
from apps.endpoints.models import ABTest, Endpoint, MLRequest, ShadowAnswer
from apps.endpoints.prediction import Unavailable
from apps.endpoints.turns import in_turn
from apps.ml.classifier.base import RetentionClassifier

logger = logging.getLogger(__name__)

# What is recorded together, while other writers of SQLite wait; fewer when they take long.
CHUNK_ROWS = 300
CHUNK_SECONDS = 1.0
# A request whose id was drawn may be committed so much later, among others that have been looked at.
SETTLED = timedelta(seconds=60)
# Until a challenger that cannot be loaded is tried again, and until who was not alone at a test looks at it again.
RETRY = timedelta(seconds=30)
STAND_BACK = timedelta(seconds=10)
LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Said:
    """What a model says of one customer, after how many milliseconds; or why it is no answer."""

    latency_ms: float
    response: str | None = None
    probability: float | None = None
    failure: str = ""


def read(answer: Mapping[str, Any], latency_ms: float = 0.0) -> Said:
    """What a classifier's answer says; a failure when it is nonsense."""
    if why := prediction.nonsense(answer):
        return Said(latency_ms, failure=why)
    return Said(latency_ms, answer["label"], answer["probability"])


def said_of(classifier: RetentionClassifier, row: Mapping[str, Any]) -> Said:
    """What a classifier says of one logged row; whatever it raises is a failure of its own."""
    began = time.perf_counter()
    try:
        answer = classifier.compute_prediction(row)
    except Exception as error:  # of a model, which may raise anything
        return Said(_ms_since(began), failure=prediction.failure_of(error))
    return read(answer, _ms_since(began))


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


def _in_time(said: Said) -> Said:
    limit = settings.SHADOW_TIMEOUT_MS
    if said.failure or said.latency_ms <= limit:
        return said
    return Said(said.latency_ms, failure=f"It took {said.latency_ms:,.0f} ms; the limit is {limit:,} ms.")


@dataclass
class _Place:
    """How far a test's requests have been looked at by their ids.

    marks: how far that was when it was last gone back, and the time before.
    """

    reached: int = 0
    marks: deque[int] = field(default_factory=lambda: deque([0, 0]))
    went_back: datetime = LONG_AGO
    rests_until: datetime = LONG_AGO
    is_behind: bool = False
    trouble: str = ""

    def go_back(self, now: datetime) -> None:
        """When it is time, look once more at what came since the last time but one, and was not settled then."""
        if now - self.went_back >= SETTLED:
            self.marks.append(self.reached)
            self.reached = self.marks.popleft()
            self.went_back = now


class Follower:
    """One process's part in the running shadow tests. A new one looks at all requests of each.

    is_behind: whether `follow` left requests for its next call, which need not wait for more to come.
    """

    def __init__(self) -> None:
        self.is_behind = False
        self._places: dict[int, _Place] = {}

    def follow(self, now: datetime, is_stopping: Callable[[], bool] = lambda: False) -> int:
        """Score some hundreds of the requests of each running test that have no shadow's answer yet.

        Returns how many answers were recorded; 0 when there is nothing to do at the moment. Raises django.db.Error.
        """
        running = list(_running())
        self._places = {test.pk: self._places.get(test.pk, _Place()) for test in running}
        recorded = sum(_follow(test, self._places[test.pk], now, is_stopping) for test in running)
        self.is_behind = any(place.is_behind for place in self._places.values())
        return recorded


def _running() -> QuerySet[ABTest]:
    newest = MLRequest.objects.filter(abtest=OuterRef("pk")).order_by("-pk").values("pk")[:1]
    return (
        ABTest.objects.running()
        .filter(design=ABTest.Design.SHADOW)
        .select_related("parent_mlalgorithm_1", "parent_mlalgorithm_2")
        .annotate(newest=Subquery(newest))
        .order_by("pk")
    )


def _follow(test: ABTest, place: _Place, now: datetime, is_stopping: Callable[[], bool]) -> int:
    place.is_behind = False
    if now < place.rests_until or test.newest is None:
        return 0
    if place.reached >= test.newest:
        place.go_back(now)
        return 0
    _, challenger = test.arms
    try:
        classifier = prediction.classifier_of(challenger)
    except Unavailable as error:
        if place.trouble != str(error):
            place.trouble = str(error)
            logger.error("Shadow test %s waits for its challenger, to score all that it has missed: %s", test.pk, error)
        place.rests_until = now + RETRY
        return 0
    place.trouble = ""
    rows = list(_unscored(test, place.reached)[:CHUNK_ROWS])
    scored = _scored(classifier, rows, is_stopping)
    recorded = in_turn(lambda: _record(test, scored, now)) if scored else 0
    if recorded < len(scored):  # another worker is at it
        place.rests_until = now + STAND_BACK
    elif len(scored) == len(rows) < CHUNK_ROWS:
        place.reached = test.newest
        place.go_back(now)
    elif scored:
        place.reached, _ = scored[-1]
        place.is_behind = True
    return recorded


def _unscored(test: ABTest, after: int) -> QuerySet[MLRequest]:
    """Ids and rows, in the order of the ids. Both sides begin behind `after`, lest the database reads them whole."""
    answers = ShadowAnswer.objects.filter(request=OuterRef("pk"), abtest=test, request__gt=after)
    requests = MLRequest.objects.filter(~Exists(answers), abtest=test, pk__gt=after)
    return requests.order_by("pk").values_list("pk", "input_data")


def _scored(
    classifier: RetentionClassifier, rows: Sequence[tuple[int, Any]], is_stopping: Callable[[], bool]
) -> list[tuple[int, Said]]:
    """What is said of the first rows, each by itself as a single prediction is; of all, unless they take long."""
    began = time.monotonic()
    scored = []
    for pk, row in rows:
        if is_stopping() or time.monotonic() - began > CHUNK_SECONDS:
            break
        scored.append((pk, _in_time(said_of(classifier, row))))
    return scored


def _record(test: ABTest, scored: Sequence[tuple[int, Said]], now: datetime) -> int:
    """Add the answers to requests that have none, while the test runs and nobody else does so; returns how many."""
    # What can be made before others wait is: the ORM's objects would take most of the time that the lock is held.
    rows = {pk: (pk, test.pk, said.response, said.probability, said.latency_ms, said.failure) for pk, said in scored}
    with transaction.atomic(), connection.cursor() as cursor:
        # Whoever ends the test holds this row too. With the key alone nothing interferes.
        features = connection.features
        alone = Endpoint.objects.select_for_update(
            skip_locked=features.has_select_for_update_skip_locked, no_key=features.has_select_for_no_key_update
        )
        is_mine = alone.filter(pk=test.parent_endpoint_id).first() is not None
        running = ABTest.objects.running().filter(pk=test.pk)
        if not is_mine or not running.exists():
            return 0
        moment = connection.ops.adapt_datetimefield_value(running.moment_after_counts(now))
        still = MLRequest.objects.filter(pk__in=rows, shadow=None).values_list("pk", flat=True)
        lacking = [(*rows[pk], moment) for pk in still]
        if lacking:
            cursor.executemany(_INSERT, lacking)
    return len(lacking)


_COLUMNS = [field.column for field in ShadowAnswer._meta.concrete_fields]
_INSERT = (
    f"INSERT INTO {ShadowAnswer._meta.db_table} ({', '.join(_COLUMNS)}) VALUES ({', '.join(['%s'] * len(_COLUMNS))})"
)
