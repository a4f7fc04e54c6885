"""Measure this product beside what could be used instead; `make bench` calls it, and README.md explains it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "backend" / "server"))

import chart  # noqa: E402
import contestants  # noqa: E402
import install  # noqa: E402
import model  # noqa: E402
import tables  # noqa: E402
import wrk  # noqa: E402
from contestants import Contestant, Running, Unavailable  # noqa: E402
from model import Subject  # noqa: E402
from tests import postgresql  # noqa: E402
from wrk import Load  # noqa: E402

CONNECTIONS, QUICK_CONNECTIONS = (1, 8, 64), (8, 64)
SECONDS, QUICK_SECONDS = 6, 1
ROUNDS = 3
ENGINE_ROWS, QUICK_ENGINE_ROWS = (1, 100, 10_000, 1_000_000), (1, 100, 10_000)
ENGINE = "engine"
README, CHART = HERE / "README.md", HERE / "chart.svg"
BEGIN, END = "<!-- results: written by `make bench WRITE=1` -->\n", "<!-- end of results -->"


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# --- One after the other ----------------------------------------------------------------------------------
class Measurement:
    """One run. `absent` says of whom there are no figures, and why."""

    def __init__(self, connections: Sequence[int], seconds: int, rounds: int):
        self.connections, self.seconds, self.rounds = connections, seconds, rounds
        self.running: list[Running] = []
        self.absent: dict[str, str] = {}
        self.loads: dict[tuple[str, int], list[Load]] = defaultdict(list)
        self.singles: dict[str, list[Load]] = defaultdict(list)
        self.lists: dict[str, list[Load]] = defaultdict(list)
        self.memory: dict[str, int] = {}
        self.stored: dict[str, int] = {}

    def start(self, stack: ExitStack, wanted: Sequence[Contestant], subject: Subject, folder: Path) -> None:
        for contestant in wanted:
            say(f"Starting {contestant.title} ...")
            try:
                self.running.append(contestants.start(stack, contestant, subject, folder))
            except Unavailable as reason:
                self.leave_out(contestant, reason)

    def leave_out(self, contestant: Contestant, reason: object) -> None:
        self.absent[contestant.title] = str(reason)
        self.running = [each for each in self.running if each.contestant is not contestant]
        say(f"  {contestant.title} is left out: {reason}")

    def measure(self, customers: Path) -> None:
        """All contestants in turn, round by round, each round beginning with another; they stay up meanwhile."""
        for number in range(self.rounds):
            say(f"Round {number + 1} of {self.rounds} ...")
            first = number * len(self.running) // self.rounds
            for running in [*self.running[first:], *self.running[:first]]:
                try:
                    self._measure_one(running, customers)
                except Unavailable as reason:
                    running.server.stop()
                    self.leave_out(running.contestant, reason)

    def _measure_one(self, running: Running, customers: Path) -> None:
        name = running.contestant.name
        for count in self.connections:
            self.loads[name, count].append(running.load(count, self.seconds))
        if running.contestant.is_ours:
            self.singles[name].append(running.load(1, self.seconds))
            self.lists[name].append(running.load(1, self.seconds, body=customers))
        self.memory[name] = running.server.memory()

    def check_stored(self) -> None:
        """Every answer that wrk counted must be a row. Raises SystemExit."""
        for running in self.running:
            name = running.contestant.name
            if running.launch.stored is None:
                continue
            self.stored[name] = running.launch.stored()
            answered = running.counted + (model.LIST - 1) * sum(load.good for load in self.lists[name])
            if self.stored[name] < answered:
                raise SystemExit(
                    f"{running.contestant.title}: {answered:,} customers were answered, "
                    f"but {self.stored[name]:,} are in the database."
                )
            say(f"{running.contestant.title}: {answered:,} answers counted, {self.stored[name]:,} rows stored.")


def check_list(running: Running, subject: Subject, customers: Path) -> None:
    """Each of a list's answers must be scikit-learn's own. Raises Unavailable."""
    answered = [answer["probability"] for answer in running.ask(customers)]
    if answered != subject.probabilities:
        raise Unavailable("a list is not answered as scikit-learn does")


# --- The engine alone -------------------------------------------------------------------------------------
def measure_engines(subject: Subject, folder: Path, counts: Sequence[int]) -> tuple[dict[str, Any], dict[str, str]]:
    """What engine.py says of each engine, and why one is missing."""
    import numpy as np

    drawn = np.random.default_rng(42).integers(0, len(subject.matrix), max(counts))
    customers = folder / "customers.npy"
    np.save(customers, subject.matrix[drawn])
    measured, absent = {}, {}
    for name in ("scikit-learn", "onnxruntime", "compiled"):
        say(f"The engine alone: {name} ...")
        try:
            python, environment, file = Path(sys.executable), contestants.clean_environment(), subject.model
            if name == "onnxruntime":
                programs, environment = contestants.prepared("fastapi-onnxruntime", subject, folder)
                python, file = programs / "python", folder / "model.onnx"
            command = [str(python), str(HERE / "engine.py"), name, str(file), str(customers), *map(str, counts)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(done.stderr.strip().splitlines()[-1])
            measured[name] = json.loads(done.stdout)
        except Unavailable as reason:
            absent[f"the engine {name}"] = str(reason)
    return measured, absent


# --- What is said in the end ------------------------------------------------------------------------------
def machine() -> str:
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [models[0] if models else platform.machine(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB of memory"]
    parts += [f"Python {platform.python_version()}", f"SQLite {sqlite3.sqlite_version}"]
    if programs := postgresql.binaries():
        said = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
        parts.append(f"PostgreSQL {said.split()[2]}")
    return ", ".join(parts)


def report(run: Measurement, engines: dict[str, Any], counts: Sequence[int]) -> str:
    shown = [each.contestant for each in run.running]
    ours = [each for each in shown if each.is_ours]
    others = [each for each in shown if not each.is_ours]
    parts = [
        f"{datetime.now(UTC):%Y-%m-%d}; {machine()}; {run.rounds} rounds of {run.seconds} s each, in turn; "
        "median (least to greatest).\n"
    ]
    if others:
        parts += [tables.ratio_table(each, others, run.connections, run.loads) for each in ours]
    if shown:
        parts.append(tables.load_table(shown, run.connections, run.loads))
        parts.append(tables.server_table(run.running, run.memory))
    if ours:
        rows = []
        for each in ours:
            lists, singles = run.lists[each.name], run.singles[each.name]
            many = tables.Spread.of(load.rate * model.LIST for load in lists)
            pairs = zip(lists, singles, strict=True)
            times = tables.Spread.of(model.LIST * each_list.rate / single.rate for each_list, single in pairs)
            rows.append([each.title, tables.Spread.of(load.rate for load in singles), many, times])
        head = ["customers per second, one connection", "in single calls", f"in lists of {model.LIST:,}", "ratio"]
        parts.append(tables.table(head, rows))
    if engines:
        parts.append(tables.engine_table(engines, counts))
    parts += [f"No figures of {title}: {reason}.\n" for title, reason in run.absent.items()]
    files: dict[Path, list[str]] = defaultdict(list)
    for each in shown:
        files[each.requirements].append(each.title)
    parts.append("".join(f"- {', '.join(titles)}: {install.versions(file)}\n" for file, titles in files.items()))
    return "\n".join(parts)


def write(text: str, run: Measurement) -> None:
    """Put the results into README.md, between its two marks, and draw the chart."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README} has no place for results any more.")
    picture = f"![Answers per second]({CHART.name})\n"
    README.write_text(f"{before}{BEGIN}\n{picture}\n{text}\n{END}{after}")
    rates = {
        each.contestant.title: [
            tables.Spread.of(load.rate for load in run.loads[each.contestant.name, count]).median
            for count in run.connections
        ]
        for each in run.running
    }
    groups = [f"{count} connections" if count > 1 else "1 connection" for count in run.connections]
    CHART.write_text(chart.bars("Answers per second (logarithmic)", rates, groups))


# --- From the command line --------------------------------------------------------------------------------
@contextmanager
def working_folder():
    """A folder on a disk: /tmp may be memory, in which a durable write costs nothing. Gone afterwards."""
    tempfile.tempdir = "/var/tmp"
    folder = Path(tempfile.mkdtemp(prefix="retention-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare_machine() -> None:
    """Let every signal that ends this program end the servers too. Raises SystemExit if it cannot measure here."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # also SIGINT, which a shell may have made its jobs ignore
    if not wrk.is_installed():
        raise SystemExit(wrk.HOW_TO_GET)
    if not Path("/proc/self/smaps_rollup").exists():
        raise SystemExit("The benchmark reads the memory of processes from /proc, and so runs on Linux only.")


def _interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the ending
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [each.name for each in contestants.ALL]
    parser.add_argument("--quick", action="store_true", help="under three minutes: fewer and shorter runs")
    parser.add_argument("--only", default="", help=f"some of {', '.join([*names, ENGINE])}, separated by commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=int, help=f"of each load: {SECONDS}, or {QUICK_SECONDS} with --quick")
    parser.add_argument("--write", action="store_true", help="write the results into bench/README.md")
    asked = parser.parse_args(arguments)
    only = {name.strip() for name in asked.only.split(",") if name.strip()}
    if unknown := only - {*names, ENGINE}:
        parser.error(f"nobody is called {', '.join(sorted(unknown))}; choose from {', '.join([*names, ENGINE])}")
    if asked.write and only:
        parser.error("--write is for whole runs; leave out --only")
    prepare_machine()

    began = time.monotonic()
    only = only or {each.name for each in contestants.ALL if each.in_quick or not asked.quick} | {ENGINE}
    wanted = [each for each in contestants.ALL if each.name in only]
    run = Measurement(
        QUICK_CONNECTIONS if asked.quick else CONNECTIONS,
        asked.seconds or (QUICK_SECONDS if asked.quick else SECONDS),
        asked.rounds,
    )
    counts = QUICK_ENGINE_ROWS if asked.quick else ENGINE_ROWS
    engines: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(working_folder())
        say("Training the model ...")
        subject = model.train(folder, contestants.clean_environment())
        customers = folder / "list.json"
        customers.write_text(json.dumps(subject.customers))
        run.start(stack, wanted, subject, folder)
        for running in [each for each in run.running if each.contestant.is_ours]:
            try:
                check_list(running, subject, customers)
            except Unavailable as reason:
                run.leave_out(running.contestant, reason)
        run.measure(customers)
        run.check_stored()
        with ThreadPoolExecutor() as pool:  # some take seconds to end
            list(pool.map(lambda running: running.server.stop(), run.running))
        if ENGINE in only:
            engines, absent = measure_engines(subject, folder, counts)
            run.absent |= absent
    text = report(run, engines, counts)
    say(f"\n{text}")
    say(f"Took {time.monotonic() - began:.0f} s.")
    if asked.write:
        write(text, run)
        say(f"Written to {README.relative_to(HERE.parent)} and {CHART.relative_to(HERE.parent)}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; every server is stopped too.")
