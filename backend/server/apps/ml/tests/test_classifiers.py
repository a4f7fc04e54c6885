"""What a classifier answers: for one customer or many, always the same, and exactly what scikit-learn says."""

from __future__ import annotations

import gc
import json
import math
import shutil
import subprocess
import sys
import threading
import time
import weakref
from datetime import UTC, datetime

import joblib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.ensemble import RandomForestClassifier as Forest
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier as Tree

from apps.ml import artifacts
from apps.ml.artifacts import ArtifactError
from apps.ml.classifier.base import RetentionClassifier
from apps.ml.classifier.decision_tree import DecisionTreeClassifier
from apps.ml.classifier.extra_trees import ExtraTreesClassifier
from apps.ml.classifier.random_forest import RandomForestClassifier
from apps.ml.forest import CompiledForest
from apps.ml.schema import InputError, Schema, rows_of
from conftest import make_customers
from tests import processes

CLASSIFIERS = [RandomForestClassifier, ExtraTreesClassifier, DecisionTreeClassifier]
COLUMNS = ("Plan", "Orders", "RecencyDays", "MeanGapDays", "Newsletter")


@pytest.fixture(scope="module", params=CLASSIFIERS, ids=lambda one: one.algorithm)
def classifier(request, trained):
    return request.param("1.0.0", trained)


@pytest.fixture(scope="module")
def customers():
    return make_customers(300, seed=11)


def by_hand(classifier, frame):
    """(rows, columns): a table encoded as the manifest says, without any code of ours."""
    manifest = json.loads((classifier.run.folder / "manifest.json").read_text())
    encoded = []
    for column in manifest["schema"]["columns"]:
        values = frame[column["name"]].fillna(column["mode"])
        if column["kind"] == "categorical":
            values = values.map({name: code for code, name in enumerate(column["categories"])}).fillna(-1)
        encoded.append(values.astype(float).to_numpy())
    return np.column_stack(encoded)


# --- the answer


def test_one_customer_gets_one_answer(classifier, customer):
    answer = classifier.compute_prediction(customer)

    assert answer == {
        "probability": answer["probability"],
        "label": "1" if answer["probability"] > 0.5 else "0",
        "status": "OK",
    }
    assert type(answer["probability"]) is float
    assert 0 <= answer["probability"] <= 1
    assert json.loads(json.dumps(answer)) == answer


def test_many_customers_get_a_list_in_their_order(classifier, customers):
    rows = rows_of(customers.drop(columns=["CustomerId", "IsRetained"]))
    alone = [classifier.compute_prediction(row) for row in rows[:20]]

    assert classifier.compute_prediction(rows[:20]) == alone
    assert classifier.compute_prediction(tuple(rows[:20])) == alone
    assert classifier.compute_prediction(rows[19::-1]) == alone[::-1]
    assert classifier.compute_prediction([rows[0]]) == alone[:1]


def test_a_whole_table_as_it_was_trained_on_may_be_given(classifier, customers):
    answers = classifier.compute_prediction(customers)

    assert answers == classifier.compute_prediction(rows_of(customers))
    assert answers == classifier.compute_prediction(customers.iloc[:, ::-1])
    gaps = customers["MeanGapDays"].isna()
    assert [("warnings" in answer) for answer in answers] == gaps.tolist()


@pytest.mark.parametrize("nobody", [[], (), pd.DataFrame(), pd.DataFrame(columns=COLUMNS)], ids=repr)
def test_nobody_gets_no_answers(classifier, nobody):
    assert classifier.compute_prediction(nobody) == []
    assert classifier.predict(classifier.preprocessing(nobody)).shape == (0, 2)


def test_equal_customers_get_equal_answers(classifier, customer):
    first, *others = classifier.compute_prediction([customer, dict(customer), customer])

    assert others == [first, first]


def test_the_three_steps_are_what_the_answer_is_made_of(classifier, customer):
    prediction = classifier.predict(classifier.preprocessing(customer))

    assert prediction.shape == (1, 2)
    assert prediction.sum() == pytest.approx(1)
    assert classifier.postprocessing(prediction[0]) == classifier.compute_prediction(customer)


@pytest.mark.parametrize(
    ("probability", "label"),
    [(0.0, "0"), (0.5, "0"), (math.nextafter(0.5, 1), "1"), (0.75, "1"), (1.0, "1")],
)
def test_the_label_is_1_above_one_half(classifier, probability, label):
    answer = classifier.postprocessing(np.array([1 - probability, probability]))

    assert answer == {"probability": probability, "label": label, "status": "OK"}


def test_what_is_missing_takes_the_training_mode_and_is_listed(classifier, customer):
    modes = {column.name: column.mode for column in classifier.schema.columns}
    whole = {**customer, "Plan": modes["Plan"], "MeanGapDays": modes["MeanGapDays"]}
    without = {name: value for name, value in customer.items() if name != "Plan"} | {"MeanGapDays": None}

    answer = classifier.compute_prediction(without)

    assert answer.pop("warnings") == [
        f"missing, filled with the training mode: Plan={modes['Plan']}, MeanGapDays={modes['MeanGapDays']}"
    ]
    assert answer == classifier.compute_prediction(whole)


def test_an_unseen_category_is_answered_with_a_warning(classifier, customer):
    answer = classifier.compute_prediction({**customer, "Plan": "platinum"})

    assert answer["warnings"] == ["Plan: 'platinum' was not seen in training, scored as unknown"]
    assert answer["status"] == "OK"


@pytest.mark.parametrize(
    ("bad", "field", "expected"),
    [
        ({"Order": 1}, "Order", "did you mean Orders?"),
        ({"Orders": True}, "Orders", "expects a number"),
        ({"Orders": math.nan}, "Orders", "is NaN"),
        ({"Orders": 10**400}, "Orders", "is infinite"),
        ({"Plan": "a\x00"}, "Plan", "cannot be stored"),
        ({}, None, "no feature is given"),
        (None, None, "each customer is an object"),
        ("Orders", None, "each customer is an object"),
        (5, None, "each customer is an object"),
        (np.zeros((2, 5)), None, "each customer is an object"),
        (pd.Series({"Orders": 1}), None, "each customer is an object"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused_by_name(classifier, bad, field, expected):
    for given_data in (bad, [bad]):
        with pytest.raises(InputError, match=expected) as refused:
            classifier.compute_prediction(given_data)
        assert refused.value.problems[0].field == field


# --- exactly the trained model


def test_the_samples_of_the_manifest_are_answered_exactly_as_at_training(classifier):
    samples = classifier.run.manifest["samples"]

    assert len(samples) >= 3
    for sample in samples:
        answer = classifier.compute_prediction(sample["row"])
        assert answer["probability"] == sample["probabilities"][classifier.algorithm]


def test_probabilities_are_those_of_scikit_learn_to_the_last_bit(classifier, customers):
    model = joblib.load(classifier.run.folder / classifier.filename)
    if hasattr(model, "n_jobs"):
        model.set_params(n_jobs=1)
    expected = model.predict_proba(by_hand(classifier, customers))[:, 1]

    answers = classifier.compute_prediction(customers)

    assert [answer["probability"] for answer in answers] == expected.tolist()


rows = st.lists(
    st.fixed_dictionaries(
        {"Orders": st.none() | st.integers(0, 20)},
        optional={
            "Plan": st.none() | st.sampled_from(["basic", "family", "premium", "gold"]),
            "RecencyDays": st.none() | st.floats(-1e38, 1e38) | st.integers(0, 365),
            "MeanGapDays": st.none() | st.floats(0, 100),
            "Newsletter": st.none() | st.booleans(),
            "CustomerId": st.integers(),
        },
    ),
    min_size=1,
    max_size=10,
)


@given(rows)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_customers_are_answered_in_bulk_as_one_by_one_and_as_a_table(classifier, rows):
    answers = classifier.compute_prediction(rows)

    assert answers == [classifier.compute_prediction(row) for row in rows]
    assert answers == classifier.compute_prediction(pd.DataFrame(rows))


def test_ten_thousand_customers_take_well_under_a_second(classifier):
    frame = make_customers(10_000, seed=3).drop(columns=["IsRetained"])
    many = rows_of(frame)
    classifier.load()
    seconds = []
    for _ in range(3):  # the best of three, as other tests run beside this one
        began = time.perf_counter()
        assert len(classifier.compute_prediction(many)) == 10_000
        seconds.append(time.perf_counter() - began)

    assert min(seconds) < 0.8


# --- which run, and when it is loaded


def a_later_run(directory):
    later = directory / "1.1.0"
    shutil.copytree(directory / "1.0.0", later)
    manifest = json.loads((later / "manifest.json").read_text())
    manifest.update(version="1.1.0", trained_at=datetime.now(UTC).isoformat())
    (later / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_without_an_argument_the_newest_run_of_the_setting_answers(monkeypatch, artifacts_dir, customer, kind):
    monkeypatch.setenv("ML_ARTIFACTS_DIR", str(artifacts_dir))
    first = kind()
    a_later_run(artifacts_dir)

    assert first.version == "1.0.0"
    assert kind().version == "1.1.0"
    assert kind("1.0.0").version == "1.0.0"
    assert kind(artifacts_dir=str(artifacts_dir)).version == "1.1.0"
    assert kind().compute_prediction(customer) == first.compute_prediction(customer)


def test_constructing_reads_the_manifest_only(artifacts_dir, customer):
    for file in (artifacts_dir / "1.0.0").glob("*.joblib"):
        file.unlink()

    classifiers = [kind("1.0.0", artifacts_dir) for kind in CLASSIFIERS]

    for classifier in classifiers:
        assert classifier.schema.names == COLUMNS
        assert 0.5 < classifier.metrics["roc_auc"]["value"] <= 1
        assert classifier.metrics["baseline"]["roc_auc"]["value"] == 0.5
        assert classifier.preprocessing(customer).matrix.shape == (1, 5)
        with pytest.raises(ArtifactError, match=rf"{classifier.filename} of training run 1.0.0 cannot be read"):
            classifier.compute_prediction(customer)


def test_a_run_without_this_model_is_said_when_it_is_constructed(artifacts_dir):
    path = artifacts_dir / "1.0.0/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["extra_trees.joblib"]
    path.write_text(json.dumps(manifest))

    with pytest.raises(ArtifactError, match=r"Training run 1.0.0 has no extra_trees.joblib"):
        ExtraTreesClassifier("1.0.0", artifacts_dir)


def test_a_corrupt_model_is_refused_and_a_repaired_one_found(artifacts_dir, customer):
    classifier = RandomForestClassifier("1.0.0", artifacts_dir)
    path = artifacts_dir / "1.0.0/random_forest.joblib"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + b"\x00")

    with pytest.raises(ArtifactError, match="is not the file its manifest names"):
        classifier.compute_prediction(customer)

    path.write_bytes(sound)
    assert classifier.compute_prediction(customer)["status"] == "OK"


def test_many_threads_load_a_model_once_and_get_one_answer(monkeypatch, trained, customer):
    loaded = []
    load = joblib.load
    monkeypatch.setattr(joblib, "load", lambda file: loaded.append(file) or time.sleep(0.05) or load(file))
    classifier = RandomForestClassifier("1.0.0", trained)
    barrier = threading.Barrier(8)
    answers = []

    def ask():
        barrier.wait(10)
        answers.append(classifier.compute_prediction(customer))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(loaded) == 1
    assert answers == [answers[0]] * 8


# --- compiled, if that changes nothing


@pytest.fixture
def loaded_models(monkeypatch):
    """Weak references to the estimators that are loaded while a test runs."""
    found = []
    load = joblib.load

    def remember(file):
        model = load(file)
        found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(joblib, "load", remember)
    return found


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_once_compiled_a_model_is_let_go_of(loaded_models, trained, customer, caplog, kind):
    classifier = kind("1.0.0", trained)
    assert "probability" in classifier.compute_prediction(customer)
    gc.collect()

    (model,) = loaded_models
    assert model() is None
    assert not caplog.records


@pytest.mark.parametrize("rows", ["one", "many"])
def test_a_compiled_model_that_answers_differently_by_one_bit_answers_nobody(
    monkeypatch, loaded_models, trained, caplog, rows
):
    right = CompiledForest.predict_proba

    def wrong(self, matrix):
        answers = right(self, matrix)
        if (len(matrix) == 1) == (rows == "one"):
            answers[-1, 1] = np.nextafter(answers[-1, 1], 2)
        return answers

    monkeypatch.setattr(CompiledForest, "predict_proba", wrong)
    classifier = RandomForestClassifier("1.0.0", trained)

    for sample in classifier.run.manifest["samples"]:
        answer = classifier.compute_prediction(sample["row"])
        assert answer["probability"] == sample["probabilities"]["random_forest"]
    (model,) = loaded_models
    assert type(model()) is Forest
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "random_forest.joblib of training run 1.0.0 is answered by scikit-learn" in record.getMessage()


FROM_A_PROCESS_OF_ITS_OWN = """
import json, logging, sys
logging.basicConfig(level="WARNING", format="%(message)s")
{first}
from apps.ml.classifier.random_forest import RandomForestClassifier
classifier = RandomForestClassifier()
samples = classifier.run.manifest["samples"]
answers = [classifier.compute_prediction(sample["row"])["probability"] for sample in samples]
assert answers == [sample["probabilities"]["random_forest"] for sample in samples]
print("compiled" if type(classifier._predict_proba.__self__).__name__ == "CompiledForest" else "scikit-learn")
"""


def answered_by(directory, first="", **env):
    """What answers in a process of its own, and the lines that were logged."""
    finished = subprocess.run(
        [sys.executable, "-c", FROM_A_PROCESS_OF_ITS_OWN.format(first=first)],
        cwd=processes.BACKEND,
        env=processes.environment("sqlite:///:memory:", directory, **env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip(), finished.stderr.splitlines()


@pytest.mark.whole
def test_without_numba_scikit_learn_answers_and_one_warning_says_so(trained):
    answering, (warning,) = answered_by(trained, "sys.modules['numba'] = None")

    assert answering == "scikit-learn"
    assert warning.startswith("random_forest.joblib of training run 1.0.0 is answered by scikit-learn")
    assert "numba" in warning


@pytest.mark.whole
def test_without_a_place_for_compiled_code_it_is_compiled_anew_and_one_warning_says_so(trained, tmp_path):
    (tmp_path / "file").touch()
    nowhere = {
        "NUMBA_CACHE_DIR": str(tmp_path / "file/cache"),
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }

    answering, (warning,) = answered_by(trained, **nowhere)

    assert answering == "compiled"
    assert warning.startswith("Compiled code cannot be kept on disk, so every start compiles it again")


@pytest.mark.whole
def test_compiled_code_that_was_cut_short_on_disk_is_compiled_anew(trained, tmp_path):
    folder = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert answered_by(trained, **folder) == ("compiled", [])
    files = list(tmp_path.rglob("*.nbc"))
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])

    answering, (warning,) = answered_by(trained, **folder)

    assert files
    assert answering == "compiled"
    assert warning.startswith("Compiled code cannot be kept on disk")


# --- a model of one's own


class Custom(RetentionClassifier):
    algorithm = "custom"


def custom(directory, model, columns=("Orders",)):
    schema = {
        "columns": [{"name": name, "kind": "numeric", "mode": 1, "categories": []} for name in columns],
        "target": {"name": "IsRetained", "positive": "1", "negative": "0"},
        "identifier": None,
        "dropped": [],
    }
    assert Schema.from_dict(schema).names == tuple(columns)
    manifest = {
        "trained_at": datetime.now(UTC).isoformat(),
        "schema": schema,
        "libraries": artifacts.library_versions(),
    }
    artifacts.write_run(directory, "1.0.0", {"custom.joblib": model}, manifest)
    return Custom(artifacts_dir=directory)


ORDERS = np.arange(40.0).reshape(-1, 1)
STAYS = (ORDERS[:, 0] % 3 > 0).astype(int)


def test_a_class_of_two_lines_answers_for_a_model(tmp_path):
    classifier = custom(tmp_path, Tree().fit(ORDERS, STAYS))

    assert [answer["label"] for answer in classifier.compute_prediction([{"Orders": 3}, {"Orders": 4}])] == ["0", "1"]
    assert classifier.title == "custom"
    assert classifier.metrics == {"baseline": {}}


def test_a_model_that_was_trained_in_parallel_answers_on_one_processor(tmp_path):
    model = Forest(300, min_samples_leaf=3, n_jobs=4, random_state=0).fit(ORDERS, STAYS)
    classifier = custom(tmp_path, model)
    model.set_params(n_jobs=1)
    expected = model.predict_proba(ORDERS)[:, 1].tolist()

    for _ in range(5):  # several processors would add up the trees in another order each time
        answers = classifier.compute_prediction([{"Orders": value} for value in ORDERS[:, 0]])
        assert [answer["probability"] for answer in answers] == expected


@pytest.mark.parametrize(
    "model",
    [
        GradientBoostingClassifier(n_estimators=5),
        make_pipeline(StandardScaler(), Forest(5)),
        CalibratedClassifierCV(Forest(5), cv=2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_of_any_other_kind_is_answered_by_scikit_learn(tmp_path, caplog, model):
    model.fit(ORDERS, STAYS)
    classifier = custom(tmp_path, model)

    answers = classifier.compute_prediction([{"Orders": value} for value in ORDERS[:, 0]])

    assert [answer["probability"] for answer in answers] == model.predict_proba(ORDERS)[:, 1].tolist()
    assert not caplog.records


def test_samples_that_do_not_fit_the_columns_stop_no_model(artifacts_dir, customer):
    path = artifacts_dir / "1.0.0/manifest.json"
    expected = RandomForestClassifier("1.0.0", artifacts_dir).compute_prediction(customer)
    manifest = json.loads(path.read_text())
    for samples in ([{"row": {"Nothing": 1}}], [{"row": {}}], []):
        path.write_text(json.dumps({**manifest, "samples": samples}))

        assert RandomForestClassifier("1.0.0", artifacts_dir).compute_prediction(customer) == expected


class Unable:
    """What any model may become when the library that it needs is another one."""

    classes_ = (0, 1)
    n_features_in_ = 1

    def predict_proba(self, matrix):
        raise AttributeError("no such attribute")


def test_a_model_that_cannot_answer_is_found_when_it_is_loaded(tmp_path, monkeypatch):
    classifier = custom(tmp_path, Tree().fit(ORDERS, STAYS))
    monkeypatch.setattr(joblib, "load", lambda file: Unable())

    with pytest.raises(ArtifactError, match=r"cannot answer: AttributeError\(.no such attribute.\)"):
        classifier.load()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Tree().fit(ORDERS, np.arange(40) % 3), "is no two-class classifier"),
        (Tree().fit(ORDERS, STAYS + 1), "is no two-class classifier"),
        (Tree().fit(ORDERS, STAYS.astype(str)), "is no two-class classifier"),
        (LinearRegression().fit(ORDERS, STAYS), "is no two-class classifier"),
        ({"a": 1}, "is no two-class classifier"),
        (Tree(), "is no two-class classifier"),
        (Tree().fit(np.hstack([ORDERS, ORDERS]), STAYS), "was trained on 2 columns, but the manifest lists 1"),
    ],
    ids=str,
)
def test_what_is_no_fitting_model_is_refused(tmp_path, model, expected):
    classifier = custom(tmp_path, model)

    with pytest.raises(ArtifactError, match=expected):
        classifier.compute_prediction({"Orders": 1})
