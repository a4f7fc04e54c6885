"""A chart of answers per second, as SVG: bars on a logarithmic scale, one group for each contestant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, LABELS, BAR, GAP, TOP = 860, 230, 13, 10, 40
COLOURS = ("#9ecae1", "#3182bd", "#08306b")


def bars(title: str, rates: Mapping[str, Sequence[float]], groups: Sequence[str]) -> str:
    """rates: for each label, one rate for each group."""
    highest = max(rate for each in rates.values() for rate in each)
    decades = range(1, math.ceil(math.log10(highest)) + 1)

    def x(rate: float) -> float:
        return LABELS + (WIDTH - LABELS - 60) * max(0.0, math.log10(max(rate, 1))) / decades[-1]

    step = BAR * len(groups) + GAP
    height = TOP + step * len(rates) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, group in enumerate(groups):
        left = WIDTH - 130 * (len(groups) - number)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect x="{left}" y="10" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{left + 17}" y="20">{escape(group)}</text>')
    for decade in decades:
        line = f'y1="{TOP - 5}" y2="{height - 25}" stroke="#ddd"'
        parts.append(f'<line x1="{x(10**decade):.1f}" x2="{x(10**decade):.1f}" {line}/>')
        parts.append(f'<text x="{x(10**decade):.1f}" y="{height - 8}" text-anchor="middle">{10**decade:,}</text>')
    for row, (label, values) in enumerate(rates.items()):
        top = TOP + row * step
        middle = top + BAR * len(groups) / 2 + 4
        parts.append(f'<text x="{LABELS - 8}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
        for number, rate in enumerate(values):
            y, width = top + number * BAR, x(rate) - LABELS
            colour = COLOURS[number % len(COLOURS)]
            parts.append(f'<rect x="{LABELS}" y="{y}" width="{width:.1f}" height="{BAR - 1}" fill="{colour}"/>')
            parts.append(f'<text x="{x(rate) + 4:.1f}" y="{y + BAR - 3}" font-size="10">{rate:,.0f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
