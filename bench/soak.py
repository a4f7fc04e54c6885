"""Serve at full load for some minutes, and say of each what became of memory, errors and p99. `make soak` calls it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import run
from wrk import Load

CONNECTIONS = 64
# What counts as flat and as steady, each against the median of all minutes after the first.
MEMORY_GROWTH, SLOWER = 1.05, 2.0


@dataclass(frozen=True)
class Minute:
    """memory: bytes of all processes of the server, at its end."""

    load: Load
    memory: int


def verdict(minutes: Sequence[Minute]) -> list[str]:
    """What is wrong, as sentences. The first minute is only warming up, but its errors count."""
    wrong = []
    if errors := sum(minute.load.errors for minute in minutes):
        wrong.append(f"There were {errors:,} errors.")
    settled = minutes[1:]
    if len(settled) >= 2:
        growth = settled[-1].memory / settled[0].memory
        if growth > MEMORY_GROWTH:
            wrong.append(f"Memory grew {growth:.2f} times after the first minute.")
        p99 = sorted(minute.load.p99 for minute in settled)
        if p99[-1] > SLOWER * p99[len(p99) // 2]:
            wrong.append(f"p99 was not steady: {p99[-1]:,.0f} ms in one minute, {p99[len(p99) // 2]:,.0f} in most.")
    return wrong


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=60, help="of which a minute has so many")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    asked = parser.parse_args(arguments)
    run.prepare_machine()

    (contestant,) = [each for each in run.contestants.ALL if each.name == asked.database]
    minutes: list[Minute] = []
    with ExitStack() as stack:
        folder = stack.enter_context(run.working_folder())
        run.say(f"{run.machine()}; {contestant.title}; {CONNECTIONS} connections.")
        subject = run.model.train(folder, run.contestants.clean_environment())
        try:
            running = run.contestants.start(stack, contestant, subject, folder)
            run.say("minute   answers/s   p50 ms   p99 ms   errors   MiB")
            for number in range(1, asked.minutes + 1):
                load = running.load(CONNECTIONS, asked.seconds)
                minutes.append(Minute(load, running.server.memory()))
                figures = f"{load.rate:>9,.0f}{load.p50:>9.1f}{load.p99:>9.1f}{load.errors:>9}"
                run.say(f"{number:>6}   {figures}{minutes[-1].memory / 2**20:>6,.0f}")
        except run.Unavailable as reason:
            sys.exit(f"{contestant.title}: {reason}")
        stored = running.launch.stored()
    run.say(f"{running.counted:,} answers counted, {stored:,} rows stored.")
    wrong = verdict(minutes)
    if stored < running.counted:
        wrong.append("Answers are missing in the database.")
    if wrong:
        sys.exit(" ".join(wrong))
    run.say("Memory flat, no error, p99 steady.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; the server is stopped too.")
