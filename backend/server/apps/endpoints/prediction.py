"""One prediction, or many: choose the algorithm, score, record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import connection, transaction

from apps.endpoints import abtests
from apps.endpoints.models import ABTest, Endpoint, MLAlgorithm, MLAlgorithmStatus, MLRequest, Status
from apps.ml.artifacts import HOW_TO_TRAIN, ArtifactError
from apps.ml.classifier.base import RetentionClassifier
from apps.ml.registry import registry
from apps.ml.schema import InputError, Problem


class PredictionError(Exception):
    """A request that cannot be answered; the message says why and what to do."""


class UnknownEndpoint(PredictionError):
    """No endpoint has this name."""


class NoSuchAlgorithm(PredictionError):
    """Nothing that is served fits the status, version and algorithm asked for."""


class AmbiguousAlgorithm(PredictionError):
    """Several algorithms fit; the caller must name one."""


class Unavailable(PredictionError):
    """The algorithm asked for cannot answer now, or none has been trained yet."""


@dataclass(frozen=True)
class Wanted:
    """Which algorithm a caller asks for; what is None is left open."""

    status: str | None = None
    version: str | None = None
    algorithm: str | None = None

    @property
    def names_one(self) -> bool:
        return self.version is not None or self.algorithm is not None


@dataclass(frozen=True)
class Choice:
    """What answers: one algorithm, or the two of a running test."""

    algorithms: tuple[MLAlgorithm, ...]
    test: ABTest | None = None


@dataclass(frozen=True)
class Answer:
    """What one customer's request was answered with, as it was recorded."""

    request_id: int
    probability: float
    label: str
    algorithm: MLAlgorithm
    warnings: Sequence[str] = field(default=())

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
    if wanted.status is not None and wanted.status not in Status.values:
        raise NoSuchAlgorithm(f"There is no status {wanted.status!r}; use one of {', '.join(Status.values)}.")
    served = list(
        MLAlgorithmStatus.objects.served()
        .filter(parent_endpoint__name=endpoint_name)
        .select_related("parent_mlalgorithm")
        .order_by("parent_mlalgorithm_id")
    )
    if not served:
        raise _nothing_served(endpoint_name)
    endpoint_id = served[0].parent_endpoint_id
    registry.unload_all_but(endpoint_id, {status.parent_mlalgorithm_id for status in served})
    testing = any(status.status == Status.AB_TESTING for status in served)
    test = ABTest.objects.running().filter(parent_endpoint_id=endpoint_id).first() if testing else None
    champion_id = test.champion_id if test else None

    def fits(status: MLAlgorithmStatus, asked: str | None) -> bool:
        algorithm = status.parent_mlalgorithm
        stands_for = {status.status, Status.PRODUCTION if algorithm.pk == champion_id else status.status}
        return (
            (asked is None or asked in stands_for)
            and wanted.version in (None, algorithm.version)
            and wanted.algorithm in (None, algorithm.name, algorithm.key)
        )

    asked = wanted.status or (None if wanted.names_one else settings.PREDICT_DEFAULT_STATUS)
    joins_test = test and in_test and not wanted.names_one
    if joins_test and (asked == Status.AB_TESTING or (asked == Status.PRODUCTION and champion_id)):
        arms = [status.parent_mlalgorithm for status in served if status.parent_mlalgorithm_id in test.arm_ids]
        return Choice(tuple(arms), test)
    matches = [status.parent_mlalgorithm for status in served if fits(status, asked)]
    if len(matches) > 1 and asked is None:
        by_default = [s.parent_mlalgorithm for s in served if fits(s, settings.PREDICT_DEFAULT_STATUS)]
        matches = by_default or matches
    if len(matches) == 1:
        return Choice((matches[0],))
    on_offer = "; ".join(
        f"status={s.status}&algorithm={s.parent_mlalgorithm.key}&version={s.parent_mlalgorithm.version}" for s in served
    )
    description = _described(asked, wanted)
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
) -> list[Answer]:
    """Answer for each row, in order, all recorded in one transaction or none.

    as_text: the values are text, as forms send them. Raises PredictionError, InputError.
    """
    choice = choose(endpoint_name, wanted)
    if choice.test is None:
        return score(choice.algorithms[0], rows, now=now, as_text=as_text)
    arms = {algorithm.pk: algorithm for algorithm in choice.algorithms}
    assigned = [abtests.choose_arm(choice.test) for _ in rows]
    answers: dict[int, Answer] = {}
    with transaction.atomic():
        for arm_id, algorithm in arms.items():
            positions = [position for position, chosen in enumerate(assigned) if chosen == arm_id]
            if not positions:
                continue
            try:
                scored = score(
                    algorithm, [rows[position] for position in positions], test=choice.test, now=now, as_text=as_text
                )
            except InputError as error:
                raise _with_rows(error, positions) from None
            answers.update(zip(positions, scored, strict=True))
    return [answers[position] for position in range(len(rows))]


def classifier_of(algorithm: MLAlgorithm) -> RetentionClassifier:
    """The loaded classifier that answers for an algorithm. Raises Unavailable."""
    try:
        return registry.get(algorithm)
    except ArtifactError as error:
        raise Unavailable(f"{algorithm} is not available: {error}") from error


def score(
    algorithm: MLAlgorithm,
    rows: Sequence[Mapping[str, Any]],
    *,
    now: datetime,
    test: ABTest | None = None,
    as_text: bool = False,
) -> list[Answer]:
    """Score rows by one algorithm and record each as a request. Raises Unavailable, InputError."""
    began = time.perf_counter()
    classifier = classifier_of(algorithm)
    if as_text:
        rows = classifier.schema.parse_text(rows)
    results = classifier.compute_prediction(list(rows))
    keys = _customer_keys(classifier, rows)
    elapsed_ms = (time.perf_counter() - began) * 1000
    requests = [
        MLRequest(
            input_data=classifier.schema.features_of(row),
            full_response=result,
            response=result["label"],
            probability=result["probability"],
            created_at=now,
            latency_ms=elapsed_ms,
            customer_key=key,
            parent_mlalgorithm=algorithm,
            abtest=test,
        )
        for row, result, key in zip(rows, results, keys, strict=True)
    ]
    _record(requests)
    return [
        Answer(request.pk, request.probability, request.response, algorithm, request.full_response.get("warnings", ()))
        for request in requests
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


def _record(requests: list[MLRequest]) -> None:
    if connection.features.can_return_rows_from_bulk_insert:
        MLRequest.objects.bulk_create(requests)
        return
    with transaction.atomic():
        for request in requests:
            request.save(force_insert=True)


def _customer_keys(classifier: RetentionClassifier, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys, problems = [], []
    for index, row in enumerate(rows):
        try:
            keys.append(classifier.schema.customer_key(row))
        except ValueError as error:
            problems.append(Problem(classifier.schema.identifier, str(error), index))
    if problems:
        raise InputError(problems)
    return keys


def _with_rows(error: InputError, positions: Sequence[int]) -> InputError:
    return InputError([Problem(p.field, p.message, positions[p.row]) for p in error.problems])


def _described(asked: str | None, wanted: Wanted) -> str:
    parts = {"status": asked, "version": wanted.version, "algorithm": wanted.algorithm}
    return ", ".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def _nothing_served(endpoint_name: str) -> PredictionError:
    names = list(Endpoint.objects.values_list("name", flat=True)[:20])
    if not names:
        return Unavailable(f"No model has been trained yet. {HOW_TO_TRAIN}")
    if endpoint_name in names or Endpoint.objects.filter(name=endpoint_name).exists():
        return NoSuchAlgorithm(
            f"Every algorithm of endpoint {endpoint_name} is retired; give one another status first."
        )
    return UnknownEndpoint(f"There is no endpoint {endpoint_name!r}; there are: {', '.join(names)}.")
