"""How many labelled customers an A/B test needs, before it starts, so that nobody starts one that cannot end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.endpoints.statistics import paired_log_e, split_half_width

if TYPE_CHECKING:
    import numpy as np

# A smaller lift takes hundreds of millions of customers to show.
SMALLEST_LIFT = 0.0001
SMALLEST_SHARE = 0.01
FEWEST_PER_DAY = 0.01


class PlanError(Exception):
    """A plan for what cannot be; `field` is to blame, and the message says why."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Need:
    """Labelled customers, of a split by arm too, and the days until there are as many; None where nobody said."""

    labelled: int
    champion: int | None
    challenger: int | None
    days: int | None


@dataclass(frozen=True)
class DesignNeeds:
    """What one design needs to show the planned lift.

    fixed_sample: with the planned power, at one look, when all these are known, and at none before.
    anytime_valid: with the planned power by then, however often someone looks; what a decision here rests on.
    anytime_valid_median: by then half of the tests have shown it, and may end.
    """

    fixed_sample: Need
    anytime_valid: Need
    anytime_valid_median: Need


@dataclass(frozen=True)
class Plan:
    """What each design needs, and that in sentences; no shadow where nobody said how often the two disagree."""

    split: DesignNeeds
    shadow: DesignNeeds | None
    message: str


def plan(
    baseline: float,
    lift: float,
    disagreement: float | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
    per_day: float | None = None,
    weight: float = 0.5,
) -> Plan:
    """What it takes to show that a challenger is better by `lift`. Raises PlanError.

    baseline: the champion's accuracy; lift: the challenger's on top of it, 0.02 for two points; disagreement: the share
    of customers whom exactly one of the two gets right; per_day: customers whose outcome becomes known; weight: the
    challenger's share of them, in a split.
    """
    _check(baseline, lift, disagreement, alpha, power, per_day, weight)
    split = _split(baseline, lift, alpha, power, per_day, weight)
    shadow = None if disagreement is None else _shadow(lift, disagreement, alpha, power, per_day)
    message = (
        f"To show that {_percent(baseline + lift)} accuracy is better than {_percent(baseline)}, with a chance of "
        f"{_percent(power)} and at most {_percent(alpha)} for a false alarm: {_sentence('a split', split)}"
    )
    if shadow:
        return Plan(split, shadow, f"{message} {_sentence('A shadow', shadow)}")
    return Plan(split, None, f"{message} How many a shadow needs depends on disagreement: say it to be told.")


def _check(
    baseline: float,
    lift: float,
    disagreement: float | None,
    alpha: float,
    power: float,
    per_day: float | None,
    weight: float,
) -> None:
    def must(holds: bool, field: str, message: str) -> None:
        if not holds:
            raise PlanError(field, message)

    for field, value in (("baseline", baseline), ("alpha", alpha), ("power", power)):
        must(0 < value < 1, field, f"Expected a number between 0 and 1, such as 0.8 for 80%; this is {value:g}.")
    must(alpha < power, "power", f"Expected more than alpha ({alpha:g}), which is reached without any evidence.")
    must(lift > 0, "lift", f"Expected how much better it is, such as 0.02 for two points; this is {lift:g}.")
    must(baseline + lift < 1, "lift", f"From {baseline:g} on, {lift:g} more are beyond what can be right.")
    must(lift >= SMALLEST_LIFT, "lift", f"Less than {SMALLEST_LIFT:g} takes more customers than there are.")
    if disagreement is not None:
        must(
            lift <= disagreement <= 1,
            "disagreement",
            f"Expected at least the lift ({lift:g}), since only where they disagree can one be better, and at most 1; "
            f"this is {disagreement:g}.",
        )
    must(
        SMALLEST_SHARE <= weight <= 1 - SMALLEST_SHARE,
        "weight",
        f"Expected the challenger's share of the customers, from {SMALLEST_SHARE} to {1 - SMALLEST_SHARE}.",
    )
    if per_day is not None:
        must(
            FEWEST_PER_DAY <= per_day < math.inf,
            "per_day",
            f"Expected labelled customers per day, {FEWEST_PER_DAY} or more; this is {per_day:g}.",
        )


def _split(
    baseline: float, lift: float, alpha: float, power: float, per_day: float | None, weight: float
) -> DesignNeeds:
    import numpy as np
    from statsmodels.stats.proportion import samplesize_proportions_2indep_onetail

    better = baseline + lift
    fixed = samplesize_proportions_2indep_onetail(lift, baseline, power, ratio=(1 - weight) / weight, alpha=alpha)
    # The variance of the difference, times customers.
    spread = baseline * (1 - baseline) / (1 - weight) + better * (1 - better) / weight
    customers = _grid(spread, lift)
    boundary = np.array([each * split_half_width(spread, each, alpha) for each in customers])
    reached = _share_reached(customers, boundary, lift, spread)

    def need(customers: float) -> Need:
        # The normal approximation finds none at all enough for a small power in arms of very different sizes.
        arms = (max(1, math.ceil(customers * (1 - weight))), max(1, math.ceil(customers * weight)))
        return Need(sum(arms), *arms, _days(sum(arms), per_day))

    return DesignNeeds(
        need(float(fixed) / weight),
        need(float(np.interp(power, reached, customers))),
        need(float(np.interp(0.5, reached, customers))),
    )


def _shadow(lift: float, disagreement: float, alpha: float, power: float, per_day: float | None) -> DesignNeeds:
    import numpy as np
    from statsmodels.stats.power import normal_sample_size_one_tail

    variance = disagreement - lift**2
    # McNemar's test with both variances: Connor 1987, "Sample size for testing differences in proportions for the
    # paired-sample design".
    fixed = normal_sample_size_one_tail(
        lift, power, alpha / 2, std_null=math.sqrt(disagreement), std_alternative=math.sqrt(variance)
    )
    customers = _grid(variance, lift)
    customers = customers[paired_log_e(customers * disagreement, 0) > -math.log(alpha)]
    boundary = _paired_boundary(customers * disagreement, alpha)
    reached = _share_reached(customers, boundary, lift, variance)

    def need(customers: float) -> Need:
        labelled = math.ceil(customers)
        return Need(labelled, None, None, _days(labelled, per_day))

    return DesignNeeds(
        need(float(fixed)),
        need(float(np.interp(power, reached, customers))),
        need(float(np.interp(0.5, reached, customers))),
    )


def _paired_boundary(discordant: np.ndarray, alpha: float) -> np.ndarray:
    """How many more pairs the challenger must win than lose, of so many, to be significantly better."""
    import numpy as np

    low, high = np.zeros_like(discordant), discordant
    for _ in range(60):
        lead = (low + high) / 2
        is_enough = paired_log_e((discordant + lead) / 2, (discordant - lead) / 2) > -math.log(alpha)
        low, high = np.where(is_enough, low, lead), np.where(is_enough, lead, high)
    return high


def _grid(variance: float, lift: float) -> np.ndarray:
    """Numbers of customers, up to many times what a test could need."""
    import numpy as np

    return np.geomspace(1, 1e6 * (1 + variance / lift**2), 4_000)


def _share_reached(customers: np.ndarray, boundary: np.ndarray, drift: float, variance: float) -> np.ndarray:
    """The share of tests that have reached a boundary by so many customers, if someone always looks.

    A sum of terms with mean `drift` and this variance, as a Brownian motion, by the tangent approximation of its first
    passage (Jennen & Lerche 1981, "First exit densities of Brownian motion through one-sided moving boundaries"),
    scaled so that all reach it in the end, as they do. Within a tenth of what simulations give.
    """
    import numpy as np
    from scipy.stats import norm

    deviation = np.sqrt(variance * customers)
    tangent = boundary - np.gradient(boundary, np.log(customers))
    density = tangent / deviation * norm.pdf((boundary - drift * customers) / deviation)
    passed = np.cumsum(density)
    return passed / passed[-1]


def _days(labelled: int, per_day: float | None) -> int | None:
    return None if per_day is None else math.ceil(labelled / per_day)


def _sentence(design: str, needs: DesignNeeds) -> str:
    def text(need: Need, what: str = "") -> str:
        days = "" if need.days is None else f" ({need.days:,} day{'' if need.days == 1 else 's'})"
        return f"{_about(need.labelled)}{what}{days}"

    return (
        f"{design} needs about {text(needs.anytime_valid, ' labelled customers')}, and half of such tests end by "
        f"{text(needs.anytime_valid_median)}; one look, and none before, needs {text(needs.fixed_sample)}."
    )


def _about(number: int) -> str:
    """To three digits."""
    return f"{round(number, 3 - len(str(number))) if number >= 1_000 else number:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
