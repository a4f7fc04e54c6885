"""An answer that a client received is in the database, however the server ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
import requests

from tests import postgresql, processes
from tests.processes import Server

pytestmark = pytest.mark.whole

CLIENTS = 12
KILLINGS = 3


@dataclass
class Load:
    """Clients that predict until the server is gone. `acknowledged`: each request's id, customer and probability."""

    server: Server
    acknowledged: dict[int, tuple[str, float]] = field(default_factory=dict)
    refused: list[int] = field(default_factory=list)
    broken: list[Exception] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self.pool = ThreadPoolExecutor(CLIENTS)
        self.running = [self.pool.submit(self.predict, number) for number in range(CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.pool.shutdown()
        for client in self.running:
            client.result()

    def predict(self, number: int) -> None:
        """Half of the clients keep their connection; each customer differs, and so do the probabilities."""
        session = requests.Session() if number % 2 else requests
        customer = {"Plan": "basic", "MeanGapDays": 31.5, "Newsletter": True}
        for count in range(100_000):
            if self.done.is_set():
                return
            key = f"{number}-{count}"
            asked = {
                **customer,
                "CustomerId": key,
                "Orders": count % 40 + 1,
                "RecencyDays": (count * 7 + number * 11) % 365,
            }
            try:
                response = session.post(
                    f"{self.server.url}/api/v1/classifier/predict?status=production",
                    json=asked,
                    headers=self.server.headers,
                    timeout=30,
                )
                answer = response.json()
            except requests.RequestException as error:
                self.broken.append(error)
                return
            if response.status_code == 200:
                self.acknowledged[answer["request_id"]] = key, answer["probability"]
            else:
                self.refused.append(response.status_code)

    def wait_for(self, answers: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.acknowledged) < answers and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.acknowledged) >= answers


def logged(env: dict[str, str], folder: Path) -> dict[int, tuple[str, float]]:
    """Every request in the database, its customer and its probability, as a new server lists them."""
    found, page = {}, {"next": "/api/v1/mlrequests?page_size=1000"}
    with processes.running({**env, "WEB_CONCURRENCY": "1"}, folder / "after.log", wait_for="/readyz") as server:
        while page["next"]:
            page = server.get(page["next"].removeprefix(server.url)).json()
            found |= {row["id"]: (row["customer_key"], row["probability"]) for row in page["results"]}
    return found


def test_after_kill_9_of_every_process_no_acknowledged_answer_is_missing_or_another_customers(
    database_url, trained, tmp_path
):
    env = processes.environment(database_url, trained, DEBUG="1", LOG_LEVEL="WARNING", WEB_CONCURRENCY="2")
    processes.manage("migrate", env=env)
    headers = processes.token_header(env)
    acknowledged: dict[int, tuple[str, float]] = {}
    for killing in range(KILLINGS):
        server = processes.start(env, tmp_path / f"server{killing}.log", wait_for="/readyz")
        server.headers = headers
        try:
            with Load(server) as load:
                load.wait_for(200)
                server.kill()
        finally:
            server.kill()
        assert load.refused == []
        assert acknowledged.keys().isdisjoint(load.acknowledged)
        acknowledged |= load.acknowledged

    found = logged(env, tmp_path)
    assert {pk: found.get(pk) for pk in acknowledged} == acknowledged
    # What was recorded and could not be answered any more: at most one request of each client and killing.
    assert len(found) - len(acknowledged) <= CLIENTS * KILLINGS


def test_a_server_that_is_told_to_stop_answers_every_request_that_it_records(trained, tmp_path):
    env = processes.environment(f"sqlite:///{tmp_path / 'server.sqlite3'}", trained, DEBUG="1", WEB_CONCURRENCY="2")
    processes.manage("migrate", env=env)
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        server.headers = processes.token_header(env)
        with Load(server) as load:
            load.wait_for(200)
            server.stop()

    assert load.refused == []
    assert logged(env, tmp_path) == load.acknowledged


@pytest.mark.parametrize("is_known", [False, True])
def test_a_database_that_dropped_its_connections_costs_no_client_an_error(postgresql_url, trained, tmp_path, is_known):
    url = postgresql.new_database(postgresql_url)
    env = processes.environment(url, trained, DEBUG="1", LOG_LEVEL="WARNING")
    processes.manage("migrate", env=env)
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        server.headers = processes.token_header(env) if is_known else {}

        def ask_often() -> set[int]:
            path = "/api/v1/classifier/predict?status=production"
            with ThreadPoolExecutor(8) as pool:
                answers = [pool.submit(server.post, path, json={"Orders": 3}) for _ in range(60)]
            return {answer.result().status_code for answer in answers}

        assert ask_often() == {200}
        with psycopg.connect(url, autocommit=True) as connection:
            dropped = connection.execute(
                "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
            assert dropped
            # Only then are they told to end. What is sent to one that still lives may be lost, and is a 503.
            alive = "SELECT 1 FROM pg_stat_activity WHERE pid = ANY(%s)"
            while connection.execute(alive, [[pid for pid, _ in dropped]]).fetchall():
                time.sleep(0.05)
            time.sleep(0.5)
        assert ask_often() == {200}


def test_a_connection_that_became_too_old_while_nobody_asked_is_not_used_again(postgresql_url, trained, tmp_path):
    url = postgresql.new_database(postgresql_url)
    env = processes.environment(url, trained, DEBUG="1", WEB_CONCURRENCY="1", WEB_THREADS="1", CONN_MAX_AGE="1")
    processes.manage("migrate", env=env)
    with (
        processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server,
        psycopg.connect(url, autocommit=True) as watching,
    ):
        server.headers = processes.token_header(env)

        def ask() -> int:
            """The database's process that recorded one more answer."""
            path = "/api/v1/classifier/predict?status=production"
            assert server.post(path, json={"Orders": 3}).status_code == 200
            ((pid,),) = watching.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " ORDER BY query_start DESC LIMIT 1"
            )
            return pid

        ask()
        first = ask()
        assert ask() == first
        time.sleep(1.5)
        second = ask()

    assert first != second


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE auth_user ALTER COLUMN username TYPE varchar(200)",
        "ALTER TABLE endpoints_mlrequest ALTER COLUMN id TYPE integer",
    ],
)
@pytest.mark.parametrize("customers", [{"Orders": 3}, [{"Orders": 3}, {"Orders": 4}]], ids=["one", "two"])
def test_a_table_that_changed_under_a_running_server_costs_no_client_an_error(
    postgresql_url, trained, tmp_path, change, customers
):
    url = postgresql.new_database(postgresql_url)
    env = processes.environment(url, trained, DEBUG="1", LOG_LEVEL="WARNING")
    processes.manage("migrate", env=env)
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server, requests.Session() as shop:
        shop.headers.update(processes.token_header(env))

        def ask() -> int:
            path = f"{server.url}/api/v1/classifier/predict?status=production"
            return shop.post(path, json=customers, timeout=30).status_code

        assert {ask() for _ in range(20)} == {200}
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(change)
        assert {ask() for _ in range(20)} == {200}


@pytest.mark.parametrize("customers", [{"Orders": 3}, [{"Orders": 3}, {"Orders": 4}]], ids=["one", "two"])
def test_a_database_that_takes_no_writes_is_told_and_left_for_one_that_does(
    postgresql_url, trained, tmp_path, customers
):
    url = postgresql.new_database(postgresql_url)
    # Connections that can only read would be kept as long as others.
    env = processes.environment(url, trained, DEBUG="1", LOG_LEVEL="ERROR", CONN_MAX_AGE="600")
    processes.manage("migrate", env=env)
    log = tmp_path / "server.log"
    with (
        processes.running(env, log, wait_for="/readyz") as server,
        psycopg.connect(url, autocommit=True) as database,
    ):
        server.headers = processes.token_header(env)
        name = database.info.dbname

        def ask() -> int:
            return server.post("/api/v1/classifier/predict?status=production", json=customers).status_code

        assert {ask() for _ in range(20)} == {200}
        database.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert {ask() for _ in range(20)} == {503}
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["message"]) == (
            503,
            "The database takes no writes, and so no answer can be recorded.",
        )

        database.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        [ask() for _ in range(40)]  # each process, and each of its threads, has yet to find out
        assert {ask() for _ in range(40)} == {200}
    assert "Traceback" not in log.read_text()
