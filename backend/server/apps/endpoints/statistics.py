"""What the labelled customers of an A/B test say, and how surely. Pure functions; no Django, no database.

Two kinds of answers: the fixed-sample ones, which hold for one look at a number of customers that was settled before,
and the anytime-valid ones, which hold however often someone looks and whenever they stop. Decisions rest on the latter.

Sources: Lindon & Malek 2022, "Anytime-Valid Inference for Multinomial Count Data" (sample ratio, paired);
Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, arXiv 2103.06476 (split). The rest is statsmodels' and SciPy's.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

SAMPLE_RATIO_K = 100
PAIRED_K = 10
# Labelled customers at which the interval of a split is tightest.
TUNED_TO = 5_000
# Beyond so many more customers nobody can be told how long to wait.
MOST_TO_SETTLE = 10_000_000


@dataclass(frozen=True)
class Difference:
    """The challenger's accuracy minus the champion's, in [-1, 1], its interval, and p against no difference."""

    estimate: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Statistic:
    """Of a fixed-sample test: its statistic, and p of both sides."""

    value: float
    p: float


# --- Is the test sound? -----------------------------------------------------------------------------------


def sample_ratio_p(first: ArrayLike, second: ArrayLike, share: float) -> float:
    """Anytime-valid p against the first arm getting its planned share of the customers (Lindon & Malek 2022).

    first, second: (looks,) customers in the arms so far, at each look, oldest first; share: the first arm's, in (0, 1).
    The smallest p of all looks; 1.0 of none.
    """
    import numpy as np
    from scipy.special import betaln

    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    alpha, beta = SAMPLE_RATIO_K * share, SAMPLE_RATIO_K * (1 - share)
    log_e = betaln(alpha + a, beta + b) - betaln(alpha, beta) - a * math.log(share) - b * math.log1p(-share)
    return math.exp(-max(0.0, log_e.max(initial=0.0)))


def sample_ratio_chi_square(first: int, second: int, share: float) -> float | None:
    """Fixed-sample p against the planned share, Pearson's chi-square; None without customers."""
    from scipy.stats import chisquare

    customers = first + second
    if not customers:
        return None
    return float(chisquare([first, second], [customers * share, customers * (1 - share)]).pvalue)


def label_rate_p(labelled_first: int, customers_first: int, labelled_second: int, customers_second: int) -> float:
    """Fixed-sample p, of both sides, against one share of labelled customers in both arms (the pooled z-test).

    1.0 where nothing can differ: an arm without customers, or all of both labelled, or none.
    """
    from statsmodels.stats.proportion import proportions_ztest

    labelled = labelled_first + labelled_second
    if not (customers_first and customers_second) or labelled in (0, customers_first + customers_second):
        return 1.0
    return float(proportions_ztest([labelled_first, labelled_second], [customers_first, customers_second])[1])


# --- One arm ----------------------------------------------------------------------------------------------


def accuracy_interval(correct: int, labelled: int, alpha: float) -> tuple[float, float] | None:
    """Wilson's interval of an arm's accuracy, fixed-sample; None without labels."""
    from statsmodels.stats.proportion import proportion_confint

    if not labelled:
        return None
    low, high = proportion_confint(correct, labelled, alpha=alpha, method="wilson")
    return float(low), float(high)


# --- Paired: both algorithms on the same customers --------------------------------------------------------
# b and c, as McNemar calls them: the pairs where only the challenger was right, and where only the champion was.


def mcnemar_p(only_challenger: int, only_champion: int) -> float:
    """McNemar's exact test, fixed-sample; 1.0 where the two never differed."""
    return _mcnemar(only_challenger, only_champion, exact=True).p


def mcnemar_chi_square(only_challenger: int, only_champion: int) -> Statistic:
    """McNemar's chi-square with continuity correction, fixed-sample. For many pairs, as the exact test."""
    if not only_challenger + only_champion:
        return Statistic(0.0, 1.0)
    return _mcnemar(only_challenger, only_champion, exact=False)


def _mcnemar(only_challenger: int, only_champion: int, *, exact: bool) -> Statistic:
    from statsmodels.stats.contingency_tables import mcnemar

    tested = mcnemar([[0, only_challenger], [only_champion, 0]], exact=exact, correction=True)
    return Statistic(float(tested.statistic), float(tested.pvalue))


def paired_log_e(only_challenger: ArrayLike, only_champion: ArrayLike, k: float = PAIRED_K) -> np.ndarray:
    """Natural logarithm of the evidence E against a fair coin: its mixture with Beta(k/2, k/2) (Lindon & Malek 2022).

    only_challenger, only_champion: counts of one shape, which is the result's. 1/E is p at that look alone.
    """
    import numpy as np
    from scipy.special import betaln

    b, c = np.asarray(only_challenger, dtype=float), np.asarray(only_champion, dtype=float)
    return betaln(k / 2 + b, k / 2 + c) - betaln(k / 2, k / 2) + (b + c) * math.log(2)


def paired_p_path(wins: ArrayLike, k: float = PAIRED_K) -> np.ndarray:
    """Anytime-valid p after each discordant pair: the smallest min(1, 1/E) so far.

    wins: (pairs,) bool, in the order in which they became known; True where only the challenger was right.
    """
    import numpy as np

    wins = np.asarray(wins, dtype=bool)
    b = np.cumsum(wins)
    c = np.arange(1, len(wins) + 1) - b
    return np.exp(-np.maximum.accumulate(np.maximum(paired_log_e(b, c, k), 0.0)))


def paired_p(wins: ArrayLike, k: float = PAIRED_K) -> float:
    """The last of `paired_p_path`: p by all that is known, whenever someone looked; 1.0 without discordant pairs."""
    path = paired_p_path(wins, k)
    return float(path[-1]) if len(path) else 1.0


def paired_lead(wins: ArrayLike, k: float = PAIRED_K) -> int:
    """Whom the look that gave `paired_p` was for: above 0 the challenger, below 0 the champion; 0 for none of both.

    A p that was small for one of the two says nothing for the other, who may lead by now.
    """
    import numpy as np

    wins = np.asarray(wins, dtype=bool)
    if not len(wins):
        return 0
    b = np.cumsum(wins)
    c = np.arange(1, len(wins) + 1) - b
    strongest = int(np.argmax(paired_log_e(b, c, k)))
    return int(b[strongest] - c[strongest])


def paired_difference(only_challenger: int, only_champion: int, pairs: int, alpha: float) -> Difference | None:
    """The difference in accuracy, (b - c) / pairs, with an anytime-valid interval; None without pairs.

    The interval holds the shares theta of the discordant pairs to which the evidence of `paired_log_e`, against theta
    instead of one half, does not object, as differences at the observed rate of discordance: it excludes zero exactly
    when p, of this look alone, is below alpha. Where the two never differed, all that is known is how rarely they do:
    then it is as wide as that rate may be (a uniform mixture's, anytime-valid too).
    """
    from scipy.optimize import brentq

    b, c = only_challenger, only_champion
    discordant = b + c
    if not pairs:
        return None
    if not discordant:
        rate = 1 - (alpha / (pairs + 1)) ** (1 / pairs)
        return Difference(0.0, -rate, rate, 1.0)

    log_e = float(paired_log_e(b, c))

    def objection(logit: float) -> float:
        """Of the evidence to a share theta, beyond 1/alpha; by logits, which are exact next to 0 and 1 too."""
        return log_e - discordant * math.log(2) + b * _log1p_exp(-logit) + c * _log1p_exp(logit) + math.log(alpha)

    def bound(side: int) -> float:
        """2 theta - 1 where the evidence begins to object, below the observed share (-1) or above it (+1)."""
        inside = math.log((b + 0.5) / (c + 0.5))
        step = 1.0
        while objection(inside + side * step) < 0:
            step *= 2
        return math.tanh(brentq(objection, *sorted((inside, inside + side * step)), xtol=1e-12) / 2)

    low, high = bound(-1) if b else -1.0, bound(+1) if c else 1.0
    rate = discordant / pairs
    return Difference((b - c) / pairs, low * rate, high * rate, math.exp(-max(0.0, log_e)))


def _log1p_exp(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# --- Split: each algorithm on customers of its own --------------------------------------------------------


def split_difference(
    correct_a: int, labelled_a: int, correct_b: int, labelled_b: int, alpha: float, tuned_to: float = TUNED_TO
) -> Difference | None:
    """The difference in accuracy, B - A, by the asymptotic confidence sequence of arXiv 2103.06476.

    None when an arm has no labels. tuned_to: labelled customers, of both arms, at which the interval is tightest. An
    arm whose answers are all right, or all wrong, shows no variance; it counts with that of (correct + 1) / (labelled +
    2). The interval is cut at -1 and 1, and excludes zero exactly when p is below alpha.
    """
    if not (labelled_a and labelled_b):
        return None
    estimate = correct_b / labelled_b - correct_a / labelled_a
    customers = labelled_a + labelled_b
    variance = _variance_of_mean(correct_a, labelled_a) + _variance_of_mean(correct_b, labelled_b)
    half = split_half_width(variance * customers, customers, alpha, tuned_to)
    log_p = _split_log_p(estimate, variance * customers, customers, alpha, tuned_to)
    return Difference(estimate, max(-1.0, estimate - half), min(1.0, estimate + half), math.exp(min(0.0, log_p)))


def split_half_width(spread: float, customers: float, alpha: float, tuned_to: float = TUNED_TO) -> float:
    """Half the interval's width. spread: the variance of the difference, times customers (of both arms)."""
    growth = customers * _rho_squared(alpha, tuned_to)
    return math.sqrt(spread * 2 * (growth + 1) / (customers * growth) * (math.log1p(growth) / 2 - math.log(alpha)))


def _split_log_p(difference: float, spread: float, customers: float, alpha: float, tuned_to: float) -> float:
    growth = customers * _rho_squared(alpha, tuned_to)
    return math.log1p(growth) / 2 - growth * difference**2 * customers / (2 * spread * (growth + 1))


def _rho_squared(alpha: float, tuned_to: float) -> float:
    return (-2 * math.log(alpha) + math.log1p(-2 * math.log(alpha))) / tuned_to


def _variance_of_mean(correct: int, labelled: int) -> float:
    accuracy = correct / labelled if 0 < correct < labelled else (correct + 1) / (labelled + 2)
    return accuracy * (1 - accuracy) / labelled


def newcombe_interval(
    correct_a: int, labelled_a: int, correct_b: int, labelled_b: int, alpha: float
) -> tuple[float, float] | None:
    """Newcombe's interval of the difference in accuracy, B - A, fixed-sample; None when an arm has no labels."""
    from statsmodels.stats.proportion import confint_proportions_2indep

    if not (labelled_a and labelled_b):
        return None
    low, high = confint_proportions_2indep(
        correct_b, labelled_b, correct_a, labelled_a, method="newcomb", compare="diff", alpha=alpha
    )
    return float(low), float(high)


# --- How many more? ---------------------------------------------------------------------------------------


def labels_to_settle_split(
    correct_a: int, labelled_a: int, correct_b: int, labelled_b: int, alpha: float, tuned_to: float = TUNED_TO
) -> int | None:
    """How many more labelled customers, of both arms, would make the observed difference significant, anytime-valid.

    Accuracies and the arms' shares are taken to stay as they are. 0 when it is significant; None when there is no
    difference, an arm has no labels, or it would take more than MOST_TO_SETTLE.
    """
    if not (labelled_a and labelled_b):
        return None
    estimate = correct_b / labelled_b - correct_a / labelled_a
    customers = labelled_a + labelled_b
    spread = (_variance_of_mean(correct_a, labelled_a) + _variance_of_mean(correct_b, labelled_b)) * customers

    def is_settled(more: int) -> bool:
        return _split_log_p(estimate, spread, customers + more, alpha, tuned_to) < math.log(alpha)

    return smallest(is_settled, range(MOST_TO_SETTLE + 1))


def labels_to_settle_paired(only_challenger: int, only_champion: int, pairs: int, alpha: float) -> int | None:
    """How many more pairs would make the observed difference significant, anytime-valid.

    The rate of discordant pairs and the challenger's share of them are taken to stay as they are. 0 when it is
    significant; None when there is no difference, or it would take more than MOST_TO_SETTLE.
    """
    if not pairs:
        return None

    def is_settled(more: int) -> bool:
        times = 1 + more / pairs
        return bool(paired_log_e(only_challenger * times, only_champion * times) > -math.log(alpha))

    return smallest(is_settled, range(MOST_TO_SETTLE + 1))


def smallest(is_enough: Callable[[int], bool], numbers: Sequence[int]) -> int | None:
    """The first of ascending numbers that is enough, where all above it are too; None when none is."""
    if not is_enough(numbers[-1]):
        return None
    return numbers[bisect_left(numbers, True, key=is_enough)]
