"""The tables that a run prints, as Markdown, from its figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from contestants import Contestant, Running
from wrk import Load

#: For each contestant's name and number of connections, one load per round.
Loads = Mapping[tuple[str, int], Sequence[Load]]


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, with the least and the greatest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.least)} to {short(self.most)})"


def short(value: float) -> str:
    """Three digits, or as many as stand before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The first column is text, the others figures."""
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    lines += [" | ".join(map(str, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def ratios(ours: Sequence[Load], theirs: Sequence[Load]) -> Spread | None:
    """How many times as many answers as theirs, round by round. None if a round of theirs has none."""
    if any(not load.rate for load in theirs):
        return None
    return Spread.of(mine.rate / other.rate for mine, other in zip(ours, theirs, strict=True))


def ratio_table(ours: Contestant, others: Sequence[Contestant], connections: Sequence[int], loads: Loads) -> str:
    rows = []
    for other in others:
        cells = [ratios(loads[ours.name, count], loads[other.name, count]) or "-" for count in connections]
        rows.append([other.title, *cells])
    return table([f"{ours.title}, times as many answers as", *map(_connections, connections)], rows)


def load_table(contestants: Sequence[Contestant], connections: Sequence[int], loads: Loads) -> str:
    rows = []
    for count in connections:
        for contestant in contestants:
            every = loads[contestant.name, count]
            rows.append(
                [
                    contestant.title,
                    count,
                    Spread.of(load.rate for load in every),
                    short(statistics.median(load.p50 for load in every)),
                    short(statistics.median(load.p99 for load in every)),
                    sum(load.errors for load in every),
                ]
            )
    return table(["", "connections", "answers per second", "p50 in ms", "p99 in ms", "errors"], rows)


def server_table(running: Sequence[Running], memory: Mapping[str, int]) -> str:
    rows = []
    for each in running:
        checked = f"{each.difference:.1e} (at most {each.contestant.tolerance:.0e})" if each.difference else "none"
        rows.append(
            [
                each.contestant.title,
                f"{each.first_answer:.1f}",
                f"{memory[each.contestant.name] / 2**20:,.0f}",
                checked if each.contestant.read else "-",
            ]
        )
    return table(["", "first answer after s", "memory in MiB", "difference from scikit-learn"], rows)


def engine_table(engines: Mapping[str, Mapping[str, Mapping[str, float]]], counts: Sequence[int]) -> str:
    """engines: what engine.py printed, by the engine's name."""
    rows = []
    for name, measured in engines.items():
        cells = [f"{measured[str(count)]['seconds'] / count * 1e6:,.2f}" for count in counts]
        difference = max(measured[str(count)]["difference"] for count in counts)
        rows.append([name, *cells, f"{difference:.1e}" if difference else "none"])
    head = [f"{count:,} rows" if count > 1 else "1 row" for count in counts]
    return table(["microseconds per row", *head, "difference from scikit-learn"], rows)


def _connections(count: int) -> str:
    return f"{count} connections" if count > 1 else "1 connection"
