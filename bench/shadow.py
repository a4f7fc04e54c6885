"""A shadow's price: single predictions of one server without a test, in a split test and in a shadow test, in one run.

    python bench/shadow.py [--seconds 3] [--rounds 5] [--connections 8]

README.md says what is measured. Prints Markdown tables. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend" / "server"))

import contestants
import model
import tables
import wrk
from contestants import Running
from run import prepare_machine, say, working_folder
from tables import Spread, short
from wrk import Load

PATIENCE = 300
STATES = {"none": "no test", "split": "a split test", "shadow": "a shadow test"}
UNSCORED = """
    SELECT count(*) FROM endpoints_mlrequest request JOIN endpoints_abtest test ON test.id = request.abtest_id
    WHERE test.design = 'shadow' AND test.ended_at IS NULL
    AND NOT EXISTS (SELECT 1 FROM endpoints_shadowanswer answer WHERE answer.request_id = request.id)
"""


@dataclass(frozen=True)
class Round:
    """One load in one state. left: shadow's answers that were missing in its end. seconds: until the last was there."""

    load: Load
    left: int
    seconds: float


def call(running: Running, path: str, body: Any = None) -> Any:
    """The JSON that the API answers: to a GET, or to a POST if there is a body."""
    base = running.url.partition("/api/")[0]
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{base}/api/v1/{path}", data, running.headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def arms(running: Running) -> dict[str, int]:
    """The body's fields that name the algorithms of a test, which the server's user may now start."""
    grant = "from django.contrib.auth.models import User; User.objects.update(is_superuser=True)"
    contestants.manage(running.launch.environment, "shell", "--no-imports", "-c", grant)
    ids = {each["name"]: each["id"] for each in call(running, "mlalgorithms")}
    return {"parent_mlalgorithm_1": ids["random forest"], "parent_mlalgorithm_2": ids["extra trees"]}


def measure(running: Running, state: str, connections: int, seconds: int) -> Round:
    """Put the endpoint into a state, load it, let the worker finish, and take it out again."""
    test = None
    if state != "none":
        test = call(running, "abtests", {"title": state, "created_by": "bench", "design": state, **arms(running)})
    loaded = wrk.load(running.url, running.launch.headers, running.body, connections, seconds)
    running.counted += loaded.good
    left = running.launch.count(UNSCORED)
    began = time.monotonic()
    while running.launch.count(UNSCORED):
        if time.monotonic() - began > PATIENCE:
            raise SystemExit(f"In {PATIENCE} s the worker did not score what came in {seconds} s.")
        time.sleep(0.1)
    took = time.monotonic() - began
    if test:
        call(running, f"stop_ab_test/{test['id']}", {})
    running.server.rest()
    return Round(loaded, left, took)


def report(measured: dict[str, list[Round]]) -> str:
    """A row for each state; ratios within a round."""
    rows = []
    for state, title in STATES.items():
        rounds = measured[state]
        ratios = (each.load.rate / alone.load.rate for each, alone in zip(rounds, measured["none"], strict=True))
        rows.append(
            [
                title,
                Spread.of(each.load.rate for each in rounds),
                Spread.of(ratios) if state != "none" else "",
                short(statistics.median(each.load.p50 for each in rounds)),
                short(statistics.median(each.load.p99 for each in rounds)),
                sum(each.load.errors for each in rounds),
                Spread.of(each.left for each in rounds) if state == "shadow" else "",
                Spread.of(each.seconds for each in rounds) if state == "shadow" else "",
            ]
        )
    head = ["", "answers per second", "of those without a test", "p50 in ms", "p99 in ms", "errors"]
    return tables.table([*head, "not scored yet in the end", "scored after s"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3, help="of each load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=8)
    asked = parser.parse_args(arguments)
    prepare_machine()
    with ExitStack() as stack:
        folder = stack.enter_context(working_folder())
        say("Training the models ...")
        subject = model.train(folder, contestants.clean_environment())
        for contestant in contestants.ALL[:2]:
            running = contestants.start(stack, contestant, subject, folder)
            measured = defaultdict(list)
            for number in range(asked.rounds):
                say(f"{contestant.title}, round {number + 1} of {asked.rounds} ...")
                order = list(STATES)
                for state in order[number % 3 :] + order[: number % 3]:
                    measured[state].append(measure(running, state, asked.connections, asked.seconds))
            say(f"\n{contestant.title}, {asked.connections} connections:\n\n{report(measured)}")
            running.server.stop()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; every server is stopped too.")
