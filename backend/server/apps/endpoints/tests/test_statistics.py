"""What labels say about two algorithms: published figures, to the printed digits, and the edges."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.endpoints import statistics
from apps.endpoints.statistics import MOST_TO_SETTLE, Difference

COUNTS = st.integers(0, 3_000)
ALPHAS = st.sampled_from([0.001, 0.01, 0.05, 0.2])


@st.composite
def answered(draw) -> tuple[int, int]:
    """Right answers, and labelled customers, of one arm."""
    labelled = draw(st.integers(1, 5_000))
    return draw(st.integers(0, labelled)), labelled


class TestTheSampleRatio:
    def test_has_the_published_chi_square(self):
        assert f"{statistics.sample_ratio_chi_square(600, 400, 0.5):.2e}" == "2.54e-10"

    def test_has_no_chi_square_without_customers(self):
        assert statistics.sample_ratio_chi_square(0, 0, 0.3) is None

    @pytest.mark.parametrize(
        ("first", "second", "share"), [(600, 400, 0.5), (480, 520, 0.5), (95, 5, 0.9), (0, 1, 0.5)]
    )
    def test_evidence_is_that_of_the_formula(self, first, second, share):
        def log_beta(a: float, b: float) -> float:
            return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

        k = 100
        evidence = math.exp(
            log_beta(k * share + first, k * (1 - share) + second)
            - log_beta(k * share, k * (1 - share))
            - first * math.log(share)
            - second * math.log(1 - share)
        )

        assert statistics.sample_ratio_p([first], [second], share) == pytest.approx(min(1, 1 / evidence))

    def test_once_broken_it_stays_broken(self):
        broken = statistics.sample_ratio_p([600], [400], 0.5)

        assert broken < 0.001
        assert statistics.sample_ratio_p([10, 600, 5_000], [10, 400, 5_000], 0.5) == broken

    def test_is_sound_without_customers_and_as_planned(self):
        assert statistics.sample_ratio_p([], [], 0.5) == 1.0
        assert statistics.sample_ratio_p([0], [0], 0.5) == 1.0
        assert statistics.sample_ratio_p([700, 70_000], [300, 30_000], 0.7) == 1.0

    def test_is_judged_by_the_planned_share(self):
        assert statistics.sample_ratio_p([500], [500], 0.9) < 1e-9


class TestTheLabelRates:
    def test_is_the_pooled_test_of_two_shares(self):
        share = (300 + 250) / 2_000
        z = (0.30 - 0.25) / math.sqrt(share * (1 - share) * 2 / 1_000)

        assert statistics.label_rate_p(300, 1_000, 250, 1_000) == pytest.approx(math.erfc(z / math.sqrt(2)))

    def test_finds_an_arm_that_gets_fewer_labels(self):
        assert statistics.label_rate_p(900, 1_000, 800, 1_000) < 0.001

    @pytest.mark.parametrize("counts", [(0, 0, 5, 10), (5, 10, 0, 0), (0, 0, 0, 0), (0, 10, 0, 20), (10, 10, 20, 20)])
    def test_says_nothing_where_nothing_can_differ(self, counts):
        assert statistics.label_rate_p(*counts) == 1.0


class TestTheAccuracyOfAnArm:
    def test_has_wilsons_interval(self):
        """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I: 81 of 263."""
        low, high = statistics.accuracy_interval(81, 263, 0.05)

        assert (f"{low:.4f}", f"{high:.4f}") == ("0.2553", "0.3662")

    def test_is_unknown_without_labels_and_bounded_where_all_are_right_or_wrong(self):
        assert statistics.accuracy_interval(0, 0, 0.05) is None
        assert statistics.accuracy_interval(0, 20, 0.05) == pytest.approx((0, 0.1611), abs=1e-4)
        assert statistics.accuracy_interval(20, 20, 0.05) == pytest.approx((0.8389, 1), abs=1e-4)


class TestPairs:
    @pytest.mark.parametrize(
        ("table", "statistic", "p"),
        [([[101, 121], [59, 33]], "20.67222", "5.450095e-06"), ([[101, 70], [59, 33]], "0.7751938", "0.3786151")],
    )
    def test_have_the_published_chi_square_of_mcnemar(self, table, statistic, p):
        tested = statistics.mcnemar_chi_square(table[0][1], table[1][0])

        assert f"{tested.value:.7g}" == statistic
        assert f"{tested.p:.7g}" == p

    def test_have_mcnemars_exact_test(self):
        assert statistics.mcnemar_p(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)

    def test_that_never_differ_show_nothing(self):
        assert statistics.mcnemar_p(0, 0) == 1.0
        assert statistics.mcnemar_chi_square(0, 0).p == 1.0
        assert statistics.paired_p([]) == 1.0

    def test_have_the_published_evidence(self):
        assert f"{math.exp(statistics.paired_log_e(8, 2, k=2)):.6f}" == "2.068687"

    def test_have_the_published_p(self):
        last_alone = math.exp(-statistics.paired_log_e(8, 2))

        assert f"{last_alone:.6f}" == "0.546745"
        assert f"{statistics.paired_p([False, False] + [True] * 8):.6f}" == "0.546745"

    def test_once_shown_it_stays_shown(self):
        shown = statistics.paired_p([True] * 20)

        assert shown < 0.05
        assert statistics.paired_p([True] * 20 + [False] * 20) == shown
        assert statistics.paired_p([True, False] * 20) == 1.0

    @given(st.lists(st.booleans(), max_size=60))
    def test_p_is_the_smallest_of_every_step(self, wins):
        smallest, path = 1.0, []
        for number in range(1, len(wins) + 1):
            b = sum(wins[:number])
            smallest = min(smallest, math.exp(-statistics.paired_log_e(b, number - b)))
            path.append(smallest)

        assert statistics.paired_p_path(wins).tolist() == pytest.approx(path)
        assert statistics.paired_p(wins) == pytest.approx(path[-1] if path else 1.0)

    def test_a_million_take_well_below_a_second(self):
        wins = np.random.default_rng(5).random(1_000_000) < 0.5
        statistics.paired_p(wins[:10])
        began = time.process_time()

        statistics.paired_p(wins)

        assert time.process_time() - began < 0.9


class TestTheDifferenceOfPairs:
    def test_is_unknown_without_pairs(self):
        assert statistics.paired_difference(0, 0, 0, 0.05) is None

    def test_is_that_of_the_two_accuracies(self):
        found = statistics.paired_difference(90, 70, 1_000, 0.05)

        assert found.estimate == pytest.approx(0.02)
        assert found.low < 0 < found.high
        assert found.p == 1.0

    def test_of_two_that_never_differed_is_bounded_by_how_rarely_they_do(self):
        found = [statistics.paired_difference(0, 0, pairs, 0.05) for pairs in (1, 100, 10_000)]

        assert {(each.estimate, each.low + each.high, each.p) for each in found} == {(0.0, 0.0, 1.0)}
        assert [each.high for each in found] == pytest.approx([0.975, 0.0733, 0.00122], rel=0.01)

    @pytest.mark.parametrize(("b", "c"), [(30, 0), (0, 30)])
    def test_where_only_one_is_ever_right_ends_at_the_rate_of_discordance(self, b, c):
        found = statistics.paired_difference(b, c, 100, 0.05)

        assert found.p < 0.05
        assert abs(found.estimate) == max(abs(found.low), abs(found.high)) == pytest.approx(0.3)
        assert found.low * found.high > 0

    @given(COUNTS, COUNTS, COUNTS, ALPHAS)
    def test_excludes_zero_exactly_when_p_is_below_alpha(self, b, c, alike, alpha):
        found = statistics.paired_difference(b, c, b + c + alike + 1, alpha)

        assert -1 <= found.low <= found.estimate <= found.high <= 1
        assert (found.low > 0 or found.high < 0) == (found.p < alpha)

    @given(COUNTS, COUNTS, ALPHAS)
    def test_changes_its_sign_with_the_arms(self, b, c, alpha):
        found, other = (statistics.paired_difference(*counts, b + c + 1, alpha) for counts in ((b, c), (c, b)))

        assert (found.estimate, found.low, found.high) == pytest.approx(
            (-other.estimate, -other.high, -other.low), abs=1e-9
        )
        assert found.p == pytest.approx(other.p)


class TestTheDifferenceOfASplit:
    def test_has_the_published_interval(self):
        found = statistics.split_difference(1396, 3000, 2422, 3461, 0.05)

        assert f"{found.estimate:.6f}" == "0.234464"
        assert (f"{found.low:.6f}", f"{found.high:.6f}") == ("0.198049", "0.270880")
        assert found.p < 1e-9

    def test_has_newcombes_published_interval(self):
        low, high = statistics.newcombe_interval(48, 80, 56, 70, 0.05)

        assert (f"{low:.5f}", f"{high:.5f}") == ("0.05243", "0.33387")

    @pytest.mark.parametrize("counts", [(0, 0, 5, 10), (5, 10, 0, 0), (0, 0, 0, 0)])
    def test_is_unknown_while_an_arm_has_no_labels(self, counts):
        assert statistics.split_difference(*counts, 0.05) is None
        assert statistics.newcombe_interval(*counts, 0.05) is None

    def test_of_equal_counts_is_none(self):
        found = statistics.split_difference(80, 100, 80, 100, 0.05)

        assert found.estimate == 0
        assert found.low == -found.high < 0
        assert found.p == 1.0

    @pytest.mark.parametrize(("correct_a", "correct_b"), [(0, 0), (0, 100), (100, 0), (100, 100)])
    def test_has_a_width_where_all_are_right_or_wrong(self, correct_a, correct_b):
        found = statistics.split_difference(correct_a, 100, correct_b, 100, 0.05)

        assert found.low < found.high
        assert (found.p < 0.05) == (correct_a != correct_b)

    @given(answered(), answered(), ALPHAS)
    def test_excludes_zero_exactly_when_p_is_below_alpha(self, a, b, alpha):
        found = statistics.split_difference(*a, *b, alpha)

        assert -1 <= found.low <= found.estimate <= found.high <= 1
        assert 0 <= found.p <= 1
        assert (found.low > 0 or found.high < 0) == (found.p < alpha)

    @given(answered(), answered(), ALPHAS)
    def test_changes_its_sign_with_the_arms(self, a, b, alpha):
        found, other = statistics.split_difference(*a, *b, alpha), statistics.split_difference(*b, *a, alpha)

        assert found == Difference(-other.estimate, pytest.approx(-other.high), pytest.approx(-other.low), other.p)

    def test_is_tightest_where_it_is_tuned_to_be(self):
        """Beside the interval of one look, which needs no tuning."""

        def times_as_wide(labelled: int, tuned_to: int) -> float:
            found = statistics.split_difference(
                labelled * 8 // 10, labelled, labelled * 8 // 10, labelled, 0.05, tuned_to
            )
            return (found.high - found.low) * math.sqrt(labelled)

        widths = {labelled: times_as_wide(labelled, 5_000) for labelled in (250, 1_000, 2_500, 10_000, 50_000)}

        assert min(widths, key=widths.get) == 2_500


class TestHowManyMoreLabelsWouldSettleIt:
    def test_of_a_split_is_the_first_number_that_does(self):
        more = statistics.labels_to_settle_split(400, 500, 410, 500, 0.05)
        times = 1 + more / 1_000

        def p(times: float) -> float:
            return statistics.split_difference(400 * times, 500 * times, 410 * times, 500 * times, 0.05).p

        assert p(times) < 0.05 <= p(times - 0.001)

    def test_of_pairs_is_the_first_number_that_does(self):
        more = statistics.labels_to_settle_paired(25, 15, 500, 0.05)

        def p(pairs: int) -> float:
            return math.exp(-statistics.paired_log_e(25 * pairs / 500, 15 * pairs / 500))

        assert p(500 + more) < 0.05 <= p(500 + more - 1)

    def test_is_none_once_it_is_settled(self):
        assert statistics.labels_to_settle_split(1396, 3000, 2422, 3461, 0.05) == 0
        assert statistics.labels_to_settle_paired(100, 20, 1_000, 0.05) == 0

    def test_is_unknown_without_a_difference_or_labels(self):
        assert statistics.labels_to_settle_split(80, 100, 80, 100, 0.05) is None
        assert statistics.labels_to_settle_split(0, 0, 80, 100, 0.05) is None
        assert statistics.labels_to_settle_split(80, 100, 0, 0, 0.05) is None
        assert statistics.labels_to_settle_paired(20, 20, 100, 0.05) is None
        assert statistics.labels_to_settle_paired(0, 0, 100, 0.05) is None
        assert statistics.labels_to_settle_paired(0, 0, 0, 0.05) is None

    def test_is_unknown_where_nobody_would_wait_for_it(self):
        assert statistics.labels_to_settle_split(50_000, 100_000, 50_010, 100_000, 0.05) is None
        assert statistics.labels_to_settle_paired(50_010, 50_000, 1_000_000, 0.05) is None

    @settings(max_examples=50)
    @given(answered(), answered(), ALPHAS)
    def test_agrees_with_the_verdict_of_a_split(self, a, b, alpha):
        more = statistics.labels_to_settle_split(*a, *b, alpha)

        assert (more == 0) == (statistics.split_difference(*a, *b, alpha).p < alpha)
        assert more is None or more <= MOST_TO_SETTLE

    @settings(max_examples=50)
    @given(COUNTS, COUNTS, COUNTS, ALPHAS)
    def test_agrees_with_the_verdict_of_pairs(self, b, c, alike, alpha):
        pairs = b + c + alike + 1
        more = statistics.labels_to_settle_paired(b, c, pairs, alpha)

        assert (more == 0) == (statistics.paired_difference(b, c, pairs, alpha).p < alpha)
