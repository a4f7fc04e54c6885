"""What the evidence of an A/B test says: the first rule that applies decides, on accuracy alone.

1. ROLLBACK: a guardrail broke. 2. INVALID: the split is broken, or one arm's outcomes become known more often. 3. HOLD:
too few outcomes yet. 4. PROMOTE: the challenger is better, significantly. 5. KEEP: the champion is, or the horizon is
reached without a difference. 6. CONTINUE otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from apps.endpoints import statistics
from apps.endpoints.evidence import UNTREATED, Counts, Day, Evidence, Pairs
from apps.endpoints.models import Decision, MLAlgorithm
from apps.endpoints.statistics import Difference

# A broken split is told apart from chance more strictly than a better model: at every look of every test.
CHECKS_ALPHA = 0.001
REQUESTS_FOR_GUARDRAILS = 100
MOSTLY_TREATED = 0.5


@dataclass(frozen=True)
class Comparison:
    """Two algorithms on the customers whose outcome counts.

    difference: of the challenger's accuracy from the champion's, with an anytime-valid interval; None without labels.
    p: anytime-valid. lead: whom p speaks for, above 0 the challenger, below 0 the champion. more_labels: how many more
    customers would make the difference significant if it stays as it is; None when it is, or when nobody can say.
    """

    counts: tuple[Counts, Counts]
    labelled: int
    difference: Difference | None
    p: float
    lead: float
    more_labels: int | None


@dataclass(frozen=True)
class Checks:
    """Whether the two arms can be compared at all. p values; of a shadow, whose arms are the same customers, None."""

    sample_ratio_p: float | None = None
    label_rate_p: float | None = None


@dataclass(frozen=True)
class Judgement:
    """A verdict, the sentence that a manager reads, and what it rests on. warnings: what else they should know."""

    verdict: Decision.Verdict
    sentence: str
    comparison: Comparison
    checks: Checks
    warnings: Sequence[str] = ()

    @property
    def is_settled(self) -> bool:
        """Whether more outcomes are not to be waited for."""
        return self.verdict not in (Decision.Verdict.HOLD, Decision.Verdict.CONTINUE)


def judge(evidence: Evidence) -> Judgement:
    test = evidence.test
    champion, challenger = test.arms
    comparison = compare(evidence)
    checks = _checks(evidence)
    broken = _broken_guardrail(evidence) or _invalid(evidence, checks)
    verdict, sentence = broken or _on_accuracy(
        comparison,
        champion,
        challenger,
        alpha=test.alpha,
        too_few=_too_few(evidence),
        is_at_horizon=evidence.is_at_horizon,
    )
    return Judgement(verdict, sentence, comparison, checks, _warnings(evidence))


def judge_pairs(
    champion: MLAlgorithm, challenger: MLAlgorithm, pairs: Pairs, wins: Sequence[bool], *, alpha: float, minimum: int
) -> Judgement:
    """The verdict on requests that were logged before, of which there will be no more. wins: as in `Evidence`."""
    comparison = compare_pairs(pairs, wins, alpha)
    verdict, sentence = _on_accuracy(
        comparison, champion, challenger, alpha=alpha, too_few=_too_few_pairs(pairs, minimum), is_at_horizon=False
    )
    return Judgement(verdict, sentence, comparison, Checks())


def compare(evidence: Evidence) -> Comparison:
    alpha = evidence.test.alpha
    if evidence.is_paired:
        return compare_pairs(evidence.pairs, evidence.wins, alpha)
    return _compare_arms((evidence.champion.judged, evidence.challenger.judged), alpha)


def compare_pairs(pairs: Pairs, wins: Sequence[bool], alpha: float) -> Comparison:
    p = statistics.paired_p(wins)
    lost, won = pairs.only_champion, pairs.only_challenger
    return Comparison(
        pairs.counts,
        pairs.total,
        statistics.paired_difference(won, lost, pairs.total, alpha) if pairs.total else None,
        p,
        statistics.paired_lead(wins),
        None if p <= alpha else statistics.labels_to_settle_paired(won, lost, pairs.total, alpha),
    )


def _compare_arms(counts: tuple[Counts, Counts], alpha: float) -> Comparison:
    numbers = [number for arm in counts for number in (arm.correct, arm.labelled)]
    difference = statistics.split_difference(*numbers, alpha)
    p = difference.p if difference else 1.0
    more = None if p <= alpha else statistics.labels_to_settle_split(*numbers, alpha)
    lead = difference.estimate if difference else 0.0
    return Comparison(counts, sum(arm.labelled for arm in counts), difference, p, lead, more)


def day_by_day(evidence: Evidence) -> list[Comparison]:
    """What could be said at the end of each day of the evidence."""
    alpha = evidence.test.alpha
    return [
        compare_pairs(day.pairs, evidence.wins[: day.pairs.only_champion + day.pairs.only_challenger], alpha)
        if evidence.is_paired
        else _compare_arms(day.judged, alpha)
        for day in evidence.days
    ]


def _checks(evidence: Evidence) -> Checks:
    if evidence.is_paired:
        return Checks()
    champion, challenger = evidence.arms
    looks: Sequence[Day] = evidence.days
    return Checks(
        sample_ratio_p=statistics.sample_ratio_p(
            [day.customers[0] for day in looks], [day.customers[1] for day in looks], 1 - evidence.test.weight
        ),
        label_rate_p=statistics.label_rate_p(
            champion.labelled.labelled, champion.customers, challenger.labelled.labelled, challenger.customers
        ),
    )


def _broken_guardrail(evidence: Evidence) -> tuple[Decision.Verdict, str] | None:
    test, (champion, challenger) = evidence.test, evidence.arms
    asked = challenger.requests + challenger.failures
    if asked < REQUESTS_FOR_GUARDRAILS:
        return None
    what = ""
    failed, limit = challenger.failure_rate, test.guardrail_error_rate
    if limit is not None and failed is not None and failed > limit:
        what = f"it failed in {failed:.1%} of {asked:,} requests, where {limit:.1%} are allowed"
    p99, limit = challenger.latency_ms.get(99), test.guardrail_latency_p99_ms
    if not what and limit is not None and p99 is not None and p99 > limit:
        what = f"its p99 latency is {p99:.1f} ms, where {limit:g} ms are allowed"
    limit = test.guardrail_label_shift
    if not what and limit is not None and champion.requests >= REQUESTS_FOR_GUARDRAILS and challenger.requests:
        says, said = challenger.positive_share, champion.positive_share
        if abs(says - said) > limit:
            what = (
                f"it says of {says:.1%} of the customers that they stay, and the champion of {said:.1%}, where a "
                f"difference of {100 * limit:g} points is allowed"
            )
    return (Decision.Verdict.ROLLBACK, f"Take {challenger.algorithm} out of the test: {what}.") if what else None


def _invalid(evidence: Evidence, checks: Checks) -> tuple[Decision.Verdict, str] | None:
    champion, challenger = evidence.arms
    weight = evidence.test.weight
    if checks.sample_ratio_p is not None and checks.sample_ratio_p < CHECKS_ALPHA:
        what = (
            f"{champion.customers:,} customers came to {champion.algorithm} and {challenger.customers:,} to "
            f"{challenger.algorithm}, where {100 * (1 - weight):.4g}% and {100 * weight:.4g}% were planned "
            f"({_p(checks.sample_ratio_p)}): something keeps customers away from one arm"
        )
    elif checks.label_rate_p is not None and checks.label_rate_p < CHECKS_ALPHA:
        what = (
            f"the outcome is known of {champion.label_rate:.1%} of the customers of {champion.algorithm} and of "
            f"{challenger.label_rate:.1%} of those of {challenger.algorithm} ({_p(checks.label_rate_p)}): "
            "the arms are not judged on the same kind of customers"
        )
    else:
        return None
    return Decision.Verdict.INVALID, f"Do not decide on this test: {what}."


def _too_few(evidence: Evidence) -> str:
    """How far the labels are from the minimum, in words; "" when there are enough."""
    minimum = evidence.test.minimum_labelled
    if evidence.is_paired:
        return _too_few_pairs(evidence.pairs, minimum)
    fewest = min(arm.judged.labelled for arm in evidence.arms)
    return "" if fewest >= minimum else f"{fewest:,} of the {minimum:,} labelled customers that each arm needs"


def _too_few_pairs(pairs: Pairs, minimum: int) -> str:
    return "" if pairs.total >= minimum else f"{pairs.total:,} of the {minimum:,} labelled customers that are needed"


def _on_accuracy(
    comparison: Comparison,
    champion: MLAlgorithm,
    challenger: MLAlgorithm,
    *,
    alpha: float,
    too_few: str,
    is_at_horizon: bool,
) -> tuple[Decision.Verdict, str]:
    if too_few and not is_at_horizon:
        return Decision.Verdict.HOLD, f"Wait: there are {too_few}."
    difference = comparison.difference
    after = f"after {comparison.labelled:,} labelled customers"
    if difference is None:
        return Decision.Verdict.KEEP, f"Keep {champion}: the horizon is reached and there are no labels to compare."
    figures = f"{_accuracies(comparison)}; {_interval(difference, alpha)}, {_p(comparison.p)}"
    # Who was shown to be better and is so no longer is not promoted for it, nor is the other.
    is_shown = comparison.p <= alpha and difference.estimate * comparison.lead > 0
    if is_shown and comparison.lead > 0:
        return Decision.Verdict.PROMOTE, f"Promote {challenger}: {after} it is shown to be better ({figures})."
    if is_shown:
        return Decision.Verdict.KEEP, f"Keep {champion}: {after} it is shown to be better ({figures})."
    not_shown = f"Keep {champion}: {after} the challenger is not shown to be better ({figures})"
    if is_at_horizon:
        return Decision.Verdict.KEEP, f"{not_shown}, and the planned horizon is reached."
    return Decision.Verdict.CONTINUE, f"{not_shown}; {what_would_settle(comparison)}."


def what_would_settle(comparison: Comparison) -> str:
    if comparison.more_labels is None:
        return "the difference is too small to say how many more would settle it"
    return f"about {rounded(comparison.more_labels):,} more are expected to settle it"


def rounded(count: int) -> int:
    """To two digits: an expectation is no better known."""
    digits = max(len(str(count)) - 2, 0)
    return round(count, -digits)


def _accuracies(comparison: Comparison) -> str:
    champion, challenger = comparison.counts
    return f"{challenger.accuracy:.1%} right against {champion.accuracy:.1%}"


def _interval(difference: Difference, alpha: float) -> str:
    low, high = 100 * difference.low, 100 * difference.high
    return (
        f"difference {100 * difference.estimate:+.1f} points, {100 * (1 - alpha):g}% interval {low:+.1f} to {high:+.1f}"
    )


def _p(p: float) -> str:
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def _warnings(evidence: Evidence) -> list[str]:
    warnings = []
    share = evidence.treated_share
    if share > MOSTLY_TREATED:
        warnings.append(
            f"Something was done for {share:.0%} of the labelled customers because of the answer. Whoever was kept so "
            "makes a right warning look wrong: leave some alone, chosen by chance, to see which model is better."
        )
    if share and evidence.judged != UNTREATED:
        warnings.append(
            "The verdict rests on treated customers too, because too few were left alone "
            f"({evidence.test.minimum_labelled:,} are needed)."
        )
    failures = evidence.challenger.failures
    if failures and not evidence.is_paired:
        warnings.append(
            f"{evidence.challenger.algorithm} could not answer {failures:,} of its requests. The champion answered "
            "them, and they count as wrong."
        )
    if evidence.is_paired and evidence.waiting:
        warnings.append(f"The challenger has not scored {evidence.waiting:,} requests yet; a batch worker does it.")
    return warnings


def beside_the_accuracy_rule(judgement: Judgement) -> str:
    """For those who promote the more accurate whatever the evidence: what it says."""
    comparison = judgement.comparison
    if judgement.is_settled or comparison.difference is None:
        return f"The evidence says: {judgement.sentence}"
    more = comparison.more_labels
    needed = f", about {rounded(more):,} more labels would settle it" if more is not None else ""
    return f"Not yet supported by the evidence: {_p(comparison.p)}{needed}."


def record(evidence: Evidence, judgement: Judgement) -> dict[str, Any]:
    """What a verdict was made of, so that anyone can make it again, and which versions made it."""
    test, comparison, checks = evidence.test, judgement.comparison, judgement.checks
    return {
        "verdict": judgement.verdict,
        "sentence": judgement.sentence,
        "as_of": evidence.as_of.isoformat(),
        "plan": {
            name: getattr(test, name)
            for name in (
                *("design", "weight", "alpha", "minimum_labelled", "horizon_days", "horizon_labelled"),
                *("maturity_days", "guardrail_error_rate", "guardrail_latency_p99_ms", "guardrail_label_shift"),
            )
        },
        "judged_on": evidence.judged,
        "arms": [
            {
                "algorithm": str(arm.algorithm),
                "artifact_sha256": arm.algorithm.artifact_sha256,
                "requests": arm.requests,
                "failures": arm.failures,
                "customers": arm.customers,
                "labelled": asdict(arm.labelled),
                "treated": asdict(arm.treated),
                "judged": asdict(arm.judged),
            }
            for arm in evidence.arms
        ],
        "pairs": asdict(evidence.pairs) if evidence.is_paired else None,
        "by_request": [asdict(counts) for counts in evidence.by_request],
        "wins_sha256": hashlib.sha256(bytes(evidence.wins)).hexdigest() if evidence.is_paired else None,
        "difference": comparison.difference and asdict(comparison.difference),
        "p": comparison.p,
        "checks": asdict(checks),
        "versions": {name: version(name) for name in ("numpy", "scipy", "statsmodels")},
    }
