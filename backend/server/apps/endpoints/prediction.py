"""One prediction, or many: choose the algorithm, score, record."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from numbers import Real
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import django.db
from django.conf import settings
from django.utils import timezone

from apps.endpoints import loop_journal
from apps.endpoints.abtests import Traffic
from apps.endpoints.journal import NewRequest, journal
from apps.endpoints.models import (
    FEEDBACK_LABELS,
    ABTest,
    Endpoint,
    MLAlgorithm,
    MLAlgorithmStatus,
    ShadowAnswer,
    Status,
)
from apps.endpoints.premise import Premise
from apps.endpoints.turns import in_turn
from apps.ml.artifacts import HOW_TO_TRAIN, ArtifactError
from apps.ml.classifier.base import RetentionClassifier
from apps.ml.registry import Served, registry
from apps.ml.schema import MISSING_IN_FORMS, InputError, Problem, Schema, checked_key

logger = logging.getLogger(__name__)

KEY_HEADER = "X-Customer-Key"
LONGEST_FAILURE = 500
_STATUSES = frozenset(Status.values)


class PredictionError(Exception):
    """A request that cannot be answered; the message says why and what to do."""


class UnknownEndpoint(PredictionError):
    """No endpoint has this name."""


class NoSuchAlgorithm(PredictionError):
    """Nothing that is served fits the status, version and algorithm asked for."""


class AmbiguousAlgorithm(PredictionError):
    """Several algorithms fit; the caller must name one."""


class BadCustomerKey(PredictionError):
    """The header that names the customer cannot be understood, or fits no customer of the body."""


class Unavailable(PredictionError):
    """The algorithm asked for cannot answer now, or none has been trained yet."""


class NeedsThread(BlockingIOError):
    """On an event loop the answer would keep others waiting; a thread is to give it."""


@dataclass(frozen=True)
class Wanted:
    """Which algorithm a caller asks for; what is None is left open."""

    status: str | None = None
    version: str | None = None
    algorithm: str | None = None
    default_status: str | None = None

    @property
    def unless_named(self) -> str:
        """The status that decides when nothing else does."""
        return self.default_status or settings.PREDICT_DEFAULT_STATUS

    @property
    def names_one(self) -> bool:
        return self.version is not None or self.algorithm is not None


@dataclass(frozen=True)
class Choice:
    """What answers: one algorithm, or the champion and the challenger of a running test."""

    algorithms: Sequence[MLAlgorithm]
    traffic: Traffic | None = None

    @property
    def test_id(self) -> int | None:
        return self.traffic.test_id if self.traffic else None


class Answer(NamedTuple):
    """What one customer's request was answered with, as it was recorded."""

    request_id: int
    probability: float
    label: str
    algorithm: MLAlgorithm
    warnings: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        body = {
            "probability": self.probability,
            "label": self.label,
            "status": "OK",
            "request_id": self.request_id,
            "algorithm": self.algorithm.name,
            "version": self.algorithm.version,
        }
        return {**body, "warnings": list(self.warnings)} if self.warnings else body

    def as_batch_json(self) -> dict[str, Any]:
        body = self.as_json()
        prediction = {name: body[name] for name in ("probability", "label", "status", "warnings") if name in body}
        return {"id": self.request_id, "prediction": prediction}


@dataclass(frozen=True)
class Availability:
    """Whether a served algorithm can answer; `reason` says why not, None when it can."""

    endpoint: str
    algorithm: MLAlgorithm
    in_production: bool
    reason: str | None


def choose(endpoint_name: str, wanted: Wanted, *, in_test: bool = True) -> Choice:
    """What serves an endpoint for a caller's wish. in_test=False keeps out of a running A/B test.

    A caller who names a version or an algorithm gets that one. While a test runs, its champion still
    counts as the production algorithm. Raises PredictionError.
    """
    served = registry.served(endpoint_name)
    if not served:
        raise _nothing_served(endpoint_name)
    return _choose(served, wanted, in_test=in_test)


def _choose(served: Sequence[MLAlgorithmStatus], wanted: Wanted, *, in_test: bool = True) -> Choice:
    if wanted.status is not None and wanted.status not in _STATUSES:
        names = ", ".join(status for status in Status.values if status != Status.RETIRED)
        raise NoSuchAlgorithm(f"There is no status {wanted.status!r}; use one of {names}.")
    named = [
        status
        for status in served
        if wanted.version in (None, status.parent_mlalgorithm.version)
        and wanted.algorithm in (None, status.parent_mlalgorithm.name, status.parent_mlalgorithm.key)
    ]

    def fitting(asked: str | None) -> list[MLAlgorithm]:
        return [
            status.parent_mlalgorithm
            for status in named
            if asked in (None, status.status)
            or (asked == Status.PRODUCTION and status.parent_mlalgorithm_id == status.champion_id)
        ]

    asked = wanted.status or (None if wanted.names_one else wanted.unless_named)
    running = served[0]
    joins_test = running.test_id and in_test and not wanted.names_one
    if joins_test and (asked == Status.AB_TESTING or (asked == Status.PRODUCTION and running.champion_id)):
        traffic = Traffic(running.test_id, running.test_design, running.test_salt, running.test_weight)
        champion_first = sorted(fitting(Status.AB_TESTING), key=lambda arm: arm.pk == running.challenger_id)
        return Choice(champion_first[:1] if traffic.design == ABTest.Design.SHADOW else champion_first, traffic)
    matches = fitting(asked)
    if len(matches) > 1 and asked is None:
        matches = fitting(wanted.unless_named) or matches
    if len(matches) == 1:
        return Choice(matches)
    on_offer = "; ".join(
        f"status={s.status}&algorithm={s.parent_mlalgorithm.key}&version={s.parent_mlalgorithm.version}" for s in served
    )
    parts = {"status": asked, "version": wanted.version, "algorithm": wanted.algorithm}
    description = ", ".join(f"{name}={value}" for name, value in parts.items() if value is not None)
    if matches:
        raise AmbiguousAlgorithm(f"{len(matches)} algorithms fit {description}; name one of: {on_offer}.")
    raise NoSuchAlgorithm(f"No algorithm fits {description}; name one of: {on_offer}.")


def predict(
    endpoint_name: str,
    rows: Sequence[Mapping[str, Any]],
    wanted: Wanted,
    *,
    now: datetime,
    as_text: bool = False,
    customer_key: str = "",
) -> list[Answer]:
    """Answer for each row, in order, all recorded in one transaction or none.

    as_text: the values are text, as forms send them. customer_key: of the only row, told beside it. Raises
    PredictionError, InputError.
    """
    return score(choose(endpoint_name, wanted), rows, now=now, as_text=as_text, customer_key=customer_key)


class KnownCall(NamedTuple):
    """One customer of a caller whose token this process has met. customer_key: told beside the customer."""

    endpoint_name: str
    customer: Mapping[str, Any]
    wanted: Wanted
    token_digest: str
    now: datetime
    customer_key: str = ""


def predict_from_memory(call: KnownCall) -> Answer | None:
    """The answer by what this process knows of the token and the endpoint, if the database confirms both.

    It does so in the statement that records the answer: one statement in place of three. None, and nothing recorded,
    when something has changed, is not known or is wrong: then `predict`, after a look at the token, decides. Raises
    django.db.Error when the database fails; the answer may be recorded then, and must not be tried again.
    """
    if not journal.can_record_if():
        return None
    asked = _from_memory(call)
    pk = asked and journal.record_if(asked.premise, asked.scored.request)
    if pk is None:
        return None
    _record_failures(asked.choice, [pk], [asked.scored])
    journal.close_if_due()
    return _answer(pk, asked.scored)


async def predict_on_loop(call: KnownCall) -> Answer | None:
    """`predict_from_memory` on an event loop, which holds up nobody while the answer is recorded.

    Raises NeedsThread, and has recorded nothing, if something else would hold up others.
    """
    asked = _from_memory(call, may_block=False)
    pk = asked and await loop_journal.record_if(asked.premise, asked.scored.request)
    return None if pk is None else _answer(pk, asked.scored)


class _Asked(NamedTuple):
    """An answer that is not recorded yet, and on what it rests."""

    choice: Choice
    scored: _Scored
    premise: Premise


def _from_memory(call: KnownCall, *, may_block: bool = True) -> _Asked | None:
    """The answer by what this process knows; None when that is too little, or something is wrong.

    Raises NeedsThread if it may not block and would: for a model that is not loaded or not compiled, or by a query.
    """
    served = registry.known(call.endpoint_name)
    if served is None or served.newest_step is None or not served.statuses:
        return None
    try:
        choice = _remembered_choice(served, call.wanted)
        if not (may_block or all(map(_is_quick, choice.algorithms))):
            raise NeedsThread
        choice = _without_a_broken_champion(choice)
        rows = [call.customer]
        told_key = _checked_key(call.customer_key, rows)
        (arm,) = _arms(choice, rows, told_key)
        (scored,) = _scored_in_test(arm, choice, rows, call.now, told_key)
    except (PredictionError, InputError):
        return None
    if scored.failure and not may_block:
        raise NeedsThread
    premise = Premise(call.token_digest, served.endpoint_id, call.endpoint_name, served.newest_step)
    return _Asked(choice, scored, premise)


def _is_quick(algorithm: MLAlgorithm) -> bool:
    classifier = registry.endpoints.get(algorithm.pk)
    return classifier is not None and classifier.is_compiled


# What came of callers' wishes, for as long as the registry knows what is served.
_choices: WeakKeyDictionary[Served, dict[Wanted, Choice]] = WeakKeyDictionary()


def _remembered_choice(served: Served, wanted: Wanted) -> Choice:
    choices = _choices.setdefault(served, {})
    choice = choices.get(wanted)
    if choice is None:
        choice = choices[wanted] = _choose(served.statuses, wanted)
    return choice


def classifier_of(algorithm: MLAlgorithm) -> RetentionClassifier:
    """The loaded classifier that answers for an algorithm. Raises Unavailable."""
    try:
        return registry.get(algorithm)
    except ArtifactError as error:
        raise Unavailable(f"{algorithm} is not available: {error}") from error


def score(
    choice: Choice,
    rows: Sequence[Mapping[str, Any]],
    *,
    now: datetime,
    as_text: bool = False,
    customer_key: str = "",
) -> list[Answer]:
    """Score each row by the algorithm chosen, or in a test by the customer's, and record them all or none.

    Whatever a test's challenger cannot answer the champion does, outside the test, and it is recorded as a failure.
    customer_key: of the only row, told beside it. Raises Unavailable, BadCustomerKey, InputError.
    """
    choice = _without_a_broken_champion(choice)
    told_key = _checked_key(customer_key, rows)
    arms = _arms(choice, rows, told_key, as_text)
    recorded: dict[int, _Scored] = {}
    problems: list[Problem] = []
    for algorithm in choice.algorithms:
        positions = [position for position, arm in enumerate(arms) if arm is algorithm]
        if not positions:
            continue
        try:
            own = [rows[position] for position in positions]
            scored = _scored_in_test(algorithm, choice, own, now, told_key, as_text)
        except InputError as error:
            problems += [replace(problem, row=positions[problem.row]) for problem in error.problems]
            continue
        recorded |= zip(positions, scored, strict=True)
    if problems:
        raise InputError(problems)
    in_order = [recorded[position] for position in range(len(rows))]
    ids = journal.record([scored.request for scored in in_order])
    _record_failures(choice, ids, in_order)
    return [_answer(pk, scored) for pk, scored in zip(ids, in_order, strict=True)]


class _Scored(NamedTuple):
    """What an algorithm answers, not recorded yet. failure: why the challenger, whose customer it is, does not."""

    algorithm: MLAlgorithm
    request: NewRequest
    failure: str = ""


def _answer(pk: int, scored: _Scored) -> Answer:
    request = scored.request
    warnings = request.full_response.get("warnings", ())
    return Answer(pk, request.probability, request.response, scored.algorithm, warnings)


def _without_a_broken_champion(choice: Choice) -> Choice:
    """A test whose champion cannot be loaded breaks no caller: the challenger answers alone, outside the test."""
    if len(choice.algorithms) > 1:
        try:
            classifier_of(choice.algorithms[0])
        except Unavailable:
            return Choice(choice.algorithms[1:])
    return choice


def _scored_in_test(
    algorithm: MLAlgorithm, choice: Choice, rows: Sequence[Mapping[str, Any]], now: datetime, *how: Any
) -> list[_Scored]:
    """The answers for rows that are an algorithm's; of what the challenger cannot answer the champion's.

    how: as `_scored` takes it. Raises Unavailable, BadCustomerKey, and InputError for rows that the champion refuses.
    """
    champion = choice.algorithms[0]
    if algorithm is champion:
        return [_Scored(champion, request) for request in _scored(champion, rows, choice.test_id, now, *how)]

    def of_challenger(rows: Sequence[Mapping[str, Any]]) -> list[_Scored]:
        answered = _scored(algorithm, rows, choice.test_id, now, *how)
        for request in answered:
            if why := nonsense(request.full_response):
                raise ValueError(why)
        return [_Scored(algorithm, request) for request in answered]

    try:
        return of_challenger(rows)
    except Exception as error:  # of a model, which may raise anything
        failure = failure_of(error)
        instead = [_Scored(champion, request, failure) for request in _scored(champion, rows, None, now, *how)]
        if len(rows) == 1 or isinstance(error, Unavailable):
            return instead
    found = []
    for row, of_champion in zip(rows, instead, strict=True):
        try:
            found += of_challenger([row])
        except Exception as error:
            found.append(of_champion._replace(failure=failure_of(error)))
    return found


def nonsense(answer: Mapping[str, Any]) -> str:
    """Why a model's answer is none, "" if it is one."""
    probability, label = answer["probability"], answer["label"]
    if not (isinstance(probability, Real) and 0 <= probability <= 1):
        return f"It answered the probability {probability}."
    return "" if label in FEEDBACK_LABELS else f"It answered the label {label}."


def failure_of(error: Exception) -> str:
    """Why a challenger could not answer, as it is recorded."""
    # PostgreSQL stores neither NUL nor half a surrogate pair.
    text = (str(error) or type(error).__name__)[:LONGEST_FAILURE].replace("\0", "")
    return text.encode("utf-8", "backslashreplace").decode()


def _record_failures(choice: Choice, ids: Sequence[int], scored: Sequence[_Scored]) -> None:
    """Of a split test's challenger, by the requests that the champion answered in its place."""
    failures = {pk: one.failure for pk, one in zip(ids, scored, strict=True) if one.failure}
    if not failures:
        return
    what = {"abtest_id": choice.test_id, "latency_ms": 0, "created_at": timezone.now()}
    rows = [ShadowAnswer(request_id=pk, failure=failure, **what) for pk, failure in failures.items()]
    logger.warning(
        "The challenger of A/B test %s failed, and the champion answered: %s", choice.test_id, rows[0].failure
    )
    try:
        in_turn(lambda: ShadowAnswer.objects.bulk_create(rows))
    except django.db.Error:
        # The customer's answer is recorded, and is worth more than the count of failures.
        logger.exception("A failure of the challenger of A/B test %s could not be recorded", choice.test_id)


def _scored(
    algorithm: MLAlgorithm,
    rows: Sequence[Mapping[str, Any]],
    test_id: int | None,
    now: datetime,
    told_key: str,
    as_text: bool = False,
) -> list[NewRequest]:
    """What one algorithm answers for rows, as requests that are not recorded yet."""
    began = time.perf_counter()
    classifier = classifier_of(algorithm)
    schema = classifier.schema
    if as_text:
        rows = schema.parse_text(rows)
    results = classifier.compute_prediction(rows)
    keys = _customer_keys(schema, rows, told_key)
    elapsed_ms = (time.perf_counter() - began) * 1000
    algorithm_id = algorithm.pk
    return [
        NewRequest(
            input_data=schema.features_of(row),
            full_response=result,
            response=result["label"],
            probability=result["probability"],
            created_at=now,
            latency_ms=elapsed_ms,
            customer_key=key,
            parent_mlalgorithm_id=algorithm_id,
            abtest_id=test_id,
        )
        for row, result, key in zip(rows, results, keys, strict=True)
    ]


def availability() -> list[Availability]:
    """Whether each served algorithm can answer now; tries to load those that are not loaded yet."""
    champions = set(ABTest.objects.running().exclude(champion=None).values_list("champion_id", flat=True))
    found = []
    for status in MLAlgorithmStatus.objects.served().select_related("parent_mlalgorithm", "parent_endpoint"):
        try:
            classifier_of(status.parent_mlalgorithm)
            reason = None
        except Unavailable as error:
            reason = str(error)
        in_production = status.status == Status.PRODUCTION or status.parent_mlalgorithm_id in champions
        found.append(Availability(status.parent_endpoint.name, status.parent_mlalgorithm, in_production, reason))
    return found


def _arms(choice: Choice, rows: Sequence[Mapping[str, Any]], told_key: str, as_text: bool = False) -> list[MLAlgorithm]:
    """Who answers each row. A key that cannot be read counts as none here: whoever scores the row will refuse it."""
    if len(choice.algorithms) == 1:
        return [*choice.algorithms] * len(rows)
    champion, challenger = choice.algorithms
    schema = classifier_of(champion).schema

    def key_of(row: Any) -> str:
        try:
            return told_key or schema.customer_key(row, MISSING_IN_FORMS if as_text else frozenset())
        except (ValueError, AttributeError):
            return ""

    return [challenger if choice.traffic.asks_challenger(key_of(row)) else champion for row in rows]


def _checked_key(text: str, rows: Sequence[Any]) -> str:
    """A key that was told beside the body, which may name one customer only. Raises BadCustomerKey."""
    if not text:
        return ""
    if len(rows) > 1:
        raise BadCustomerKey(
            f"{KEY_HEADER} names one customer, and the body has {len(rows):,}: put each customer's key into its row."
        )
    try:
        return checked_key(text, KEY_HEADER)
    except ValueError as error:
        raise BadCustomerKey(f"{error}.") from None


def _customer_keys(schema: Schema, rows: Sequence[Mapping[str, Any]], told_key: str) -> list[str]:
    if told_key:
        return [_told_twice(schema, row, told_key) for row in rows]
    return schema.customer_keys([row.get(schema.identifier) for row in rows])


def _told_twice(schema: Schema, row: Mapping[str, Any], told_key: str) -> str:
    with suppress(ValueError):
        if schema.customer_key(row) in ("", told_key):
            return told_key
    raise BadCustomerKey(
        f"{KEY_HEADER} is {told_key!r} and {schema.identifier} is {str(row[schema.identifier])[:60]!r}: "
        "send one of them, or the same in both."
    )


def _nothing_served(endpoint_name: str) -> PredictionError:
    endpoint = Endpoint.objects.filter(name=endpoint_name).first()
    if endpoint:
        return NoSuchAlgorithm(f"Endpoint {endpoint} serves no algorithm; give a retired one another status first.")
    names = Endpoint.objects.order_by("id").values_list("name", flat=True)[:20]
    if not names:
        return Unavailable(f"No model has been trained yet. {HOW_TO_TRAIN}")
    return UnknownEndpoint(f"There is no endpoint {endpoint_name!r}; there are: {', '.join(names)}.")
