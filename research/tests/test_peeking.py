"""How often each rule errs, and how many customers each design needs, in simulated tests with fixed seeds."""

import numpy as np
import pytest

import peeking
from apps.endpoints import statistics

CUSTOMERS = 4_000


def right(accuracy):
    return np.arange(CUSTOMERS) < accuracy * CUSTOMERS


def pair(both, only_first, only_second):
    """Two models by the shares of customers whom both have right, or one alone."""
    rank = np.arange(CUSTOMERS) / CUSTOMERS
    second_alone = (rank >= both + only_first) & (rank < both + only_first + only_second)
    return rank < both + only_first, (rank < both) | second_alone


@pytest.fixture(scope="module")
def equal():
    return peeking.splits(right(0.8), right(0.8), tests=400, seed=1)


@pytest.fixture(scope="module")
def needed():
    champion, challenger = pair(both=0.72, only_first=0.02, only_second=0.06)
    return peeking.needed_by_design(champion, challenger, tests=200, seed=2)


# --- what is drawn


def test_a_simulated_split_has_the_accuracies_of_its_customers():
    tests = peeking.splits(right(0.6), right(0.9), tests=200, seed=3)
    assert tests.champion.shape == tests.challenger.shape == (200, len(peeking.LOOKS))
    assert tests.champion[:, -1].mean() / (tests.labelled[-1] / 2) == pytest.approx(0.6, abs=0.01)
    assert tests.difference[:, -1].mean() == pytest.approx(0.3, abs=0.01)
    assert (np.diff(tests.champion, axis=1) >= 0).all()


def test_the_same_seed_draws_the_same_tests_and_another_seed_others():
    draws = [peeking.splits(right(0.8), right(0.8), tests=5, seed=seed).champion for seed in (1, 1, 2)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_the_evidence_of_a_split_is_the_servers(equal):
    look = 10
    each = int(equal.labelled[look]) // 2
    counts = int(equal.champion[3, look]), each, int(equal.challenger[3, look]), each
    server = statistics.split_difference(*counts, equal.alpha)
    assert equal.evidence_p[3, look] == server.p
    assert tuple(equal.course(3).intervals[peeking.EVIDENCE][look]) == (server.low, server.high)


def test_the_evidence_of_a_shadow_is_the_servers():
    # One model always wins: whoever is drawn, so many pairs are so many wins.
    looks = np.array([4, 8, 12])
    tests = peeking.shadows(right(0), right(1), looks=looks, tests=2, seed=4)
    assert tests.lead.tolist() == [[4, 8, 12]] * 2
    assert tests.evidence_p[0].tolist() == [statistics.paired_p([True] * int(count)) for count in looks]


def test_two_models_that_always_agree_are_never_told_apart():
    tests = peeking.shadows(right(0.8), right(0.8), looks=np.array([100, 1_000]), tests=3, seed=5)
    assert (tests.evidence_p == 1).all()
    assert (tests.by_evidence().winner == 0).all()
    assert np.isinf(peeking.needed(tests)).all()


def test_arms_that_are_always_right_show_no_difference():
    tests = peeking.splits(right(1), right(1), tests=2, seed=6)
    assert (tests.z_test_p == 1).all()
    assert (tests.by_evidence().winner == 0).all()


# --- when a test ends


def test_a_test_ends_at_the_first_look_that_is_significant_for_whoever_is_ahead_then():
    p = np.array([[0.5, 0.04, 0.01], [0.05, 0.9, 0.9], [0.5, 0.5, 0.5], [0.01, 0.5, 0.02]])
    lead = np.array([[-1, 1, -1], [-1, 1, 1], [1, 1, 1], [0, 1, 1]])
    ends = peeking.first_verdicts(p, lead, 0.05)
    assert ends.look.tolist() == [1, 0, 3, 2]
    assert ends.winner.tolist() == [1, -1, 0, 1]
    assert peeking.promoted_by(ends, 3).tolist() == [0, 0.25, 0.5]


# --- two equal models


def test_evidence_promotes_one_of_two_equal_models_in_fewer_tests_than_alpha(equal):
    assert (equal.by_evidence().winner != 0).mean() <= equal.alpha
    assert peeking.promotions(equal)[peeking.EVIDENCE][-1] <= equal.alpha / 2


def test_a_z_test_at_every_look_promotes_one_of_two_equal_models_far_more_often_than_alpha(equal):
    shares = peeking.promotions(equal)[peeking.Z_TEST]
    assert (np.diff(shares) >= 0).all()
    assert shares[0] < equal.alpha
    assert shares[-1] > 2 * equal.alpha
    assert (equal.by_z_test().winner != 0).mean() > 4 * equal.alpha


def test_counting_right_answers_promotes_one_of_two_equal_models_in_half_of_the_tests(equal):
    assert peeking.promotions(equal)[peeking.MORE_RIGHT].mean() == pytest.approx(0.49, abs=0.03)


def test_the_example_promotes_by_the_z_test_and_never_by_the_evidence(equal):
    course = peeking.misled(equal)
    assert ((course.p[peeking.Z_TEST] <= equal.alpha) & (course.difference > 0)).any()
    assert not (course.p[peeking.EVIDENCE] <= equal.alpha).any()


@pytest.mark.parametrize("rule", [peeking.Z_TEST, peeking.EVIDENCE])
def test_an_interval_leaves_out_zero_exactly_when_p_is_small(equal, rule):
    for course in (peeking.misled(equal), equal.course(0), equal.course(1)):
        low, high = course.intervals[rule].T
        assert ((low > 0) | (high < 0)).tolist() == (course.p[rule] <= equal.alpha).tolist()


def test_an_interval_that_allows_for_every_look_is_wider(equal):
    (single_low, single_high), (low, high) = (one.T for one in peeking.misled(equal).intervals.values())
    assert (low < single_low).all()
    assert (high > single_high).all()


def test_there_is_no_example_where_nobody_was_misled():
    assert peeking.misled(peeking.splits(right(0.9), right(0.1), tests=5, seed=7)) is None


# --- a better challenger


def test_a_better_challenger_is_promoted_by_a_shadow_with_several_times_fewer_customers(needed):
    split, shadow = (float(np.median(needed[design])) for design in (peeking.SPLIT, peeking.SHADOW))
    assert np.isfinite(needed[peeking.SHADOW]).all()
    assert split > 4 * shadow


def test_a_challenger_that_is_worse_is_not_promoted():
    champion, challenger = pair(both=0.6, only_first=0.2, only_second=0.05)
    assert np.isinf(list(peeking.needed_by_design(champion, challenger, tests=20, seed=8).values())).all()


def test_the_weaker_of_two_models_comes_first():
    weaker, better = peeking.weaker_first({"b": right(0.9), "a": right(0.7)})
    assert (weaker.mean(), better.mean()) == (0.7, 0.9)


# --- what is said of them


def test_a_pair_is_told_apart_only_where_its_interval_leaves_out_zero():
    first, second = pair(both=0.7, only_first=0.02, only_second=0.06)
    equals = pair(both=0.7, only_first=0.02, only_second=0.02)
    assert peeking.on_the_pairs([{"old": first, "new": second}]) == "By 4.0 points **new is better than old**."
    assert peeking.on_the_pairs([{"new": second, "old": first}]) == "By 4.0 points **new is better than old**."
    assert "do not tell new from old: it alone is right for 80" in peeking.on_the_pairs(
        [dict(zip(["old", "new"], equals, strict=True))]
    )
    table = peeking.pair_table([{"old": first, "new": second}])
    assert table.loc["new against old", ["accuracy", "only one is right", "difference"]].tolist() == [
        "76.0% against 72.0%",
        "8.0%",
        "+4.0 points",
    ]


def test_the_shares_that_are_told_are_those_that_are_drawn(equal):
    told = peeking.on_the_promotions(equal)
    for rule, form in ((peeking.Z_TEST, ".0%"), (peeking.EVIDENCE, ".1%"), (peeking.MORE_RIGHT, ".0%")):
        assert f"**{peeking.promotions(equal)[rule][-1]:{form}}**" in told


def test_the_example_is_told_from_the_look_at_which_it_misleads(equal):
    course = peeking.misled(equal)
    at = np.flatnonzero((course.p[peeking.Z_TEST] <= equal.alpha) & (course.difference > 0))[0]
    assert peeking.on_the_course(course).startswith(f"After {course.labelled[at]:,} customers the challenger is ")


def test_designs_are_compared_by_their_medians():
    told = peeking.on_the_designs(
        {peeking.SPLIT: np.array([400.0, 600, 800]), peeking.SHADOW: np.array([100, 200, np.inf])}
    )
    assert "have promoted the better model by **600** labelled customers, four fifths by 800." in told
    assert "Of the shadows, 67% have promoted the better model." in told
    assert "**3.0 times fewer**" in told


def test_designs_that_seldom_end_are_not_compared():
    never = np.full(10, np.inf)
    told = peeking.on_the_designs({peeking.SPLIT: never, peeking.SHADOW: never})
    assert "0% have promoted" in told
    assert "fewer" not in told
