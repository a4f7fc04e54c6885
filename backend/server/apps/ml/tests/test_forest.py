"""A compiled forest gives scikit-learn's probabilities to the last bit, and is compiled before it is asked."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba.core import event
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier

import train
from apps.ml import forest
from apps.ml.forest import compile_forest

pytestmark = pytest.mark.whole  # no database

LARGEST = float(np.finfo(np.float32).max)
LAYOUTS = ["narrow", "wide"]
FORESTS = [RandomForestClassifier, ExtraTreesClassifier]


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    if request.param == "wide":
        monkeypatch.setattr(forest, "_LINK_BITS", 0)
    return request.param


def some_table(seed=0, rows=300, features=12, missing=0.0, decimals=2, scale=1.0):
    """(rows, features) and (rows,): numbers with repetitions, and classes that depend on them a little."""
    random = np.random.default_rng(seed)
    matrix = np.round(random.normal(size=(rows, features)), decimals) * scale
    outcome = (matrix[:, 0] + matrix[:, -1] + random.normal(size=rows) * scale > 0).astype(int)
    outcome[0], outcome[-1] = 0, 1
    matrix[random.random(matrix.shape) < missing] = np.nan
    return matrix, outcome


def trees_of(estimator):
    return getattr(estimator, "estimators_", [estimator])


def rows_at_the_thresholds(estimator, matrix, rows, seed=0, missing=0.0):
    """(rows, features): of each feature, numbers that a tree compares with, their neighbours, and some others."""
    random = np.random.default_rng(seed)
    features = np.concatenate([tree.tree_.feature for tree in trees_of(estimator)])
    thresholds = np.concatenate([tree.tree_.threshold for tree in trees_of(estimator)])
    columns = []
    for feature in range(matrix.shape[1]):
        exact = thresholds[(features == feature) & np.isfinite(thresholds)]
        single = exact.astype(np.float32)
        pool = [
            exact,
            single,
            np.nextafter(single, np.float32(-LARGEST)),
            np.nextafter(single, np.float32(LARGEST)),
            matrix[~np.isnan(matrix[:, feature]), feature],
            [0.0, -0.0, 1e-45, -1e-45, 1e-50, 1e-38, LARGEST, -LARGEST],
        ]
        columns.append(random.choice(np.concatenate(pool).astype(np.float64), rows))
    chosen = np.column_stack(columns)
    chosen[random.random(chosen.shape) < missing] = np.nan
    return chosen


def assert_same(estimator, matrix, answers):
    with np.errstate(all="ignore"):  # scikit-learn adds up all numbers to see whether one of them is infinite
        expected = estimator.predict_proba(matrix)
    assert answers.dtype == expected.dtype
    assert answers.shape == expected.shape
    different = np.flatnonzero((answers.view(np.int64) != expected.view(np.int64)).any(axis=1))
    assert not len(different), f"{len(different)} of {len(matrix)} rows, the first is row {different[0]}"


def answered_in_parts(compiled, matrix):
    """The answers to 1, 2, ... 17 rows at a time, and then to the others one by one."""
    ends = np.cumsum([*range(1, 18), *[1] * len(matrix)])
    return np.concatenate([compiled.predict_proba(rows) for rows in np.split(matrix, ends[ends < len(matrix)])])


# --- any forest


@st.composite
def estimators(draw):
    """A fitted estimator and the table that it was fitted to."""
    features = draw(st.sampled_from([1, 2, 3, 12, 40, 301]))
    matrix, outcome = some_table(
        seed=draw(st.integers(0, 10**6)),
        rows=draw(st.integers(2, 200)),
        features=features,
        missing=draw(st.sampled_from([0.0, 0.0, 0.2, 0.9])),
        decimals=draw(st.sampled_from([0, 1, 8])),
        scale=draw(st.sampled_from([1.0, 1.0, 1e30, 1e-30, 1e-42])),
    )
    if draw(st.booleans()):  # few customers who stay
        outcome = np.where(np.arange(len(outcome)) % 20 == 1, 1, 0)
    options = {
        "max_depth": draw(st.sampled_from([None, None, 1, 4])),
        "max_leaf_nodes": draw(st.sampled_from([None, None, 2, 9])),
        "min_samples_leaf": draw(st.sampled_from([1, 1, 5])),
        "criterion": draw(st.sampled_from(["gini", "entropy"])),
        "class_weight": draw(st.sampled_from([None, "balanced", {0: 0.3, 1: 7.1}])),
        "random_state": draw(st.integers(0, 1000)),
    }
    kind = draw(st.sampled_from([*FORESTS, *FORESTS, DecisionTreeClassifier, ExtraTreeClassifier]))
    if kind in FORESTS:
        options |= {"n_estimators": draw(st.integers(1, 20)), "bootstrap": draw(st.booleans()), "n_jobs": 1}
    weights = np.random.default_rng(1).exponential(size=len(outcome)) if draw(st.booleans()) else None
    return kind(**options).fit(matrix, outcome, sample_weight=weights), matrix


@given(estimators(), st.integers(0, 100))
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_any_forest_answers_as_scikit_learn_does(layout, fitted, seed):
    estimator, matrix = fitted
    compiled = compile_forest(estimator)
    rows = rows_at_the_thresholds(estimator, matrix, rows=300, seed=seed)
    incomplete = rows_at_the_thresholds(estimator, matrix, rows=200, seed=seed, missing=min(0.3, 2 / matrix.shape[1]))

    assert compiled.wide == (layout == "wide")
    for asked in (rows, incomplete):
        assert_same(estimator, asked, compiled.predict_proba(asked))
        assert_same(estimator, asked, answered_in_parts(compiled, asked))


def test_trees_of_a_single_node_answer(layout):
    matrix, outcome = some_table()
    estimator = RandomForestClassifier(9, min_samples_leaf=200, n_jobs=1).fit(matrix, outcome)
    assert all(tree.tree_.node_count == 1 for tree in estimator.estimators_)

    assert_same(estimator, matrix, compile_forest(estimator).predict_proba(matrix))


def test_a_table_of_more_features_than_a_block_holds_answers(layout):
    matrix, outcome = some_table(features=10_000, rows=60)
    estimator = ExtraTreesClassifier(30, n_jobs=1, random_state=0).fit(matrix, outcome)
    rows = rows_at_the_thresholds(estimator, matrix, rows=50)

    assert_same(estimator, rows, compile_forest(estimator).predict_proba(rows))


def test_nodes_become_wide_where_feature_and_child_do_not_fit_beside_each_other(monkeypatch):
    matrix, outcome = some_table(features=12)
    estimator = RandomForestClassifier(10, n_jobs=1, random_state=0).fit(matrix, outcome)
    nodes = sum(tree.tree_.node_count for tree in estimator.estimators_)
    needed = (12 - 1).bit_length() + nodes.bit_length()

    for bits, wide in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(forest, "_LINK_BITS", bits)
        compiled = compile_forest(estimator)
        assert compiled.wide == wide
        assert_same(estimator, matrix, compiled.predict_proba(matrix))


# --- the models of this product


@pytest.fixture(scope="module")
def product():
    """The three models, trained on the whole of the table that is shipped, and that table."""
    table = train.load_table(train.DATA)
    matrix = table.schema.align_table(table.frame).matrix
    outcome = train.outcomes(table.frame, table.schema.target)
    return [make(train.SEED).fit(matrix, outcome) for make in train.MODELS.values()], matrix


def assert_same_for(product, rows):
    models, matrix = product
    assert len(models) == 3
    for model in models:
        if hasattr(model, "n_jobs"):
            model.set_params(n_jobs=1)
        chosen = rows_at_the_thresholds(model, matrix, rows)
        assert_same(model, chosen, compile_forest(model).predict_proba(chosen))


def test_a_hundred_thousand_rows_get_the_trained_models_answers(product):
    assert_same_for(product, 100_000)


@pytest.mark.slow
def test_a_million_rows_get_the_trained_models_answers(product):
    assert_same_for(product, 1_000_000)


# --- any matrix


@pytest.fixture(scope="module")
def fitted():
    matrix, outcome = some_table(missing=0.1)
    return RandomForestClassifier(20, n_jobs=1, random_state=0).fit(matrix, outcome)


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize(
    "change",
    [
        lambda matrix: matrix.astype(np.float32),
        lambda matrix: matrix.astype(">f8"),
        lambda matrix: (matrix * 100).astype(np.int32),
        lambda matrix: np.full(matrix.shape, 2**60 + 2**36 + 1),  # is rounded up once, but down if twice
        lambda matrix: matrix > 0,
        lambda matrix: matrix.astype(object),
        lambda matrix: np.asfortranarray(matrix),
        lambda matrix: np.repeat(matrix, 2, axis=0)[::2],
        lambda matrix: np.repeat(matrix, 2, axis=1)[:, ::2],
        lambda matrix: matrix[::-1, ::-1],
        lambda matrix: np.broadcast_to(matrix[:1], matrix.shape),
        lambda matrix: np.frombuffer(matrix.tobytes()).reshape(matrix.shape),  # not to be written to
        lambda matrix: matrix.tolist(),
    ],
)
def test_a_matrix_of_any_type_and_layout_is_read_as_scikit_learn_reads_it(fitted, change, rows):
    matrix = change(some_table(seed=5, rows=rows)[0])

    assert_same(fitted, matrix, compile_forest(fitted).predict_proba(matrix))


def test_integers_are_rounded_once():
    integers = 2**60 + 2**36 + np.arange(-3, 4)
    matrix = integers.reshape(-1, 1).repeat(20, axis=0)
    assert (matrix.astype(np.float32) != matrix.astype(np.float64).astype(np.float32)).any()
    estimator = DecisionTreeClassifier().fit(matrix, matrix[:, 0] > 2**60 + 2**36)

    assert_same(estimator, matrix, compile_forest(estimator).predict_proba(matrix))


def test_no_rows_get_no_answers(fitted):
    answers = compile_forest(fitted).predict_proba(np.empty((0, 12)))

    assert answers.shape == (0, 2)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("number", [np.inf, -np.inf, 1e39, np.nextafter(LARGEST, np.inf) * (1 + 2**-24)])
def test_what_is_infinite_in_single_precision_is_refused_as_by_scikit_learn(fitted, number, rows):
    matrix = some_table(rows=rows, missing=0.1)[0]
    matrix[-1, 3] = number

    with np.errstate(over="ignore"), pytest.raises(ValueError, match="infinity or a value too large"):
        fitted.predict_proba(matrix)
    with pytest.raises(ValueError, match="infinity or a value too large"):
        compile_forest(fitted).predict_proba(matrix)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_missing_value_is_refused_where_scikit_learn_refuses_it(rows):
    matrix, outcome = some_table()
    estimator = ExtraTreeClassifier(splitter="best").fit(matrix, outcome)
    matrix[rows - 1, 3] = np.nan

    with pytest.raises(ValueError, match="contains NaN"):
        estimator.predict_proba(matrix[:rows])
    with pytest.raises(ValueError, match="contains NaN"):
        compile_forest(estimator).predict_proba(matrix[:rows])


@pytest.mark.parametrize("shape", [(12,), (1, 11), (3, 13), (0,), (1, 1, 12)])
def test_a_matrix_of_another_shape_is_refused(fitted, shape):
    with pytest.raises(ValueError, match="12 features are expected"):
        compile_forest(fitted).predict_proba(np.zeros(shape))


def test_a_matrix_is_left_as_it_was(fitted):
    matrix = some_table(missing=0.1)[0]
    before = matrix.tobytes()

    compile_forest(fitted).predict_proba(matrix)

    assert matrix.tobytes() == before


# --- in a server


def test_no_call_compiles(layout, fitted):
    compiled = compile_forest(fitted)
    matrix = some_table(missing=0.01)[0]
    with event.install_recorder("numba:compile") as recorder:
        for rows in (matrix, matrix[:1], np.nan_to_num(matrix), np.asfortranarray(matrix), matrix.astype(np.float32)):
            compiled.predict_proba(rows)
            compiled.predict_proba(np.broadcast_to(rows[0], rows.shape))
    assert not recorder.buffer


def test_many_threads_get_their_own_answers(fitted):
    compiled = compile_forest(fitted)
    matrix = some_table(rows=4_000, missing=0.001)[0]
    expected = fitted.predict_proba(matrix)
    wrong = []

    def ask(start):
        for first in range(start, 4_000, 80):
            for size in (1, 7, 300):
                rows = slice(first, first + size)
                if compiled.predict_proba(matrix[rows]).tobytes() != expected[rows].tobytes():
                    wrong.append(rows)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong


@pytest.mark.parametrize("change", [0, 1])
def test_one_bit_of_difference_is_seen(fitted, change):
    compiled = compile_forest(fitted)
    matrix = some_table(rows=3)[0]
    expected = fitted.predict_proba(matrix)
    expected.view(np.int64)[2, 1] += change

    assert compiled.answers(matrix, expected) == (change == 0)


# --- what is not compiled


class Subclass(RandomForestClassifier):
    def predict_proba(self, X):
        return super().predict_proba(X)[:, ::-1]


@pytest.mark.parametrize(
    "estimator",
    [
        GradientBoostingClassifier(n_estimators=3),
        HistGradientBoostingClassifier(max_iter=3),
        make_pipeline(StandardScaler(), RandomForestClassifier(3)),
        CalibratedClassifierCV(RandomForestClassifier(3), cv=2),
        RandomForestRegressor(3),
        DecisionTreeRegressor(),
        Subclass(3),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_any_other_estimator_is_left_to_scikit_learn(estimator):
    assert compile_forest(estimator.fit(*some_table())) is None


def test_anything_but_two_classes_is_left_to_scikit_learn():
    matrix, outcome = some_table()
    three = np.arange(len(outcome)) % 3
    for classes in (three, np.zeros(len(outcome)), np.column_stack([outcome, outcome])):
        for kind in (RandomForestClassifier(3), DecisionTreeClassifier()):
            assert compile_forest(kind.fit(matrix, classes)) is None


@pytest.mark.parametrize("estimator", [RandomForestClassifier(), DecisionTreeClassifier(), None, {"a": 1}], ids=repr)
def test_what_was_not_trained_is_left_to_scikit_learn(estimator):
    assert compile_forest(estimator) is None
