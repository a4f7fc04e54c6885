"""What every test of the server may use: a trained table, a client, and the services of the machine."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from django.core.handlers.wsgi import WSGIRequest
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
from django.http import HttpResponse
from rest_framework.test import APIClient

from apps.endpoints.models import MLAlgorithm, MLAlgorithmStatus
from apps.ml.registry import registry
from server.handler import Handler
from tests import postgresql, processes

# A run that a shell put in the background ignores Ctrl-C, and so would every server that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def make_customers(rows: int = 400, seed: int = 7) -> pd.DataFrame:
    """A small table with every kind of column: customers who buy often and lately tend to stay."""
    random = np.random.default_rng(seed)
    orders = random.poisson(3, rows) + 1
    recency = random.integers(0, 365, rows).astype(float)
    stays = random.random(rows) < 1 / (1 + np.exp(recency / 60 - orders / 2))
    return pd.DataFrame(
        {
            "CustomerId": [f"C{number:05d}" for number in range(1, rows + 1)],
            "Plan": random.choice(["basic", "family", "premium"], rows),
            "Orders": orders,
            "RecencyDays": recency,
            "MeanGapDays": np.where(orders > 1, np.round(random.exponential(30, rows), 2), np.nan),
            "Newsletter": random.random(rows) < 0.5,
            "IsRetained": stays.astype(int),
        }
    )


@pytest.fixture(scope="session")
def customers_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "customers.csv"
    make_customers().to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, customers_csv: Path) -> Path:
    """An artifacts folder with training run 1.0.0. Not to be changed: see `artifacts_dir` for that."""
    import train

    directory = tmp_path_factory.mktemp("artifacts")
    assert train.main(["--data", str(customers_csv), "--artifacts-dir", str(directory)]) == 0
    return directory


@pytest.fixture
def artifacts_dir(tmp_path: Path, trained: Path) -> Path:
    """A copy of the artifacts folder that a test may change or damage."""
    return Path(shutil.copytree(trained, tmp_path / "artifacts"))


@pytest.fixture(autouse=True)
def _known_artifacts_and_empty_registry(settings, trained: Path, tmp_path_factory) -> Iterator[None]:
    settings.ML_ARTIFACTS_DIR = trained
    settings.BATCH_DIR = tmp_path_factory.getbasetemp() / "batches"
    registry.clear()
    yield
    registry.clear()


@pytest.fixture
def algorithms(db, trained: Path) -> dict[str, MLAlgorithm]:
    """The three algorithms of the first run, registered, by key."""
    return {algorithm.key: algorithm for algorithm in registry.register_run()}


@pytest.fixture
def api(settings) -> APIClient:
    """A client in development: no token, from this machine."""
    settings.DEBUG = True
    return APIClient()


Application = Callable[..., list[bytes]]


def make_application(handler: Handler | None = None) -> Application:
    """A WSGI application. Like Django's own test client it leaves the test's database connection open."""
    handler = handler or Handler()

    def answer(environ: dict[str, object], start_response: Callable[..., object]) -> list[bytes]:
        moments = (request_started, request_finished)
        for moment in moments:
            moment.disconnect(close_old_connections)
        try:
            response = handler(environ, start_response)
            with closing(response) if hasattr(response, "close") else nullcontext():
                return list(response)
        finally:
            for moment in moments:
                moment.connect(close_old_connections)

    return answer


@pytest.fixture
def application(db) -> Application:
    return make_application()


class AsServed:
    """What a test client may have as its handler: its requests come to the application as from a server."""

    def __init__(self, application: Application):
        self._application = application

    def __call__(self, environ: dict[str, object]) -> HttpResponse:
        told: list[tuple[str, list[tuple[str, str]]]] = []
        content = b"".join(self._application(environ, lambda *heads: told.append(heads)))
        ((status, headers),) = told
        response = HttpResponse(content, status=int(status.split()[0]), headers=dict(headers))
        response.wsgi_request = WSGIRequest(environ)
        return response


@pytest.fixture
def wsgi(api: APIClient, application: Application) -> Callable[..., tuple[int, dict]]:
    """Send a request as a server hands it to the application, headers and body as broken as they may be."""

    def send(body: bytes = b"", **environ: str) -> tuple[int, dict]:
        answer: dict = {}
        base = {
            "REQUEST_METHOD": "POST",
            "PATH_INFO": "/api/v1/classifier/predict",
            "QUERY_STRING": "",
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "8000",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_HOST": "testserver",
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
        }
        chunks = application({**base, **environ}, lambda status, headers: answer.update(status=int(status.split()[0])))
        return answer["status"], json.loads(b"".join(chunks))

    return send


@pytest.fixture
def customer() -> dict[str, object]:
    return {"Plan": "basic", "Orders": 4, "RecencyDays": 20.0, "MeanGapDays": 31.5, "Newsletter": True}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason to skip, which says what to do, however many tests it skips."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, number in reasons.items():
        terminalreporter.write_line(f"Skipped {number} of the tests: {reason.removeprefix('Skipped: ')}")


def status_of(algorithm: MLAlgorithm) -> str:
    return MLAlgorithmStatus.objects.active().get(parent_mlalgorithm=algorithm).status


def require(found: object, how_to_get: str) -> None:
    """Skip a test whose service is not installed; fail where services are required."""
    if found:
        return
    if os.environ.get("REQUIRE_SERVICES") == "1":
        pytest.fail(how_to_get)
    pytest.skip(how_to_get)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A running PostgreSQL server, without a database's name."""
    require(postgresql.binaries(), postgresql.HOW_TO_GET)
    with postgresql.running() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database for a server of the test's own: the test runs once on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'server.sqlite3'}"
    return postgresql.new_database(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def server(tmp_path: Path, trained: Path) -> Iterator[processes.Server]:
    """A real server in development mode on a fresh SQLite database."""
    env = processes.environment(f"sqlite:///{tmp_path / 'server.sqlite3'}", trained, DEBUG="1")
    processes.manage("migrate", env=env)
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as running:
        yield running
