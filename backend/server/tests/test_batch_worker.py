"""Batch jobs under real processes: whatever is killed in the middle, nobody is lost or scored twice."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from conftest import make_customers
from tests import postgresql, processes
from tests.processes import Server, worker

pytestmark = pytest.mark.whole

ROWS = 21_000
CUSTOMERS = make_customers(ROWS, seed=5).to_csv(index=False).encode()
JOBS = "/api/v1/batch-jobs"


@pytest.fixture
def env(database_url: str, trained: Path, tmp_path: Path) -> dict[str, str]:
    return prepared(database_url, trained, tmp_path)


def prepared(database_url: str, trained: Path, folder: Path) -> dict[str, str]:
    env = processes.environment(
        database_url,
        trained,
        DEBUG="1",
        LOG_LEVEL="WARNING",
        WEB_CONCURRENCY="1",
        BATCH_DIR=str(folder / "batches"),
        BATCH_LEASE_SECONDS="2",
    )
    processes.manage("migrate", env=env)
    processes.manage("register_algorithms", env=env)
    return env


def submit(server: Server, **fields: str) -> str:
    response = server.post("/api/v1/batch-predict", files={"file": ("c.csv", CUSTOMERS)}, data=fields)
    assert response.status_code == 202, response.text
    return response.headers["Location"]


def wait_until(server: Server, job: str, condition: Callable[[dict], bool], seconds: float = 90) -> dict:
    deadline = time.monotonic() + seconds
    while True:
        told = {}
        with suppress(requests.RequestException):
            told = server.get(job).json()
        if "state" in told and condition(told):
            return told
        assert told.get("state") != "failed", told
        assert time.monotonic() < deadline, told
        time.sleep(0.02)


def is_done(told: dict) -> bool:
    return told["state"] == "succeeded"


def result(server: Server, job: str) -> list[dict[str, str]]:
    response = server.get(f"{job}/result")
    assert response.status_code == 200, response.text
    assert len(response.content) == int(response.headers["Content-Length"])
    return list(csv.DictReader(io.StringIO(response.content.decode())))


def without_ids(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**row, "request_id": ""} for row in rows]


def logged_ids(env: dict[str, str]) -> list[int]:
    command = (
        "from apps.endpoints.models import *; print(*MLRequest.objects.order_by('pk').values_list('pk', flat=True))"
    )
    return [int(pk) for pk in processes.manage("shell", "--no-imports", "-c", command, env=env).stdout.split()]


def check(server: Server, env: dict[str, str], disturbed: str, undisturbed: str) -> None:
    """Both jobs gave the same, and each row of either is one logged request."""
    first, second = result(server, disturbed), result(server, undisturbed)
    assert without_ids(first) == without_ids(second)
    assert [row["CustomerId"] for row in first] == [f"C{n:05d}" for n in range(1, ROWS + 1)]
    assert sorted(int(row["request_id"]) for row in first + second) == logged_ids(env)


def test_a_worker_that_is_killed_again_and_again_costs_nobody_an_answer_or_a_second_one(env, tmp_path):
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        job = submit(server)
        for share in (0.0, 0.3, 0.6):
            with worker(env, tmp_path / "worker.log") as killed:
                wait_until(server, job, lambda told, share=share: told["rows_read"] > share * ROWS)
                os.kill(killed.pid, signal.SIGKILL)
        with worker(env, tmp_path / "worker.log"):
            wait_until(server, job, is_done)
            undisturbed = submit(server)
            wait_until(server, undisturbed, is_done)

        check(server, env, job, undisturbed)


def test_a_worker_that_is_told_to_stop_finishes_its_part_and_the_next_one_goes_on_at_once(env, tmp_path):
    env = {**env, "BATCH_LEASE_SECONDS": "600"}
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        job = submit(server)
        with worker(env, tmp_path / "worker.log") as told:
            wait_until(server, job, lambda told: told["rows_read"] > 0)
            told.send_signal(signal.SIGTERM)
            assert told.wait(10) == 0
        with worker(env, tmp_path / "worker.log"):
            assert wait_until(server, job, is_done)["rows_scored"] == ROWS


def test_several_workers_share_the_jobs_and_each_is_done_once(env, tmp_path):
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        jobs = [submit(server) for _ in range(4)]
        with worker(env, tmp_path / "first.log"), worker(env, tmp_path / "second.log"):
            for job in jobs:
                wait_until(server, job, is_done)

        assert len(logged_ids(env)) == len(jobs) * ROWS
        for job in jobs[1:]:
            assert without_ids(result(server, job)) == without_ids(result(server, jobs[0]))


def test_the_server_runs_a_worker_and_after_kill_9_of_all_a_restart_goes_on(env, tmp_path):
    env = {**env, "BATCH_WORKERS": "1"}
    server = processes.start(env, tmp_path / "server.log", wait_for="/readyz")
    try:
        job = submit(server)
        wait_until(server, job, lambda told: told["rows_read"] > 0)
        server.kill()
    finally:
        server.kill()

    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        wait_until(server, job, is_done)
        undisturbed = submit(server)
        wait_until(server, undisturbed, is_done)

        check(server, env, job, undisturbed)


def test_after_kill_9_of_postgresql_the_worker_goes_on_by_itself(trained, tmp_path):
    with postgresql.cluster(durable=True) as cluster:
        env = prepared(postgresql.new_database(cluster.url), trained, tmp_path)
        with processes.running({**env, "BATCH_WORKERS": "1"}, tmp_path / "server.log", wait_for="/readyz") as server:
            job = submit(server)
            wait_until(server, job, lambda told: told["rows_read"] > 0)
            cluster.kill()
            time.sleep(1)
            restart(cluster)
            wait_until(server, job, is_done)
            undisturbed = submit(server)
            wait_until(server, undisturbed, is_done)

            check(server, env, job, undisturbed)


def restart(cluster: postgresql.Cluster) -> None:
    for _ in range(20):  # until the kernel has let go of the dead one's memory
        with suppress(subprocess.CalledProcessError):
            return cluster.start()
        time.sleep(0.5)
    raise AssertionError("PostgreSQL does not start again")


def test_the_worker_of_a_server_ends_with_it(env, tmp_path):
    server = processes.start({**env, "BATCH_WORKERS": "1"}, tmp_path / "server.log", wait_for="/readyz")
    try:
        (pid,) = [child for child in server.workers() if is_batch_worker(child)]
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        deadline = time.monotonic() + 10
        while is_batch_worker(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        server.kill()


def test_a_worker_of_a_server_that_dies_is_replaced(env, tmp_path):
    with processes.running({**env, "BATCH_WORKERS": "1"}, tmp_path / "server.log", wait_for="/readyz") as server:
        (first,) = [child for child in server.workers() if is_batch_worker(child)]
        os.kill(first, signal.SIGKILL)

        deadline = time.monotonic() + 20
        while not [child for child in server.workers() if child != first and is_batch_worker(child)]:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_batch_worker(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return b"batch_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
