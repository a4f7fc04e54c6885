"""A/B tests by the thousand, drawn from customers whose outcome is known: how often a rule errs, and how soon it ends.

Each customer of a simulated test is drawn with replacement from those held out of training, as if more of the same
kind kept coming. `champion` and `challenger` are (customers,) bool, of the same customers: whose outcome each model has
right. A `pair` is {model: the same}, of two models. The rule on evidence is the server's own code,
`apps.endpoints.statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.stats import norm

import train
from apps.endpoints import statistics

ALPHA = 0.05
TESTS = 1_000
# Labelled customers at the looks: fifty of them, the first when each arm of a split has the hundred that it needs.
LOOKS = np.arange(200, 10_001, 200)
# To see when a test ends, it is looked at more often, until nobody would wait any longer.
OFTEN = np.arange(200, 20_001, 50)

MORE_RIGHT, Z_TEST, EVIDENCE = "more right answers wins", "z-test at every look", "evidence at every look"
SPLIT, SHADOW = "split", "shadow"


@dataclass(frozen=True)
class Ends:
    """How each of many tests ended.

    look: (tests,) the position of its last look, the number of looks if it did not end. winner: (tests,) 1 where the
    challenger was called better, -1 where the champion was, 0 where nobody was.
    """

    look: np.ndarray
    winner: np.ndarray


@dataclass(frozen=True)
class Course:
    """One test, look by look.

    difference: (looks,) the challenger's accuracy minus the champion's; intervals: {rule: (looks, 2)} of it; p: {rule:
    (looks,)}. The rules are Z_TEST and EVIDENCE.
    """

    labelled: np.ndarray
    difference: np.ndarray
    intervals: Mapping[str, np.ndarray]
    p: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Splits:
    """Many tests, each of two arms with half of the customers.

    labelled: (looks,) customers of both arms; champion, challenger: (tests, looks) right answers of each arm by then.
    """

    labelled: np.ndarray
    champion: np.ndarray
    challenger: np.ndarray
    alpha: float

    @property
    def difference(self) -> np.ndarray:
        """(tests, looks): the challenger's accuracy minus the champion's."""
        return (self.challenger - self.champion) / (self.labelled // 2)

    @property
    def standard_error(self) -> np.ndarray:
        """(tests, looks): of the difference."""
        each = self.labelled // 2
        shares = np.stack([self.champion, self.challenger]) / each
        return np.sqrt((shares * (1 - shares)).sum(axis=0) / each)

    @cached_property
    def z_test_p(self) -> np.ndarray:
        """(tests, looks): of both sides, by the look alone; 1 where no difference shows."""
        error = self.standard_error
        z = np.divide(np.abs(self.difference), error, out=np.zeros_like(error), where=error > 0)
        return 2 * norm.sf(z)

    @cached_property
    def evidence_p(self) -> np.ndarray:
        """(tests, looks): the server's, anytime-valid."""
        each = (self.labelled // 2).tolist()
        counts = zip(self.champion.tolist(), self.challenger.tolist(), strict=True)
        return np.array(
            [
                [statistics.split_difference(a, n, b, n, self.alpha).p for a, b, n in zip(*arms, each, strict=True)]
                for arms in counts
            ]
        )

    def by_z_test(self) -> Ends:
        return first_verdicts(self.z_test_p, self.difference, self.alpha)

    def by_evidence(self) -> Ends:
        return first_verdicts(self.evidence_p, self.difference, self.alpha)

    def course(self, test: int) -> Course:
        """One of the tests, by its position."""
        difference = self.difference[test]
        half = norm.isf(self.alpha / 2) * self.standard_error[test]
        looks = zip(self.champion[test].tolist(), self.challenger[test].tolist(), self.labelled.tolist(), strict=True)
        anytime = [statistics.split_difference(a, n // 2, b, n // 2, self.alpha) for a, b, n in looks]
        intervals = {
            Z_TEST: np.column_stack([difference - half, difference + half]),
            EVIDENCE: np.array([(one.low, one.high) for one in anytime]),
        }
        p = {Z_TEST: self.z_test_p[test], EVIDENCE: self.evidence_p[test]}
        return Course(self.labelled, difference, intervals, p)


@dataclass(frozen=True)
class Shadows:
    """Many tests in which both models score every customer.

    labelled: (looks,) customers; lead: (tests, looks) right answers of the challenger minus the champion's; evidence_p:
    (tests, looks) the server's, anytime-valid.
    """

    labelled: np.ndarray
    lead: np.ndarray
    evidence_p: np.ndarray
    alpha: float

    def by_evidence(self) -> Ends:
        return first_verdicts(self.evidence_p, self.lead, self.alpha)


def splits(
    champion: np.ndarray,
    challenger: np.ndarray,
    *,
    looks: np.ndarray = LOOKS,
    tests: int = TESTS,
    alpha: float = ALPHA,
    seed: int = train.SEED,
) -> Splits:
    """Draw tests whose arms get different customers, half of them each. looks: (looks,) even numbers of customers."""
    random = np.random.default_rng(seed)
    each = looks // 2
    correct = [
        right[random.integers(len(right), size=(tests, each[-1]), dtype=np.int32)].cumsum(axis=1, dtype=np.int32)
        for right in (champion, challenger)
    ]
    return Splits(looks, *(one[:, each - 1] for one in correct), alpha)


def shadows(
    champion: np.ndarray,
    challenger: np.ndarray,
    *,
    looks: np.ndarray = LOOKS,
    tests: int = TESTS,
    alpha: float = ALPHA,
    seed: int = train.SEED,
) -> Shadows:
    """Draw tests in which both models score each customer. looks: (looks,) numbers of customers."""
    random = np.random.default_rng(seed)
    won = challenger.astype(np.int8) - champion.astype(np.int8)
    won = won[random.integers(len(won), size=(tests, looks[-1]), dtype=np.int32)]
    discordant = (won != 0).cumsum(axis=1, dtype=np.int32)[:, looks - 1]
    p = np.array(
        [
            np.concatenate([[1.0], statistics.paired_p_path(one[one != 0] > 0)])[known]
            for one, known in zip(won, discordant, strict=True)
        ]
    )
    return Shadows(looks, won.cumsum(axis=1, dtype=np.int32)[:, looks - 1], p, alpha)


def first_verdicts(p: np.ndarray, lead: np.ndarray, alpha: float) -> Ends:
    """End each test at the first look at which p is small enough, for whoever is ahead then.

    p, lead: (tests, looks); lead is above 0 where the challenger is ahead.
    """
    settles = (p <= alpha) & (lead != 0)
    ended = settles.any(axis=1)
    look = settles.argmax(axis=1)
    winner = np.sign(lead[np.arange(len(p)), look]).astype(int)
    return Ends(np.where(ended, look, p.shape[1]), np.where(ended, winner, 0))


def promoted_by(ends: Ends, looks: int) -> np.ndarray:
    """(looks,): the share of all tests that have promoted the challenger at this look or before."""
    promoting = np.bincount(ends.look[ends.winner > 0], minlength=looks)[:looks]
    return promoting.cumsum() / len(ends.look)


def promotions(tests: Splits) -> dict[str, np.ndarray]:
    """By rule, the share of tests that have promoted the challenger by each look, (looks,).

    Whoever goes by right answers promotes when the test is stopped: theirs is the share that would, if it were now.
    """
    looks = len(tests.labelled)
    return {
        Z_TEST: promoted_by(tests.by_z_test(), looks),
        EVIDENCE: promoted_by(tests.by_evidence(), looks),
        MORE_RIGHT: (tests.difference > 0).mean(axis=0),
    }


def misled(tests: Splits) -> Course | None:
    """Of the tests in which the z-test promoted the challenger and evidence nobody, one neither early nor late.

    None if there is no such test.
    """
    by_z_test = tests.by_z_test()
    found = np.flatnonzero((by_z_test.winner > 0) & (tests.by_evidence().winner == 0))
    in_order = found[np.argsort(by_z_test.look[found], kind="stable")]
    return tests.course(int(in_order[len(found) // 2])) if len(found) else None


def needed(tests: Splits | Shadows) -> np.ndarray:
    """(tests,): labelled customers at which the evidence promoted the challenger; infinite where it did not."""
    ends = tests.by_evidence()
    at = np.append(tests.labelled.astype(float), np.inf)[ends.look]
    return np.where(ends.winner > 0, at, np.inf)


def weaker_first(pair: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Whose outcome the less accurate of two models has right, and the more accurate."""
    weaker, better = sorted(pair.values(), key=np.mean)
    return weaker, better


def needed_by_design(
    champion: np.ndarray, challenger: np.ndarray, *, tests: int = TESTS, seed: int = train.SEED
) -> dict[str, np.ndarray]:
    """`needed` of many tests of each design."""
    return {
        design: needed(draw(champion, challenger, looks=OFTEN, tests=tests, seed=seed))
        for design, draw in ((SPLIT, splits), (SHADOW, shadows))
    }


# --- What the notebook says of them -----------------------------------------------------------------------


def pair_table(pairs: Sequence[Mapping[str, np.ndarray]], alpha: float = ALPHA) -> pd.DataFrame:
    """One line per pair: accuracy of each, how often they disagree, and the difference with its interval."""
    lines = []
    for pair in pairs:
        (champion, first), (challenger, second) = pair.items()
        found = _difference(first, second, alpha)
        lines.append(
            [
                f"{challenger} against {champion}",
                f"{second.mean():.1%} against {first.mean():.1%}",
                f"{(first != second).mean():.1%}",
                f"{100 * found.estimate:+.1f} points",
                f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
            ]
        )
    header = ["", "accuracy", "only one is right", "difference", f"{1 - alpha:.0%} interval"]
    return pd.DataFrame(lines, columns=header).set_index("")


def on_the_pairs(pairs: Sequence[Mapping[str, np.ndarray]], alpha: float = ALPHA) -> str:
    """Of each pair, whether these customers tell the two apart."""
    sentences = []
    for pair in pairs:
        (champion, first), (challenger, second) = pair.items()
        found = _difference(first, second, alpha)
        if found.low <= 0 <= found.high:
            sentences.append(
                f"These {len(first):,} customers do not tell {challenger} from {champion}: it alone is right for "
                f"{_alone(second, first):,} of them, the other alone for {_alone(first, second):,}."
            )
        else:
            better, worse = (challenger, champion) if found.estimate > 0 else (champion, challenger)
            sentences.append(f"By {100 * abs(found.estimate):.1f} points **{better} is better than {worse}**.")
    return " ".join(sentences)


def on_the_promotions(tests: Splits) -> str:
    """How often each rule errs where the two models are the same one."""
    shares = {rule: by_look[-1] for rule, by_look in promotions(tests).items()}
    by_z_test, by_evidence = ((ends.winner != 0).mean() for ends in (tests.by_z_test(), tests.by_evidence()))
    return (
        f"Of {len(tests.champion):,} tests of a model against itself, counting right answers promotes the challenger "
        f"in **{shares[MORE_RIGHT]:.0%}**: a coin, whenever the test is stopped. The z-test at {tests.alpha:.0%}, "
        f"looked at {len(tests.labelled)} times, promotes it in **{shares[Z_TEST]:.0%}** and calls one of the two "
        f"better in {by_z_test:.0%}: what it promises, {tests.alpha:.0%}, holds for one look. The evidence promotes it "
        f"in **{shares[EVIDENCE]:.1%}** and calls one of the two better in {by_evidence:.1%}; it promises at most "
        f"{tests.alpha:.0%}, however many looks there are."
    )


def on_the_course(course: Course, alpha: float = ALPHA) -> str:
    """When the z-test promoted, and what became of the difference that it promoted for."""
    p = course.p[Z_TEST]
    at = int(((p <= alpha) & (course.difference > 0)).argmax())
    last = "still" if p[-1] <= alpha else "no longer"
    return (
        f"After {course.labelled[at]:,} customers the challenger is {100 * course.difference[at]:.1f} points ahead and "
        f"the z-test says p = {p[at]:.2g}: whoever looks then promotes. After "
        f"{course.labelled[-1]:,} the difference is {100 * course.difference[-1]:+.1f} points and {last} significant; "
        "it never was real. The anytime-valid interval is wider, because it allows for every look, and holds zero."
    )


def on_the_designs(needed: Mapping[str, np.ndarray]) -> str:
    """By when half and four fifths of the tests have promoted, by design, and how many times fewer the shadow needs."""
    sentences = []
    for design, customers in needed.items():
        half, four_fifths = np.quantile(customers, [0.5, 0.8], method="higher")
        sentences.append(
            f"Half of the {design}s have promoted the better model by **{half:,.0f}** labelled customers, four "
            f"fifths by {four_fifths:,.0f}."
            if np.isfinite(four_fifths)
            else f"Of the {design}s, {np.isfinite(customers).mean():.0%} have promoted the better model."
        )
    medians = [np.quantile(needed[design], 0.5, method="higher") for design in (SPLIT, SHADOW)]
    if np.isfinite(medians).all():
        sentences.append(f"The shadow takes **{medians[0] / medians[1]:.1f} times fewer**.")
    return " ".join(sentences)


def _difference(champion: np.ndarray, challenger: np.ndarray, alpha: float) -> statistics.Difference:
    """Of accuracy on the same customers, with an anytime-valid interval."""
    alone = _alone(challenger, champion), _alone(champion, challenger)
    return statistics.paired_difference(*alone, len(champion), alpha)


def _alone(right: np.ndarray, other: np.ndarray) -> int:
    return int((right & ~other).sum())
