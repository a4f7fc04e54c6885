"""A/B tests: two algorithms share an endpoint's traffic until someone stops the test and the better one wins."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Count, F, Q

from apps.endpoints import lifecycle
from apps.endpoints.models import ABTest, MLAlgorithm, MLRequest, Status
from apps.ml.artifacts import ArtifactError
from apps.ml.registry import registry


class ABTestError(Exception):
    """A test that cannot be started; the message says why."""


@dataclass(frozen=True)
class ArmScore:
    """How one algorithm did in a test. Only labelled requests of the test count."""

    algorithm: MLAlgorithm
    labelled: int
    correct: int

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"{self.algorithm}: no labelled requests"
        counts = f"{self.correct} of {self.labelled} labelled requests right"
        return f"{self.algorithm}: {counts} (accuracy {self.accuracy:.4f})"


def start(title: str, first: MLAlgorithm, second: MLAlgorithm, *, by: str, now: datetime, **plan: Any) -> ABTest:
    """Put both algorithms into `ab_testing` and share the endpoint's traffic between them. Raises ABTestError.

    plan: fields of ABTest, within the bounds that its validators set; what it leaves out is as the model, the setting
    ABTEST_POLICY and the endpoint's `maturity_days` say.
    """
    if first.pk == second.pk:
        raise ABTestError("An A/B test compares two different algorithms; these are the same.")
    if first.parent_endpoint_id != second.parent_endpoint_id:
        raise ABTestError(
            f"An A/B test compares two algorithms of one endpoint; {first} belongs to {first.parent_endpoint}, "
            f"{second} to {second.parent_endpoint}."
        )
    with transaction.atomic():
        endpoint = lifecycle.lock(first.parent_endpoint_id)
        running = endpoint.abtests.running().first()
        if running:
            raise ABTestError(
                f"A/B test {running.pk} ({running.title}) is already running on endpoint {endpoint}: "
                f"stop it first with POST /api/v1/stop_ab_test/{running.pk}."
            )
        for algorithm in (first, second):
            if not algorithm.statuses.served().exists():
                raise ABTestError(f"{algorithm} is retired; give it another status before it is tested.")
            try:
                registry.get(algorithm)
            except ArtifactError as error:
                raise ABTestError(f"{algorithm} cannot answer a test's requests: {error}") from error
        holder = lifecycle.in_production(endpoint.pk)
        test = ABTest.objects.create(
            title=title,
            created_by=by,
            created_at=now,
            parent_mlalgorithm_1=first,
            parent_mlalgorithm_2=second,
            parent_endpoint=endpoint,
            champion=holder if holder in (first, second) else None,
            **{"policy": settings.ABTEST_POLICY, "maturity_days": endpoint.maturity_days, **plan},
        )
        for algorithm in (first, second):
            lifecycle.move(algorithm, Status.AB_TESTING, by=by, now=now)
    return test


@dataclass(frozen=True)
class Traffic:
    """How a running test shares out an endpoint's requests."""

    test_id: int
    design: str
    salt: str
    weight: float

    def asks_challenger(self, customer_key: str) -> bool:
        """Whether the challenger answers: for one customer always the same, without a key by chance."""
        return (_fraction(self.salt, customer_key) if customer_key else random.random()) < self.weight


def _fraction(salt: str, customer_key: str) -> float:
    """Where a test puts a customer between 0 and 1: evenly over all keys, and anew in each test."""
    digest = hashlib.sha256(f"{salt}:{customer_key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def scores(test: ABTest) -> tuple[ArmScore, ArmScore]:
    """Both arms on the test's labelled requests, counted by the database."""
    return scores_of([test])[test.pk]


def scores_of(tests: Iterable[ABTest]) -> dict[int, tuple[ArmScore, ArmScore]]:
    """The scores of several tests, by their ids, from one query."""
    tests = list(tests)
    counted = {
        (test, algorithm): counts
        for test, algorithm, *counts in MLRequest.objects.filter(abtest__in=tests)
        .labelled()
        .values_list("abtest", "parent_mlalgorithm")
        .annotate(labelled=Count("*"), correct=Count("feedback", filter=Q(response=F("feedback"))))
    }

    def score(test: ABTest, algorithm: MLAlgorithm) -> ArmScore:
        return ArmScore(algorithm, *counted.get((test.pk, algorithm.pk), (0, 0)))

    return {test.pk: (score(test, test.parent_mlalgorithm_1), score(test, test.parent_mlalgorithm_2)) for test in tests}


def stop(test: ABTest, *, by: str, now: datetime) -> tuple[ABTest, bool]:
    """End a test; returns it and whether this call ended it (False when it had ended before).

    The more accurate on labelled requests goes to production, the other to testing. A tie, or an arm
    without labels, leaves production as it was when the test began.
    """
    with transaction.atomic():
        lifecycle.lock(test.parent_endpoint_id)
        test = ABTest.objects.select_related("parent_mlalgorithm_1", "parent_mlalgorithm_2", "champion").get(pk=test.pk)
        if test.ended_at:
            return test, False
        arms = scores(test)
        winner, reason = _winner(test, arms)
        for arm in arms:
            if winner is None or arm.algorithm.pk != winner.pk:
                lifecycle.move(arm.algorithm, Status.TESTING, by=by, now=now)
        if winner:
            lifecycle.promote(winner, by=by, now=now)
        test.ended_at = now
        test.summary = f"{arms[0]}. {arms[1]}. {reason} Stopped by {by}."
        test.save(update_fields=["ended_at", "summary"])
    return test, True


def _winner(test: ABTest, arms: tuple[ArmScore, ArmScore]) -> tuple[MLAlgorithm | None, str]:
    """Who goes to production, or None when neither does, and a sentence that says why."""
    first, second = arms
    if first.accuracy is not None and second.accuracy is not None and first.accuracy != second.accuracy:
        winner = first if first.accuracy > second.accuracy else second
        return winner.algorithm, f"{winner.algorithm} is the more accurate and goes to production."
    why = (
        "Both are equally accurate" if first.labelled and second.labelled else "There are not enough labels to compare"
    )
    if test.champion:
        return test.champion, f"{why}: {test.champion} keeps production."
    return None, f"{why}, and neither held production when the test began: production stays as it is."
