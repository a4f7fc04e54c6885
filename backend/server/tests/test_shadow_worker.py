"""Shadow tests under real processes: a worker scores what a server has answered, whatever is killed in between."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from conftest import make_customers
from tests import processes
from tests.processes import Server, worker

pytestmark = pytest.mark.whole

PREDICT = "/api/v1/classifier/predict?status=production"
CUSTOMERS = json.loads(make_customers(400, seed=3).drop(columns="IsRetained").to_json(orient="records"))
# A model that takes part in training's manifest like any other, and cannot answer some customers.
MOODY = """
from apps.ml.classifier.base import RetentionClassifier
compute = RetentionClassifier.compute_prediction
def moody(self, rows):
    if self.algorithm == "decision_tree" and isinstance(rows, dict) and rows.get("Orders") == 77:
        raise RuntimeError("no such leaf")
    return compute(self, rows)
RetentionClassifier.compute_prediction = moody
from django.core.management import call_command
call_command("batch_worker")
"""


@pytest.fixture
def env(database_url: str, trained: Path, tmp_path: Path) -> dict[str, str]:
    folder = str(tmp_path / "batches")
    env = processes.environment(database_url, trained, DEBUG="1", LOG_LEVEL="WARNING", BATCH_DIR=folder)
    processes.manage("migrate", env=env)
    processes.manage("register_algorithms", env=env)
    return env


def begin(server: Server) -> int:
    ids = {each["name"]: each["id"] for each in server.get("/api/v1/mlalgorithms").json()}
    arms = {"parent_mlalgorithm_1": ids["random forest"], "parent_mlalgorithm_2": ids["decision tree"]}
    body = {"title": "Shadow", "created_by": "Ada", "design": "shadow", **arms}
    response = server.post("/api/v1/abtests", json=body)
    assert response.status_code == 201, response.text
    return response.json()["id"]


def ask(server: Server, customers: dict | list[dict]) -> list[int]:
    response = server.post(PREDICT, json=customers)
    assert response.status_code == 200, response.text
    answers = response.json() if isinstance(customers, list) else [response.json()]
    assert {answer["algorithm"] for answer in answers} == {"random forest"}
    return [answer["request_id"] for answer in answers]


def shadows(env: dict[str, str]) -> dict[int, str]:
    """The failure, or nothing, by the request."""
    command = (
        "import json; from apps.endpoints.models import *; "
        "print(json.dumps(list(ShadowAnswer.objects.values_list('request', 'failure'))))"
    )
    return dict(json.loads(processes.manage("shell", "--no-imports", "-c", command, env=env).stdout))


def shadows_when(env: dict[str, str], least: int, seconds: float = 60) -> dict[int, str]:
    deadline = time.monotonic() + seconds
    while len(found := shadows(env)) < least:
        assert time.monotonic() < deadline, len(found)
    return found


def test_soon_each_request_of_the_test_has_the_challengers_answer_too(env, tmp_path):
    env = {**env, "BATCH_WORKERS": "1"}
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        outside = ask(server, CUSTOMERS[:5])
        begin(server)
        ids = [ask(server, customer)[0] for customer in CUSTOMERS[:20]] + ask(server, CUSTOMERS)

        assert shadows_when(env, len(ids)) == dict.fromkeys(ids, "")
        assert not set(outside) & set(ids)


def test_a_worker_that_is_killed_again_and_again_loses_and_doubles_none(env, tmp_path):
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        begin(server)
        ids = []
        for _ in range(3):
            with worker(env, tmp_path / "worker.log") as killed:
                for _ in range(4):
                    ids += ask(server, CUSTOMERS)
                shadows_when(env, len(ids) // 3)
                os.kill(killed.pid, signal.SIGKILL)
        with worker(env, tmp_path / "first.log"), worker(env, tmp_path / "second.log"):
            ids += ask(server, CUSTOMERS)

            assert shadows_when(env, len(ids)) == dict.fromkeys(ids, "")


def test_a_challenger_that_raises_changes_no_answer_and_its_failures_are_counted(env, tmp_path):
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        begin(server)
        with worker(env, tmp_path / "worker.log", "shell", "--no-imports", "-c", MOODY):
            good, bad = ask(server, CUSTOMERS[0] | {"Orders": 3}), ask(server, CUSTOMERS[1] | {"Orders": 77})

            assert shadows_when(env, 2) == {good[0]: "", bad[0]: "no such leaf"}


def test_a_worker_that_follows_a_test_ends_when_it_is_told_to(env, tmp_path):
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        begin(server)
        with worker(env, tmp_path / "worker.log") as told:
            shadows_when(env, len(ask(server, CUSTOMERS)))
            told.send_signal(signal.SIGTERM)

            assert told.wait(10) == 0


def test_after_a_stop_what_was_not_scored_stays_so(env, tmp_path):
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        test_id = begin(server)
        ask(server, CUSTOMERS)
        assert server.post(f"/api/v1/stop_ab_test/{test_id}").status_code == 200
        with worker(env, tmp_path / "worker.log"):
            time.sleep(3)

            assert shadows(env) == {}
