"""Who is measured, and how each is set up, started, asked and read."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import install
import wrk
from install import CONTESTANTS, Unavailable
from model import BACKEND, REPOSITORY, Subject
from processes import Server
from tests import postgresql

WORKERS = "2"
FIRST_ANSWER = 90
WARM_CONNECTIONS = 8
JSON = {"Content-Type": "application/json"}
# More requests than this in one batch cannot come together at 64 connections; 10 ms is about what two forests cost.
BATCH, BATCH_SECONDS = 64, 0.01


def served(*application: str) -> list[str]:
    """How the product is served, or on the same server another application: the one place that knows."""
    return [sys.executable, str(BACKEND / "serve.py"), *application]


@dataclass(frozen=True)
class Launch:
    """A command that serves on a port of 127.0.0.1.

    count: what its database counts, where it has one. stored: how many answers that holds.
    """

    command: list[str]
    environment: dict[str, str]
    folder: Path
    headers: dict[str, str] = field(default_factory=dict)
    stored: Callable[[], int] | None = None
    count: Callable[[str], int] | None = None


@dataclass(frozen=True)
class Contestant:
    """launch: called with a stack for what must be closed, the subject, an empty folder and a port.

    body: what is posted. read: the probability in the answer's JSON; None where there is none, as with the floor.
    tolerance: how far that may be from scikit-learn's. requirements: the file that pins its versions.
    in_quick: whether it takes part in a quick run. is_ours: whether the others are compared with it.
    """

    name: str
    title: str
    launch: Callable[[ExitStack, Subject, Path, int], Launch]
    path: str
    body: Callable[[Subject], Any]
    read: Callable[[Any], float] | None
    tolerance: float = 0.0
    requirements: Path = REPOSITORY / "requirements.txt"
    in_quick: bool = True
    is_ours: bool = False


class Running:
    """A contestant that has started and given its first, checked answer.

    first_answer: seconds from its start. difference: how far its probability is from scikit-learn's.
    counted: the good answers that wrk counted, of every run.
    """

    def __init__(self, contestant: Contestant, launch: Launch, server: Server, url: str, subject: Subject, body: Path):
        self.contestant, self.launch, self.server, self.url = contestant, launch, server, url
        self.subject, self.body, self.counted = subject, body, 0
        self.headers = {**JSON, **launch.headers}
        self.first_answer = self.difference = 0.0

    def wait(self) -> None:
        """Ask until it answers, and check the answer. Raises Unavailable."""
        while True:
            try:
                answer = self.ask(self.body)
            except OSError as error:
                if self.server.has_ended:
                    raise Unavailable(f"it stopped: {self.server.last_words()}") from None
                if time.monotonic() - self.server.began > FIRST_ANSWER:
                    raise Unavailable(f"no answer in {FIRST_ANSWER} s: {error}; {self.server.last_words()}") from None
                time.sleep(0.02)
            else:
                break
        self.first_answer = time.monotonic() - self.server.began
        self.check(answer)

    def ask(self, body: Path) -> Any:
        request = urllib.request.Request(self.url, body.read_bytes(), self.headers)
        with urllib.request.urlopen(request, timeout=FIRST_ANSWER) as response:
            return json.load(response)

    def check(self, answer: Any) -> None:
        """Raise Unavailable if an answer is not scikit-learn's, within the contestant's tolerance."""
        read = self.contestant.read
        if read is None:
            if answer != self.contestant.body(self.subject):
                raise Unavailable(f"it answered {answer!r}")
            return
        probability = read(answer)
        self.difference = max(self.difference, abs(probability - self.subject.probability))
        if not self.difference <= self.contestant.tolerance:
            raise Unavailable(f"it answered {probability}, scikit-learn {self.subject.probability}")

    def load(self, connections: int, seconds: int, body: Path | None = None) -> wrk.Load:
        """Measure, then wait for what is left over, and check an answer once more. Raises Unavailable."""
        try:
            loaded = wrk.load(self.url, self.launch.headers, body or self.body, connections, seconds)
        except subprocess.SubprocessError as error:
            raise Unavailable(f"wrk could not ask it: {error}") from None
        self.counted += loaded.good
        self.server.rest()
        try:
            self.check(self.ask(self.body))
        except OSError as error:
            raise Unavailable(f"no answer after {connections} connections: {error}") from None
        return loaded


def start(stack: ExitStack, contestant: Contestant, subject: Subject, folder: Path) -> Running:
    """Install, prepare and start; the stack ends it. Raises Unavailable."""
    folder = folder / contestant.name
    folder.mkdir()
    body = folder / "body.json"
    body.write_text(json.dumps(contestant.body(subject)))
    port = postgresql.free_port()
    launch = contestant.launch(stack, subject, folder, port)
    server = Server(launch.command, launch.environment, launch.folder, folder / "log")
    stack.callback(server.stop)
    url = f"http://127.0.0.1:{port}{contestant.path}"
    running = Running(contestant, launch, server, url, subject, body)
    try:
        running.wait()
        running.load(WARM_CONNECTIONS, 1)  # what is slow only once shall not count
    except Unavailable:
        server.stop()
        raise
    return running


# --- Ours -------------------------------------------------------------------------------------------------
def nothing_but(**more: str) -> dict[str, str]:
    """An environment to which this shell gives only what every program needs."""
    return {**{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}, **more}


def clean_environment(**more: str) -> dict[str, str]:
    """The product's settings at their defaults: an empty value keeps out what the repository's .env says."""
    settings = re.findall(r"^#? ?([A-Z_]+)=", (REPOSITORY / ".env.example").read_text(), re.MULTILINE)
    return {**nothing_but(PYTHONPATH=str(BACKEND)), **dict.fromkeys(settings, ""), **more}


def production(port: int, **more: str) -> dict[str, str]:
    """As the README says, but for TLS: wrk is on this machine and speaks plain HTTP."""
    return clean_environment(
        DEBUG="0",
        SECRET_KEY="of-a-measurement-that-listens-to-this-machine-only-and-soon-ends",
        ALLOWED_HOSTS="127.0.0.1",
        SECURE_SSL_REDIRECT="0",
        WEB_CONCURRENCY=WORKERS,
        PORT=str(port),
        **more,
    )


def manage(environment: Mapping[str, str], *arguments: str) -> str:
    command = [sys.executable, str(BACKEND / "manage.py"), *arguments]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"manage.py {arguments[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()


def _product(subject: Subject, port: int, database_url: str, count: Callable[[str], int], **settings: str) -> Launch:
    environment = production(port, DATABASE_URL=database_url, ML_ARTIFACTS_DIR=str(subject.artifacts), **settings)
    manage(environment, "migrate", "--verbosity", "0")
    token = manage(environment, "create_token", "bench", "--create-user")
    return Launch(
        served(),
        environment,
        BACKEND,
        headers={"Authorization": f"Token {token}"},
        stored=lambda: count("SELECT count(*) FROM endpoints_mlrequest"),
        count=count,
    )


def on_sqlite(stack: ExitStack, subject: Subject, folder: Path, port: int, **settings: str) -> Launch:
    file = folder / "db.sqlite3"

    def count(query: str) -> int:
        with closing(sqlite3.connect(file)) as connection:
            return connection.execute(query).fetchone()[0]

    return _product(subject, port, f"sqlite:///{file}", count, **settings)


def on_flushed_sqlite(stack: ExitStack, subject: Subject, folder: Path, port: int) -> Launch:
    return on_sqlite(stack, subject, folder, port, SQLITE_SYNCHRONOUS="FULL")


def on_postgresql(stack: ExitStack, subject: Subject, folder: Path, port: int, flushed: bool = True) -> Launch:
    import psycopg

    if postgresql.binaries() is None:
        raise Unavailable(postgresql.HOW_TO_GET)
    url = postgresql.new_database(stack.enter_context(postgresql.running(durable=True)))
    if not flushed:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f'ALTER DATABASE "{connection.info.dbname}" SET synchronous_commit = off')

    def count(query: str) -> int:
        with psycopg.connect(url) as connection:
            return connection.execute(query).fetchone()[0]

    return _product(subject, port, url, count)


def on_unflushed_postgresql(stack: ExitStack, subject: Subject, folder: Path, port: int) -> Launch:
    return on_postgresql(stack, subject, folder, port, flushed=False)


def floor(stack: ExitStack, subject: Subject, folder: Path, port: int) -> Launch:
    here = CONTESTANTS / "floor"
    environment = production(port, DJANGO_SETTINGS_MODULE="settings")
    environment["PYTHONPATH"] += f":{here}"
    return Launch(served("floor"), environment, here)


# --- Theirs -----------------------------------------------------------------------------------------------
def prepared(name: str, subject: Subject, folder: Path, **more: str) -> tuple[Path, dict[str, str]]:
    """Install a contestant and run its prepare.py, if it has one; the bin folder and the environment."""
    programs = install.programs(name)
    environment = {**nothing_but(**more), "PATH": f"{programs}:{os.environ['PATH']}"}
    script = CONTESTANTS / name / "prepare.py"
    if script.exists():
        command = [str(programs / "python"), str(script), str(subject.model), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"its model cannot be prepared: {done.stderr.strip()[-500:]}")
    return programs, environment


def fastapi_sklearn(stack: ExitStack, subject: Subject, folder: Path, port: int) -> Launch:
    return _fastapi("fastapi-sklearn", subject, folder, port, subject.model)


def fastapi_onnxruntime(stack: ExitStack, subject: Subject, folder: Path, port: int) -> Launch:
    return _fastapi("fastapi-onnxruntime", subject, folder, port, folder / "model.onnx")


def _fastapi(name: str, subject: Subject, folder: Path, port: int, model: Path) -> Launch:
    programs, environment = prepared(name, subject, folder, MODEL=str(model))
    command = [str(programs / "uvicorn"), "app:app", "--host", "127.0.0.1", "--port", str(port), "--workers", WORKERS]
    return Launch(command, environment, CONTESTANTS / name)


def mlflow(stack: ExitStack, subject: Subject, folder: Path, port: int) -> Launch:
    programs, environment = prepared("mlflow", subject, folder)
    command = [str(programs / "mlflow"), "models", "serve", "--model-uri", str(folder / "model")]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", WORKERS]
    return Launch(command, environment, folder)


def bentoml(stack: ExitStack, subject: Subject, folder: Path, port: int, batching: bool = False) -> Launch:
    programs, environment = prepared(
        "bentoml",
        subject,
        folder,
        BENTOML_HOME=str(folder / "home"),
        BENTOML_DO_NOT_TRACK="True",
        BATCHING=str(int(batching)),
    )
    command = [str(programs / "bentoml"), "serve", "service:Retention", "--host", "127.0.0.1", "--port", str(port)]
    return Launch(command, environment, CONTESTANTS / "bentoml")


def mlserver(stack: ExitStack, subject: Subject, folder: Path, port: int, batching: bool = False) -> Launch:
    ports = {"HTTP": port, "GRPC": postgresql.free_port(), "METRICS": postgresql.free_port()}
    settings = {"MLSERVER_HOST": "127.0.0.1", **{f"MLSERVER_{name}_PORT": str(each) for name, each in ports.items()}}
    if batching:
        settings |= {"MLSERVER_MODEL_MAX_BATCH_SIZE": str(BATCH), "MLSERVER_MODEL_MAX_BATCH_TIME": str(BATCH_SECONDS)}
    programs, environment = prepared("mlserver", subject, folder, **settings)
    return Launch([str(programs / "mlserver"), "start", str(folder)], environment, folder)


def _batching(launch: Callable[..., Launch]) -> Callable[[ExitStack, Subject, Path, int], Launch]:
    return lambda *arguments: launch(*arguments, batching=True)


def by_name(subject: Subject) -> dict[str, Any]:
    return subject.customer


def rows(subject: Subject) -> dict[str, Any]:
    return {"rows": [subject.row]}


def inputs(subject: Subject) -> dict[str, Any]:
    return {"inputs": [subject.row]}


def tensor(subject: Subject) -> dict[str, Any]:
    given = {"name": "rows", "shape": [1, len(subject.row)], "datatype": "FP64", "data": subject.row}
    return {"inputs": [given], "outputs": [{"name": "predict_proba"}]}


def _theirs(name: str, title: str, launch: Callable[..., Launch], **more: Any) -> Contestant:
    return Contestant(name, title, launch, requirements=install.requirements(more.pop("environment", name)), **more)


PREDICT = "/api/v1/classifier/predict?status=production"
INFER = "/v2/models/retention/infer"
OURS = {"path": PREDICT, "body": by_name, "read": lambda answer: answer["probability"]}
FASTAPI = {"path": "/predict", "body": rows, "read": lambda answer: answer["probability"][0]}
BENTOML = {"environment": "bentoml", "path": "/predict", "body": rows, "read": lambda answer: answer[0]}
MLFLOW = {"path": "/invocations", "body": inputs, "read": lambda answer: answer["predictions"][0][1]}
MLSERVER = {
    "environment": "mlserver",
    "path": INFER,
    "body": tensor,
    "read": lambda answer: answer["outputs"][0]["data"][1],
}

#: In the order of the tables. onnxruntime counts in float32, and so is off in the seventh digit; the others are exact.
ALL = (
    Contestant("sqlite", "this product on SQLite", on_sqlite, is_ours=True, **OURS),
    Contestant("postgresql", "this product on PostgreSQL", on_postgresql, is_ours=True, **OURS),
    Contestant("sqlite-full", "itself on SQLite with FULL", on_flushed_sqlite, in_quick=False, **OURS),
    Contestant("postgresql-off", "itself on PostgreSQL with off", on_unflushed_postgresql, in_quick=False, **OURS),
    _theirs("fastapi-onnxruntime", "FastAPI with onnxruntime", fastapi_onnxruntime, tolerance=1e-6, **FASTAPI),
    _theirs("fastapi-sklearn", "FastAPI with scikit-learn", fastapi_sklearn, **FASTAPI),
    _theirs("mlserver", "MLServer", mlserver, **MLSERVER),
    _theirs("mlserver-batching", "MLServer, adaptive batching", _batching(mlserver), in_quick=False, **MLSERVER),
    _theirs("bentoml", "BentoML", bentoml, **BENTOML),
    _theirs("bentoml-batching", "BentoML, adaptive batching", _batching(bentoml), in_quick=False, **BENTOML),
    _theirs("mlflow", "MLflow", mlflow, **MLFLOW),
    Contestant("drf", "floor: a bare DRF view", floor, "/drf", by_name, None),
    Contestant("django", "floor: a bare Django view", floor, "/django", by_name, None, in_quick=False),
)
