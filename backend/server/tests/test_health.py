"""/livez and /readyz, as a load balancer asks them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.test import Client
from rest_framework.test import APIClient

from apps.endpoints.models import MLAlgorithm
from apps.ml.registry import registry
from conftest import require
from tests import postgresql, processes


@pytest.fixture
def probe() -> Client:
    """A load balancer in front of a production server: it comes by address and over plain HTTP."""
    return Client(headers={"Host": "10.0.3.7:8000"}, REMOTE_ADDR="10.0.0.2")


@pytest.fixture(autouse=True)
def _production(settings) -> None:
    settings.DEBUG = False
    settings.ALLOWED_HOSTS = ["retention.example.com"]
    settings.SECURE_SSL_REDIRECT = True


@pytest.fixture
def damaged(artifacts_dir: Path, settings, db) -> Path:
    """Registered algorithms, whose artifacts a test may damage; nothing is loaded yet."""
    settings.ML_ARTIFACTS_DIR = artifacts_dir
    registry.register_run()
    registry.clear()
    return artifacts_dir / "1.0.0"


def post(path: str, body: dict[str, object]) -> None:
    administrator = APIClient(headers={"Host": "retention.example.com"})
    administrator.force_authenticate(User(username="root", is_superuser=True))
    assert administrator.post(path, body, secure=True).status_code == 201


def set_status(algorithm: MLAlgorithm, status: str) -> None:
    post("/api/v1/mlalgorithmstatuses", {"status": status, "parent_mlalgorithm": algorithm.pk})


def start_test(first: str, second: str) -> None:
    arms = [MLAlgorithm.objects.get(key=key).pk for key in (first, second)]
    post("/api/v1/abtests", {"title": "autumn", "parent_mlalgorithm_1": arms[0], "parent_mlalgorithm_2": arms[1]})


def assert_not_ready(response, *words: str) -> None:
    assert response.status_code == 503
    assert response["Content-Type"] == "application/json"
    body = response.json()
    assert body["status"] == "Error"
    assert all(word in body["message"] for word in words), body


# --- Both probes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_need_no_token_no_name_and_no_tls(probe, algorithms, path):
    assert probe.get(path).status_code == 200
    assert probe.get("/api/v1/endpoints").status_code in {301, 400}


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_may_ask_for_the_head_only(probe, algorithms, path):
    response = probe.head(path)

    assert response.status_code == 200 and response.content == b""


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
@pytest.mark.parametrize("method", ["post", "put", "delete", "options"])
def test_probes_are_read_only(probe, path, method):
    response = getattr(probe, method)(path)

    assert response.status_code == 405
    assert response["Allow"] == "GET, HEAD"
    assert response.json()["message"].startswith(f"{method.upper()} is not possible here, but GET, HEAD is.")


def test_being_alive_asks_the_database_nothing(probe):
    # Without the `db` fixture any query would fail.
    assert probe.get("/livez").json() == {"status": "alive"}


# --- Ready, degraded, not ready ---------------------------------------------------------------------------------------
def test_a_server_whose_algorithms_all_answer_is_ready(probe, algorithms):
    assert probe.get("/readyz").json() == {"status": "ready"}


@pytest.mark.django_db(transaction=True)
def test_a_database_without_tables_is_not_ready_and_says_how_to_migrate(probe):
    call_command("migrate", "endpoints", "zero", verbosity=0)
    try:
        assert_not_ready(probe.get("/readyz"), "migrations are pending", "python manage.py migrate")
    finally:
        call_command("migrate", verbosity=0)


def test_before_the_first_training_the_command_is_named(probe, db, settings, tmp_path):
    settings.ML_ARTIFACTS_DIR = tmp_path

    assert_not_ready(probe.get("/readyz"), "No model has been trained yet", "python research/train.py")


def test_when_the_artifacts_are_gone_each_algorithm_is_named(probe, damaged):
    shutil.rmtree(damaged)

    assert_not_ready(probe.get("/readyz"), "random forest 1.0.0 is not available", "There is no training run in")


def test_a_broken_production_algorithm_is_not_ready_and_says_why(probe, damaged):
    (damaged / "random_forest.joblib").write_bytes(b"damaged")

    response = probe.get("/readyz")

    assert_not_ready(response, "classifier: random forest 1.0.0 is not available", "is not the file its manifest names")
    assert "no production algorithm can answer" in response.json()["message"]


def test_another_broken_algorithm_degrades_only(probe, damaged):
    (damaged / "extra_trees.joblib").write_bytes(b"damaged")

    response = probe.get("/readyz")

    assert response.status_code == 200
    body = response.json()
    assert body["status"] == "degraded"
    (reason,) = body["degraded"]
    assert reason.startswith("classifier: extra trees 1.0.0 is not available")


def test_a_repaired_artifact_is_ready_without_a_restart(probe, damaged):
    whole = (damaged / "random_forest.joblib").read_bytes()
    (damaged / "random_forest.joblib").write_bytes(b"damaged")
    assert probe.get("/readyz").status_code == 503

    (damaged / "random_forest.joblib").write_bytes(whole)

    assert probe.get("/readyz").json() == {"status": "ready"}


def test_without_a_production_algorithm_the_server_is_not_ready(probe, algorithms):
    set_status(algorithms["random_forest"], "retired")

    assert_not_ready(probe.get("/readyz"), "classifier: no production algorithm can answer")


def test_when_all_are_retired_the_remedy_is_to_promote(probe, algorithms):
    for algorithm in algorithms.values():
        set_status(algorithm, "retired")

    assert_not_ready(probe.get("/readyz"), "Every algorithm is retired; promote one.")


def test_a_second_endpoint_without_production_degrades_only(probe, algorithms):
    registry.register_run("shop")
    shop = MLAlgorithm.objects.get(key="random_forest", parent_endpoint__name="shop")
    set_status(shop, "testing")

    response = probe.get("/readyz")

    assert response.status_code == 200
    assert response.json()["degraded"] == ["shop: no production algorithm can answer."]


def test_the_champion_of_a_running_test_counts_as_production(probe, damaged):
    start_test("random_forest", "extra_trees")
    assert probe.get("/readyz").json() == {"status": "ready"}

    registry.clear()
    (damaged / "extra_trees.joblib").write_bytes(b"damaged")
    assert probe.get("/readyz").json()["status"] == "degraded"

    registry.clear()
    (damaged / "random_forest.joblib").write_bytes(b"damaged")
    assert_not_ready(probe.get("/readyz"), "random forest 1.0.0 is not available")


def test_an_algorithm_outside_a_test_stays_production_while_it_runs(probe, algorithms):
    start_test("extra_trees", "decision_tree")

    assert probe.get("/readyz").json() == {"status": "ready"}


# --- A real server ----------------------------------------------------------------------------------------------------
@pytest.mark.whole
@pytest.mark.service
def test_a_server_lives_through_all_that_can_be_missing_and_says_what_is(tmp_path, trained, customer):
    require(postgresql.binaries(), postgresql.HOW_TO_GET)
    predict = "/api/v1/classifier/predict?status=production"
    artifacts = tmp_path / "artifacts"
    with postgresql.running() as url:
        env = processes.environment(f"{url}/not_there_yet", artifacts, DEBUG="1")
        server = processes.start(env, tmp_path / "log")
        try:
            assert server.get("/readyz").json()["message"] == "The database does not answer; the log says why."

            create = "from django.db import connection; connection.cursor().execute('CREATE DATABASE not_there_yet')"
            processes.manage("shell", "--no-imports", "-c", create, env={**env, "DATABASE_URL": f"{url}/postgres"})
            assert "python manage.py migrate" in server.get("/readyz").json()["message"]

            processes.manage("migrate", env=env)
            assert "python research/train.py" in server.get("/readyz").json()["message"]
            assert "python research/train.py" in server.post(predict, json=customer).json()["message"]

            shutil.copytree(trained, artifacts)
            processes.manage("register_algorithms", env=env)
            assert server.get("/readyz").json() == {"status": "ready"}
            assert server.post(predict, json=customer).status_code == 200
        except BaseException:
            server.kill()
            raise
    try:
        assert server.get("/livez").status_code == 200
        refused = server.get("/readyz")
        assert refused.status_code == 503
        assert refused.json()["message"] == "The database does not answer; the log says why."
        assert server.post(predict, json=customer).status_code == 503
        assert "Connection refused" in (tmp_path / "log").read_text()
    finally:
        server.stop()
