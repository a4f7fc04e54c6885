"""The figures of the notebooks. Each takes plain arrays and gives a matplotlib Figure; nothing is drawn on a screen.

`probabilities` is {model: (n,) float in [0, 1]} and `outcome` (n,) 0 or 1, both of held-out customers. A model has
the colour and the line of its place in the mapping, in every figure; both differ, so neither is needed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

import evaluation

# Okabe and Ito 2008: told apart with any kind of colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LINES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
GREY = "#767676"
DPI = 90

# Lift among fewer customers than this share of all says little: one customer more or less moves it far.
SMALLEST_SHARE = 0.01

_THOUSANDS = FuncFormatter(lambda count, _: f"{count:,.0f}")
_AT_THE_RIGHT = {"textcoords": "offset points", "ha": "right", "color": GREY}


def roc_and_precision_recall(probabilities: Mapping[str, np.ndarray], outcome: np.ndarray) -> Figure:
    """Both curves side by side, each with the line of a model that knows nothing."""
    figure, (roc, recall) = _figure(1, 2, (9.4, 4.4))
    roc.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="chance")
    recall.axhline(np.mean(outcome), color=GREY, linewidth=1)
    for (name, probability), style in _styled(probabilities):
        false_positive, true_positive, _ = roc_curve(outcome, probability)
        roc.plot(false_positive, true_positive, label=name, **style)
        precision, found, _ = precision_recall_curve(outcome, probability)
        precision[-1] = precision[-2]  # scikit-learn ends with a precision of 1 at recall 0, which no threshold has
        recall.step(found, precision, where="post", **style)
    _unit_square(roc, "ROC", "share of those who left, called stayers", "share of those who stayed, found")
    _unit_square(recall, "Precision and recall", "recall: share of those who stayed, found", "precision")
    roc.legend(loc="lower right", frameon=False)
    return figure


def calibration(probabilities: Mapping[str, np.ndarray], outcome: np.ndarray) -> Figure:
    """Observed retention in bins of predicted probability, with 95% intervals, over how many are in each bin."""
    figure, axes = _figure(2, len(probabilities), _wide(len(probabilities), 4.4), sharex=True, sharey="row", ratio=3)
    tops, bottoms = axes.reshape(2, -1)
    for (name, probability), style, top, bottom in zip(*_names_and_styles(probabilities), tops, bottoms, strict=True):
        predicted, observed, count = evaluation.calibration_bins(probability, outcome)
        low, high = evaluation.wilson_interval(observed * count, count)
        top.plot([0, 1], [0, 1], color=GREY, linewidth=1)
        error = np.clip([observed - low, high - observed], 0, None)
        top.errorbar(predicted, observed, error, marker="o", markersize=4, capsize=2, **{**style, "linewidth": 1.2})
        _unit_square(top, name, "", "")
        bottom.hist(probability, bins=20, range=(0, 1), color=style["color"], alpha=0.8)
        bottom.set_xlabel("predicted probability")
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    tops[0].set_ylabel("share who stayed")
    bottoms[0].set_ylabel("customers")
    return figure


def gains_and_lift(probabilities: Mapping[str, np.ndarray], outcome: np.ndarray) -> Figure:
    """Taking customers from the highest probability down: how many of those who stay are found, and the lift."""
    figure, (gains, lift) = _figure(1, 2, (9.4, 4.4))
    gains.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="chance")
    gains.plot([0, np.mean(outcome), 1], [0, 1, 1], color="black", linewidth=0.8, label="perfect order")
    lift.axhline(1, color=GREY, linewidth=1)
    for (name, probability), style in _styled(probabilities):
        contacted, found = evaluation.cumulative_gains(probability, outcome)
        gains.plot(contacted, found, label=name, **style)
        shown = contacted >= SMALLEST_SHARE
        lift.plot(contacted[shown], found[shown] / contacted[shown], **style)
    _unit_square(gains, "Cumulative gains", "share of customers taken", "share of those who stayed, found")
    gains.legend(loc="lower right", frameon=False)
    lift.set(title="Lift", xlabel="share of customers taken", ylabel="retention over that of all", xlim=(0, 1))
    lift.set_ylim(bottom=0)
    lift.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def importance(falls: Mapping[str, np.ndarray], features: Sequence[str], most: int = 15) -> Figure:
    """The fall in ROC AUC when a column is shuffled: mean and range of the repetitions, largest first.

    falls: {model: (features, repetitions)}. Only the `most` columns with the largest mean over the models are shown.
    """
    mean = np.mean([fall.mean(axis=1) for fall in falls.values()], axis=0)
    shown = np.argsort(-mean, kind="stable")[:most]
    figure, (axes,) = _figure(1, 1, (8, 1.2 + 0.36 * len(shown)))
    place = np.arange(len(shown))
    offsets = np.linspace(-0.22, 0.22, len(falls)) if len(falls) > 1 else [0.0]
    for (name, fall), style, offset, marker in zip(*_names_and_styles(falls), offsets, cycle(MARKERS), strict=False):
        centre = fall[shown].mean(axis=1)
        spread = np.clip([centre - fall[shown].min(axis=1), fall[shown].max(axis=1) - centre], 0, None)
        axes.errorbar(
            centre, place + offset, xerr=spread, fmt=marker, markersize=5, color=style["color"], linewidth=1, label=name
        )
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(place, [_short(features[position]) for position in shown])
    axes.invert_yaxis()
    axes.set_xlabel("fall in ROC AUC when the column is shuffled")
    axes.legend(loc="lower right", frameon=False)
    return figure


def confusion(probabilities: Mapping[str, np.ndarray], outcome: np.ndarray) -> Figure:
    """Customers by what was said and what happened, at a threshold of one half; shaded by share of the row."""
    figure, axes = _figure(1, len(probabilities), _wide(len(probabilities), 3.4), sharey=True)
    for (name, probability), panel in zip(probabilities.items(), axes, strict=True):
        counts = confusion_matrix(outcome, np.asarray(probability) > evaluation.THRESHOLD, labels=[0, 1])
        share = counts / counts.sum(axis=1, keepdims=True)
        panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            text = f"{count:,}\n{share[row, column]:.0%}"
            panel.text(
                column, row, text, ha="center", va="center", color="white" if share[row, column] > 0.6 else "black"
            )
        panel.set_xticks([0, 1], ["leaves", "stays"])
        panel.set_yticks([0, 1], ["left", "stayed"])
        panel.set(title=_plain(name), xlabel="said")
        panel.grid(False)
        panel.spines[:].set_visible(False)
    axes[0].set_ylabel("happened")
    return figure


def only_one_right(pairs: Sequence[Mapping[str, np.ndarray]]) -> Figure:
    """Of pairs of models, for how many customers one alone is right: the first to the left, the second to the right.

    pairs: of each {model: (customers,) bool, whose outcome it has right}, two models.
    """
    figure, (axes,) = _figure(1, 1, (9.4, 0.9 + 0.9 * len(pairs)))
    alone = [[int((first & ~second).sum()), int((second & ~first).sum())] for first, second in map(dict.values, pairs)]
    most = max(max(both) for both in alone) or 1
    for place, (pair, both) in enumerate(zip(pairs, alone, strict=True)):
        for name, count, side, colour in zip(pair, both, (-1, 1), COLOURS, strict=False):
            axes.barh(place, side * count, color=colour, height=0.5, alpha=0.85)
            axes.annotate(
                f"only {_plain(name)}: {count:,}",
                (side * count, place),
                (6 * side, 0),
                textcoords="offset points",
                va="center",
                ha="left" if side > 0 else "right",
            )
    axes.axvline(0, color="black", linewidth=1)
    accuracies = ["\nagainst ".join(f"{right.mean():.1%} right" for right in pair.values()) for pair in pairs]
    axes.set_yticks(range(len(pairs)), accuracies)
    axes.invert_yaxis()
    axes.set(title="Customers for whom only one of the two is right", xlim=(-2.5 * most, 2.5 * most))
    axes.set_xlabel("customers")
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{abs(count):,.0f}"))
    axes.grid(False, axis="y")
    return figure


def false_promotions(labelled: np.ndarray, shares: Mapping[str, np.ndarray], alpha: float) -> Figure:
    """Share of tests of two equal models that have promoted the challenger, as looks go on, by rule.

    labelled: (looks,) customers at each look; shares: {rule: (looks,)}.
    """
    figure, (axes,) = _figure(1, 1, (8, 4.4))
    axes.axhline(alpha, color=GREY, linewidth=1)
    axes.annotate(f"promised: at most {alpha:.0%}", (labelled[-1], alpha), (0, 4), **_AT_THE_RIGHT)
    for (rule, share), style in _styled(shares):
        axes.plot(labelled, share, label=rule, **style)
        axes.annotate(f"{share[-1]:.1%}", (labelled[-1], share[-1]), (5, 0), textcoords="offset points", va="center")
    axes.set(title="Two equal models: how many tests promote the challenger by mistake", ylim=(-0.02, 0.65))
    axes.set(xlabel="labelled customers so far", ylabel="share of tests that promoted")
    axes.set_xlim(0, labelled[-1] * 1.08)
    axes.xaxis.set_major_formatter(_THOUSANDS)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper right", frameon=False, ncols=len(shares))
    return figure


def one_test(
    labelled: np.ndarray,
    difference: np.ndarray,
    intervals: Mapping[str, np.ndarray],
    p: Mapping[str, np.ndarray],
    alpha: float,
) -> Figure:
    """A test as it goes on: the difference in accuracy with its intervals, and p, each by the same rules.

    labelled, difference: (looks,); intervals: {rule: (looks, 2)}; p: {rule: (looks,)}.
    """
    figure, (lead, chance) = _figure(1, 2, (9.4, 4.2))
    lead.axhline(0, color="black", linewidth=1)
    lead.plot(labelled, 100 * difference, color="black", linewidth=1.6, label="difference")
    for (rule, interval), style in _styled(intervals):
        lead.plot(labelled, 100 * interval, **{**style, "linewidth": 1.2}, label=[f"interval, {rule}", None])
    widest = 130 * min(np.abs(interval).max() for interval in intervals.values())
    lead.set(title="The difference and its intervals", ylim=(-widest, widest))
    lead.set_ylabel("challenger ahead, in points of accuracy")
    lowest = min(0.01, *(values.min() / 3 for values in p.values()))
    for (rule, values), style in _styled(p):
        chance.plot(labelled, values, label=rule, **style)
        promotes = (values <= alpha) & (difference > 0)
        if promotes.any():
            first = int(promotes.argmax())
            chance.plot(labelled[first], values[first], "o", color=style["color"])
            chance.vlines(labelled[first], lowest, values[first], color=style["color"], linewidth=0.8)
            side = "left" if first < len(values) / 2 else "right"
            chance.annotate(" promotes here ", (labelled[first], lowest), (0, 5), textcoords="offset points", ha=side)
    chance.axhline(alpha, color=GREY, linewidth=1)
    chance.annotate(f"{alpha:.0%}", (labelled[-1], alpha), (0, 3), **_AT_THE_RIGHT)
    chance.set(title="p: how easily chance explains the difference", yscale="log", ylim=(lowest, 8))
    chance.set_ylabel("p, small where chance hardly does")
    chance.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    chance.yaxis.set_minor_formatter(NullFormatter())
    for axes in (lead, chance):
        axes.set_xlabel("labelled customers so far")
        axes.xaxis.set_major_formatter(_THOUSANDS)
    lead.legend(loc="lower right", frameon=False)
    chance.legend(loc="upper right", frameon=False)
    return figure


def customers_needed(needed: Mapping[str, np.ndarray]) -> Figure:
    """Share of tests that have promoted the better model by so many labelled customers, by design.

    needed: {design: (tests,) customers, infinite for a test that did not}.
    """
    figure, (axes,) = _figure(1, 1, (8, 4.4))
    axes.axhline(0.5, color=GREY, linewidth=1)
    for (design, customers), style in _styled(needed):
        ended = np.sort(customers[np.isfinite(customers)])
        share = np.arange(1, len(ended) + 1) / len(customers)
        axes.step(np.append(0, ended), np.append(0, share), where="post", label=design, **style)
        if len(ended) and share[-1] >= 0.5:
            half = ended[np.searchsorted(share, 0.5)]
            axes.plot(half, 0.5, "o", color=style["color"])
            axes.annotate(f"half by {half:,.0f}", (half, 0.5), (8, -14), textcoords="offset points")
    axes.set(title="A better challenger: when the evidence promotes it", ylim=(0, 1.02))
    axes.set(xlabel="labelled customers", ylabel="share of tests that have promoted it")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_THOUSANDS)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower right", frameon=False)
    return figure


def narrowing(labelled: np.ndarray, difference: np.ndarray, interval: np.ndarray) -> Figure:
    """How a test's interval narrows as outcomes come in.

    labelled, difference: (looks,), the latter the challenger's accuracy minus the champion's; interval: (looks, 2).
    """
    figure, (axes,) = _figure(1, 1, (8, 4.2))
    colour = COLOURS[0]
    axes.axhline(0, color="black", linewidth=1)
    low, high = 100 * interval.T
    axes.fill_between(labelled, low, high, color=colour, alpha=0.18, linewidth=0, label="interval, anytime-valid")
    axes.plot(labelled, 100 * difference, color=colour, marker="o", markersize=3.5, label="difference")
    for place, side, text in ((0.97, "top", "challenger ahead"), (0.03, "bottom", "champion ahead")):
        axes.text(0.99, place, text, transform=axes.transAxes, va=side, ha="right", color=GREY)
    axes.set(title="The live test, as outcomes came in", xlabel="labelled customers")
    axes.set_ylabel("difference in accuracy, in points")
    axes.xaxis.set_major_formatter(_THOUSANDS)
    axes.legend(loc="upper center", frameon=False, ncols=2)
    # Zero is in the middle; the first intervals, as wide as the figure, would flatten all that follow.
    widest = 130 * np.abs(interval[len(interval) // 5 :]).max(initial=0.01)
    axes.set_ylim(-widest, widest)
    return figure


def _figure(
    rows: int,
    columns: int,
    size: tuple[float, float],
    ratio: float = 1,
    widths: Sequence[float] | None = None,
    **shared: Any,
) -> tuple[Figure, np.ndarray]:
    """A Figure that no window and no global state knows of, and its axes."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    heights = [ratio, *[1] * (rows - 1)]
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, width_ratios=widths, **shared)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes if rows > 1 else axes[0]


def _wide(panels: int, height: float) -> tuple[float, float]:
    return max(4.0, 3.1 * panels), height


def _styled(models: Mapping[str, Any]) -> zip:
    """((name, value), line style) of each model."""
    return zip(*_names_and_styles(models), strict=True)


def _names_and_styles(models: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], list[dict[str, Any]]]:
    styles = [
        {"color": colour, "linestyle": line, "linewidth": 1.6}
        for colour, line in islice(zip(cycle(COLOURS), cycle(LINES), strict=False), len(models))
    ]
    return [(_plain(name), value) for name, value in models.items()], styles


def _unit_square(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set(title=title, xlabel=across, ylabel=up, xlim=(0, 1), ylim=(0, 1.005))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _short(name: str) -> str:
    """A column's name as a label; a dollar sign would begin a formula."""
    return (name if len(name) <= 40 else f"{name[:37]}...").replace("$", r"\$")
