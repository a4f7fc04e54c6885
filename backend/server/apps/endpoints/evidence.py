"""What the log says of an A/B test at a moment: counted by the database, whatever the test's size.

The unit is a customer, counted once by the first of its requests whose outcome became known; a request without a key
is a unit by itself. An outcome counts when it is known and the answer is `maturity_days` old. Evidence accumulates in
the order in which outcomes began to count, then by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import accumulate
from typing import Any

from django.db import connection, transaction

from apps.endpoints.models import ABTest, MLAlgorithm

CALIBRATION_BINS = 10
PERCENTILES = (50, 95, 99)
EVERYONE, UNTREATED = "everyone", "untreated"
# Positions of the champion's and the challenger's in all that is told of both.
SIDES = CHAMPION, CHALLENGER = 0, 1


@dataclass(frozen=True)
class Counts:
    """Customers with an outcome that counts, and how many of them were answered rightly."""

    labelled: int = 0
    correct: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.labelled + other.labelled, self.correct + other.correct)

    def without(self, other: Counts) -> Counts:
        return Counts(self.labelled - other.labelled, self.correct - other.correct)

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None


@dataclass(frozen=True)
class Arm:
    """One algorithm in a test.

    requests: answered, or of a shadow's challenger scored. failures: what the challenger should have answered, or
    scored, and could not; of a split the champion answered those, and they count as wrong. customers: who asked.
    labelled: customers whose outcome counts; judged: those on whom the verdict rests. calibration: (mean probability,
    share that stayed, customers) by tenth of the probability. latency_ms: by percentile, of all requests.
    """

    algorithm: MLAlgorithm
    requests: int = 0
    customers: int = 0
    labelled: Counts = Counts()
    treated: Counts = Counts()
    judged: Counts = Counts()
    failures: int = 0
    positive: int = 0
    mean_probability: float | None = None
    brier: float | None = None
    roc_auc: float | None = None
    latency_ms: dict[int, float] = field(default_factory=dict)
    calibration: Sequence[tuple[float, float, int]] = ()

    @property
    def label_rate(self) -> float | None:
        return self.labelled.labelled / self.customers if self.customers else None

    @property
    def positive_share(self) -> float | None:
        return self.positive / self.requests if self.requests else None

    @property
    def failure_rate(self) -> float | None:
        asked = self.requests + self.failures
        return self.failures / asked if asked else None


@dataclass(frozen=True)
class Pairs:
    """Customers whom both algorithms scored, by who was right."""

    both: int = 0
    only_champion: int = 0
    only_challenger: int = 0
    neither: int = 0

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(
            self.both + other.both,
            self.only_champion + other.only_champion,
            self.only_challenger + other.only_challenger,
            self.neither + other.neither,
        )

    @property
    def counts(self) -> tuple[Counts, Counts]:
        """The same, of each of the two by itself."""
        champion, challenger = self.both + self.only_champion, self.both + self.only_challenger
        return Counts(self.total, champion), Counts(self.total, challenger)

    @property
    def total(self) -> int:
        return self.both + self.only_champion + self.only_challenger + self.neither


@dataclass(frozen=True)
class Day:
    """What had accumulated at the end of a day (UTC), each the champion's first. customers: who asked first by then."""

    day: date
    customers: tuple[int, int]
    judged: tuple[Counts, Counts]
    pairs: Pairs


@dataclass(frozen=True)
class Evidence:
    """All that a verdict rests on, at a moment.

    judged: EVERYONE, or UNTREATED if enough customers were left alone. by_request: of each of the two all labelled
    requests, however young; by these the policy `accuracy` decides. wins: of pairs in which one alone was right,
    whether it was the challenger, in the order in which they began to count; of a shadow. waiting: requests that a
    shadow's challenger has not scored yet.
    """

    test: ABTest
    as_of: datetime
    arms: tuple[Arm, Arm]
    judged: str
    days: Sequence[Day]
    pairs: Pairs
    by_request: tuple[Counts, Counts]
    wins: Sequence[bool]
    waiting: int = 0

    @property
    def champion(self) -> Arm:
        return self.arms[CHAMPION]

    @property
    def challenger(self) -> Arm:
        return self.arms[CHALLENGER]

    @property
    def is_paired(self) -> bool:
        return self.test.design == ABTest.Design.SHADOW

    @property
    def requests(self) -> int:
        return self.champion.requests + (0 if self.is_paired else self.challenger.requests)

    @property
    def labelled(self) -> int:
        """Customers on whom the verdict rests."""
        return self.pairs.total if self.is_paired else sum(arm.judged.labelled for arm in self.arms)

    @property
    def treated_share(self) -> float:
        """Of the labelled customers those for whom something was done because of the answer."""
        labelled = sum(arm.labelled.labelled for arm in self.arms)
        return sum(arm.treated.labelled for arm in self.arms) / labelled if labelled else 0.0

    @property
    def is_at_horizon(self) -> bool:
        test = self.test
        by_days = test.horizon_days and self.as_of >= test.created_at + timedelta(days=test.horizon_days)
        return bool(by_days or (test.horizon_labelled and self.labelled >= test.horizon_labelled))


def gather(test: ABTest, as_of: datetime, *, as_it_stood: bool = False, only_for_verdict: bool = False) -> Evidence:
    """The evidence of a test at a moment. as_it_stood: with the outcomes as they were told by then.

    only_for_verdict: without what is shown beside it, which takes longer.
    """
    log = _Log(test, as_of, as_it_stood)
    with log.read_once():
        return _told_by(log, as_of, only_for_verdict)


def _told_by(log: _Log, as_of: datetime, only_for_verdict: bool) -> Evidence:
    test = log.test
    accumulated = log.accumulated()
    everyone, treated = _total(accumulated), _total(row for row in accumulated if row.treated)
    untreated = _total(row for row in accumulated if not row.treated)
    enough = all(counts.labelled >= test.minimum_labelled for counts in untreated.counts)
    only_untreated = enough and any(counts.labelled for counts in treated.counts)
    judged = [row for row in accumulated if not (only_untreated and row.treated)]
    customers = log.customers()
    return Evidence(
        test=test,
        as_of=as_of,
        arms=tuple(
            Arm(
                algorithm=test.arms[side],
                customers=sum(asked[side] for asked in customers.values()),
                labelled=everyone.counts[side],
                treated=treated.counts[side],
                judged=_total(judged).counts[side],
                **_measures(log, side, only_for_verdict),
            )
            for side in SIDES
        ),
        judged=UNTREATED if only_untreated else EVERYONE,
        days=_days(customers, judged),
        pairs=_total(judged).pairs,
        by_request=log.by_request(),
        wins=log.wins(only_untreated) if log.is_paired else (),
        waiting=log.waiting() if log.is_paired else 0,
    )


def _measures(log: _Log, side: int, only_for_verdict: bool) -> dict[str, Any]:
    """What `Arm` shows of an arm beside its counts."""
    measures: dict[str, Any] = log.traffic(side)
    if not only_for_verdict or log.test.guardrail_latency_p99_ms is not None:
        measures["latency_ms"] = log.percentiles(side, measures["requests"])
    return measures if only_for_verdict else measures | log.quality(side)


@dataclass(frozen=True)
class _Accumulated:
    """What a day added, of customers who were left alone or who were not."""

    day: date
    treated: bool = False
    counts: tuple[Counts, Counts] = (Counts(), Counts())
    pairs: Pairs = Pairs()

    def __add__(self, other: _Accumulated) -> _Accumulated:
        first, second = (mine + more for mine, more in zip(self.counts, other.counts, strict=True))
        return _Accumulated(other.day, other.treated, (first, second), self.pairs + other.pairs)


def _total(rows: Iterable[_Accumulated]) -> _Accumulated:
    return sum(rows, _Accumulated(date.min))


def _days(customers: dict[date, tuple[int, int]], judged: Sequence[_Accumulated]) -> list[Day]:
    """Every day on which anything changed, with what had accumulated by its end."""
    days = sorted({*customers, *(row.day for row in judged)})
    asked = accumulate(
        (customers.get(day, (0, 0)) for day in days), lambda total, more: (total[0] + more[0], total[1] + more[1])
    )
    added = (_total(row for row in judged if row.day == day) for day in days)
    known = accumulate(added, lambda total, more: total + more)
    return [Day(day, each, sums.counts, sums.pairs) for day, each, sums in zip(days, asked, known, strict=True)]


# Where databases differ. {0} is an expression; days is of whole days.
_DAY_OF = {
    "sqlite": "substr({0}, 1, 10)",
    "postgresql": "to_char(({0}) AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "mysql": "CAST(DATE({0}) AS CHAR)",
}
_LATER = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f', {0}, '+{days} days')",
    "postgresql": "({0} + interval '{days} days')",
    "mysql": "({0} + INTERVAL {days} DAY)",
}
# Nearly all requests of a test came by then, and the test's own index gives them in the order of the table.
_NOT_BY_INDEX = {"sqlite": "+{0}", "postgresql": "{0}", "mysql": "{0}"}
# Whoever has no key is a unit by itself.
_KEYLESS = "CASE WHEN customer_key = '' THEN id END"
_WHOLE = {"sqlite": "CAST({0} AS INTEGER)", "postgresql": "floor({0})::integer", "mysql": "FLOOR({0})"}


class _Log:
    """The requests of a test, told of by SQL.

    They are read once, into a table of this connection that holds what is asked for and nothing else: a request's row
    is mostly its customer's data. So all questions are about the same moment, too.
    """

    def __init__(self, test: ABTest, as_of: datetime, as_it_stood: bool):
        self.is_paired = test.design == ABTest.Design.SHADOW
        self.test = test
        self._champion = test.arms[CHAMPION].pk
        self._moment = connection.ops.adapt_datetimefield_value(as_of)
        self._mature_since = connection.ops.adapt_datetimefield_value(as_of - timedelta(days=test.maturity_days))
        self._as_it_stood = as_it_stood

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """While this lasts, questions can be asked."""
        # A pooler of PostgreSQL's gives another connection to the next transaction, and an error undoes the tables with
        # it. On SQLite a transaction would keep all writers waiting, and only this connection sees the tables.
        with ExitStack() as scope:
            if connection.vendor == "sqlite":
                scope.callback(self._drop)
            else:
                scope.enter_context(transaction.atomic())
                self._drop()
            self._do(f"CREATE TEMPORARY TABLE evidence_asked AS {self._asked()}")
            self._do(f"CREATE TEMPORARY TABLE evidence_units AS {self._units()}")
            yield
            if connection.vendor != "sqlite":
                self._drop()

    def _drop(self) -> None:
        for table in ("evidence_asked", "evidence_units"):
            # Without this word MySQL would commit.
            self._do(f"DROP {'TEMPORARY' if connection.vendor == 'mysql' else ''} TABLE IF EXISTS {table}")

    def accumulated(self) -> list[_Accumulated]:
        """By day and treatment, the customers whose outcome began to count then."""
        day = self._by_vendor(_DAY_OF, "counts_at")
        if self.is_paired:
            rows = self._ask(
                f"""
                SELECT {day}, treated,
                    SUM(champion_right * challenger_right), SUM(champion_right * (1 - challenger_right)),
                    SUM((1 - champion_right) * challenger_right), SUM((1 - champion_right) * (1 - challenger_right))
                FROM evidence_units GROUP BY 1, 2
                """
            )
            return [
                _Accumulated(date.fromisoformat(day), bool(treated), pairs.counts, pairs)
                for day, treated, *counted in rows
                for pairs in [Pairs(*counted)]
            ]
        rows = self._ask(
            f"SELECT {day}, treated, side, COUNT(*), SUM(champion_right) FROM evidence_units GROUP BY 1, 2, 3"
        )
        return [
            _Accumulated(
                date.fromisoformat(day),
                bool(treated),
                (Counts(labelled, correct), Counts()) if side == CHAMPION else (Counts(), Counts(labelled, correct)),
            )
            for day, treated, side, labelled, correct in rows
        ]

    def by_request(self) -> tuple[Counts, Counts]:
        right, challenger_right = (
            f"SUM(CASE WHEN {self._of(side, 'response')} = outcome THEN 1 ELSE 0 END)" for side in SIDES
        )
        answered = f"FROM evidence_asked WHERE outcome IS NOT NULL AND {self._of(CHALLENGER, 'response')} IS NOT NULL"
        if self.is_paired:
            ((labelled, *correct),) = self._ask(f"SELECT COUNT(*), {right}, {challenger_right} {answered}")
            return Counts(labelled, correct[0] or 0), Counts(labelled, correct[1] or 0)
        found = {
            side: Counts(*counted)
            for side, *counted in self._ask(f"SELECT side, COUNT(*), {right} {answered} GROUP BY 1")
        }
        return found.get(CHAMPION, Counts()), found.get(CHALLENGER, Counts())

    def wins(self, only_untreated: bool) -> list[bool]:
        rows = self._ask(
            f"""
            SELECT challenger_right FROM evidence_units
            WHERE champion_right <> challenger_right {"AND treated = 0" if only_untreated else ""}
            ORDER BY counts_at, id
            """
        )
        return [bool(won) for (won,) in rows]

    def customers(self) -> dict[date, tuple[int, int]]:
        """By day, how many customers of each arm asked first then. A shadow's both arms have all of them."""
        found: dict[date, list[int]] = {}
        for day, side, customers in self._ask(
            f"""
            SELECT {self._by_vendor(_DAY_OF, "first_asked_at")}, side, COUNT(*) FROM (
                SELECT side, MIN(asked_at) AS first_asked_at FROM evidence_asked GROUP BY customer_key, {_KEYLESS}, side
            ) AS customers GROUP BY 1, 2
            """
        ):
            found.setdefault(date.fromisoformat(day), [0, 0])[side] += customers
        return {day: (asked[0], asked[0] if self.is_paired else asked[1]) for day, asked in found.items()}

    def waiting(self) -> int:
        ((waiting,),) = self._ask("SELECT COUNT(*) FROM evidence_asked WHERE is_scored = 0")
        return waiting

    def traffic(self, side: int) -> dict[str, int]:
        """Requests answered, how many of them with label 1, and how many the challenger could not answer."""
        response = self._of(side, "response")
        (counted,) = self._ask(
            f"""
            SELECT COUNT({response}), COALESCE(SUM(CASE WHEN {response} = '1' THEN 1 ELSE 0 END), 0),
                COALESCE(SUM(CASE WHEN {response} IS NULL AND is_scored = 1 THEN 1 ELSE 0 END), 0)
            FROM evidence_asked WHERE {self._answered_by(side)}
            """
        )
        return dict(zip(("requests", "positive", "failures"), counted, strict=True))

    def percentiles(self, side: int, requests: int) -> dict[int, float]:
        """Nearest-rank percentiles of the latency of all requests of an arm, in milliseconds."""
        if not requests:
            return {}
        rank = {percent: -(-requests * percent // 100) for percent in PERCENTILES}
        latency = self._of(side, "latency_ms")
        rows = self._ask(
            f"""
            SELECT nth, latency FROM (
                SELECT {latency} AS latency, ROW_NUMBER() OVER (ORDER BY {latency}) AS nth FROM evidence_asked
                WHERE {self._answered_by(side)} AND {self._of(side, "response")} IS NOT NULL
            ) AS ranked WHERE nth IN ({", ".join(map(str, rank.values()))})
            """
        )
        by_rank = dict(rows)
        return {percent: by_rank[nth] for percent, nth in rank.items()}

    def quality(self, side: int) -> dict[str, Any]:
        """How good an arm's probabilities are, over all customers whose outcome counts.

        The area under the ROC curve is the chance that of two customers the one who stayed has the higher probability,
        ties counted by half (Hanley and McNeil 1982).
        """
        grouped = f"""
            SELECT {self._of(side, "probability")} AS p, SUM(stayed) AS stayed, SUM(1 - stayed) AS left_us
            FROM evidence_units WHERE {self._answered_by(side)} AND probability IS NOT NULL GROUP BY 1
        """
        tenth = self._by_vendor(_WHOLE, f"p * {CALIBRATION_BINS}")
        rows = self._ask(
            f"""
            SELECT {tenth}, SUM(p * (stayed + left_us)), SUM(stayed), SUM(left_us),
                SUM(stayed * (1 - p) * (1 - p) + left_us * p * p), SUM(stayed * (left_before - left_us / 2.0))
            FROM (SELECT p, stayed, left_us, SUM(left_us) OVER (ORDER BY p) AS left_before FROM ({grouped}) AS grouped)
            AS cumulated GROUP BY 1 ORDER BY 1
            """
        )
        stayed, left = sum(int(row[2]) for row in rows), sum(int(row[3]) for row in rows)
        if not rows:
            return {}
        bins: dict[int, list[float]] = {}
        for number, total, ones, zeros, *_ in rows:
            sums = bins.setdefault(min(int(number), CALIBRATION_BINS - 1), [0.0, 0, 0])
            sums[0], sums[1], sums[2] = sums[0] + total, sums[1] + int(ones), sums[2] + int(ones + zeros)
        return {
            "mean_probability": sum(row[1] for row in rows) / (stayed + left),
            "brier": sum(row[4] for row in rows) / (stayed + left),
            "roc_auc": float(sum(row[5] for row in rows)) / (stayed * left) if stayed and left else None,
            "calibration": tuple((total / n, ones / n, n) for _, (total, ones, n) in sorted(bins.items())),
        }

    def _asked(self) -> str:
        """The requests of the test; counts_at is null where no outcome counts. 1 is for what is so, 0 for what is not.

        challenger_*: what a shadow says of the same request. What a split's challenger could not answer is among its
        requests, without an answer: without its failures it would look better than it is.
        """
        outcome, acted_on = "r.feedback", "r.acted_on"
        moment = self._literal(self._moment)
        if self._as_it_stood:
            then = "FROM endpoints_feedbackchange AS c WHERE c.request_id = r.id AND c.created_at"
            told = f"{then} <= {moment} ORDER BY c.id DESC LIMIT 1"
            has_changed = f"EXISTS (SELECT 1 {then} > {moment})"
            outcome, acted_on = (
                f"CASE WHEN {has_changed} THEN (SELECT c.{name} {told}) ELSE r.{name} END"
                for name in ("feedback", "acted_on")
            )
        counts_at = "r.labelled_at"
        if self.test.maturity_days:
            mature_at = self._by_vendor(_LATER, "r.created_at", days=self.test.maturity_days)
            counts_at = f"CASE WHEN r.labelled_at < {mature_at} THEN {mature_at} ELSE r.labelled_at END"
        # Outcomes of whose telling no history was kept are known, and count in no order.
        known = f"r.feedback IS NOT NULL AND (r.labelled_at IS NULL OR r.labelled_at <= {moment})"
        counts = f"r.labelled_at IS NOT NULL AND {known} AND r.created_at <= {self._literal(self._mature_since)}"
        told = f"""
            r.id, r.customer_key, r.created_at AS asked_at,
            CASE WHEN {counts} THEN {counts_at} END AS counts_at, CASE WHEN {known} THEN {outcome} END AS outcome,
            CASE WHEN {counts} AND {acted_on} THEN 1 ELSE 0 END AS treated
        """
        came = f"{self._by_vendor(_NOT_BY_INDEX, 'r.created_at')} <= {moment}"
        side = f"CASE WHEN r.parent_mlalgorithm_id = {self._champion} THEN {CHAMPION} ELSE {CHALLENGER} END AS side"
        answered = f"{told}, {side}, r.response, r.probability, r.latency_ms"
        if self.is_paired:
            return f"""
                SELECT {answered}, CASE WHEN s.request_id IS NULL THEN 0 ELSE 1 END AS is_scored,
                    s.response AS challenger_response, s.probability AS challenger_probability,
                    s.latency_ms AS challenger_latency_ms
                FROM endpoints_mlrequest AS r
                LEFT JOIN endpoints_shadowanswer AS s ON s.request_id = r.id AND s.created_at <= {moment}
                WHERE r.abtest_id = {self.test.pk} AND {came}
            """
        return f"""
            SELECT {answered}, 1 AS is_scored
            FROM endpoints_mlrequest AS r WHERE r.abtest_id = {self.test.pk} AND {came}
            UNION ALL
            SELECT {told}, {CHALLENGER}, NULL, NULL, NULL, 1
            FROM endpoints_shadowanswer AS s JOIN endpoints_mlrequest AS r ON r.id = s.request_id
            WHERE s.abtest_id = {self.test.pk} AND s.created_at <= {moment} AND {came}
        """

    def _units(self) -> str:
        """Of the customers whose outcome counts, the request by which they do."""
        told, challenger, of_both = "", "", ""
        if self.is_paired:
            challenger = """
                , CASE WHEN challenger_response = outcome THEN 1 ELSE 0 END AS challenger_right, challenger_probability
            """
            told = ", challenger_response, challenger_probability"
            of_both = "AND challenger_response IS NOT NULL"
        return f"""
            SELECT id, side, treated, counts_at, probability {challenger},
                CASE WHEN response = outcome THEN 1 ELSE 0 END AS champion_right,
                CASE WHEN outcome = '1' THEN 1 ELSE 0 END AS stayed
            FROM (
                SELECT id, side, treated, counts_at, response, outcome, probability {told},
                    ROW_NUMBER() OVER (
                    PARTITION BY customer_key, {_KEYLESS} ORDER BY counts_at, id
                ) AS nth FROM evidence_asked WHERE counts_at IS NOT NULL {of_both}
            ) AS counting WHERE nth = 1
        """

    def _of(self, side: int, column: str) -> str:
        return f"challenger_{column}" if side == CHALLENGER and self.is_paired else column

    def _answered_by(self, side: int) -> str:
        return "1 = 1" if self.is_paired else f"side = {side}"

    def _literal(self, moment: Any) -> str:
        return f"'{moment}'"

    def _by_vendor(self, forms: dict[str, str], expression: str, **values: int) -> str:
        return forms[connection.vendor].format(expression, **values)

    def _do(self, sql: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(sql)

    def _ask(self, sql: str) -> list[tuple[Any, ...]]:
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()
