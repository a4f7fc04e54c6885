"""The plots of an A/B test's report, for a page and for a slide, to be read without statistics."""

from __future__ import annotations

import io
import textwrap
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.utils import timezone

from apps.endpoints.evidence import UNTREATED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008: told apart with any kind of colour vision; the marks differ as well.
CHAMPION, CHALLENGER = {"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "s"}
TITLES = {
    "difference": "Which one is right more often, day by day",
    "accuracy": "How often each was right",
    "calibration": "Do their percentages come true?",
}
GREY, INK = "#767676", "#222222"
STYLE = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    # The name of an algorithm may hold a dollar sign.
    "text.parse_math": False,
    # A browser may lack the font: letters become shapes, and each chart is the same at each call.
    "svg.fonttype": "path",
    "svg.hashsalt": "charts",
}
PAGE_INCHES = {"difference": (9.6, 3.6), "accuracy": (4.7, 3.6), "calibration": (4.7, 3.6)}
SLIDE_INCHES, SLIDE_DPI = (12.8, 7.2), 150
# Early intervals are far wider than what one wants to see, the last one, which gets this share of the height.
SHARE_OF_LAST_INTERVAL = 0.25
# matplotlib's settings and caches are the process's.
_drawing = threading.Lock()


def page(report: dict[str, Any]) -> dict[str, bytes]:
    """The three charts of a report, as `report.report` makes it, by their names, each as SVG."""
    return {
        name: _drawn(PAGE_INCHES[name], "svg", lambda figure, draw=draw: draw(figure.subplots(), report))
        for name, draw in CHARTS.items()
    }


def slide(report: dict[str, Any]) -> bytes:
    """The three charts below the decision: a PNG of 1920 by 1080 pixels."""

    def draw(figure: Figure) -> None:
        decision = report["decision"]
        heading, charts = figure.subfigures(2, height_ratios=[1, 4])
        told = report["summary"] or " ".join([decision["sentence"], *decision["warnings"]])
        size, width = (12, 125) if len(told) < 360 else (9, 165)
        heading.text(0.02, 0.9, _short(report["title"], 80), fontsize=17, weight="bold", va="top")
        heading.text(0.02, 0.58, textwrap.fill(_short(told, 900), width), fontsize=size, va="top", linespacing=1.3)
        axes = charts.subplot_mosaic([["difference", "difference"], ["accuracy", "calibration"]])
        for name, draw_chart in CHARTS.items():
            draw_chart(axes[name], report)
        note = textwrap.fill(f"{how_to_read(report)} As of {timezone.localtime(report['as_of']):%Y-%m-%d %H:%M}.", 170)
        charts.supxlabel(note, x=0.02, ha="left", fontsize=9, color=GREY)

    return _drawn(SLIDE_INCHES, "png", draw)


def how_to_read(report: dict[str, Any]) -> str:
    """The interval in words."""
    sure = f"{100 * (1 - report['alpha']):g}%"
    return (
        f"The band is where the true difference lies, with {sure} certainty, however often one looks. A band that "
        "holds zero shows neither to be better."
    )


def _drawn(inches: tuple[float, float], form: str, draw: Callable[[Figure], None]) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    drawn = io.BytesIO()
    with _drawing, matplotlib.rc_context(STYLE):
        figure = Figure(inches, layout="constrained")
        draw(figure)
        # Without the date of drawing the same report is the same file.
        figure.savefig(drawn, format=form, dpi=SLIDE_DPI, metadata={"Date": None} if form == "svg" else None)
    return drawn.getvalue()


def _difference(axes: Axes, report: dict[str, Any]) -> None:
    """How sure one could be at the end of each day."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.ticker import FuncFormatter

    axes.set_title(TITLES["difference"])
    days = [day for day in report["days"] if day["difference"]["interval"]]
    if not days:
        return _nothing_yet(axes)
    when = [day["day"] for day in days]
    low, high = zip(*(day["difference"]["interval"] for day in days), strict=True)
    estimate = [day["difference"]["estimate"] for day in days]
    style = {**CHALLENGER, "markersize": 4}
    axes.axhline(0, color=INK, linewidth=1)
    if len(days) == 1:
        axes.errorbar(when, estimate, [[estimate[0] - low[0]], [high[0] - estimate[0]]], capsize=4, **style)
        axes.set_xticks(when, [f"{when[0]:%Y-%m-%d}"])
    else:
        axes.fill_between(when, low, high, color=CHALLENGER["color"], alpha=0.2, linewidth=0)
        axes.plot(when, estimate, **style)
        axes.xaxis.set_major_locator(locator := AutoDateLocator(minticks=2, maxticks=8))
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    reach = max(abs(low[-1]), abs(high[-1]), abs(estimate[-1]), (high[-1] - low[-1]) / 2 / SHARE_OF_LAST_INTERVAL)
    bound = min(1.0, 1.1 * reach)
    axes.set_ylim(-bound, bound)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.3g}" if value else "0"))
    axes.set_ylabel("lead, in points of accuracy")
    for height, side, name in ((0.97, "top", "challenger"), (0.03, "bottom", "champion")):
        ahead = f"{_short(report[name]['name'])} ahead"
        axes.text(0.99, height, ahead, transform=axes.transAxes, ha="right", va=side, color=GREY)
    return None


def _accuracy(axes: Axes, report: dict[str, Any]) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title(TITLES["accuracy"])
    arms = [(report[name], style) for name, style in ARMS.items()]
    if not any(arm["accuracy_interval"] for arm, _ in arms):
        return _nothing_yet(axes)
    for height, (arm, style) in zip((1, 0), arms, strict=True):
        if arm["accuracy_interval"] is None:
            continue
        accuracy, (low, high) = arm["accuracy"], arm["accuracy_interval"]
        # An interval of Wilson's may leave out its own middle by a rounding error.
        error = [[max(0.0, accuracy - low)], [max(0.0, high - accuracy)]]
        axes.errorbar(accuracy, height, xerr=error, capsize=4, markersize=8, **style)
        said = f"{accuracy:.1%} of {judged(report, arm):,}"
        axes.annotate(said, (accuracy, height), (0, 10), textcoords="offset points", ha="center")
    axes.set_ylim(-0.6, 1.6)
    axes.set_yticks([1, 0], [textwrap.fill(_short(arm["name"]), 18) for arm, _ in arms])
    axes.margins(x=0.25)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set_xlabel("right answers")
    return None


def _calibration(axes: Axes, report: dict[str, Any]) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title(TITLES["calibration"])
    arms = [(report[name], style) for name, style in ARMS.items()]
    most = max((tenth["customers"] for arm, _ in arms for tenth in arm["calibration"]), default=0)
    if not most:
        return _nothing_yet(axes)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    for arm, style in arms:
        said, stayed, customers = (
            [tenth[name] for tenth in arm["calibration"]] for name in ("mean_probability", "stayed", "customers")
        )
        axes.plot(said, stayed, color=style["color"], linewidth=1)
        areas = [10 + 110 * count / most for count in customers]
        axes.scatter(said, stayed, areas, alpha=0.75, label=f" {_short(arm['name'])}", **style)
    for axis, name in ((axes.xaxis, "chance to stay that was told"), (axes.yaxis, "customers who stayed")):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_label_text(name)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    # The names begin with a space: matplotlib leaves out what begins with "_". Each mark is as large as the other.
    for handle in axes.legend(loc="upper left").legend_handles:
        handle.set_sizes([40])
    return None


ARMS = {"champion": CHAMPION, "challenger": CHALLENGER}
CHARTS = {"difference": _difference, "accuracy": _accuracy, "calibration": _calibration}


def judged(report: dict[str, Any], arm: dict[str, Any]) -> int:
    """How many customers an arm's accuracy rests on."""
    return arm["untreated"]["labelled"] if report["judged_on"] == UNTREATED else arm["labelled"]


def _nothing_yet(axes: Axes) -> None:
    axes.text(0.5, 0.5, "No outcome is known yet.", transform=axes.transAxes, ha="center", color=GREY)
    axes.set(xticks=[], yticks=[])


def _short(text: str, most: int = 40) -> str:
    """Without its middle: the end of a name is its version."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]} … {text[most // 2 + 3 - most :]}"
