"""How often each rule promotes a model that is no better, and how soon one that is: simulated, and so slow.

    make test-slow TESTS=backend/server/apps/endpoints/tests/test_false_promotions.py

shows the rates. Someone looks after every 200 labelled customers, 50 times, and acts at the first verdict.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import norm

from apps.endpoints import planning, statistics

pytestmark = [pytest.mark.slow, pytest.mark.whole]

logger = logging.getLogger(__name__)

TESTS = 1_000
LOOKS = 50
BETWEEN_LOOKS = 200
ALPHA = 0.05
MINIMUM = 100

Tell = Callable[[str, object], None]


@dataclass(frozen=True)
class Ends:
    """When each of many tests ended by a rule, and who was said to be better.

    at: (tests,) labelled customers, infinite where it did not end; winner: (tests,) 1 for the challenger, -1 for the
    champion, 0 for nobody.
    """

    at: np.ndarray
    winner: np.ndarray

    @property
    def promoted(self) -> float:
        return float((self.winner > 0).mean())

    @property
    def decided(self) -> float:
        return float((self.winner != 0).mean())


@pytest.fixture
def tell(record_property, caplog) -> Tell:
    """Leave a figure where it can be read: in the log of a test, shown by -rP, and in a report as JUnit's."""
    caplog.set_level(logging.INFO, logger=__name__)

    def tell(what: str, figure: object) -> None:
        record_property(what, figure)
        logger.info("%s: %s", what, figure)

    return tell


def first_verdict(p: np.ndarray, difference: np.ndarray, customers: np.ndarray) -> Ends:
    """p, difference: (tests, looks); customers: (looks,). The first look at which p is small enough decides."""
    settles = (p <= ALPHA) & (difference != 0)
    ended = settles.any(axis=1)
    look = settles.argmax(axis=1)
    winner = np.sign(difference[np.arange(len(p)), look])
    return Ends(np.where(ended, customers[look], np.inf), np.where(ended, winner, 0))


class Split:
    """Tests of two arms of one size. correct_a, correct_b: (tests, looks) right answers so far."""

    def __init__(self, champion: float, challenger: float, looks: int = LOOKS, *, seed: int):
        random = np.random.default_rng(seed)
        each = BETWEEN_LOOKS // 2
        self.correct_a = random.binomial(each, champion, (TESTS, looks)).cumsum(axis=1)
        self.correct_b = random.binomial(each, challenger, (TESTS, looks)).cumsum(axis=1)
        self.arm = each * np.arange(1, looks + 1)
        self.difference = self.correct_b - self.correct_a

    def by_evidence(self) -> Ends:
        p = [
            [
                statistics.split_difference(a, n, b, n, ALPHA).p
                for a, b, n in zip(*counts, self.arm.tolist(), strict=True)
            ]
            for counts in zip(self.correct_a.tolist(), self.correct_b.tolist(), strict=True)
        ]
        return first_verdict(np.array(p), self.difference, 2 * self.arm)

    def by_z_tests(self) -> Ends:
        pooled = (self.correct_a + self.correct_b) / (2 * self.arm)
        z = self.difference / np.sqrt(2 * self.arm * pooled * (1 - pooled))
        return first_verdict(2 * norm.sf(np.abs(z)), self.difference, 2 * self.arm)


class Shadow:
    """Tests in pairs. outcome: (tests, pairs) 1 where only the challenger is right, -1 where only the champion is."""

    def __init__(self, lift: float, disagreement: float, looks: int = LOOKS, *, seed: int):
        shares = [(disagreement - lift) / 2, 1 - disagreement, (disagreement + lift) / 2]
        pairs = BETWEEN_LOOKS * looks
        ranks = np.random.default_rng(seed).random((TESTS, pairs))
        self.outcome = np.searchsorted(np.cumsum(shares)[:2], ranks, side="right").astype(np.int8) - 1
        self.difference = self.outcome.cumsum(axis=1, dtype=np.int32)

    def by_evidence(self, between_looks: int = BETWEEN_LOOKS) -> Ends:
        looks = np.arange(between_looks, self.outcome.shape[1] + 1, between_looks)
        looks = looks[looks >= MINIMUM]
        p = np.ones((TESTS, len(looks)))
        for number, outcome in enumerate(self.outcome):
            discordant = np.cumsum(outcome != 0)[looks - 1]
            path = statistics.paired_p_path(outcome[outcome != 0] > 0)
            p[number] = np.concatenate([[1.0], path])[discordant]
        return first_verdict(p, self.difference[:, looks - 1], looks)

    def by_z_tests(self) -> Ends:
        looks = np.arange(BETWEEN_LOOKS, self.outcome.shape[1] + 1, BETWEEN_LOOKS)
        discordant = (self.outcome != 0).cumsum(axis=1, dtype=np.int32)[:, looks - 1]
        difference = self.difference[:, looks - 1]
        return first_verdict(2 * norm.sf(np.abs(difference) / np.sqrt(discordant)), difference, looks)


@pytest.fixture(scope="module")
def equal_split() -> Split:
    return Split(0.8, 0.8, seed=20260101)


@pytest.fixture(scope="module")
def equal_shadow() -> Shadow:
    return Shadow(0.0, 0.08, seed=20260102)


class TestTwoEqualModels:
    @pytest.mark.parametrize("design", ["split", "shadow"])
    def test_are_seldom_told_apart_by_the_evidence(self, request, tell, design):
        ends = request.getfixturevalue(f"equal_{design}").by_evidence()
        tell(f"{design}, evidence: the challenger is promoted", ends.promoted)
        tell(f"{design}, evidence: either is said to be better", ends.decided)

        assert ends.promoted <= ends.decided <= ALPHA

    @pytest.mark.parametrize("design", ["split", "shadow"])
    def test_are_told_apart_in_a_third_of_the_tests_by_looking_at_a_z_test_again_and_again(self, request, tell, design):
        ends = request.getfixturevalue(f"equal_{design}").by_z_tests()
        tell(f"{design}, z-test at every look: the challenger is promoted", ends.promoted)
        tell(f"{design}, z-test at every look: either is said to be better", ends.decided)

        assert 0.27 < ends.decided < 0.36
        assert 0.12 < ends.promoted < 0.20

    @pytest.mark.parametrize("design", ["split", "shadow"])
    def test_change_places_in_half_of_the_tests_where_more_right_answers_win(self, request, tell, design):
        promoted = float((request.getfixturevalue(f"equal_{design}").difference[:, -1] > 0).mean())
        tell(f"{design}, more right answers in the end: the challenger is promoted", promoted)

        assert 0.44 < promoted < 0.55


@pytest.fixture(scope="module")
def medians() -> dict[str, float]:
    """Labelled customers until the challenger is promoted, 80% against 82%, with 8% disagreement."""
    split = Split(0.80, 0.82, 300, seed=20260105).by_evidence()
    shadow = Shadow(0.02, 0.08, 30, seed=20260106).by_evidence()
    return {"split": float(np.median(split.at)), "shadow": float(np.median(shadow.at))}


class TestABetterChallenger:
    def test_by_five_points_is_promoted_in_most_tests(self, tell):
        split = Split(0.75, 0.80, seed=20260103).by_evidence()
        shadow = Shadow(0.05, 0.15, seed=20260104).by_evidence()
        tell("split, 75% against 80%: the challenger is promoted", split.promoted)
        tell("shadow, 75% against 80%: the challenger is promoted", shadow.promoted)

        assert split.promoted > 0.9
        assert shadow.promoted > 0.9

    def test_is_found_with_several_times_fewer_labels_in_pairs(self, tell, medians):
        for design, median in medians.items():
            tell(f"{design}, 80% against 82%: labelled customers, median", median)

        assert medians["split"] == pytest.approx(11_800, rel=0.1)
        # Looked at after every 200 pairs, half of the tests have ended at 1,400 or at 1,600, by the seed.
        assert medians["shadow"] == pytest.approx(1_600, rel=0.15)
        assert medians["split"] > 5 * medians["shadow"]

    @pytest.mark.parametrize(
        ("baseline", "lift", "disagreement"), [(0.80, 0.02, 0.08), (0.75, 0.05, 0.15), (0.60, 0.03, 0.30)]
    )
    def test_needs_about_as_many_labels_as_a_plan_says(self, tell, baseline, lift, disagreement):
        plan = planning.plan(baseline, lift, disagreement)
        split = Split(baseline, baseline + lift, 300, seed=20260107).by_evidence().at
        shadow = Shadow(lift, disagreement, 40, seed=20260108).by_evidence(between_looks=10).at

        for design, ends, needs in (("split", split, plan.split), ("shadow", shadow, plan.shadow)):
            for share, planned in ((0.5, needs.anytime_valid_median), (0.8, needs.anytime_valid)):
                taken = float(np.quantile(ends, share, method="lower"))
                tell(f"{design}, {baseline} + {lift}, {share:.0%} of tests: planned {planned.labelled}, taken", taken)
                assert taken == pytest.approx(planned.labelled, rel=0.1)
