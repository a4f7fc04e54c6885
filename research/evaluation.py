"""How good a probability is: scores, their bootstrap intervals, and the points of the usual curves.

Every score takes `probability` (n,) float in [0, 1], `outcome` (n,) 0 or 1 with both present, and `weight`
(..., n), which says how often each row counts. It returns the score for each set of weights, (...): one call
with a (resamples, n) matrix is a whole bootstrap. Without weights it returns a float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import numpy as np

THRESHOLD = 0.5
BINS = 10
TOP_SHARE = 0.1
RESAMPLES = 500
CONFIDENCE = 0.95

# A resample is a row of weights; this many numbers are held at a time (32 MB).
_NUMBERS_AT_A_TIME = 4_000_000


def roc_auc(probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None = None) -> Any:
    """The chance that a retained customer is scored above one who left; a tie counts half."""
    positive, negative = _by_distinct_probability(probability, outcome, weight)
    above = np.cumsum(positive, axis=-1) - positive / 2
    return _plain((negative * above).sum(-1) / (positive.sum(-1) * negative.sum(-1)))


def pr_auc(probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None = None) -> Any:
    """Average precision: precision at each threshold, weighted by the recall gained there."""
    positive, negative = _by_distinct_probability(probability, outcome, weight)
    retained, taken = np.cumsum(positive, axis=-1), np.cumsum(positive + negative, axis=-1)
    precision = np.divide(retained, taken, out=np.zeros_like(taken), where=taken > 0)
    return _plain((positive * precision).sum(-1) / positive.sum(-1))


def accuracy(probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None = None) -> Any:
    """Share of right labels; the label is 1 when the probability is above one half."""
    return _mean((np.asarray(probability) > THRESHOLD) == np.asarray(outcome), weight)


def brier(probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None = None) -> Any:
    """Mean squared distance of probability and outcome, in [0, 1]; lower is better."""
    return _mean((np.asarray(probability) - np.asarray(outcome)) ** 2, weight)


def log_loss(probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None = None) -> Any:
    """Mean negative log-likelihood in nats. A certainty that fails costs 36, not infinity."""
    epsilon = np.finfo(float).eps
    likelihood = np.where(np.asarray(outcome) == 1, probability, 1 - np.asarray(probability))
    return _mean(-np.log(np.clip(likelihood, epsilon, 1 - epsilon)), weight)


def expected_calibration_error(
    probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None = None, bins: int = BINS
) -> Any:
    """Mean gap between predicted and observed retention in bins of equal width, weighted by bin size.

    Guo et al. 2017, eq. 3. A perfect model scores above 0 on few rows, and above its own score on resamples of
    them: the interval of this score is pessimistic, and can lie above it.
    """
    member = _bin_of(probability, bins)[:, None] == np.arange(bins)
    gap = np.asarray(outcome) - np.asarray(probability)
    weight = _weights(weight, len(gap))
    return _plain(np.abs((weight * gap) @ member.astype(float)).sum(-1) / weight.sum(-1))


def top_decile_lift(probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None = None) -> Any:
    """Retention among the tenth with the highest probabilities, over retention among all.

    Customers who tie at the edge of that tenth count in proportion.
    """
    positive, negative = _by_distinct_probability(probability, outcome, weight)
    size = TOP_SHARE * (positive + negative).sum(-1, keepdims=True)
    before = np.cumsum(positive + negative, axis=-1) - (positive + negative)
    room = np.clip(size - before, 0, positive + negative)
    count = positive + negative
    taken = np.divide(room, count, out=np.zeros_like(count), where=count > 0)
    retained = (positive * taken).sum(-1)
    return _plain(retained / size[..., 0] / (positive.sum(-1) / count.sum(-1)))


METRICS = {
    "roc_auc": roc_auc,
    "pr_auc": pr_auc,
    "accuracy": accuracy,
    "brier": brier,
    "log_loss": log_loss,
    "expected_calibration_error": expected_calibration_error,
    "top_decile_lift": top_decile_lift,
}


def scores(
    probability: np.ndarray,
    outcome: np.ndarray,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    customers: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """Every metric with its 95% percentile bootstrap interval: {metric: {"value", "low", "high"}}.

    customers: (n,) int, who each row is of; the bootstrap draws customers, with all their rows. By default each
    row is a customer. The draws depend on the seed and the customers only, so models meet the same resamples.
    """
    outcome = np.asarray(outcome)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for weight in _resamples(outcome, customers, resamples, seed):
        for name, metric in METRICS.items():
            drawn[name].append(metric(probability, outcome, weight))
    result = {}
    for name, metric in METRICS.items():
        low, high = _percentiles(np.concatenate(drawn[name]))
        result[name] = {"value": metric(probability, outcome), "low": low, "high": high}
    return result


def difference(
    first: np.ndarray,
    second: np.ndarray,
    outcome: np.ndarray,
    *,
    metric: Callable[..., Any] = roc_auc,
    seed: int,
    resamples: int = RESAMPLES,
    customers: np.ndarray | None = None,
) -> dict[str, float]:
    """How much higher `first` scores than `second`, with its 95% interval: {"value", "low", "high"}.

    Both meet the same resamples of `scores`, so what is hard for both does not widen the interval.
    """
    outcome = np.asarray(outcome)
    drawn = [
        metric(first, outcome, weight) - metric(second, outcome, weight)
        for weight in _resamples(outcome, customers, resamples, seed)
    ]
    low, high = _percentiles(np.concatenate(drawn))
    return {"value": metric(first, outcome) - metric(second, outcome), "low": low, "high": high}


def wilson_interval(count: Any, total: Any) -> tuple[Any, Any]:
    """95% interval of a share, `count` of `total` (above 0); numbers or arrays. Wilson 1927."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = count / total, z**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = np.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return np.minimum(centre - half, share), np.maximum(centre + half, share)  # rounding may put it outside


def calibration_bins(
    probability: np.ndarray, outcome: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, observed retention and row count of each bin that has rows, three (at most bins,)."""
    member = _bin_of(probability, bins)
    count = np.bincount(member, minlength=bins)
    used = count > 0
    predicted = np.bincount(member, np.asarray(probability, float), bins)[used] / count[used]
    observed = np.bincount(member, np.asarray(outcome, float), bins)[used] / count[used]
    return predicted, observed, count[used]


def cumulative_gains(probability: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of customers contacted, highest probability first, and share of the retained among them.

    Two (distinct probabilities + 1,) from 0 to 1. Their quotient, from the second point on, is the lift.
    """
    positive, negative = _by_distinct_probability(probability, outcome, None)
    contacted = np.concatenate([[0.0], np.cumsum(positive + negative)])
    found = np.concatenate([[0.0], np.cumsum(positive)])
    return contacted / contacted[-1], found / found[-1]


def _by_distinct_probability(
    probability: np.ndarray, outcome: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the retained and of the others at each distinct probability, highest first: two (..., distinct)."""
    probability, outcome = np.asarray(probability, float), np.asarray(outcome, float)
    order = np.argsort(-probability, kind="stable")
    starts = np.flatnonzero(np.diff(probability[order], prepend=np.inf))
    weight = _weights(weight, len(probability))[..., order]
    every = np.add.reduceat(weight, starts, axis=-1)
    positive = np.add.reduceat(weight * outcome[order], starts, axis=-1)
    return positive, every - positive


def _resamples(outcome: np.ndarray, customers: np.ndarray | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights of bootstrap resamples, in blocks (some, n). One that has no customer of a class is drawn again."""
    rows = len(outcome)
    customer = np.arange(rows) if customers is None else np.unique(customers, return_inverse=True)[1]
    number = int(customer.max()) + 1
    random = np.random.default_rng(seed)
    block = max(1, _NUMBERS_AT_A_TIME // rows)
    for start in range(0, resamples, block):
        weight = np.empty((min(block, resamples - start), rows))
        for row in weight:
            retained = -1.0
            while not 0 < retained < row.sum():
                row[:] = np.bincount(random.integers(number, size=number), minlength=number)[customer]
                retained = row @ outcome
        yield weight


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    """The ends of the interval that holds the middle 95% of the resamples' scores."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _bin_of(probability: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each probability; an upper edge belongs to its bin, as in Guo et al."""
    return np.clip(np.ceil(np.asarray(probability) * bins).astype(int) - 1, 0, bins - 1)


def _mean(value: np.ndarray, weight: np.ndarray | None) -> Any:
    weight = _weights(weight, len(value))
    return _plain(weight @ np.asarray(value, float) / weight.sum(-1))


def _weights(weight: np.ndarray | None, rows: int) -> np.ndarray:
    return np.ones(rows) if weight is None else np.asarray(weight, float)


def _plain(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else value
