"""What a server does when it starts: fills an empty registry once, and lets no bad model stop it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import train
from tests import processes
from tests.processes import Server

pytestmark = pytest.mark.whole

KEYS = ["random_forest", "extra_trees", "decision_tree"]


@contextmanager
def started(database_url: str, artifacts_dir: Path, log: Path) -> Iterator[Server]:
    """A server that need not be ready. One process, since one more would only do the same."""
    log.unlink(missing_ok=True)
    env = processes.environment(database_url, artifacts_dir, DEBUG="1", WEB_CONCURRENCY="1")
    with processes.running(env, log) as server:
        yield server


def migrate(database_url: str, artifacts_dir: Path) -> None:
    processes.manage("migrate", env=processes.environment(database_url, artifacts_dir))


@pytest.fixture(scope="module")
def migrated_file(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    file = tmp_path_factory.mktemp("migrated") / "server.sqlite3"
    migrate(f"sqlite:///{file}", trained)
    return file


@pytest.fixture
def migrated_url(migrated_file: Path, tmp_path: Path) -> str:
    """An empty SQLite database with its tables."""
    return f"sqlite:///{shutil.copy(migrated_file, tmp_path)}"


def statuses(server: Server) -> dict[str, str]:
    """Each algorithm's status, as in {"random forest 1.0.0": "production"}."""
    return {f"{a['name']} {a['version']}": a["current_status"] for a in server.get("/api/v1/mlalgorithms").json()}


def answers(server: Server, customer: dict, version: str = "1.0.0") -> dict[str, int]:
    """The HTTP status with which each algorithm answers."""
    return {key: ask(server, customer, key, version).status_code for key in KEYS}


def ask(server: Server, customer: dict, key: str, version: str = "1.0.0"):
    return server.post(f"/api/v1/classifier/predict?algorithm={key}&version={version}", json=customer)


FIRST_STATUSES = {
    "random forest 1.0.0": "production",
    "extra trees 1.0.0": "staging",
    "decision tree 1.0.0": "testing",
}


# --- Many at once ---------------------------------------------------------------------------------------------------
def test_four_processes_that_start_at_once_fill_an_empty_database_once(database_url, trained, tmp_path, customer):
    migrate(database_url, trained)
    # All four import what is slow, say so, and go on at the same moment.
    start = (
        "import django.core.wsgi, sklearn.ensemble; print('set', flush=True); input();"
        "import server.wsgi; from apps.ml.registry import registry; print(len(registry.endpoints), 'loaded')"
    )
    together = [
        subprocess.Popen(
            [sys.executable, "-c", start],
            cwd=processes.BACKEND,
            env=processes.environment(database_url, trained, DEBUG="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(4)
    ]
    assert [process.stdout.readline() for process in together] == ["set\n"] * 4
    for process in together:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in together]
    assert said == ["3 loaded\n"] * 4

    with started(database_url, trained, tmp_path / "log") as server:
        assert [endpoint["name"] for endpoint in server.get("/api/v1/endpoints").json()] == ["classifier"]
        assert statuses(server) == FIRST_STATUSES
        assert len(server.get("/api/v1/mlalgorithmstatuses").json()) == len(FIRST_STATUSES)
        assert answers(server, customer) == dict.fromkeys(KEYS, 200)


# --- Not ready yet --------------------------------------------------------------------------------------------------
def test_without_artifacts_the_server_names_the_training_command_and_after_it_is_ready(
    migrated_url, tmp_path, customers_csv, customer
):
    artifacts_dir, log = tmp_path / "artifacts", tmp_path / "log"
    with started(migrated_url, artifacts_dir, log) as server:
        ready = server.get("/readyz")
        prediction = server.post("/api/v1/classifier/predict?status=production", json=customer)

    assert ready.status_code == prediction.status_code == 503
    assert "python research/train.py" in ready.json()["message"]
    assert prediction.json()["message"] == ready.json()["message"]
    assert "python research/train.py" in log.read_text()
    assert "Traceback" not in log.read_text()

    assert train.main(["--data", str(customers_csv), "--artifacts-dir", str(artifacts_dir)]) == 0
    with started(migrated_url, artifacts_dir, log) as server:
        assert server.get("/readyz").json() == {"status": "ready"}
        assert answers(server, customer) == dict.fromkeys(KEYS, 200)


def test_before_the_migrations_the_server_starts_and_names_the_command(database_url, trained, tmp_path, customer):
    log = tmp_path / "log"
    with started(database_url, trained, log) as server:
        ready = server.get("/readyz")
        prediction = server.post("/api/v1/classifier/predict", json=customer)

    assert ready.status_code == 503
    assert "python manage.py migrate" in ready.json()["message"]
    assert "python manage.py migrate" in log.read_text()
    assert prediction.status_code >= 500
    assert prediction.json()["status"] == "Error"


# --- Bad models -----------------------------------------------------------------------------------------------------
def flip_a_byte(artifacts_dir: Path, key: str) -> None:
    file = artifacts_dir / "1.0.0" / f"{key}.joblib"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_in_half(artifacts_dir: Path, key: str) -> None:
    file = artifacts_dir / "1.0.0" / f"{key}.joblib"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove(artifacts_dir: Path, key: str) -> None:
    (artifacts_dir / "1.0.0" / f"{key}.joblib").unlink()


def replace_with_its_manifest(artifacts_dir: Path, key: str) -> None:
    """Put another valid model in its place, for which the manifest vouches."""
    run = artifacts_dir / "1.0.0"
    other = (run / f"{next(other for other in KEYS if other != key)}.joblib").read_bytes()
    (run / f"{key}.joblib").write_bytes(other)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"][f"{key}.joblib"] = {"sha256": hashlib.sha256(other).hexdigest(), "bytes": len(other)}
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damages",
    [
        {"random_forest": (flip_a_byte, "is not the file its manifest names")},
        {
            "extra_trees": (cut_in_half, "is not the file its manifest names"),
            "decision_tree": (remove, "cannot be read"),
        },
        {"extra_trees": (replace_with_its_manifest, "is not the one that was registered")},
    ],
    ids=["in production", "two others", "replaced together with its manifest"],
)
def test_a_bad_artifact_stops_nothing_but_its_own_algorithm(migrated_url, artifacts_dir, tmp_path, customer, damages):
    first_start = processes.environment(migrated_url, artifacts_dir)
    processes.manage("shell", "--no-imports", "-c", "import server.wsgi", env=first_start)
    for key, (damage, _) in damages.items():
        damage(artifacts_dir, key)

    log = tmp_path / "log"
    with started(migrated_url, artifacts_dir, log) as server:
        assert answers(server, customer) == {**dict.fromkeys(KEYS, 200), **dict.fromkeys(damages, 503)}
        refusals = {key: ask(server, customer, key).json() for key in damages}
        ready = server.get("/readyz")
        assert statuses(server) == FIRST_STATUSES

    # Only an algorithm in production is needed for being ready.
    assert ready.status_code == (503 if "random_forest" in damages else 200)
    for key, (_, reason) in damages.items():
        message = refusals[key]["message"]
        assert refusals[key]["status"] == "Error"
        assert reason in message
        assert key.replace("_", " ") in message
        assert message in json.dumps(ready.json())
        assert message in log.read_text()


def test_a_run_of_another_scikit_learn_is_not_loaded_and_says_so(migrated_url, artifacts_dir, tmp_path, customer):
    manifest_file = artifacts_dir / "1.0.0/manifest.json"
    manifest = json.loads(manifest_file.read_text())
    installed = manifest["libraries"]["scikit-learn"]
    manifest["libraries"] |= {"scikit-learn": "0.24.2", "numpy": "1.19.0"}
    manifest_file.write_text(json.dumps(manifest))

    with started(migrated_url, artifacts_dir, tmp_path / "log") as server:
        assert answers(server, customer) == dict.fromkeys(KEYS, 503)
        message = ask(server, customer, "extra_trees").json()["message"]
        ready = server.get("/readyz")

    assert "scikit-learn 0.24.2" in message
    assert installed in message
    assert ready.status_code == 503
    assert "scikit-learn 0.24.2" in ready.text


# --- A later run ----------------------------------------------------------------------------------------------------
def test_retraining_and_restarting_promotes_nothing(migrated_url, artifacts_dir, tmp_path, customers_csv, customer):
    with started(migrated_url, artifacts_dir, tmp_path / "log") as server:
        promoted = next(a for a in server.get("/api/v1/mlalgorithms").json() if a["name"] == "extra trees")
        body = {"status": "production", "created_by": "ana", "parent_mlalgorithm": promoted["id"]}
        assert server.post("/api/v1/mlalgorithmstatuses", json=body).status_code == 201
        before = server.post("/api/v1/classifier/predict?status=production", json=customer).json()
        as_left = statuses(server)

    retrained = ["--data", str(customers_csv), "--artifacts-dir", str(artifacts_dir), "--seed", "1"]
    assert train.main(retrained) == 0

    with started(migrated_url, artifacts_dir, tmp_path / "log") as server:
        after = server.post("/api/v1/classifier/predict?status=production", json=customer).json()
        assert {**after, "request_id": None} == {**before, "request_id": None}
        assert statuses(server) == as_left | {
            "random forest 1.1.0": "testing",
            "extra trees 1.1.0": "testing",
            "decision tree 1.1.0": "testing",
        }
        assert answers(server, customer, "1.1.0") == dict.fromkeys(KEYS, 200)
