"""A/B tests: two algorithms share an endpoint's traffic until someone stops the test and the better one wins."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Count, F, Q

from apps.endpoints import evidence, json_text, lifecycle, verdict
from apps.endpoints.evidence import Evidence
from apps.endpoints.models import ABTest, Decision, FeedbackChange, MLAlgorithm, MLRequest, Status
from apps.endpoints.verdict import Judgement
from apps.ml.artifacts import ArtifactError
from apps.ml.registry import registry

# How long after its date a request is committed at most, unless the database stands still; and of a test for whose
# requests one need not wait, how long ago the last one came at least.
RECORDING = timedelta(seconds=1)
QUIET = timedelta(seconds=10)


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
            lifecycle.move(algorithm, Status.AB_TESTING, by=by, now=now, reason=f"A/B test {test.pk} began: {title}")
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
    shadows = [test for test in tests if test.design == ABTest.Design.SHADOW]
    labelled = MLRequest.objects.labelled()
    right, challenger_right = Q(response=F("feedback")), Q(shadow__response=F("feedback"))
    counted = {
        (test, algorithm): counts
        for test, algorithm, *counts in labelled.filter(abtest__in=[test for test in tests if test not in shadows])
        .values_list("abtest", "parent_mlalgorithm")
        .annotate(labelled=Count("*"), correct=Count("feedback", filter=right))
    }
    if shadows:
        arms = {test.pk: test.arms for test in shadows}
        for test, both, *correct in (
            labelled.filter(abtest__in=shadows, shadow__response__isnull=False)
            .values_list("abtest")
            .annotate(
                labelled=Count("*"),
                champion_correct=Count("feedback", filter=right),
                challenger_correct=Count("feedback", filter=challenger_right),
            )
        ):
            counted |= {(test, arm.pk): (both, count) for arm, count in zip(arms[test], correct, strict=True)}

    def score(test: ABTest, algorithm: MLAlgorithm) -> ArmScore:
        return ArmScore(algorithm, *counted.get((test.pk, algorithm.pk), (0, 0)))

    return {test.pk: (score(test, test.parent_mlalgorithm_1), score(test, test.parent_mlalgorithm_2)) for test in tests}


def evaluate(test: ABTest, *, by: str, now: datetime) -> tuple[Judgement, bool]:
    """What the evidence of a test says, and whether this call ended it: if that settles it, and it has `auto_apply`."""
    if test.auto_apply:
        _, judgement, ended_now = _end(test, by=by, now=now, only_if_settled=True)
        if judgement:
            return judgement, ended_now
    return verdict.judge(evidence.gather(test, now, only_for_verdict=True)), False


def recompute(decision: Decision) -> dict[str, tuple[Any, Any]]:
    """What of a decision differs, as recorded and as made now, when it is made again from the log.

    Purged requests change it, and in the counts of customers those that were answered then and took longer than
    RECORDING to be recorded.
    """
    found = evidence.gather(decision.abtest, decision.decided_at, as_it_stood=True, only_for_verdict=True)
    again = json_text.loads(json_text.dumps(verdict.record(found, verdict.judge(found))))
    return {
        name: (recorded, again[name])
        for name, recorded in decision.evidence.items()
        if name != "versions" and again[name] != recorded
    }


def stop(
    test: ABTest,
    *,
    by: str,
    now: datetime,
    force: bool = False,
    reason: str = "",
    promote: str = "",
) -> tuple[ABTest, bool]:
    """End a test by its policy; returns it and whether this call ended it (False when it had ended before).

    `accuracy`: the more accurate on labelled requests goes to production, the other to testing; a tie, or an arm
    without labels, leaves production as it was when the test began. `evidence`: only the verdict PROMOTE moves
    production. Under both, a broken guardrail leaves the champion where it was. force: against the policy, for a
    reason; promote: "champion" or "challenger", by default whichever the policy would not. Raises ABTestError.
    """
    if force and not reason.strip():
        raise ABTestError("Overruling a verdict takes a reason: send `reason` with `force`.")
    if promote and not force:
        raise ABTestError("The policy says who goes to production; to overrule it send `force` and a `reason`.")
    test, _, ended_now = _end(test, by=by, now=now, force=force, reason=reason, promote=promote)
    return test, ended_now


def _end(
    test: ABTest,
    *,
    by: str,
    now: datetime,
    force: bool = False,
    reason: str = "",
    promote: str = "",
    only_if_settled: bool = False,
) -> tuple[ABTest, Judgement | None, bool]:
    """The test, what was said of it (None if it had ended before), and whether this call ended it."""
    with transaction.atomic():
        test = _locked(test)
        if test.ended_at:
            return test, None, False
        now = _count_until(test, now)
    _let_answers_be_recorded(test, now)
    # Of a large test this takes seconds, in which nobody need wait.
    found = evidence.gather(test, now, as_it_stood=True, only_for_verdict=True)
    judgement = verdict.judge(found)
    if only_if_settled and not judgement.is_settled:
        return test, judgement, False
    outcome = _outcome(test, judgement, found)
    if force:
        outcome = _overruled(test, outcome, promote, by, reason)
    with transaction.atomic():
        test = _locked(test)
        if test.ended_at:
            return test, judgement, False
        promoted_to = _apply(test, outcome, by=by, now=now)
        test.ended_at = now
        test.summary = f"{outcome.summary} Stopped by {by}."
        test.save(update_fields=["ended_at", "summary"])
        Decision.objects.create(
            abtest=test,
            verdict=judgement.verdict,
            sentence=judgement.sentence,
            policy=test.policy,
            evidence=verdict.record(found, judgement),
            promoted=outcome.winner if promoted_to else None,
            promoted_to=promoted_to,
            forced=force,
            reason=reason.strip(),
            decided_by=by,
            decided_at=now,
        )
    return test, judgement, True


def _locked(test: ABTest) -> ABTest:
    """The test as it is now, and stays until the surrounding transaction ends."""
    lifecycle.lock(test.parent_endpoint_id)
    return ABTest.objects.select_related("parent_mlalgorithm_1", "parent_mlalgorithm_2", "champion").get(pk=test.pk)


def _count_until(test: ABTest, now: datetime) -> datetime:
    """Up to when the end of a locked test counts.

    All outcomes, and a shadow's answers, that are dated by then have been told, and none will be told later.
    """
    newest = (FeedbackChange.objects.all(), test.shadow_answers.all())
    told = [rows.order_by("-pk").values_list("created_at", flat=True).first() for rows in newest]
    test.counted_until = max(filter(None, (now, test.counted_until, *told)))
    test.save(update_fields=["counted_until"])
    return test.counted_until


def _let_answers_be_recorded(test: ABTest, now: datetime) -> None:
    """Requests are dated before they are committed, and a decision that did not see one could not be made again."""
    newest = test.requests.order_by("-pk").values_list("created_at", flat=True).first()
    if newest is not None and now - newest < QUIET:
        time.sleep(RECORDING.total_seconds())


@dataclass(frozen=True)
class _Outcome:
    """Who wins a test, None if by the accuracy rule neither does, and what is said of it."""

    winner: MLAlgorithm | None
    summary: str
    by_accuracy: bool = False


def _outcome(test: ABTest, judgement: Judgement, found: Evidence) -> _Outcome:
    champion, challenger = test.arms
    if test.policy == ABTest.Policy.EVIDENCE or judgement.verdict == Decision.Verdict.ROLLBACK:
        wins = judgement.verdict == Decision.Verdict.PROMOTE
        return _Outcome(challenger if wins else champion, " ".join([judgement.sentence, *judgement.warnings]))
    counted = dict(zip(test.arms, found.by_request, strict=True))
    arms = [
        ArmScore(arm, counted[arm].labelled, counted[arm].correct)
        for arm in (test.parent_mlalgorithm_1, test.parent_mlalgorithm_2)
    ]
    winner, why = _more_accurate(test, arms)
    said = verdict.beside_the_accuracy_rule(judgement)
    return _Outcome(winner, f"{arms[0]}. {arms[1]}. {why} {said}", by_accuracy=True)


def _overruled(test: ABTest, outcome: _Outcome, promote: str, by: str, reason: str) -> _Outcome:
    champion, challenger = test.arms
    chosen = {"champion": champion, "challenger": challenger}.get(promote)
    if chosen is None:
        chosen = champion if outcome.winner == challenger else challenger
    return _Outcome(chosen, f"{outcome.summary} Overruled by {by} in favour of {chosen}: {reason.strip()}")


def _apply(test: ABTest, outcome: _Outcome, *, by: str, now: datetime) -> str:
    """Give both algorithms their next status; returns where the winner was promoted to, "" if it was not."""
    champion, challenger = test.arms
    if outcome.by_accuracy:
        promoted = outcome.winner
        others = {arm: Status.TESTING for arm in test.arms if arm != promoted}
        target = Status.PRODUCTION
    elif outcome.winner == challenger:
        # Who held production is the last champion, to which one may want to go back.
        promoted = challenger
        others = {champion: Status.STAGING if test.champion else _status_before(champion)}
        target = Status.PRODUCTION if test.champion else test.promote_to
    else:
        promoted = test.champion
        others = {challenger: Status.TESTING} | ({} if promoted else {champion: _status_before(champion)})
        target = Status.PRODUCTION
    step = {"by": by, "now": now, "reason": f"A/B test {test.pk} ended: {test.title}"}
    for arm, status in others.items():
        lifecycle.move(arm, status, **step)
    if promoted is None:
        return ""
    if target == Status.PRODUCTION:
        lifecycle.promote(promoted, **step)
    else:
        lifecycle.move(promoted, target, **step)
    return "" if promoted == test.champion else target


def _status_before(arm: MLAlgorithm) -> str:
    return arm.statuses.exclude(status=Status.AB_TESTING).order_by("-pk").values_list("status", flat=True)[0]


def _more_accurate(test: ABTest, arms: Sequence[ArmScore]) -> tuple[MLAlgorithm | None, str]:
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
