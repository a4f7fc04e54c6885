"""What the page of an A/B test's report shows, as plain data."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from datetime import datetime
from typing import Any

from django.urls import reverse
from django.utils import timezone

from apps.endpoints import charts
from apps.endpoints.admin.history import badge
from apps.endpoints.evidence import UNTREATED
from apps.endpoints.models import ABTest, Decision
from apps.endpoints.verdict import CHECKS_ALPHA, rounded

Verdict = Decision.Verdict
BADGES = {
    Verdict.ROLLBACK: ("A guardrail broke", "danger"),
    Verdict.INVALID: ("The comparison is broken", "danger"),
    Verdict.HOLD: ("Too early to say", ""),
    Verdict.PROMOTE: ("Promote the challenger", "success"),
    Verdict.KEEP: ("Keep the champion", "info"),
    Verdict.CONTINUE: ("Not settled yet", "warning"),
}
NONE = "-"


def shown(test: ABTest, report: dict[str, Any], *, now: datetime, fresh: bool) -> dict[str, Any]:
    """report: as `report.report` makes it. fresh: it was asked to."""
    decision, difference = report["decision"], report["difference"]
    more = difference["more_labels"]
    is_open = not test.ended_at and decision["verdict"] in (Verdict.HOLD, Verdict.CONTINUE)
    moment = timezone.localtime(report["as_of"]).strftime("%Y-%m-%d %H:%M")
    return {
        "title": test.title,
        "badge": badge(*BADGES[decision["verdict"]]),
        "state": f"as it was when it ended, {moment}" if test.ended_at else f"as of {moment}",
        "sentence": decision["sentence"],
        "warnings": decision["warnings"],
        "summary": test.summary,
        "was_kept": not test.ended_at and report["as_of"] < now,
        "slide_url": reverse("admin:endpoints_abtest_slide", args=[test.pk]) + ("?fresh=true" if fresh else ""),
        "test_url": reverse("admin:endpoints_abtest_change", args=[test.pk]),
        "figures": [
            *((f"Right: {report[side]['name']}", _percent(report[side]["accuracy"])) for side in charts.ARMS),
            ("Difference", NONE if difference["estimate"] is None else f"{100 * difference['estimate']:+.1f} points"),
            ("Labelled customers", f"{_labelled(report):,}"),
            ("Still needed, about", f"{rounded(more):,}" if more and is_open else NONE),
        ],
        "charts": _charts(report),
        "tables": [table for table in (_arms(report), _pairs(report), _checks(report)) if table["rows"]],
    }


def _labelled(report: dict[str, Any]) -> int:
    if report["pairs"] is not None:
        return sum(report["pairs"].values())
    return sum(charts.judged(report, report[side]) for side in charts.ARMS)


def _charts(report: dict[str, Any]) -> list[dict[str, str]]:
    captions = {
        "difference": charts.how_to_read(report),
        "accuracy": "Each line shows how exactly the share is known. What decides is the difference above, not whether "
        "these lines overlap.",
        "calibration": "Of all customers who were told a chance of 70%, about 70% should stay: marks on the grey line "
        "come true. The larger a mark, the more customers.",
    }
    drawn = charts.page(report)
    return [
        {
            "title": charts.TITLES[name],
            "caption": caption,
            "source": f"data:image/svg+xml;base64,{b64encode(drawn[name]).decode()}",
        }
        for name, caption in captions.items()
    ]


def _arms(report: dict[str, Any]) -> dict[str, Any]:
    judged = "of customers who were left alone" if report["judged_on"] == UNTREATED else "of these"
    of: dict[str, Callable[[dict[str, Any]], str]] = {
        "Requests": lambda arm: f"{arm['requests']:,}",
        "Requests that it could not score": lambda arm: f"{arm['failures']:,}",
        "Customers": lambda arm: f"{arm['customers']:,}",
        "Customers with a known outcome": lambda arm: f"{arm['labelled']:,} ({_percent(arm['label_rate'])})",
        f"Right, {judged}": lambda arm: _with_interval(arm["accuracy"], arm["accuracy_interval"]),
        "Says of so many that they stay": lambda arm: _percent(arm["positive_share"]),
        "Chance to stay that it tells, on average": lambda arm: _percent(arm["mean_probability"]),
        "Brier score (0 is perfect)": lambda arm: _decimal(arm["brier"]),
        "ROC AUC (0.5 is guessing, 1 is perfect)": lambda arm: _decimal(arm["roc_auc"]),
        "Answers in, of 50%, 95% and 99% of requests": lambda arm: (
            ", ".join(f"{latency:.1f} ms" for latency in arm["latency_ms"].values()) or NONE
        ),
    }
    if report["treated_share"]:
        of |= {
            "Nothing was done for, and right of these": lambda arm: _of(arm["untreated"]),
            "Something was done for, and right of these": lambda arm: _of(arm["treated"]),
        }
    arms = [report[side] for side in charts.ARMS]
    return {
        "title": "Both models",
        "headers": ["", *(f"{side}: {arm['name']}" for side, arm in zip(charts.ARMS, arms, strict=True))],
        "rows": [[name, *(cell(arm) for arm in arms)] for name, cell in of.items()],
    }


def _pairs(report: dict[str, Any]) -> dict[str, Any]:
    pairs = report["pairs"]
    rows = pairs and [
        ["Champion right", f"{pairs['both']:,}", f"{pairs['only_champion']:,}"],
        ["Champion wrong", f"{pairs['only_challenger']:,}", f"{pairs['neither']:,}"],
    ]
    return {
        "title": "The same customers, by who was right",
        "headers": ["", "Challenger right", "Challenger wrong"],
        "rows": rows or [],
    }


def _checks(report: dict[str, Any]) -> dict[str, Any]:
    ratio, rate = report["checks"]["sample_ratio"], report["checks"]["label_rate"]
    rows = []
    if ratio:
        planned = " and ".join(f"{100 * share:.4g}%" for share in ratio["planned"])
        customers = " and ".join(f"{count:,}" for count in ratio["customers"])
        rows.append([f"Customers by arm, planned {planned}", customers, _likely(ratio["p"])])
    if rate:
        rates = " and ".join(map(_percent, rate["label_rates"]))
        rows.append(["Customers with a known outcome, alike in both", rates, _likely(rate["p"])])
    return {"title": "Can the two be compared?", "headers": ["Check", "Found", "Result"], "rows": rows}


def _likely(p: float) -> str:
    return f"as expected (p = {p:.2g})" if p >= CHECKS_ALPHA else f"hardly by chance (p = {p:.2g})"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def _decimal(number: float | None) -> str:
    return NONE if number is None else f"{number:.3f}"


def _with_interval(share: float | None, interval: tuple[float, float] | None) -> str:
    return NONE if interval is None else f"{_percent(share)} ({_percent(interval[0])} to {_percent(interval[1])})"


def _of(counts: dict[str, Any]) -> str:
    return f"{counts['labelled']:,} ({_percent(counts['accuracy'])})"
