"""How an A/B test stands: all that a manager and a statistician want to see of it, from one look at the log."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from apps.endpoints import statistics, verdict
from apps.endpoints.evidence import Arm, Evidence, gather
from apps.endpoints.models import ABTest
from apps.endpoints.statistics import Difference
from apps.endpoints.verdict import Comparison, Judgement


def report(test: ABTest, *, now: datetime) -> dict[str, Any]:
    """The report of a test as it stands, or as it ended."""
    evidence = gather(test, test.ended_at or now, as_it_stood=test.ended_at is not None)
    return _told(evidence, verdict.judge(evidence))


def _told(evidence: Evidence, judgement: Judgement) -> dict[str, Any]:
    test = evidence.test
    return {
        "abtest": test.pk,
        "title": test.title,
        "design": test.design,
        "policy": test.policy,
        "alpha": test.alpha,
        "as_of": evidence.as_of,
        "ended_at": test.ended_at,
        "summary": test.summary,
        "decision": {
            "verdict": judgement.verdict,
            "sentence": judgement.sentence,
            "warnings": list(judgement.warnings),
        },
        "judged_on": evidence.judged,
        "treated_share": evidence.treated_share,
        "champion": _arm(evidence.champion, test.alpha),
        "challenger": _arm(evidence.challenger, test.alpha),
        "difference": {**_difference(judgement.comparison), **_single_look(evidence)},
        "checks": _checks(evidence, judgement),
        "pairs": asdict(evidence.pairs) if evidence.is_paired else None,
        "waiting": evidence.waiting,
        "days": [
            {
                "day": day.day,
                "customers": list(day.customers),
                "labelled": [counts.labelled for counts in comparison.counts],
                "accuracy": [counts.accuracy for counts in comparison.counts],
                "difference": _difference(comparison),
            }
            for day, comparison in zip(evidence.days, verdict.day_by_day(evidence), strict=True)
        ],
    }


def _arm(arm: Arm, alpha: float) -> dict[str, Any]:
    untreated = arm.labelled.without(arm.treated)
    return {
        "algorithm": arm.algorithm.pk,
        "name": str(arm.algorithm),
        "requests": arm.requests,
        "failures": arm.failures,
        "customers": arm.customers,
        "labelled": arm.labelled.labelled,
        "label_rate": arm.label_rate,
        "accuracy": arm.judged.accuracy,
        "accuracy_interval": statistics.accuracy_interval(arm.judged.correct, arm.judged.labelled, alpha),
        "treated": {"labelled": arm.treated.labelled, "accuracy": arm.treated.accuracy},
        "untreated": {"labelled": untreated.labelled, "accuracy": untreated.accuracy},
        "positive_share": arm.positive_share,
        "mean_probability": arm.mean_probability,
        "brier": arm.brier,
        "roc_auc": arm.roc_auc,
        "latency_ms": {f"p{percent}": latency for percent, latency in arm.latency_ms.items()},
        "calibration": [
            {"mean_probability": mean, "stayed": stayed, "customers": customers}
            for mean, stayed, customers in arm.calibration
        ],
    }


def _difference(comparison: Comparison) -> dict[str, Any]:
    difference: Difference | None = comparison.difference
    return {
        "estimate": difference and difference.estimate,
        "interval": difference and [difference.low, difference.high],
        "p": comparison.p,
        "more_labels": comparison.more_labels,
    }


def _single_look(evidence: Evidence) -> dict[str, Any]:
    """What would hold if this were the only look, for comparison with other tools."""
    if evidence.is_paired:
        pairs = evidence.pairs
        return {"single_look": {"p": statistics.mcnemar_p(pairs.only_challenger, pairs.only_champion)}}
    champion, challenger = evidence.champion.judged, evidence.challenger.judged
    interval = statistics.newcombe_interval(
        *(champion.correct, champion.labelled, challenger.correct, challenger.labelled), evidence.test.alpha
    )
    return {"single_look": {"interval": interval and list(interval)}}


def _checks(evidence: Evidence, judgement: Judgement) -> dict[str, Any]:
    if evidence.is_paired:
        return {"sample_ratio": None, "label_rate": None}
    champion, challenger = evidence.arms
    share = 1 - evidence.test.weight
    return {
        "sample_ratio": {
            "customers": [champion.customers, challenger.customers],
            "planned": [share, evidence.test.weight],
            "p": judgement.checks.sample_ratio_p,
            "single_look_p": statistics.sample_ratio_chi_square(champion.customers, challenger.customers, share),
        },
        "label_rate": {
            "label_rates": [champion.label_rate, challenger.label_rate],
            "p": judgement.checks.label_rate_p,
        },
    }
