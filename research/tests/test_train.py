"""Any table trains into one complete, reproducible run, or is refused with a sentence that helps."""

import csv
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.tree import DecisionTreeClassifier

import evaluation
import train
from apps.ml import artifacts
from apps.ml.classifier.random_forest import RandomForestClassifier
from apps.ml.schema import MISSING_IN_FILES, TableError

ONE_TREE = {"decision_tree": train.MODELS["decision_tree"]}


def customers(rows=300, seed=7):
    """Every kind of column; customers who ordered lately and often tend to stay."""
    random = np.random.default_rng(seed)
    orders = random.poisson(3, rows) + 1
    recency = random.integers(0, 365, rows)
    return pd.DataFrame(
        {
            "CustomerId": [f"{number:05d}" for number in range(1, rows + 1)],
            "Plan": random.choice(["basic", "family", "premium"], rows),
            "Orders": orders,
            "RecencyDays": recency,
            "MeanGapDays": np.where(orders > 2, random.exponential(30, rows).round(2), np.nan),
            "Newsletter": random.random(rows) < 0.5,
            "IsRetained": (random.random(rows) < 1 / (1 + np.exp(recency / 60 - orders / 2))).astype(int),
        }
    )


@pytest.fixture
def save(tmp_path):
    """Writes a table, or text, or bytes, as a file of customers."""

    def write(content, **options):
        path = tmp_path / "customers.csv"
        if isinstance(content, pd.DataFrame):
            content = content.to_csv(index=False, **options)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "artifacts"


@pytest.fixture
def table(save):
    return train.load_table(save(customers()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the default models; not to be changed."""
    path = tmp_path_factory.mktemp("data") / "customers.csv"
    customers().to_csv(path, index=False)
    table = train.load_table(path)
    return train.train(table, directory=tmp_path_factory.mktemp("artifacts"), resamples=30)


def quickly(table, folder, **options):
    return train.train(table, directory=folder, **{"resamples": 5, "models": ONE_TREE, **options})


def refusal(path, **options):
    """The sentence with which a table is refused, on reading or on splitting."""
    with pytest.raises(TableError) as refused:
        train.split(train.load_table(path, **options))
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


# --- a run on disk


def test_a_run_holds_three_models_and_what_they_need(run):
    assert {path.name for path in run.folder.iterdir()} == {
        "random_forest.joblib",
        "extra_trees.joblib",
        "decision_tree.joblib",
        "train_mode.joblib",
        "encoders.joblib",
        "training_customers.txt",
        "manifest.json",
    }
    forest, extra, tree = (run.load_model(f"{key}.joblib") for key in train.MODELS)
    assert len(forest.estimators_) == len(extra.estimators_) == 100
    assert tree.max_leaf_nodes == 100
    assert forest.n_jobs is None and extra.n_jobs is None


def test_every_file_has_the_hash_and_size_that_the_manifest_says(run):
    files = strict_json(run.folder / "manifest.json")["files"]
    for name, described in files.items():
        content = (run.folder / name).read_bytes()
        assert described == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert len(files) == 6


def test_the_manifest_says_what_was_trained_on_what_and_with_what(run):
    manifest = strict_json(run.folder / "manifest.json")
    source = customers()
    content = source.to_csv(index=False).encode()
    assert manifest["version"] == "1.0.0"
    assert run.trained_at.utcoffset().total_seconds() == 0
    assert manifest["seed"] == 42
    assert manifest["python"].count(".") == 2
    assert manifest["libraries"] == artifacts.library_versions()
    assert manifest["data"] == {
        "file": "customers.csv",
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": 300,
        "columns": 7,
    }
    assert manifest["rows"] == {"train": 225, "test": 75}
    assert manifest["target"] == {
        "name": "IsRetained",
        "positive": "1",
        "negative": "0",
        "positive_share": pytest.approx(source["IsRetained"].mean()),
    }
    assert manifest["training_customers"] == "training_customers.txt"
    assert manifest["seconds"] > 0
    for key, model in manifest["models"].items():
        assert model["file"] == f"{key}.joblib"
        assert model["seconds"] > 0
        assert model["parameters"]["random_state"] == 42


def test_every_model_and_the_baseline_have_every_score_with_its_interval(run):
    scores = run.manifest["metrics"]
    assert list(scores) == ["baseline", *train.MODELS]
    for of_model in scores.values():
        assert set(of_model) == set(evaluation.METRICS)
        assert all(set(score) == {"value", "low", "high"} for score in of_model.values())
    assert scores["random_forest"]["roc_auc"]["low"] > scores["baseline"]["roc_auc"]["value"] == 0.5


def test_the_baseline_always_answers_the_larger_class(run, table):
    held_out = train.split(table).test_outcome
    assert run.manifest["metrics"]["baseline"]["accuracy"]["value"] == max(held_out.mean(), 1 - held_out.mean())


def test_modes_and_encoders_beside_the_models_agree_with_the_schema(run):
    columns = {column.name: column for column in run.schema.columns}
    modes = joblib.load(run.folder / "train_mode.joblib")
    assert modes == {name: column.mode for name, column in columns.items()}
    assert joblib.load(run.folder / "encoders.joblib") == {"Plan": ["basic", "family", "premium"]}
    assert list(columns["Plan"].categories) == ["basic", "family", "premium"]


def test_a_served_model_gives_the_probabilities_of_the_samples_to_the_last_bit(run):
    samples = strict_json(run.folder / "manifest.json")["samples"]
    served = RandomForestClassifier(artifacts_dir=run.folder.parent)
    answers = served.compute_prediction([sample["row"] for sample in samples])
    assert [answer["probability"] for answer in answers] == [
        sample["probabilities"]["random_forest"] for sample in samples
    ]
    assert len(samples) == 5
    assert any(None in sample["row"].values() for sample in samples)


def test_the_only_held_out_row_with_a_missing_value_is_among_the_samples(save, folder):
    complete = customers().drop(columns="MeanGapDays")
    last_held_out = train.split(train.load_table(save(complete))).test_rows[-1]
    complete["Orders"] = complete["Orders"].astype(float)
    complete.loc[last_held_out, "Orders"] = np.nan
    run = quickly(train.load_table(save(complete)), folder)
    assert [sample["row"]["Orders"] is None for sample in run.manifest["samples"]].count(True) == 1


def test_no_customer_of_the_training_part_is_tested_on(run, table):
    parts = train.split(table)
    ids = table.frame["CustomerId"].to_numpy()
    assert run.training_customers == set(ids[parts.train_rows])
    assert run.training_customers.isdisjoint(ids[parts.test_rows])
    assert len(parts.train_rows) + len(parts.test_rows) == 300


def test_rows_of_one_customer_stay_together(save, folder):
    months = customers(400)
    months["CustomerId"] = [f"C{number // 3}" for number in range(400)]
    table = train.load_table(save(months), identifier="CustomerId")
    parts = train.split(table)
    ids = table.frame["CustomerId"].to_numpy()
    assert set(ids[parts.train_rows]).isdisjoint(ids[parts.test_rows])
    assert 0.2 < len(parts.test_rows) / 400 < 0.3
    run = quickly(table, folder)
    lines = (run.folder / "training_customers.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(run.training_customers)


def test_both_parts_have_the_same_share_of_retained(table):
    parts = train.split(table)
    assert parts.train_outcome.mean() == pytest.approx(parts.test_outcome.mean(), abs=0.01)


def test_what_only_held_out_rows_have_is_unseen_as_in_production(save):
    source = customers()
    held_out = train.split(train.load_table(save(source))).test_rows[0]
    source.loc[held_out, "Plan"] = "gold"
    table = train.load_table(save(source))
    parts = train.split(table)
    assert "gold" in table.schema.columns[0].categories
    assert "gold" not in parts.schema.columns[0].categories
    assert parts.test_matrix[0, 0] == -1


def test_the_same_seed_gives_the_same_scores_and_probabilities(table, tmp_path):
    one, same = (train.train(table, directory=tmp_path / name, resamples=10) for name in ["one", "same"])
    other = train.train(table, directory=tmp_path / "other", resamples=10, seed=1)
    for part in ["metrics", "samples", "schema"]:
        assert one.manifest[part] == same.manifest[part]
    assert one.manifest["metrics"] != other.manifest["metrics"]
    assert one.training_customers == same.training_customers != other.training_customers


def test_each_run_is_the_next_version_and_a_used_one_is_refused(table, folder):
    assert quickly(table, folder).version == "1.0.0"
    assert quickly(table, folder).version == "1.1.0"
    assert quickly(table, folder, version="2.0.0-trial").version == "2.0.0-trial"
    before = (folder / "1.1.0" / "manifest.json").read_bytes()
    with pytest.raises(artifacts.ArtifactError, match=r"1\.1\.0 exists already"):
        quickly(table, folder, version="1.1.0")
    with pytest.raises(artifacts.ArtifactError, match="cannot be a version"):
        quickly(table, folder, version="../up")
    assert (folder / "1.1.0" / "manifest.json").read_bytes() == before


def test_a_crash_while_writing_leaves_nothing(table, folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        quickly(table, folder)
    assert list(folder.iterdir()) == []


def test_a_fourth_model_is_one_line(table, folder):
    boosting = {"gradient_boosting": lambda seed: HistGradientBoostingClassifier(random_state=seed)}
    run = quickly(table, folder, models={**ONE_TREE, **boosting})
    assert run.load_model("gradient_boosting.joblib").classes_.tolist() == [0, 1]
    assert "gradient_boosting" in strict_json(run.folder / "manifest.json")["metrics"]


# --- tables that train


@pytest.mark.parametrize("said", ["true", "True", "TRUE"])
def test_the_positive_value_may_be_spelled_as_in_the_file(save, said):
    source = customers()
    source["IsRetained"] = source["IsRetained"].map({1: "true", 0: "false"})

    assert train.load_table(save(source), positive=said).schema.target.positive == "True"


def test_a_churn_flag_is_inverted(save, folder):
    source = customers()
    source["Churn"] = source.pop("IsRetained").map({1: "No", 0: "Yes"})
    run = quickly(train.load_table(save(source), target="Churn", positive="No"), folder)
    assert (run.schema.target.positive, run.schema.target.negative) == ("No", "Yes")
    plain = quickly(train.load_table(save(customers())), folder)
    assert run.manifest["metrics"] == plain.manifest["metrics"]


def test_a_numeric_churn_flag_is_inverted(save):
    source = customers()
    source["Churn"] = 1 - source.pop("IsRetained")
    parts = train.split(train.load_table(save(source), target="Churn", positive="0"))
    expected = train.split(train.load_table(save(customers())))
    assert parts.train_outcome.tolist() == expected.train_outcome.tolist()


@pytest.mark.parametrize("target", [["yes", "no"], ["True", "False"], ["1.0", "0.0"]])
def test_a_target_may_be_spelled_in_many_ways(save, target):
    source = customers()
    source["IsRetained"] = source["IsRetained"].map({1: target[0], 0: target[1]})
    expected = train.split(train.load_table(save(customers())))
    assert train.split(train.load_table(save(source))).train_outcome.tolist() == expected.train_outcome.tolist()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n"])
def test_delimiters_line_ends_and_byte_order_marks_make_no_difference(save, delimiter, line_end, start):
    text = customers().to_csv(index=False, sep=delimiter, lineterminator=line_end)
    table = train.load_table(save(start + text + line_end))
    pd.testing.assert_frame_equal(table.frame, train.load_table(save(customers())).frame)


def test_quotes_may_hold_delimiters_quotes_and_line_breaks(save):
    source = customers()
    source["Plan"] = source["Plan"].map({"basic": 'the "basic", one', "family": "two\nlines", "premium": "a;b"})
    table = train.load_table(save(source))
    assert table.schema.columns[0].categories == ("a;b", 'the "basic", one', "two\nlines")


def test_ids_keep_their_leading_zeros(run, table):
    assert table.frame["CustomerId"].iloc[0] == "00001"
    assert all(len(key) == 5 for key in run.training_customers)


def test_missing_is_spelled_as_in_production(save):
    source = customers().astype({"Orders": str, "Newsletter": str})
    source.loc[:4, "Orders"] = ["NA", " ", "", "  null ", "\t"]
    source.loc[:1, "Newsletter"] = ["None", " "]
    source.loc[0, "Plan"] = " NaN"
    table = train.load_table(save(source))
    kinds = {column.name: column.kind for column in table.schema.columns}
    assert (kinds["Orders"], kinds["Newsletter"]) == ("numeric", "boolean")
    assert table.frame[["Orders", "Newsletter", "Plan"]].isna().sum().tolist() == [5, 2, 1]


def test_three_hundred_columns_train(save, folder):
    source = customers()
    noise = np.random.default_rng(0).normal(size=(300, 300))
    wide = pd.concat([source, pd.DataFrame(noise, columns=[f"n{number}" for number in range(300)])], axis=1)
    run = quickly(train.load_table(save(wide)), folder)
    assert len(run.schema.columns) == 305


def test_dropped_columns_are_known_but_no_features(save, folder):
    source = customers().assign(ClosedOn="2024-01-01", Empty="")
    run = quickly(train.load_table(save(source), drop=["ClosedOn", "Empty"]), folder)
    assert run.schema.dropped == ("ClosedOn", "Empty")
    assert "ClosedOn" not in run.schema.names


# --- which column names the customer


@pytest.mark.parametrize("name", ["CustomerId", "customerID", "customer_id", "id", "ID", "customerid", "client key"])
def test_a_column_that_plainly_names_the_customer_is_found_and_said(save, name):
    table = train.load_table(save(customers().rename(columns={"CustomerId": name})))
    assert table.schema.identifier == name
    assert table.notes == (
        f"{name} names the customer: every row has another value. (Not so? Name the column with --id.)",
    )


@pytest.mark.parametrize("name", ["Paid", "Grid", "monkey", "Number"])
def test_other_columns_with_unique_values_are_features(save, name):
    source = customers().rename(columns={"CustomerId": name})
    source[name] = np.arange(300)
    table = train.load_table(save(source))
    assert table.schema.identifier is None
    assert name in table.schema.names


def test_without_an_identifier_no_customers_are_written(save, folder):
    run = quickly(train.load_table(save(customers().drop(columns="CustomerId"))), folder)
    assert run.manifest["training_customers"] is None
    assert not (run.folder / "training_customers.txt").exists()


def test_an_id_that_repeats_is_a_feature_and_that_is_said(save):
    table = train.load_table(save(customers().assign(CustomerId=1 + np.arange(300) // 2)))
    assert table.schema.identifier is None
    assert "Say --id" in table.notes[0]


def test_a_named_identifier_wins(save):
    table = train.load_table(
        save(customers().assign(Account=np.arange(300))), identifier="Account", drop=["CustomerId"]
    )
    assert table.schema.identifier == "Account"
    assert table.notes == ()


# --- tables that are refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"Orders,IsRetained\n", "has a header and no rows"),
        (b"Orders,IsRetained\n" + b"1,0\n2,1\n" * 5, "has 10 rows; at least 20"),
        (b"Stadt,IsRetained\n" + "Köln,1\n".encode("latin-1") * 30, "is not UTF-8 in line 2"),
        (b"Orders,IsRetained\n" + b"1,0\n" * 8 + b"1,0,7\n" + b"2,1\n" * 20, "has 3 fields in line 10, but 2 columns"),
        (b"Orders,Plan,IsRetained\n" + b"1,a,0\n" * 8 + b"1,0\n", "has 2 fields in line 10, but 3 columns"),
        (b"Orders,Orders,IsRetained\n" + b"1,2,0\n" * 30, "Two columns are named Orders"),
        (b",Orders,IsRetained\n" + b"1,2,0\n" * 30, "Column 1 has no name"),
        (b'Plan,IsRetained\n"a,1\n' + b"b,0\n" * 30, "fields in line"),
        (b"Plan,IsRetained\n" + b"a,1\n" * 30 + b'b,"0\n', "cannot be read as a table"),
        (b"Plan,IsRetained\n" + b"a\0,1\n" * 30, "NUL character in line 2"),
        ("Plan,IsRetained\n".encode("utf-16"), "is not UTF-8 in line 1"),
    ],
)
def test_a_file_that_is_no_table_is_refused(save, content, expected):
    assert expected in refusal(save(content))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"IsRetained": None}, "The target IsRetained is missing in 300 rows"),
        ({"IsRetained": 1}, "one value only (1)"),
        ({"IsRetained": ["a", "b", "c"] * 100}, "has 3 values (a, b, c)"),
        ({"IsRetained": ["Yes", "Maybe"] * 150, "Plan": None}, "Column Plan is empty in every row"),
        ({"IsRetained": ["stays", "leaves"] * 150}, "Say it with --positive"),
        ({"IsRetained": [1] * 3 + [0] * 297}, "have IsRetained = 1; at least 2"),
        ({"IsRetained": [1] + [0] * 299}, "too few customers to split"),
        ({"Plan": ""}, "Column Plan is empty in every row; leave it out with --drop Plan"),
        ({"Plan": [f"code {number}" for number in range(300)]}, "Column Plan is text with 300 different values"),
        ({"Plan": "2024-05-01"}, "Column Plan holds dates"),
        ({"Orders": "inf"}, "Column Orders holds infinity"),
        ({"Orders": ["9" * 40, "1"] * 150}, "Column Orders holds infinity or numbers beyond"),
    ],
)
def test_a_column_that_cannot_be_used_is_named(save, change, expected):
    assert expected in refusal(save(customers().assign(**change)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target": "IsRetaind"}, "no column IsRetaind (--target); did you mean IsRetained?"),
        ({"identifier": "Customer"}, "no column Customer (--id)"),
        ({"drop": ["Plam"]}, "no column Plam (--drop); did you mean Plan?"),
        ({"positive": "2"}, "--positive 2 is no value of IsRetained; it has 0 and 1"),
        ({"identifier": "IsRetained"}, "--id and --target both name IsRetained"),
        ({"drop": ["Plan", "Orders", "RecencyDays", "MeanGapDays", "Newsletter"]}, "no feature columns"),
    ],
)
def test_an_option_that_does_not_fit_the_table_is_named(save, options, expected):
    assert expected in refusal(save(customers()), **options)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("", "The identifier CustomerId is missing in row 3"),
        ("a\nb", "has a line break in row 3"),
        ("x" * 300, "Row 3: CustomerId is longer than 200 characters"),
    ],
)
def test_an_identifier_that_cannot_be_kept_is_refused(save, key, expected):
    source = customers()
    source.loc[2, "CustomerId"] = key
    assert expected in refusal(save(source), identifier="CustomerId")


def test_a_column_that_is_empty_where_we_train_is_named(save):
    source = customers()
    held_out = train.split(train.load_table(save(source))).test_rows[0]
    source["Rare"] = np.nan
    source.loc[held_out, "Rare"] = 1.0
    sentence = refusal(save(source))
    assert sentence.startswith("Among the three quarters of the rows to train on: Column Rare is empty")


def test_a_missing_file_is_named():
    assert "no file" in refusal("nowhere.csv")
    assert "cannot be read" in refusal(Path(__file__).parent)


# --- any table at all

CELLS = st.one_of(
    st.sampled_from(["", " ", "NA", "0", "1", "True", "false", "2024-01-01", "-1e300", "1e400", "0x1", "nan", "ß"]),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(st.characters(codec="utf-8"), max_size=5),
)
COLUMNS = st.one_of(
    CELLS.map(lambda cell: [cell]),
    st.lists(CELLS, min_size=2, max_size=4),
    st.lists(st.integers(-5, 5).map(str), min_size=20, max_size=60),
    st.lists(st.floats(width=32).map(repr), min_size=20, max_size=60),
    st.lists(st.sampled_from(["True", "False", ""]), min_size=2, max_size=9),
)


@st.composite
def tables(draw):
    """Text of a CSV file: columns of any cells, repeated to fill the rows, and mostly a target of two values."""
    rows = draw(st.integers(18, 80))
    names = draw(st.lists(st.sampled_from(["a", "b id", "c", "Id", "ü", '"', "IsRetained "]), min_size=1, unique=True))
    columns = {name: np.resize(np.array(draw(COLUMNS), dtype=object), rows) for name in names}
    target = ["0", "1", *draw(st.lists(st.sampled_from(["0", "1"]), max_size=20))]
    if draw(st.integers(0, 9)) == 9:
        target.append(draw(CELLS))
    columns["IsRetained"] = np.resize(np.array(target, dtype=object), rows)
    return pd.DataFrame(columns).to_csv(index=False)


def as_served(schema, text):
    """What production makes of the same file: cells parsed one by one, then aligned."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return schema.align(schema.parse_text(list(rows), MISSING_IN_FILES)).matrix


@example(text="a,IsRetained\n" + ",0\n9223372036854775808,1\n" * 10, seed=0)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=tables(), seed=st.integers(0, 5))
def test_any_table_trains_as_it_is_served_or_is_refused_with_a_sentence(tmp_path_factory, text, seed):
    folder = tmp_path_factory.mktemp("any")
    path = folder / "table.csv"
    path.write_bytes(text.encode())
    models = {"tree": lambda seed: DecisionTreeClassifier(max_leaf_nodes=5, random_state=seed)}
    try:
        table = train.load_table(path)
        run = quickly(table, folder / "runs", models=models, seed=seed)
    except TableError:
        assert not (folder / "runs").exists()
        return
    parts = train.split(table, seed)
    matrix = as_served(run.schema, text)
    np.testing.assert_array_equal(matrix[parts.train_rows], parts.train_matrix)
    np.testing.assert_array_equal(matrix[parts.test_rows], parts.test_matrix)
    manifest = strict_json(run.folder / "manifest.json")
    aligned = run.schema.align([sample["row"] for sample in manifest["samples"]])
    answers = run.load_model("tree.joblib").predict_proba(aligned.matrix)[:, 1]
    assert answers.tolist() == [sample["probabilities"]["tree"] for sample in manifest["samples"]]


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text("aI,;\t\"'\r\n 01\0\x1c\u2028", max_size=60)).map(str))
def test_any_text_is_a_table_or_is_refused_with_a_sentence(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "table.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(TableError):
        train.load_table(path)


# --- the command


def test_the_command_trains_from_any_working_directory(save, folder, tmp_path):
    path = save(customers())
    command = [sys.executable, str(Path(train.__file__)), "--data", path.name, "--artifacts-dir", folder.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "CustomerId names the customer" in done.stdout
    assert "roc auc" in done.stdout
    command = f"{sys.executable} {train.BACKEND / 'manage.py'} register_algorithms"
    assert "Next: register it; a running server answers with it from the next request on" in done.stdout
    assert f"  {command}\n" in done.stdout and f"  {command} --endpoint NAME --version 1.0.0\n" in done.stdout
    assert [run.version for run in artifacts.training_runs(folder)] == ["1.0.0"]


def test_the_command_passes_every_option_on(save, folder, capsys):
    source = customers().rename(columns={"CustomerId": "Account", "IsRetained": "Stays"}).assign(Leak=1, Other=2)
    arguments = ["--data", save(source), "--artifacts-dir", folder, "--target", "Stays", "--positive", "0"]
    arguments += ["--id", "Account", "--drop", "Leak, Other", "--version", "7", "--seed", "5"]
    assert train.main([str(argument) for argument in arguments]) == 0
    run = artifacts.open_run(folder, "7")
    assert (run.schema.target.positive, run.schema.identifier) == ("0", "Account")
    assert (run.schema.dropped, run.manifest["seed"]) == (("Leak", "Other"), 5)
    assert "names the customer" not in capsys.readouterr().out


def test_a_refused_table_is_one_sentence_and_exit_code_two(save, folder, capsys):
    assert train.main(["--data", str(save("a,b\n1,2\n")), "--artifacts-dir", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "The table has no column IsRetained (--target); it has a, b.\n"
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(save, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "MODELS", ONE_TREE)
    (tmp_path / "taken").write_text("a file")
    assert train.main(["--data", str(save(customers())), "--artifacts-dir", str(tmp_path / "taken")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupted_training_says_that_nothing_was_written(save, folder, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", interrupt)
    assert train.main(["--data", str(save(customers())), "--artifacts-dir", str(folder)]) == 130
    assert capsys.readouterr().err == "Interrupted; nothing was written.\n"
    assert not folder.exists()


def test_if_missing_trains_only_where_there_is_no_run(save, folder, capsys):
    arguments = ["--data", str(save(customers())), "--artifacts-dir", str(folder), "--if-missing"]
    assert train.main(arguments) == 0
    capsys.readouterr()
    assert train.main(arguments) == 0
    assert capsys.readouterr().out == f"Version 1.0.0 is in {folder} already; nothing to train.\n"
    assert [run.version for run in artifacts.training_runs(folder)] == ["1.0.0"]


@pytest.mark.parametrize("seed", ["-1", "x", str(2**32), "1.5"])
def test_a_seed_out_of_range_is_refused(seed, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--seed", seed])
    assert stopped.value.code == 2
    assert "no whole number from 0" in capsys.readouterr().err


def test_the_committed_table_is_worth_a_model(tmp_path):
    """The forest must beat the data card's figure for a plain one, and what it says must be calibrated."""
    table = train.load_table(train.DATA)
    parts = train.split(table)
    assert (len(parts.train_rows), len(parts.test_rows)) == (17_677, 5_893)
    forest = {"random_forest": train.MODELS["random_forest"]}
    scores = train.evaluate(train.fit(parts, models=forest), parts, resamples=20)
    assert scores["random_forest"]["roc_auc"]["value"] > 0.75
    assert scores["random_forest"]["expected_calibration_error"]["value"] < 0.04
    assert scores["random_forest"]["accuracy"]["low"] > scores["baseline"]["accuracy"]["high"]


def test_spaces_around_a_column_name_do_not_count(tmp_path):
    path = tmp_path / "spaced.csv"
    path.write_text("Orders, Plan ,IsRetained\n" + "".join(f"{n % 7},{'ab'[n % 2]},{n % 2}\n" for n in range(60)))

    assert train.load_table(path).schema.names == ("Orders", "Plan")
