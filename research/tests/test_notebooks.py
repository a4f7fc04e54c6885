"""Both notebooks, run from top to bottom as Jupyter would, and what they leave behind."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import train
from apps.ml import artifacts
from tests import processes

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("notebooks")]

TRAINING = train.RESEARCH / "Train_Retension_Model.ipynb"
LIVE_TEST = train.RESEARCH / "ab_test.ipynb"
FIGURES = ["curves", "calibration", "gains", "importance", "confusion"]
AB_FIGURES = ["quality", "peeking", "course", "designs", "result"]
HOW_TO_REFRESH = (
    "The committed report is out of date. Run it again with an artifacts folder of its own: "
    "ML_ARTIFACTS_DIR=$(mktemp -d) .venv/bin/jupyter execute --inplace research/Train_Retension_Model.ipynb"
)


def execute(path: Path, parameters: str = "", **env: str) -> nbformat.NotebookNode:
    """Run a copy of a notebook in its own folder, by this interpreter. parameters: code to add to that cell."""
    notebook = nbformat.read(path, as_version=4)
    cell(notebook, "parameters").source += f"\n{parameters}"
    # Without kernel folders, python3 is the interpreter that runs the tests, whatever a user has installed.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    # cleanup_kc: else a kernel that the client did not make itself would run on.
    client.execute(env={**os.environ, **env}, cleanup_kc=True)
    return notebook


def cell(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    (found,) = [one for one in notebook.cells if one.id == name]
    return found


def shown(notebook: nbformat.NotebookNode, name: str, kind: str) -> list[str]:
    return [output.data[kind] for output in cell(notebook, name).outputs if kind in output.get("data", {})]


def texts(notebook: nbformat.NotebookNode) -> dict[str, list[str]]:
    """What each cell says, but for the one whose words differ from run to run."""
    return {
        one.id: shown(notebook, one.id, "text/markdown") + shown(notebook, one.id, "text/html")
        for one in notebook.cells
        if one.cell_type == "code" and one.id != "artifacts"
    }


def streams(notebook: nbformat.NotebookNode) -> list[str]:
    """What was written to stdout and stderr: warnings, say."""
    outputs = [output for one in notebook.cells for output in one.get("outputs", [])]
    return [output.text for output in outputs if output.output_type == "stream"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("notebook") / "artifacts"


@pytest.fixture(scope="module")
def executed(folder) -> nbformat.NotebookNode:
    """The training notebook as it is committed, run on the data that is committed."""
    return execute(TRAINING, ML_ARTIFACTS_DIR=str(folder))


def test_the_notebook_writes_what_the_command_writes(executed, folder, tmp_path):
    assert train.main(["--artifacts-dir", str(tmp_path)]) == 0
    by_command, by_notebook = artifacts.newest_run(tmp_path), artifacts.newest_run(folder)
    assert (by_notebook.version, by_command.version) == ("1.0.0", "1.0.0")
    differs = {"trained_at", "seconds", "models"}
    assert {key: value for key, value in by_notebook.manifest.items() if key not in differs} == {
        key: value for key, value in by_command.manifest.items() if key not in differs
    }
    assert by_notebook.training_customers == by_command.training_customers
    assert by_notebook.manifest["models"].keys() == by_command.manifest["models"].keys() == train.MODELS.keys()


def test_the_notebook_draws_every_figure_and_complains_of_nothing(executed):
    assert all(len(shown(executed, name, "image/png")) == 1 for name in FIGURES)
    assert streams(executed) == []


def test_the_committed_report_says_what_the_code_says(executed):
    committed = nbformat.read(TRAINING, as_version=4)
    assert texts(committed) == texts(executed), HOW_TO_REFRESH
    assert all(len(shown(committed, name, "image/png")) == 1 for name in FIGURES), HOW_TO_REFRESH


def test_another_team_changes_the_parameters_and_nothing_else(tmp_path):
    random = np.random.default_rng(5)
    visits = random.poisson(4, 500)
    members = pd.DataFrame(
        {
            "Member": [f"M{number}" for number in range(500)],
            "Tariff": random.choice(["flat", "per use", "none $"], 500),
            "Visits": visits,
            "Autopay": random.random(500) < 0.5,
            "Age": np.where(random.random(500) < 0.2, np.nan, random.integers(18, 90, 500)),
            "ExitInterview": random.integers(0, 2, 500),
            "Quit": np.where(random.random(500) < 1 / (1 + np.exp(visits - 4)), "yes", "no"),
        }
    )
    members.to_csv(tmp_path / "members.csv", index=False)
    notebook = execute(
        TRAINING,
        f"""
from pathlib import Path
DATA = Path({str(tmp_path / "members.csv")!r})
TARGET, POSITIVE, IDENTIFIER, DROP = "Quit", "no", "Member", ["ExitInterview"]
VERSION, ARTIFACTS = "7.0.0", Path({str(tmp_path / "artifacts")!r})
""",
    )
    run = artifacts.open_run(tmp_path / "artifacts", "7.0.0")
    assert run.schema.names == ("Tariff", "Visits", "Autopay", "Age")
    assert (run.schema.target.positive, run.schema.identifier) == ("no", "Member")
    assert run.manifest["metrics"]["random_forest"]["roc_auc"]["value"] > 0.7
    assert all(len(shown(notebook, name, "image/png")) == 1 for name in FIGURES)
    assert streams(notebook) == []
    stayed = int((members["Quit"] == "no").sum())
    assert f"{stayed} rows ({stayed / 500:.1%}) have `Quit` = no" in texts(notebook)["data"][0]
    told = json.dumps([texts(notebook), [one.source for one in notebook.cells]])
    assert not [word for word in ["CDNOW", "music", *pd.read_csv(train.DATA, nrows=0).columns] if word in told]


def test_a_live_test_ends_recorded_and_labelled_with_every_status_as_before(executed, folder, tmp_path):
    env = processes.environment(f"sqlite:///{tmp_path / 'server.sqlite3'}", folder, DEBUG="1")
    processes.manage("migrate", env=env)
    with processes.running(env, tmp_path / "server.log", wait_for="/readyz") as server:
        settings = {"ML_ARTIFACTS_DIR": str(folder), "RETENTION_URL": server.url}
        before = statuses(server)
        notebooks = [execute(LIVE_TEST, f"TESTS, CUSTOMERS = 100, {count}", **settings) for count in (300, 60)]
        assert statuses(server) == before
        kept = execute(LIVE_TEST, "TESTS, CUSTOMERS, RESTORE = 100, 40, False", **settings)
        tests = server.get("/api/v1/abtests").json()
        logged = server.get("/api/v1/mlrequests?page_size=1000").json()["results"]
        after = statuses(server)

    runs = [*notebooks, kept]
    for test, one in zip(tests, runs, strict=True):
        assert test["policy"] == "evidence"
        assert test["decision"]["sentence"] in shown(one, "outcomes", "text/markdown")[0]
        assert test["summary"] in shown(one, "stop", "text/markdown")[0]
        assert all(len(shown(one, name, "image/png")) == 1 for name in AB_FIGURES)
        assert "times fewer" in shown(one, "designs", "text/markdown")[0]
        assert "a shadow" in shown(one, "designs", "text/markdown")[1].lower()
        assert "its interval is" in shown(one, "replay", "text/markdown")[0]
        assert not [text for text in streams(one) if "Warning" in text]
    assert all(test["ended_at"] for test in tests)
    for test, count in zip(tests, (300, 60, 40), strict=True):
        assert sum(one["abtest"] == test["id"] for one in logged) == count

    outcomes = pd.read_csv(train.DATA, dtype=str).set_index("CustomerId")["IsRetained"]
    assert all(one["feedback"] == outcomes[one["customer_key"]] for one in logged)
    training_customers = artifacts.newest_run(folder).training_customers
    assert training_customers.isdisjoint(one["customer_key"] for one in logged)

    # Each request was answered by an arm of its test, and both had their turn.
    assert {one["parent_mlalgorithm"] for one in logged if one["abtest"] == tests[0]["id"]} == {
        tests[0]["parent_mlalgorithm_1"],
        tests[0]["parent_mlalgorithm_2"],
    }
    # The third run left both where the server put them.
    assert sorted(after.values()) == ["production", "testing", "testing"]


def statuses(server: processes.Server) -> dict[str, str]:
    return {one["key"]: one["current_status"] for one in server.get("/api/v1/mlalgorithms").json()}


@pytest.mark.parametrize("path", [TRAINING, LIVE_TEST], ids=lambda path: path.name)
def test_what_is_committed_is_small_and_tells_nothing_of_the_machine(path):
    content = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(content, as_version=4)
    nbformat.validate(notebook)
    assert len(content) < 500_000
    assert notebook.metadata.kernelspec.name == "python3"
    outputs = [json.dumps(output) for one in notebook.cells for output in one.get("outputs", [])]
    assert not [text for text in outputs if str(Path.home()) in text or str(train.RESEARCH.parent) in text]
    assert (path == LIVE_TEST) == (not outputs)


@pytest.mark.parametrize("path", [TRAINING, LIVE_TEST], ids=lambda path: path.name)
def test_a_notebook_calls_functions_and_defines_none(path):
    source = "\n".join(
        line
        for one in nbformat.read(path, as_version=4).cells
        for line in one.source.splitlines()
        if one.cell_type == "code" and not line.startswith("%")
    )
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
