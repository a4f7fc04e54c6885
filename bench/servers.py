"""Which server: this product on SQLite, by uvicorn (serve.py), gunicorn (gunicorn.conf.py) and granian, in one run.

    python bench/servers.py [--seconds 2] [--rounds 3]

README.md says what is measured. Prints Markdown tables. Linux only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend" / "server"))

import contestants
import model
import tables
from contestants import BACKEND, Contestant, Launch, Running
from model import Subject
from run import CONNECTIONS, prepare_machine, say, working_folder
from tables import Loads, Spread

CLIENTS = 8
PATIENCE = 60


def uvicorn(stack: ExitStack, subject: Subject, folder: Path, port: int) -> Launch:
    """Without a worker of batch jobs, which the others have not either."""
    return contestants.on_sqlite(stack, subject, folder, port, BATCH_WORKERS="0")


def gunicorn(stack: ExitStack, subject: Subject, folder: Path, port: int) -> Launch:
    command = [sys.executable, "-m", "gunicorn", "--config", str(BACKEND / "gunicorn.conf.py"), "server.wsgi"]
    return replace(contestants.on_sqlite(stack, subject, folder, port), command=command)


def granian(stack: ExitStack, subject: Subject, folder: Path, port: int) -> Launch:
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--port", str(port)]
    command += ["--workers", contestants.WORKERS, "--blocking-threads", "8", "--backlog", "1024", "--no-ws"]
    command += ["--respawn-failed-workers", "--workers-kill-timeout", "30", "--log-level", "error"]
    launch = contestants.on_sqlite(stack, subject, folder, port)
    return replace(launch, command=[*command, "server.wsgi:application"])


SERVERS = (
    Contestant("uvicorn", "uvicorn", uvicorn, **contestants.OURS),
    Contestant("gunicorn", "gunicorn", gunicorn, **contestants.OURS),
    Contestant("granian", "granian", granian, **contestants.OURS),
)


# --- Clients that see what breaks -------------------------------------------------------------------------
@dataclass
class Clients:
    """Each request has a connection of its own. answered: good ones. gone: never accepted. failed: all others."""

    running: Running
    answered: int = 0
    gone: int = 0
    failed: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    counting: threading.Lock = field(default_factory=threading.Lock)

    def ask(self) -> None:
        body = self.running.body.read_bytes()
        host = self.running.url.split("/")[2]
        path = "/" + self.running.url.split("/", 3)[3]
        while not self.ended.is_set():
            outcome = "answered"
            connection = http.client.HTTPConnection(host, timeout=PATIENCE)
            try:
                connection.request("POST", path, body, self.running.headers)
                answer = connection.getresponse()
                if answer.status != 200 or "probability" not in json.load(answer):
                    outcome = "failed"
            except http.client.RemoteDisconnected:
                outcome = "failed"
            except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
                outcome = "gone"
                time.sleep(0.005)
            except (OSError, http.client.HTTPException, ValueError):
                outcome = "failed"
            finally:
                if connection.sock:
                    # By a reset: thousands of connections that are still closing would hide those that are open.
                    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
            with self.counting:
                setattr(self, outcome, getattr(self, outcome) + 1)

    def wait_for(self, answers: int) -> None:
        _wait(lambda: self.answered >= answers, "the clients get no answers")


@contextmanager
def clients(running: Running) -> Iterator[Clients]:
    asking = Clients(running)
    threads = [threading.Thread(target=asking.ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield asking
    finally:
        asking.ended.set()
        for thread in threads:
            thread.join()


def _wait(condition: Callable[[], object], otherwise: str) -> float:
    """Seconds until it holds. Raises SystemExit."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > PATIENCE:
            raise SystemExit(f"In {PATIENCE} s {otherwise}.")
        time.sleep(0.01)
    return time.monotonic() - began


# --- What is measured -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stop:
    """SIGTERM under load: seconds until the last process ended, and requests that were accepted and not answered."""

    seconds: float
    lost: int


@dataclass(frozen=True)
class Death:
    """kill -9 of one process under load: requests without an answer, and seconds until another answers in its place."""

    errors: int
    whole_again: float


def kill_one(running: Running) -> Death:
    before = running.server.tree().keys()
    with clients(running) as asking:
        asking.wait_for(100)
        os.kill(max(before - {running.server.process.pid}), signal.SIGKILL)
        seconds = _wait(
            lambda: any(map(_answers, running.server.tree().keys() - before)), "nobody takes the place of the dead"
        )
    return Death(asking.failed + asking.gone, seconds)


def _answers(pid: int) -> bool:
    """Whether a process has a client's connection open, which it takes when it has loaded the models."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    open_ones = {f"socket:[{row[9]}]" for row in rows if row[3] == "01"}
    with suppress(OSError):
        return any(str(link.readlink()) in open_ones for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def stop(running: Running) -> Stop:
    stored = running.launch.stored
    before = stored()
    with clients(running) as asking:
        asking.wait_for(200)
        began = time.monotonic()
        running.server.process.terminate()
        running.server.process.wait(PATIENCE)
        seconds = time.monotonic() - began
    return Stop(seconds, max(asking.failed, stored() - before - asking.answered))


# --- One run ----------------------------------------------------------------------------------------------
@dataclass
class Figures:
    """Of one server, a value per start."""

    first_answer: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)


def measure(subject: Subject, folder: Path, rounds: int, seconds: int) -> tuple[Loads, dict[str, Figures]]:
    """In each round all are started anew, loaded in turn, and ended; the rounds begin with another server."""
    loads, figures = defaultdict(list), defaultdict(Figures)
    for number in range(rounds):
        say(f"Round {number + 1} of {rounds} ...")
        first = number % len(SERVERS)
        order = [*SERVERS[first:], *SERVERS[:first]]
        with ExitStack() as stack:
            here = folder / str(number)
            here.mkdir()
            all_of_them = [contestants.start(stack, server, subject, here) for server in order]
            for count in CONNECTIONS:
                for running in all_of_them:
                    loads[running.contestant.name, count].append(running.load(count, seconds))
            for running in all_of_them:
                its = figures[running.contestant.name]
                its.first_answer.append(running.first_answer)
                its.memory.append(running.server.memory())
                its.deaths.append(kill_one(running))
                its.stops.append(stop(running))
    return loads, figures


def report(loads: Loads, figures: dict[str, Figures]) -> str:
    rows = []
    for server in SERVERS:
        its = figures[server.name]
        rows.append(
            [
                server.title,
                Spread.of(its.first_answer),
                f"{max(its.memory) / 2**20:,.0f}",
                Spread.of(end.seconds for end in its.stops),
                sum(end.lost for end in its.stops),
                Spread.of(death.whole_again for death in its.deaths),
                sum(death.errors for death in its.deaths),
            ]
        )
    head = ["", "first answer after s", "memory in MiB", "SIGTERM: s", "lost", "kill -9: whole again after s", "errors"]
    first, *others = SERVERS
    parts = [
        tables.ratio_table(first, others, CONNECTIONS, loads),
        tables.load_table(SERVERS, CONNECTIONS, loads),
        tables.table(head, rows),
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=2, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(arguments)
    prepare_machine()
    with working_folder() as folder:
        say("Training the model ...")
        subject = model.train(folder, contestants.clean_environment())
        say(f"\n{report(*measure(subject, folder, asked.rounds, asked.seconds))}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; every server is stopped too.")
