"""Two processes, many clients: one production algorithm at any time, and every process knows which."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

import train
from tests import processes
from tests.processes import Server

pytestmark = pytest.mark.whole

ROUNDS = 20
PRODUCTION = "/api/v1/classifier/predict?status=production"


@pytest.fixture(params=["nobody", "a caller who is known"])
def two_workers(request: pytest.FixtureRequest, database_url: str, trained: Path, tmp_path: Path) -> Iterator[Server]:
    env = processes.environment(database_url, trained, DEBUG="1", WEB_CONCURRENCY="2", LOG_LEVEL="WARNING")
    processes.manage("migrate", env=env)
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        if request.param != "nobody":
            server.headers = processes.token_header(env)
        yield server


@pytest.fixture
def ids(two_workers: Server) -> dict[str, int]:
    """Each algorithm's id, by name."""
    return {algorithm["name"]: algorithm["id"] for algorithm in two_workers.get("/api/v1/mlalgorithms").json()}


def set_status(server: Server, algorithm: int, status: str, by: str) -> requests.Response:
    body = {"status": status, "created_by": by, "parent_mlalgorithm": algorithm}
    return requests.post(
        f"{server.url}/api/v1/mlalgorithmstatuses", json=body, timeout=30
    )  # in development anybody may


def in_production(server: Server) -> list[str]:
    return [algorithm["name"] for algorithm in server.get("/api/v1/mlalgorithms?status=production").json()]


@dataclass
class Predicting:
    """Clients that predict all the while. `answers`: when each was asked and answered, the HTTP status, by whom."""

    server: Server
    customer: dict
    clients: int = 3
    answers: list[tuple[float, float, int, str]] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Predicting:
        self.pool = ThreadPoolExecutor(self.clients)
        self.running = [self.pool.submit(self.predict) for _ in range(self.clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.pool.shutdown()
        for client in self.running:
            client.result()

    def predict(self) -> None:
        while not self.done.is_set():
            asked = time.monotonic()
            response = self.server.post(PRODUCTION, json=self.customer)  # a new connection, so to any process
            self.answers.append((asked, time.monotonic(), response.status_code, response.json().get("algorithm")))


@dataclass
class Round:
    """Between two moments some promote, each a different algorithm; afterwards one of them holds production."""

    began: float
    ended: float
    contenders: tuple[str, ...]
    winner: str


def may_answer(rounds: list[Round], asked: float, answered: float) -> set[str]:
    """Who may answer a request: who held production when it was asked, and whoever was promoted meanwhile."""
    settled = [past.winner for past in rounds if past.ended <= asked][-1]
    return {settled}.union(*(each.contenders for each in rounds if each.began < answered and each.ended > asked))


def test_two_clients_promoting_at_once_leave_one_production_algorithm_and_break_no_prediction(
    two_workers, ids, customer
):
    pairs = [("extra trees", "decision tree"), ("decision tree", "random forest"), ("random forest", "extra trees")]
    rounds = [Round(0, 0, (), "random forest")]
    with Predicting(two_workers, customer) as clients, ThreadPoolExecutor(2) as pool:
        for number in range(ROUNDS):
            contenders = pairs[number % len(pairs)]
            together = threading.Barrier(2)

            def promote(name: str, together: threading.Barrier = together) -> int:
                together.wait()
                return set_status(two_workers, ids[name], "production", by=name).status_code

            began = time.monotonic()
            assert list(pool.map(promote, contenders)) == [201, 201]
            ended = time.monotonic()

            (winner,) = in_production(two_workers)
            assert winner in contenders
            rounds.append(Round(began, ended, contenders, winner))
            # Both are acknowledged, so from now on every process answers with the one that came last.
            later = [two_workers.post(PRODUCTION, json=customer).json()["algorithm"] for _ in range(6)]
            assert later == [winner] * 6

    assert len(clients.answers) > ROUNDS
    assert {status for _, _, status, _ in clients.answers} == {200}
    wrong = [answer for answer in clients.answers if answer[3] not in may_answer(rounds, answer[0], answer[1])]
    assert wrong == []

    history = two_workers.get("/api/v1/mlalgorithmstatuses").json()
    active = [row for row in history if row["active"]]
    assert sorted(row["parent_mlalgorithm"] for row in active) == sorted(ids.values())
    assert [row["status"] for row in active].count("production") == 1
    promotions = [row["created_by"] for row in history if row["status"] == "production"]
    assert sorted(promotions[1:]) == sorted(name for each in rounds for name in each.contenders)
    assert "Traceback" not in two_workers.log.read_text()


def test_what_another_process_registers_is_served_by_every_worker_from_the_next_request_on(
    database_url, artifacts_dir, customers_csv, tmp_path, customer
):
    env = processes.environment(database_url, artifacts_dir, DEBUG="1", WEB_CONCURRENCY="2", LOG_LEVEL="WARNING")
    processes.manage("migrate", env=env)
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        server.headers = processes.token_header(env)

        def ask(count: int = 40) -> set[tuple[int, str | None]]:
            """What the workers answer for the new version: so many ask at once that each worker gets some."""
            path = "/api/v1/classifier/predict?algorithm=extra_trees&version=1.1.0"
            with ThreadPoolExecutor(10) as pool:
                answers = list(pool.map(lambda _: server.post(path, json=customer), range(count)))
            return {(answer.status_code, answer.json().get("version")) for answer in answers}

        assert train.main(["--data", str(customers_csv), "--artifacts-dir", str(artifacts_dir), "--seed", "1"]) == 0
        assert ask() == {(400, None)}
        processes.manage("register_algorithms", "--version", "1.1.0", env=env)
        assert ask() == {(200, "1.1.0")}

        (extra_trees,) = server.get("/api/v1/mlalgorithms?version=1.1.0&name=extra trees").json()
        assert set_status(server, extra_trees["id"], "retired", by="ana").status_code == 201
        assert ask() == {(400, None)}
        assert set_status(server, extra_trees["id"], "staging", by="ana").status_code == 201
        assert ask() == {(200, "1.1.0")}


def test_two_files_of_outcomes_about_the_same_customers_are_recorded_one_after_the_other(two_workers, customer):
    ids = [answer["request_id"] for answer in two_workers.post(PRODUCTION, json=[customer] * 500).json()]
    address = "/api/v1/feedback"

    def telling(outcome: str, order: list[int]) -> requests.Response:
        return two_workers.post(address, json=[{"request_id": pk, "outcome": outcome} for pk in order])

    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(telling, outcome, order) for outcome, order in [("1", ids), ("0", ids[::-1])]]
            assert [answer.result().status_code for answer in answers] == [200, 200]

        told = two_workers.get("/api/v1/mlrequests?page_size=1000").json()["results"]
        assert len({request["feedback"] for request in told}) == 1
