"""Many clients start and stop A/B tests, promote and roll back at once on a real server of several processes.

On SQLite and PostgreSQL.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import requests

from tests import processes

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("lifecycle servers")]

CUSTOMER = {"Plan": "basic", "Orders": 4, "RecencyDays": 20, "MeanGapDays": 31.5, "Newsletter": True}
KEYS = ["random_forest", "extra_trees", "decision_tree"]


class Client:
    """What the tests ask of a server."""

    def __init__(self, server: processes.Server):
        self.server = server
        listed = self.get("mlalgorithms")
        self.ids = {row["key"]: row["id"] for row in listed}

    def get(self, path: str) -> list[dict]:
        return self.server.get(f"/api/v1/{path}").json()

    def move(self, key: str, status: str) -> requests.Response:
        body = {"status": status, "parent_mlalgorithm": self.ids[key]}
        return self.server.post("/api/v1/mlalgorithmstatuses", json=body)

    def roll_back(self) -> requests.Response:
        return self.server.post(f"/api/v1/endpoints/{self.get('endpoints')[0]['id']}/rollback")

    def begin(self, first: str, second: str) -> requests.Response:
        body = {"title": "T", "parent_mlalgorithm_1": self.ids[first], "parent_mlalgorithm_2": self.ids[second]}
        return self.server.post("/api/v1/abtests", json=body)

    def stop(self, test_id: int) -> requests.Response:
        return self.server.post(f"/api/v1/stop_ab_test/{test_id}")

    def predict(self, status: str = "production") -> requests.Response:
        return self.server.post(f"/api/v1/classifier/predict?status={status}", json=CUSTOMER)

    def statuses(self) -> dict[str, str]:
        return {row["key"]: row["current_status"] for row in self.get("mlalgorithms")}

    def running(self) -> list[dict]:
        return [test for test in self.get("abtests") if test["ended_at"] is None]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def client(request, tmp_path_factory, trained) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("server")
    if request.param == "sqlite":
        url = f"sqlite:///{folder / 'server.sqlite3'}"
    else:
        root = request.getfixturevalue("postgresql_url")
        with psycopg.connect(f"{root}/postgres", autocommit=True) as connection:
            connection.execute("CREATE DATABASE lifecycle")
        url = f"{root}/lifecycle"
    env = processes.environment(url, trained, DEBUG="1", LOG_LEVEL="WARNING", WEB_CONCURRENCY="2")
    processes.manage("migrate", env=env)
    with processes.running(env, folder / "server.log", wait_for="/readyz") as server:
        yield Client(server)


@pytest.fixture(autouse=True)
def out_of_the_box(client: Client) -> None:
    for test in client.running():
        client.stop(test["id"])
    for key, status in zip(KEYS, ["production", "staging", "testing"], strict=True):
        assert client.move(key, status).status_code == 201


def all_at_once(calls: list[Callable[[], requests.Response]]) -> list[requests.Response]:
    barrier = threading.Barrier(len(calls))

    def call(index: int) -> requests.Response:
        barrier.wait()
        return calls[index]()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, range(len(calls))))


def test_of_many_clients_starting_a_test_one_succeeds(client):
    pairs = [(KEYS[0], KEYS[1]), (KEYS[1], KEYS[2]), (KEYS[2], KEYS[0])] * 2

    responses = all_at_once([lambda pair=pair: client.begin(*pair) for pair in pairs])

    assert Counter(response.status_code for response in responses) == {201: 1, 400: 5}
    (test,) = client.running()
    tested = {test["parent_mlalgorithm_1"], test["parent_mlalgorithm_2"]}
    assert {client.ids[key] for key, status in client.statuses().items() if status == "ab_testing"} == tested


def test_of_many_clients_stopping_a_test_one_ends_it_and_all_are_told_the_same(client):
    test = client.begin("random_forest", "decision_tree").json()["id"]
    steps = len(client.get("mlalgorithmstatuses"))

    told = [response.json() for response in all_at_once([lambda: client.stop(test)] * 6)]

    assert sum(answer["message"].startswith("The test is stopped.") for answer in told) == 1
    assert len({(answer["summary"], answer["ended_at"]) for answer in told}) == 1
    assert client.statuses() == {"random_forest": "production", "extra_trees": "staging", "decision_tree": "testing"}
    assert len(client.get("mlalgorithmstatuses")) == steps + 2


def test_a_start_and_a_promotion_at_once_happen_one_after_the_other(client):
    for _ in range(5):
        started, promoted = all_at_once(
            [lambda: client.begin("random_forest", "decision_tree"), lambda: client.move("decision_tree", "production")]
        )

        assert started.status_code == 201
        assert promoted.status_code in (201, 409)
        assert client.statuses()["random_forest"] == client.statuses()["decision_tree"] == "ab_testing"
        assert client.stop(started.json()["id"]).status_code == 200
        holder = "random_forest" if promoted.status_code == 409 else "decision_tree"
        assert client.statuses()[holder] == "production"
        assert client.move("random_forest", "production").status_code == 201


def test_of_many_clients_rolling_back_each_goes_one_promotion_further(client):
    for key in ("extra_trees", "decision_tree", "random_forest", "extra_trees"):
        assert client.move(key, "production").status_code == 201

    responses = all_at_once([client.roll_back] * 3)

    assert [response.status_code for response in responses] == [201] * 3
    by_key = {number: key for key, number in client.ids.items()}
    in_order = sorted((response.json() for response in responses), key=lambda step: step["id"])
    given_back = [by_key[step["parent_mlalgorithm"]] for step in in_order]
    assert given_back == ["random_forest", "decision_tree", "extra_trees"]
    assert client.statuses() == {"random_forest": "testing", "extra_trees": "production", "decision_tree": "testing"}


def test_a_rollback_and_a_promotion_at_once_happen_one_after_the_other(client):
    for _ in range(5):
        for key in ("random_forest", "extra_trees"):
            assert client.move(key, "production").status_code == 201

        back, promoted = all_at_once([client.roll_back, lambda: client.move("decision_tree", "production")])

        assert (back.status_code, promoted.status_code) == (201, 201)
        # Either the promotion of the extra trees was undone before the tree came, or the tree's own was.
        undone_first = back.json()["id"] < promoted.json()["id"]
        holder, former = ("decision_tree", "random_forest") if undone_first else ("extra_trees", "extra_trees")
        assert back.json()["parent_mlalgorithm"] == client.ids[former]
        assert [key for key, status in client.statuses().items() if status == "production"] == [holder]
        answers = {client.predict().json()["algorithm"] for _ in range(6)}
        assert answers == {holder.replace("_", " ")}


def test_a_rollback_and_the_start_of_a_test_at_once_leave_one_to_answer(client):
    for _ in range(5):
        assert client.move("extra_trees", "production").status_code == 201

        back, started = all_at_once([client.roll_back, lambda: client.begin("extra_trees", "decision_tree")])

        assert (back.status_code, started.status_code) in {(201, 201), (409, 201)}
        assert client.stop(started.json()["id"]).status_code == 200
        holder = "random_forest" if back.status_code == 201 else "extra_trees"
        assert [key for key, status in client.statuses().items() if status == "production"] == [holder]
        assert client.move("random_forest", "production").status_code == 201


def test_production_callers_never_break_while_tests_start_and_stop(client):
    done = threading.Event()

    def keep_asking() -> Counter:
        codes: Counter = Counter()
        while not done.is_set():
            codes[client.predict().status_code] += 1
        return codes

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking) for _ in range(4)]
        try:
            for _ in range(15):
                test = client.begin("random_forest", "decision_tree").json()["id"]
                client.stop(test)
        finally:
            done.set()
        codes = sum((future.result() for future in asking), Counter())

    assert set(codes) == {200}
    assert codes[200] > 20
