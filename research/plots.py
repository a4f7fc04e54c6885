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
from matplotlib.ticker import MaxNLocator, PercentFormatter
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


def ab_test(right: Mapping[str, np.ndarray]) -> Figure:
    """Accuracy of each arm with its 95% interval, at the end and as the outcomes came in.

    right: {arm: (labelled,) bool, in the order in which the outcomes were told}.
    """
    figure, (end, course) = _figure(1, 2, (9.4, 4.2), widths=(1, 2))
    for place, ((name, answers), style, marker) in enumerate(zip(*_names_and_styles(right), MARKERS, strict=False)):
        labelled = np.arange(1, len(answers) + 1)
        if not len(labelled):
            continue
        correct = np.cumsum(answers)
        accuracy = correct / labelled
        low, high = evaluation.wilson_interval(correct, labelled)
        last = accuracy[-1]
        end.errorbar(place, last, [[last - low[-1]], [high[-1] - last]], fmt=marker, capsize=5, color=style["color"])
        end.annotate(f"{last:.1%}\nof {len(labelled)}", (place, last), (9, 0), textcoords="offset points", va="center")
        course.plot(labelled, accuracy, label=name, **style)
        course.fill_between(labelled, low, high, color=style["color"], alpha=0.15, linewidth=0)
    end.set_xticks(range(len(right)), [_plain(name).replace(" ", "\n") for name in right])
    end.set(title="At the end", xlim=(-0.5, len(right) - 0.1), ylabel="accuracy, 95% interval")
    end.grid(False, axis="x")
    course.set(title="As outcomes came in", xlabel="labelled requests of the arm", ylim=(0, 1))
    course.set_xlim(left=1)
    course.legend(loc="lower right", frameon=False)
    for axes in (end, course):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
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
