"""A comparison before any traffic moves: a challenger scores what the champion answered and whose outcome is known.

Nothing is recorded. The unit and the order are those of a test's evidence: each customer counts once, by the first of
their requests whose outcome began to count, and a request without a key is a unit by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from apps.endpoints import lifecycle, prediction, statistics, verdict
from apps.endpoints.evidence import Counts, Pairs
from apps.endpoints.models import ABTest, MLAlgorithm, MLRequest
from apps.endpoints.shadow import Said, read, said_of
from apps.endpoints.verdict import Judgement
from apps.ml.artifacts import ArtifactError, TrainingRun
from apps.ml.classifier.base import RetentionClassifier

CHUNK_ROWS = 1_000
# Of one call over HTTP: they take some seconds.
MOST_AT_ONCE = 100_000


class ReplayError(Exception):
    """Two algorithms that cannot be compared on the log; the message says why."""


class UnknownAlgorithm(ReplayError):
    """No algorithm has this id."""


class NothingToCompare(ReplayError):
    """No request is left on which the two can be compared."""


@dataclass(frozen=True)
class LeftOut:
    """Labelled requests that do not count, each for the first reason that applies.

    immature: younger than the maturity period. trained_on: by whom the challenger may have learned. repeated: of
    customers who count by another request. failures: which the challenger could not score.
    """

    immature: int = 0
    trained_on: int = 0
    repeated: int = 0
    failures: int = 0


@dataclass(frozen=True)
class Replay:
    """What came of it. run: the challenger's. by_key: whether its training customers are known, and not only when."""

    champion: MLAlgorithm
    challenger: MLAlgorithm
    run: TrainingRun
    alpha: float
    left_out: LeftOut
    pairs: Pairs
    judgement: Judgement

    @property
    def considered(self) -> int:
        return sum(asdict(self.left_out).values()) + self.pairs.total

    @property
    def by_key(self) -> bool:
        return bool(self.run.training_customers)

    def as_json(self) -> dict[str, Any]:
        comparison = self.judgement.comparison
        return {
            "champion": _arm(self.champion, comparison.counts[0], self.alpha),
            "challenger": _arm(self.challenger, comparison.counts[1], self.alpha),
            "considered": self.considered,
            "left_out": asdict(self.left_out),
            "compared": self.pairs.total,
            "training": {
                "known_by": "customer key" if self.by_key else "time",
                "cutoff": self.run.trained_at,
                "data_sha256": self.run.manifest.get("data", {}).get("sha256"),
            },
            "pairs": asdict(self.pairs),
            "difference": comparison.difference and asdict(comparison.difference),
            "p": comparison.p,
            "alpha": self.alpha,
            "verdict": self.judgement.verdict,
            "sentence": self.judgement.sentence,
        }


def _arm(algorithm: MLAlgorithm, counts: Counts, alpha: float) -> dict[str, Any]:
    low, high = statistics.accuracy_interval(counts.correct, counts.labelled, alpha)
    return {
        "id": algorithm.pk,
        "algorithm": algorithm.name,
        "version": algorithm.version,
        "correct": counts.correct,
        "accuracy": counts.accuracy,
        "low": low,
        "high": high,
    }


@dataclass(frozen=True, order=True)
class _Unit:
    """The request by which a customer counts, and what the champion said and what became of it."""

    counts_at: datetime
    pk: int
    response: str
    outcome: str


def replay(
    challenger_id: int,
    champion_id: int | None = None,
    *,
    now: datetime,
    since: datetime | None = None,
    until: datetime | None = None,
    alpha: float = 0.05,
    minimum_labelled: int = 100,
    maturity_days: int | None = None,
    most: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Replay:
    """Compare a challenger with a champion, by default who is in production, or the champion of the running test.

    since, until: when the champion answered; from, and before. most: labelled requests, the newest first.
    maturity_days: by default the endpoint's. progress: told how many customers of how many are scored. Raises
    ReplayError, Unavailable when the challenger cannot be loaded.
    """
    challenger = _algorithm(challenger_id, "challenger")
    champion = _champion_of(challenger) if champion_id is None else _algorithm(champion_id, "champion")
    if champion.pk == challenger.pk:
        raise ReplayError(f"{challenger} is the champion itself; name another challenger, or another champion.")
    if champion.parent_endpoint_id != challenger.parent_endpoint_id:
        raise ReplayError(
            f"A replay compares two algorithms of one endpoint; {champion} belongs to {champion.parent_endpoint}, "
            f"{challenger} to {challenger.parent_endpoint}."
        )
    classifier = prediction.classifier_of(challenger)
    try:
        trained_on = _knows(classifier.run)
    except ArtifactError as error:
        raise ReplayError(f"Nobody can say on whom {challenger} was trained: {error}") from error
    days = challenger.parent_endpoint.maturity_days if maturity_days is None else maturity_days
    requests = MLRequest.objects.labelled().filter(parent_mlalgorithm=champion, labelled_at__lte=now)
    if since:
        requests = requests.since(since)
    if until:
        requests = requests.filter(created_at__lt=until)
    units, left_out = _units(requests.order_by("-pk")[:most], timedelta(days=days), trained_on, now)
    pairs, wins = Counter(), []
    for begin in range(0, len(units), CHUNK_ROWS):
        progress(begin, len(units))
        chunk = units[begin : begin + CHUNK_ROWS]
        rows = dict(MLRequest.objects.filter(pk__in=[unit.pk for unit in chunk]).values_list("pk", "input_data"))
        kept = [unit for unit in chunk if unit.pk in rows]  # the others were purged meanwhile
        for unit, said in zip(kept, said_of_all(classifier, [rows[unit.pk] for unit in kept]), strict=True):
            if said.failure:
                left_out["failures"] += 1
                continue
            rights = unit.response == unit.outcome, said.response == unit.outcome
            pairs[rights] += 1
            if rights[0] != rights[1]:
                wins.append(rights[1])
    progress(len(units), len(units))
    found = Pairs(pairs[True, True], pairs[True, False], pairs[False, True], pairs[False, False])
    excluded = LeftOut(**left_out)
    if not found.total:
        raise _nothing(champion, challenger, excluded, days)
    judgement = verdict.judge_pairs(champion, challenger, found, wins, alpha=alpha, minimum=minimum_labelled)
    return Replay(champion, challenger, classifier.run, alpha, excluded, found, judgement)


def said_of_all(classifier: RetentionClassifier, rows: Sequence[Any]) -> list[Said]:
    """What a classifier says of each logged row: of all at once, or where it refuses one, of each by itself."""
    try:
        answers = classifier.compute_prediction(rows)
    except Exception:  # whatever a model raises is found again with the row that is to blame
        return [said_of(classifier, row) for row in rows]
    return [read(answer) for answer in answers]


def _algorithm(pk: int, what: str) -> MLAlgorithm:
    found = MLAlgorithm.objects.select_related("parent_endpoint").filter(pk=pk).first()
    if found is None:
        raise UnknownAlgorithm(f"There is no algorithm {pk} to be the {what}; GET /api/v1/mlalgorithms lists them.")
    return found


def _champion_of(challenger: MLAlgorithm) -> MLAlgorithm:
    endpoint = challenger.parent_endpoint
    test = ABTest.objects.running().filter(parent_endpoint=endpoint).first()
    champion = test.arms[0] if test else lifecycle.in_production(endpoint.pk)
    if champion is None:
        raise ReplayError(f"No algorithm of endpoint {endpoint} is in production; name the champion.")
    return champion


def _knows(run: TrainingRun) -> Callable[[str, datetime], bool]:
    """Whether a run's models may have learned from a request: by its customer's key, and when it was answered.

    Where there is no key to go by, all that was there when they were trained. Raises ArtifactError.
    """
    customers = run.training_customers
    return lambda key, at: key in customers if key and customers else at <= run.trained_at


def _units(
    requests: Any, maturity: timedelta, trained_on: Callable[[str, datetime], bool], now: datetime
) -> tuple[list[_Unit], Counter[str]]:
    """Who counts, in the order in which their outcomes began to; and how many requests do not, by LeftOut's names."""
    left_out: Counter[str] = Counter()
    first: dict[str | int, _Unit] = {}
    columns = ("pk", "customer_key", "created_at", "labelled_at", "response", "feedback")
    for pk, key, created_at, labelled_at, response, outcome in requests.values_list(*columns).iterator():
        mature_at = created_at + maturity
        if mature_at > now:
            left_out["immature"] += 1
        elif trained_on(key, created_at):
            left_out["trained_on"] += 1
        else:
            unit = _Unit(max(labelled_at, mature_at), pk, response, outcome)
            left_out["repeated"] += (key or pk) in first
            first[key or pk] = min(first.get(key or pk, unit), unit)
    return sorted(first.values()), left_out


def _nothing(champion: MLAlgorithm, challenger: MLAlgorithm, left_out: LeftOut, days: int) -> NothingToCompare:
    reasons = [
        f"{left_out.immature:,} are younger than {days} days" * bool(left_out.immature),
        f"{left_out.trained_on:,} may have trained the challenger" * bool(left_out.trained_on),
        f"{left_out.failures:,} cannot be scored by it" * bool(left_out.failures),
    ]
    why = "; ".join(filter(None, reasons))
    return NothingToCompare(
        f"There is no labelled request on which {challenger} can be compared with {champion}"
        + (f": {why}." if why else ", in the time asked for: tell outcomes first, with PATCH /api/v1/mlrequests/ID.")
    )
