"""A run is on disk whole or not at all, and nothing of it is used that is not what the manifest says."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.ml import artifacts
from apps.ml.artifacts import ArtifactError, NoTrainingRun, TrainingRun, newest_run, next_version, training_runs
from apps.ml.classifier.decision_tree import DecisionTreeClassifier
from tests.processes import BACKEND

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SCHEMA = {
    "columns": [{"name": "Orders", "kind": "numeric", "mode": 1, "categories": []}],
    "target": {"name": "IsRetained", "positive": "1", "negative": "0"},
    "identifier": None,
    "dropped": [],
}


def manifest(trained_at: datetime = NOON, **more):
    return {
        "trained_at": trained_at.isoformat(),
        "schema": SCHEMA,
        "libraries": artifacts.library_versions(),
        **more,
    }


def write(directory, version="1.0.0", files=None, **more):
    return artifacts.write_run(directory, version, files or {"notes.txt": "as trained\n"}, manifest(**more))


def change_manifest(run: TrainingRun, **changes):
    path = run.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- writing


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = write(tmp_path, "1.0.0", {"notes.txt": "é\n", "modes.joblib": {"Orders": 1}})

    (found,) = training_runs(tmp_path)
    assert found.version == "1.0.0"
    assert found.trained_at == NOON
    assert found.read("notes.txt") == "é\n".encode()
    assert found.load_model("modes.joblib") == {"Orders": 1}
    assert "modes.joblib" in found and "other.joblib" not in found
    assert sorted(path.name for path in run.folder.iterdir()) == ["manifest.json", "modes.joblib", "notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["1.0.0"]


class FailsWhenSaved:
    def __reduce__(self):
        raise KeyboardInterrupt


def test_a_run_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, files={"first.txt": "x", "second.joblib": FailsWhenSaved()})

    assert list(tmp_path.iterdir()) == []


def test_a_killed_training_leaves_nothing_that_is_taken_for_a_run(tmp_path):
    write(tmp_path, "1.0.0")
    killed = """
import os, signal, sys
from pathlib import Path
from apps.ml import artifacts

class Last:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)

artifacts.write_run(Path(sys.argv[1]), "1.1.0", {"first.txt": "x", "last.joblib": Last()}, {})
"""
    process = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], cwd=BACKEND, check=False)

    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the first run, and what the killed one left behind
    assert [run.version for run in training_runs(tmp_path)] == ["1.0.0"]
    assert newest_run(tmp_path).version == "1.0.0"
    assert next_version(tmp_path) == "1.1.0"
    assert write(tmp_path, "1.1.0").version == "1.1.0"


def test_a_run_that_did_not_get_its_name_yet_is_none(tmp_path, caplog):
    run = write(tmp_path, "1.0.0")
    shutil.copytree(run.folder, tmp_path / ".1.1.0-half")

    assert [run.version for run in training_runs(tmp_path)] == ["1.0.0"]
    assert caplog.text == ""


class WaitsWhenSaved:
    """Two that share a barrier are both half-way at the same time."""

    def __init__(self, barrier):
        self.barrier = barrier

    def __reduce__(self):
        self.barrier.wait(10)
        return (dict, ())


def test_of_two_writers_of_one_version_one_wins_and_the_other_is_told(tmp_path):
    barrier = threading.Barrier(2)
    outcomes = []

    def train(name):
        try:
            write(tmp_path, "1.0.0", {"slow.joblib": WaitsWhenSaved(barrier), "name.txt": name})
            outcomes.append(name)
        except ArtifactError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=train, args=[name]) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (winner,) = {"first", "second"} & set(outcomes)
    (told,) = set(outcomes) - {winner}
    assert told == "Version 1.0.0 was written by another process meanwhile."
    assert newest_run(tmp_path).read("name.txt").decode() == winner
    assert [path.name for path in tmp_path.iterdir()] == ["1.0.0"]


def test_a_version_is_never_overwritten(tmp_path):
    write(tmp_path, "1.0.0", {"name.txt": "first"})

    with pytest.raises(ArtifactError, match=r"Version 1.0.0 exists already in .*; choose another with --version"):
        write(tmp_path, "1.0.0", {"name.txt": "second"})

    assert newest_run(tmp_path).read("name.txt") == b"first"


@pytest.mark.parametrize("version", ["../2.0.0", "a/b", "", ".", "..", ".hidden", "-x", "1.0 beta", "1\n", "a" * 65])
def test_a_version_that_is_no_plain_folder_name_is_refused(tmp_path, version):
    with pytest.raises(ArtifactError, match="cannot be a version: use letters, digits, dots and dashes"):
        write(tmp_path / "runs", version)
    with pytest.raises(ArtifactError, match="cannot be a version"):
        artifacts.open_run(tmp_path, version)

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_the_systems_error(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(FileExistsError):
        write(tmp_path / "file")
    with pytest.raises(OSError, match="File name too long"):
        write(tmp_path / "runs", files={"a" * 300: "x"})
    assert list((tmp_path / "runs").iterdir()) == []


# --- finding


def test_the_newest_run_is_the_one_that_was_trained_last_whatever_its_version(tmp_path):
    write(tmp_path, "2.0.0", trained_at=NOON)
    write(tmp_path, "1.9.0", trained_at=NOON + timedelta(hours=1))
    # Half an hour earlier than 1.9.0, though its clock showed a later time.
    elsewhere = (NOON + timedelta(minutes=30)).astimezone(datetime.fromisoformat("2026-01-01T00:00+05:00").tzinfo)
    write(tmp_path, "1.10.0", trained_at=elsewhere)

    assert [run.version for run in training_runs(tmp_path)] == ["2.0.0", "1.10.0", "1.9.0"]
    assert newest_run(tmp_path).version == "1.9.0"


@pytest.mark.parametrize("folder", ["empty", "not/there"])
def test_without_a_run_the_command_that_trains_is_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()

    with pytest.raises(NoTrainingRun, match=r"There is no trained model in .*python research/train.py"):
        newest_run(tmp_path / folder)


def test_a_damaged_run_is_reported_and_passed_over(tmp_path, caplog):
    write(tmp_path, "1.0.0")
    newer = write(tmp_path, "1.1.0", trained_at=NOON + timedelta(days=1))
    (newer.folder / "manifest.json").write_text("{")
    (tmp_path / "notes").mkdir()
    (tmp_path / "README").write_text("not a run")

    assert newest_run(tmp_path).version == "1.0.0"
    assert f"The manifest of {newer.folder} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("present", "following"),
    [
        ([], "1.0.0"),
        (["1.0.0"], "1.1.0"),
        (["1.9.0", "1.10.3"], "1.11.0"),
        (["1.0.0", "2.3.4"], "2.4.0"),
        (["pilot", "1.0"], "1.0.0"),
        ([".3.0.0-x1"], "1.0.0"),
    ],
)
def test_the_next_version_is_the_next_minor_after_the_highest(tmp_path, present, following):
    for name in present:
        (tmp_path / name).mkdir()

    assert next_version(tmp_path) == following


def test_a_version_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ArtifactError, match=r"There is no training run in .*9\.9\.9"):
        artifacts.open_run(tmp_path, "9.9.9")


def test_a_renamed_folder_is_no_run(tmp_path):
    run = write(tmp_path, "1.0.0")
    shutil.copytree(run.folder, tmp_path / "1.0.0-backup")

    assert [run.folder.name for run in training_runs(tmp_path)] == ["1.0.0"]
    with pytest.raises(
        ArtifactError, match=r"1.0.0-backup holds version 1.0.0; a run's folder is named as its version"
    ):
        artifacts.open_run(tmp_path, "1.0.0-backup")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, BACKEND.parents[1] / "research/artifacts"),
        ("", BACKEND.parents[1] / "research/artifacts"),
        ("/srv/models", Path("/srv/models")),
        ("my/models", BACKEND.parents[1] / "my/models"),
        ("~/models", Path.home() / "models"),
    ],
)
def test_the_folder_of_runs_does_not_depend_on_where_a_process_starts(monkeypatch, tmp_path, named, expected):
    monkeypatch.chdir(tmp_path)
    if named is None:
        monkeypatch.delenv("ML_ARTIFACTS_DIR", raising=False)
    else:
        monkeypatch.setenv("ML_ARTIFACTS_DIR", named)

    assert artifacts.default_artifacts_dir() == expected.resolve()


# --- trusting


def test_a_file_that_is_not_what_the_manifest_names_is_refused(tmp_path):
    run = write(tmp_path, files={"model.joblib": {"a": 1}})
    (run.folder / "model.joblib").write_bytes(b"other bytes")

    with pytest.raises(ArtifactError, match=r"model.joblib of training run 1.0.0 is not the file its manifest names"):
        run.load_model("model.joblib")


def test_nothing_is_unpickled_before_its_hash_was_compared(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    run = write(tmp_path / "runs", files={"model.joblib": {"a": 1}})
    trap = write(tmp_path / "trap", files={"model.joblib": Trap()})
    shutil.copy(trap.folder / "model.joblib", run.folder / "model.joblib")

    with pytest.raises(ArtifactError):
        run.load_model("model.joblib")
    assert not (tmp_path / "sprung").exists()
    trap.load_model("model.joblib")
    assert (tmp_path / "sprung").exists()  # so the trap does spring when nothing stops it


def test_a_missing_file_is_said(tmp_path):
    run = write(tmp_path, files={"model.joblib": {"a": 1}})
    (run.folder / "model.joblib").unlink()

    with pytest.raises(ArtifactError, match=r"model.joblib of training run 1.0.0 cannot be read: No such file"):
        run.load_model("model.joblib")
    with pytest.raises(ArtifactError, match=r"Training run 1.0.0 has no other.joblib"):
        run.read("other.joblib")


def test_a_file_that_is_whole_but_no_pickle_is_said(tmp_path):
    run = write(tmp_path, files={"model.txt": "plain text"})

    with pytest.raises(ArtifactError, match=r"model.txt of training run 1.0.0 cannot be loaded"):
        run.load_model("model.txt")


@pytest.mark.parametrize("recorded", ["0.1", None])
def test_another_scikit_learn_refuses_to_load_and_says_what_to_do(tmp_path, recorded):
    run = write(tmp_path, files={"model.joblib": {"a": 1}})
    change_manifest(run, libraries={**artifacts.library_versions(), "scikit-learn": recorded})
    running = artifacts.library_versions()["scikit-learn"]

    with pytest.raises(ArtifactError) as refused:
        TrainingRun(run.folder).load_model("model.joblib")

    assert str(refused.value) == (
        f"Training run 1.0.0 was made with scikit-learn {recorded or '(not recorded)'}, this is {running}: "
        "install that version, or train again."
    )


def test_a_run_that_does_not_say_which_scikit_learn_is_not_loaded(tmp_path):
    run = write(tmp_path, files={"model.joblib": {"a": 1}}, libraries={})

    with pytest.raises(ArtifactError, match="install that version, or train again"):
        run.load_model("model.joblib")


def test_other_libraries_only_warn(tmp_path, caplog):
    versions = {**artifacts.library_versions(), "numpy": "0.1", "no-such-library": "3"}
    run = write(tmp_path, files={"model.joblib": {"a": 1}}, libraries=versions)

    assert run.load_model("model.joblib") == {"a": 1}
    assert "Training run 1.0.0 was made with numpy 0.1; this is" in caplog.text
    assert "Training run 1.0.0 was made with no-such-library 3; this is None" in caplog.text
    assert "pandas" not in caplog.text


def test_the_training_customers_are_read_once_checked(tmp_path):
    run = write(tmp_path, files={"customers.txt": "C1\n0002\né\n"}, training_customers="customers.txt")
    none = write(tmp_path, "1.1.0", training_customers=None)

    assert run.training_customers == {"C1", "0002", "é"}
    assert none.training_customers == set()
    (run.folder / "customers.txt").write_text("C9\n")
    with pytest.raises(ArtifactError, match="is not the file its manifest names"):
        assert not TrainingRun(run.folder).training_customers


# --- damage

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths_of(value, path=()):
    """The place of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def use(directory: Path):
    """All that a server does with a run."""
    for run in training_runs(directory):
        for sample in run.manifest.get("samples", []):
            assert isinstance(sample["row"], dict)
        assert isinstance(run.training_customers, frozenset)
    classifier = DecisionTreeClassifier(artifacts_dir=directory)
    json.dumps(classifier.metrics, allow_nan=False)
    json.dumps(classifier.schema.as_dict(), allow_nan=False)
    classifier.load()
    (answer,) = classifier.compute_prediction([{classifier.schema.names[0]: None}])
    assert answer["status"] == "OK"


@pytest.fixture(scope="module")
def one_run(tmp_path_factory, trained):
    """A folder with a run of the tree alone, to be damaged again and again, and its sound manifest."""
    directory = tmp_path_factory.mktemp("damaged")
    shutil.copytree(trained / "1.0.0", directory / "1.0.0")
    for name in ("random_forest.joblib", "extra_trees.joblib"):
        (directory / "1.0.0" / name).unlink()
    return directory, json.loads((trained / "1.0.0/manifest.json").read_text())


@given(st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_changed_in_a_manifest_the_run_works_or_is_refused(one_run, data):
    directory, sound = one_run
    damaged = copy.deepcopy(sound)
    *above, last = data.draw(st.sampled_from([path for path in paths_of(sound) if path]), label="place")
    parent = damaged
    for key in above:
        parent = parent[key]
    if data.draw(st.booleans(), label="remove"):
        del parent[last]
    else:
        parent[last] = data.draw(json_values, label="value")
    (directory / "1.0.0/manifest.json").write_text(json.dumps(damaged), encoding="utf-8")

    with suppress(ArtifactError):
        use(directory)


@given(st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_bytes_of_a_manifest_are_damaged_the_run_works_or_is_refused(one_run, data):
    directory, sound = one_run
    content = json.dumps(sound, indent=2).encode()
    start = data.draw(st.integers(0, len(content)), label="start")
    removed = data.draw(st.integers(0, 20) | st.integers(0, len(content)), label="removed")
    inserted = data.draw(st.binary(max_size=10) | st.just(b"[" * 200_000) | st.just(b"9" * 5000), label="inserted")
    (directory / "1.0.0/manifest.json").write_bytes(content[:start] + inserted + content[start + removed :])

    with suppress(ArtifactError):
        use(directory)


def test_the_sound_manifest_works(one_run):
    directory, sound = one_run
    (directory / "1.0.0/manifest.json").write_text(json.dumps(sound))

    use(directory)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{}", b'"x"', b"\xff\xfe", b"\x00", b'{"version": 1}', b"[" * 100_000],
)
def test_a_manifest_that_is_no_manifest_is_refused_with_its_place(tmp_path, content):
    run = write(tmp_path)
    (run.folder / "manifest.json").write_bytes(content)

    with pytest.raises(ArtifactError, match=f"The manifest of {run.folder} is damaged"):
        TrainingRun(run.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"trained_at": "2026-01-01T12:00:00"},
        {"trained_at": "yesterday"},
        {"version": 1},
        {"libraries": []},
        {"metrics": {"random_forest": 5}},
        {"metrics": {"random_forest": {"roc_auc": {"value": "good"}}}},
        {"samples": [{"row": []}]},
        {"training_customers": ["C1"]},
        {"files": {"a.joblib": {}}},
        {"files": {"a.joblib": {"sha256": None}}},
        {"schema": {}},
    ],
)
def test_a_manifest_whose_readers_would_stumble_is_refused_at_once(tmp_path, change):
    run = write(tmp_path)
    change_manifest(run, **change)

    with pytest.raises(ArtifactError, match="is damaged"):
        TrainingRun(run.folder)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(tmp_path, number):
    run = write(tmp_path, metrics={"a": {"b": {"value": 0.75}}})
    path = run.folder / "manifest.json"
    path.write_text(path.read_text().replace("0.75", number))

    with pytest.raises(ArtifactError, match=f"{number} is no number"):
        TrainingRun(run.folder)
