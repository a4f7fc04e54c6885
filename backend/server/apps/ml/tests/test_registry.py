"""Rows and loaded classifiers: registered once, in the right status, and answering only with what was registered."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import joblib
import pytest
from django.utils import timezone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.tree import DecisionTreeClassifier as Tree

import train
from apps.endpoints import lifecycle
from apps.endpoints.models import Endpoint, MLAlgorithm, MLAlgorithmStatus
from apps.ml import kernels
from apps.ml import registry as registry_module
from apps.ml.artifacts import ArtifactError, NoTrainingRun, open_run
from apps.ml.classifier.base import RetentionClassifier
from apps.ml.classifier.extra_trees import ExtraTreesClassifier
from apps.ml.classifier.random_forest import RandomForestClassifier
from apps.ml.registry import MLRegistry, registry
from conftest import status_of

PREDICT = "/api/v1/classifier/predict"


def statuses(endpoint="classifier"):
    """What each algorithm's active status is, by key and version."""
    active = MLAlgorithmStatus.objects.active().filter(parent_endpoint__name=endpoint)
    return {(s.parent_mlalgorithm.key, s.parent_mlalgorithm.version): s.status for s in active}


OUT_OF_THE_BOX = {
    ("random_forest", "1.0.0"): "production",
    ("extra_trees", "1.0.0"): "staging",
    ("decision_tree", "1.0.0"): "testing",
}
RETRAINED = OUT_OF_THE_BOX | {(key, "1.1.0"): "testing" for key, _ in OUT_OF_THE_BOX}


def change_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def retrain(directory: Path, version: str = "1.1.0") -> None:
    """A later run, without the wait for a training."""
    shutil.copytree(directory / "1.0.0", directory / version)
    change_manifest(
        directory / version, lambda manifest: manifest.update(version=version, trained_at=datetime.now(UTC).isoformat())
    )


def restart() -> dict[MLAlgorithm, ArtifactError]:
    """What a process does when it starts."""
    registry.clear()
    registry.register_newest_run()
    return registry.warm()


@pytest.fixture
def changeable(db, settings, artifacts_dir):
    """The artifacts folder that the server uses, free to be changed, with the first run registered."""
    settings.ML_ARTIFACTS_DIR = artifacts_dir
    restart()
    return artifacts_dir


def algorithm(key, version="1.0.0"):
    return MLAlgorithm.objects.get(key=key, version=version)


def ask(api, customer, key, version="1.0.0"):
    return api.post(f"{PREDICT}?algorithm={key}&version={version}", customer)


# --- registering


def test_out_of_the_box_the_forest_is_in_production_and_the_others_wait(changeable):
    assert statuses() == OUT_OF_THE_BOX
    assert Endpoint.objects.get().name == "classifier"
    assert {pk: one.algorithm for pk, one in registry.endpoints.items()} == {
        one.pk: one.key for one in MLAlgorithm.objects.all()
    }


def test_add_algorithm_creates_the_rows_and_keeps_the_object(db, trained, customer):
    own = MLRegistry()
    forest = RandomForestClassifier("1.0.0", trained)

    row = own.add_algorithm(
        endpoint_name="stayers",
        algorithm_object=forest,
        algorithm_name="our forest",
        algorithm_status="staging",
        algorithm_version="0.0.1",
        owner="ann",
        algorithm_description="A first try.",
        algorithm_code="class ...",
    )

    row.refresh_from_db()
    assert (row.name, row.version, row.owner) == ("our forest", "0.0.1", "ann")
    assert (row.description, row.code) == ("A first try.", "class ...")
    assert (row.parent_endpoint.name, row.parent_endpoint.owner) == ("stayers", "ann")
    assert (row.key, row.artifact) == ("random_forest", "1.0.0/random_forest.joblib")
    assert row.artifact_sha256 == hashlib.sha256((trained / row.artifact).read_bytes()).hexdigest()
    assert row.schema_sha256 == forest.schema.sha256
    assert row.metrics["roc_auc"]["value"] == forest.metrics["roc_auc"]["value"]
    assert row.target == {"name": "IsRetained", "positive": "1", "negative": "0"}
    (status,) = row.statuses.all()
    assert (status.status, status.active, status.created_by) == ("staging", True, "ann")
    assert own.endpoints == {row.pk: forest}
    assert own.get(row).compute_prediction(customer) == forest.compute_prediction(customer)


def test_registering_again_changes_nothing(changeable):
    before = list(MLAlgorithm.objects.values()), list(MLAlgorithmStatus.objects.values())

    for _ in range(2):
        registry.register_run()
        restart()

    assert (list(MLAlgorithm.objects.values()), list(MLAlgorithmStatus.objects.values())) == before


def test_a_status_that_does_not_exist_is_refused(db, trained):
    for status in ("live", "", "ab_testing"):
        with pytest.raises(lifecycle.LifecycleError, match="status must be one of testing, staging, production"):
            registry.add_algorithm("stayers", RandomForestClassifier("1.0.0", trained), "f", status, "1", "a", "", "")

    assert not MLAlgorithm.objects.exists()
    assert not registry.endpoints


def test_retraining_and_restarting_promotes_nothing(changeable, api, customer):
    before = api.post(f"{PREDICT}?status=production", customer).json()
    retrain(changeable)

    assert restart() == {}

    assert statuses() == RETRAINED
    after = api.post(f"{PREDICT}?status=production", customer).json()
    assert (after["version"], after["probability"]) == ("1.0.0", before["probability"])


def test_a_later_version_displaces_nobody_even_where_production_is_empty(changeable):
    lifecycle.set_status(algorithm("random_forest"), "retired", by="ann", now=datetime.now(UTC))
    retrain(changeable)

    restart()

    assert statuses() == {**RETRAINED, ("random_forest", "1.0.0"): "retired"}


def test_what_a_person_promoted_stays_in_production_after_a_restart(changeable):
    lifecycle.set_status(algorithm("decision_tree"), "production", by="ann", now=datetime.now(UTC))

    restart()

    assert status_of(algorithm("decision_tree")) == "production"
    assert status_of(algorithm("random_forest")) == "staging"


def test_each_endpoint_has_a_first_run_of_its_own(changeable):
    retrain(changeable)
    registry.register_run("loyalty", "1.1.0")

    assert statuses("loyalty") == {(key, "1.1.0"): status for (key, _), status in OUT_OF_THE_BOX.items()}
    assert statuses() == OUT_OF_THE_BOX


def test_a_run_may_lack_an_algorithm(db, settings, artifacts_dir):
    settings.ML_ARTIFACTS_DIR = artifacts_dir
    change_manifest(artifacts_dir / "1.0.0", lambda manifest: manifest["files"].pop("extra_trees.joblib"))

    assert [one.key for one in registry.register_run()] == ["random_forest", "decision_tree"]


def test_registering_reads_no_model(db, settings, artifacts_dir):
    settings.ML_ARTIFACTS_DIR = artifacts_dir
    for model in (artifacts_dir / "1.0.0").glob("*.joblib"):
        model.unlink()

    assert len(registry.register_run()) == 3
    assert len(registry.warm()) == 3  # which does


def test_without_a_run_nothing_is_registered_and_the_command_is_named(db, settings, tmp_path):
    settings.ML_ARTIFACTS_DIR = tmp_path

    with pytest.raises(NoTrainingRun, match=r"python research/train.py"):
        registry.register_run()
    with pytest.raises(ArtifactError, match=r"There is no training run in .*7\.0\.0"):
        registry.register_run(version="7.0.0")
    assert not Endpoint.objects.exists()


# --- getting


def test_a_row_is_loaded_by_a_process_that_did_not_register_it(algorithms, customer):
    other_process = MLRegistry()

    answers = {key: other_process.get(row).compute_prediction(customer) for key, row in algorithms.items()}

    assert answers == {key: registry.get(row).compute_prediction(customer) for key, row in algorithms.items()}
    assert set(other_process.endpoints) == {row.pk for row in algorithms.values()}


def test_threads_that_ask_at_once_construct_and_load_each_model_once(monkeypatch, algorithms):
    """Reading manifests and models is slowed down, so that all threads ask while the first is still at it."""
    loaded = []
    load, loads = joblib.load, json.loads
    monkeypatch.setattr(joblib, "load", lambda file: loaded.append(file) or time.sleep(0.05) or load(file))
    monkeypatch.setattr(json, "loads", lambda *args, **kwargs: time.sleep(0.02) or loads(*args, **kwargs))
    other_process = MLRegistry()
    barrier = threading.Barrier(9)
    found = []

    def get(row):
        barrier.wait(10)
        found.append((row.key, other_process.get(row)))

    threads = [threading.Thread(target=get, args=[row]) for row in list(algorithms.values()) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(loaded) == 3
    assert len(set(found)) == 3


def test_classifiers_are_let_go_while_others_are_being_loaded(algorithms):
    rows = list(algorithms.values())
    endpoint = rows[0].parent_endpoint_id
    own = MLRegistry()
    failures = []
    done = threading.Event()

    def keep_loading():
        try:
            while not done.is_set():
                for row in rows:
                    assert own.get(row).algorithm == row.key
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=keep_loading) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for served in [{rows[0].pk}, {rows[1].pk}, set()] * 30:
            own.unload_all_but(endpoint, served)
    finally:
        done.set()
        for thread in threads:
            thread.join()

    assert not failures


def test_what_is_not_served_any_more_is_let_go_on_its_endpoint_only(algorithms):
    forest, extra, tree = (algorithms[key] for key in ("random_forest", "extra_trees", "decision_tree"))
    other = registry.register_run("loyalty")

    registry.unload_all_but(forest.parent_endpoint_id, {forest.pk})

    assert set(registry.endpoints) == {forest.pk, *(one.pk for one in other)}
    registry.unload_all_but(forest.parent_endpoint_id, ())
    assert set(registry.endpoints) == {one.pk for one in other}
    assert registry.get(tree).algorithm == "decision_tree"
    assert registry.get(extra).algorithm == "extra_trees"


def test_a_retired_model_that_a_late_request_loads_again_is_let_go_at_the_next_request(api, algorithms, customer):
    extra = algorithms["extra_trees"]
    lifecycle.set_status(extra, "retired", by="ana", now=timezone.now())
    assert api.post("/api/v1/classifier/predict?status=production", customer).status_code == 200
    registry.get(extra)

    assert api.post("/api/v1/classifier/predict?status=production", customer).status_code == 200

    assert extra.pk not in registry.endpoints


def test_a_server_that_starts_without_a_model_has_compiled_what_one_will_need(db):
    kernels._compiled.cache_clear()

    assert registry.warm() == {}

    assert kernels._compiled.cache_info().currsize == 1


def test_a_row_whose_class_is_gone_says_which_line_is_missing(changeable, api, customer, monkeypatch):
    monkeypatch.setattr(registry_module, "ALGORITHMS", registry_module.ALGORITHMS[1:])

    failures = restart()

    assert [str(error) for error in failures.values()] == [
        "No class answers for 'random_forest'; is its line missing in apps/ml/registry.py?"
    ]
    assert "No class answers for 'random_forest'" in reason(api, customer)
    assert others_answer(api, customer)


# --- what is not what was registered


def others_answer(api, customer, refused="random_forest"):
    return all(ask(api, customer, key).status_code == 200 for key, _ in OUT_OF_THE_BOX if key != refused)


def reason(api, customer, key="random_forest"):
    answer = ask(api, customer, key)
    assert answer.status_code == 503
    return answer.json()["message"]


def test_a_corrupt_model_stops_only_itself_until_it_is_repaired(changeable, api, customer):
    path = changeable / "1.0.0/random_forest.joblib"
    sound = path.read_bytes()
    path.write_bytes(sound[:100])

    (failed,) = restart()

    assert failed.key == "random_forest"
    assert "random_forest.joblib of training run 1.0.0 is not the file its manifest names" in reason(api, customer)
    assert others_answer(api, customer)
    path.write_bytes(sound)
    assert ask(api, customer, "random_forest").status_code == 200


def test_a_model_replaced_with_its_manifest_is_refused_until_it_is_restored(changeable, api, customer):
    folder = changeable / "1.0.0"
    original = {name: (folder / name).read_bytes() for name in ("random_forest.joblib", "manifest.json")}
    schema = open_run(changeable, "1.0.0").schema
    usurper = Tree().fit(schema.align([customer, {**customer, "Orders": 1}]).matrix, [0, 1])
    joblib.dump(usurper, folder / "random_forest.joblib")
    digest = hashlib.sha256((folder / "random_forest.joblib").read_bytes()).hexdigest()
    change_manifest(folder, lambda manifest: manifest["files"]["random_forest.joblib"].update(sha256=digest))

    (failed,) = restart()

    assert failed.key == "random_forest"
    assert "The artifact of random forest 1.0.0 is not the one that was registered" in reason(api, customer)
    assert "restore it, or retire the algorithm and register a new version" in reason(api, customer)
    assert others_answer(api, customer)
    for name, content in original.items():
        (folder / name).write_bytes(content)
    assert ask(api, customer, "random_forest").status_code == 200


def test_a_schema_that_was_edited_refuses_the_whole_run(changeable, api, customer):
    change_manifest(
        changeable / "1.0.0", lambda manifest: manifest["schema"]["columns"][0].update(categories=["a", "premium"])
    )

    assert len(restart()) == 3

    for key, _ in OUT_OF_THE_BOX:
        assert "is not the one that was registered" in reason(api, customer, key)


def test_a_run_that_is_gone_is_named(changeable, api, customer):
    retrain(changeable)
    restart()
    shutil.rmtree(changeable / "1.0.0")

    failures = restart()

    assert {one.version for one in failures} == {"1.0.0"}
    assert f"There is no training run in {changeable / '1.0.0'}" in reason(api, customer)
    assert ask(api, customer, "random_forest", "1.1.0").status_code == 200


def test_a_damaged_manifest_leaves_the_older_run_in_production(changeable, api, customer):
    retrain(changeable)
    restart()
    (changeable / "1.1.0/manifest.json").write_text("{")

    failures = restart()

    assert {one.version for one in failures} == {"1.1.0"}
    assert api.post(f"{PREDICT}?status=production", customer).json()["version"] == "1.0.0"
    assert ask(api, customer, "random_forest", "1.1.0").status_code == 503


def test_a_run_trained_under_another_scikit_learn_is_unavailable_and_says_so(changeable, api, customer):
    retrain(changeable)
    change_manifest(changeable / "1.1.0", lambda manifest: manifest["libraries"].update({"scikit-learn": "0.24.2"}))

    failures = restart()

    assert {(one.key, one.version) for one in failures} == {(key, "1.1.0") for key, _ in OUT_OF_THE_BOX}
    answer = ask(api, customer, "random_forest", "1.1.0")
    assert answer.status_code == 503
    assert "Training run 1.1.0 was made with scikit-learn 0.24.2, this is" in answer.json()["message"]
    assert "install that version, or train again" in answer.json()["message"]
    assert others_answer(api, customer, refused=None)
    # Once the record is right again no restart is needed.
    libraries = json.loads((changeable / "1.0.0/manifest.json").read_text())["libraries"]
    change_manifest(changeable / "1.1.0", lambda manifest: manifest.update(libraries=libraries))
    assert ask(api, customer, "random_forest", "1.1.0").status_code == 200


def test_a_run_trained_under_another_numpy_answers_with_a_warning_in_the_log(changeable, api, customer, caplog):
    change_manifest(changeable / "1.0.0", lambda manifest: manifest["libraries"].update(numpy="1.19.0"))

    assert restart() == {}

    assert "Training run 1.0.0 was made with numpy 1.19.0" in caplog.text
    assert others_answer(api, customer, refused=None)


# --- a fourth algorithm


class GradientBoostingClassifier(RetentionClassifier):
    """Trees grown one after the other, each on what the former got wrong."""

    algorithm = "gradient_boosting"


def test_a_fourth_algorithm_is_a_class_a_line_that_registers_and_one_that_trains_it(
    changeable, customers_csv, api, customer, monkeypatch
):
    """The README does the same in the files of a clone; this is on both databases, and faster."""
    monkeypatch.setitem(
        train.MODELS, "gradient_boosting", lambda seed: HistGradientBoostingClassifier(random_state=seed)
    )
    monkeypatch.setattr(
        registry_module, "ALGORITHMS", [*registry_module.ALGORITHMS, (GradientBoostingClassifier, "testing")]
    )
    train.train(train.load_table(customers_csv), directory=changeable, resamples=5)

    assert restart() == {}

    assert statuses() == {**RETRAINED, ("gradient_boosting", "1.1.0"): "testing"}
    answer = api.post(f"{PREDICT}?algorithm=gradient_boosting", customer).json()
    assert (answer["algorithm"], answer["version"]) == ("gradient boosting", "1.1.0")
    for sample in open_run(changeable, "1.1.0").manifest["samples"]:
        scored = registry.get(algorithm("gradient_boosting", "1.1.0")).compute_prediction(sample["row"])
        assert scored["probability"] == sample["probabilities"]["gradient_boosting"]
    lifecycle.set_status(algorithm("gradient_boosting", "1.1.0"), "production", by="ann", now=datetime.now(UTC))
    assert api.post(f"{PREDICT}?status=production", customer).json()["algorithm"] == "gradient boosting"


def test_the_class_that_answers_is_the_one_of_the_rows_key(algorithms):
    assert type(registry.get(algorithms["extra_trees"])) is ExtraTreesClassifier


def test_a_run_that_predicts_something_else_does_not_enter_the_default_endpoint(changeable):
    retrain(changeable)
    change_manifest(changeable / "1.1.0", lambda manifest: manifest["schema"]["target"].update(name="Renewed"))

    restart()

    assert not MLAlgorithm.objects.filter(version="1.1.0").exists()
