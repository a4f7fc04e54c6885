"""Light paths stay light: what loads no model imports nothing that only models need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

pytestmark = pytest.mark.whole  # processes with a database of their own

HEAVY = {
    "sklearn",
    "scipy",
    "pandas",
    "joblib",
    "numba",
    "llvmlite",
    "pyarrow",
    "statsmodels",
    "matplotlib",
    "dask",
    "distributed",
}


@pytest.fixture
def env(tmp_path: Path, artifacts_dir: Path) -> dict[str, str]:
    return processes.environment(
        f"sqlite:///{tmp_path / 'db.sqlite3'}", artifacts_dir, DJANGO_SETTINGS_MODULE="server.settings"
    )


def modules_after(code: str, env: dict[str, str]) -> set[str]:
    """The packages that a fresh Python has imported when it has run some code."""
    show = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    finished = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"],
        cwd=processes.BACKEND,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return set(json.loads(finished.stdout.splitlines()[-1]))


@pytest.mark.parametrize("run", ["sound", "damaged"])
def test_check_migrate_and_test_load_no_model(env, artifacts_dir, tmp_path, run):
    if run == "damaged":
        (artifacts_dir / "1.0.0/manifest.json").write_text("{")
    code = """
from django.core.management import execute_from_command_line
for command in ("check", "migrate", "test"):
    try:
        execute_from_command_line(["manage.py", command])
    except SystemExit as stopped:
        assert command == "test", stopped  # it found no tests of Django's own kind
from apps.endpoints.models import MLAlgorithm
assert MLAlgorithm.objects.count() == 0
"""

    assert not modules_after(code, env) & HEAVY


def test_what_serves_is_imported_without_anything_heavy_and_registers_nothing(env):
    code = """
import django
django.setup()
import server.urls
from apps.endpoints import admin, batch, views
from apps.ml.registry import registry
assert registry.endpoints == {}
"""

    assert not modules_after(code, env) & HEAVY


def test_the_ml_package_imports_no_django_and_constructing_nothing_heavy(env):
    code = """
from apps.ml import artifacts, forest, schema
from apps.ml.classifier import base, decision_tree, extra_trees, random_forest
classifier = random_forest.RandomForestClassifier()
classifier.preprocessing([{"Orders": 3, "Plan": "basic"}]).warnings
classifier.metrics, classifier.artifact_sha256, classifier.schema.sha256
"""

    modules = modules_after(code, env)

    assert not modules & HEAVY
    assert not modules & {"django", "rest_framework", "server"}


def test_a_worker_of_a_cluster_imports_no_django(env):
    assert not modules_after("import apps.endpoints.cluster", env) & {*HEAVY, "django", "server"}


def test_scoring_does_import_what_models_need(env):
    """So the tests above look for the right names."""
    code = """
from apps.ml.classifier.random_forest import RandomForestClassifier
RandomForestClassifier().compute_prediction({"Orders": 3})
"""

    assert modules_after(code, env) >= {"sklearn", "joblib", "scipy", "numba", "llvmlite"}
