"""Columns are learned once; then every row is read, checked and aligned exactly as the training table was."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import time
import tracemalloc
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import train
from apps.endpoints import batch
from apps.ml.schema import (
    BOOLEAN,
    CATEGORICAL,
    MISSING_IN_FILES,
    MISSING_IN_FORMS,
    NUMERIC,
    UNSEEN_CATEGORY,
    Column,
    InputError,
    Problem,
    Schema,
    TableError,
    Target,
    learn_schema,
)

SCHEMA = Schema(
    columns=(
        Column("Orders", NUMERIC, 1),
        Column("Plan", CATEGORICAL, "basic", ("basic", "family", "premium")),
        Column("Newsletter", BOOLEAN, True),
    ),
    target=Target("IsRetained", "1", "0"),
    identifier="CustomerId",
    dropped=("Leak",),
)


def problems_of(*rows, schema=SCHEMA):
    with pytest.raises(InputError) as refused:
        schema.align(rows)
    return [(problem.row, problem.field, problem.message) for problem in refused.value.problems]


def only_problem(row):
    ((_, field, message),) = problems_of(row)
    return field, message


# --- one row


def test_a_row_becomes_numbers_in_the_order_of_training():
    aligned = SCHEMA.align([{"Newsletter": False, "Plan": "premium", "Orders": 2.5}])

    assert aligned.matrix.tolist() == [[2.5, 2.0, 0.0]]
    assert aligned.warnings == {}


def test_absent_keys_and_nulls_take_the_training_mode_and_are_listed():
    aligned = SCHEMA.align([{"Orders": None, "Plan": "family"}])

    assert aligned.matrix.tolist() == [[1.0, 1.0, 1.0]]
    assert aligned.warnings == {0: ["missing, filled with the training mode: Orders=1, Newsletter=True"]}


def test_an_unseen_category_is_scored_as_unknown_and_reported():
    aligned = SCHEMA.align([{"Orders": 1, "Plan": "gold", "Newsletter": True}])

    assert aligned.matrix.tolist() == [[1.0, UNSEEN_CATEGORY, 1.0]]
    assert aligned.warnings == {0: ["Plan: 'gold' was not seen in training, scored as unknown"]}


def test_identifier_target_and_dropped_columns_are_ignored_whatever_they_hold():
    row = {"Orders": 1, "Plan": "basic", "Newsletter": True}
    extras = {"CustomerId": "C1", "IsRetained": object(), "Leak": math.nan}

    assert SCHEMA.align([{**row, **extras}]).matrix.tolist() == SCHEMA.align([row]).matrix.tolist()


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (3.5, 3.5),
        (np.int64(3), 3.0),
        (np.uint8(3), 3.0),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float64(0.1), 0.1),
        (Fraction(1, 2), 0.5),
        (2**53 + 1, float(2**53)),
        (10**38, 1e38),
        (-0.0, 0.0),
        (5e-324, 5e-324),
    ],
)
def test_any_real_number_is_a_number(value, number):
    assert SCHEMA.align([{"Orders": value}]).matrix[0, 0] == number
    assert SCHEMA.align([{"Orders": value}] * 3).matrix[:, 0].tolist() == [number] * 3


@pytest.mark.parametrize("value", [True, np.True_, 1, 1.0, np.int64(1)])
def test_one_is_a_spelling_of_true(value):
    assert SCHEMA.align([{"Newsletter": value}]).matrix[0, 2] == 1.0


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"orders": 1}, "orders", "'orders' is not a column of this model; did you mean Orders?"),
        ({"Order": 1}, "Order", "did you mean Orders?"),
        ({"NEWSLETER": True}, "NEWSLETER", "did you mean Newsletter?"),
        ({"x": 1}, "x", "'x' is not a column of this model; columns are Orders, Plan, Newsletter"),
        ({5: 1}, "5", "5 is not a column of this model"),
        ({"": 1}, "", "'' is not a column"),
        ({None: 1}, "None", "None is not a column"),
        ({"Orders": True}, "Orders", "Orders expects a number, got True"),
        ({"Orders": np.True_}, "Orders", "Orders expects a number, got"),
        ({"Orders": "3"}, "Orders", "Orders expects a number, got '3'"),
        ({"Orders": [3]}, "Orders", "Orders expects a number, got [3]"),
        ({"Orders": {}}, "Orders", "Orders expects a number, got {}"),
        ({"Orders": 3 + 0j}, "Orders", "Orders expects a number"),
        ({"Orders": math.nan}, "Orders", "Orders is NaN; leave it out or send null"),
        ({"Orders": np.float32("nan")}, "Orders", "Orders is NaN"),
        ({"Orders": math.inf}, "Orders", "Orders is infinite or beyond 3.4e+38"),
        ({"Orders": -1e39}, "Orders", "Orders is infinite or beyond 3.4e+38"),
        ({"Orders": 10**400}, "Orders", "Orders is infinite or beyond 3.4e+38"),
        ({"Orders": -(10**400)}, "Orders", "Orders is infinite or beyond 3.4e+38"),
        ({"Plan": 1}, "Plan", "Plan expects text, got 1"),
        ({"Plan": True}, "Plan", "Plan expects text, got True"),
        ({"Plan": math.nan}, "Plan", "Plan expects text, got nan"),
        ({"Plan": b"basic"}, "Plan", "Plan expects text, got b'basic'"),
        ({"Plan": 10**5000}, "Plan", "Plan expects text, got a number of thousands of digits"),
        ({"Plan": "a\x00"}, "Plan", "Plan holds a character that cannot be stored"),
        ({"Plan": "\ud800"}, "Plan", "Plan holds a character that cannot be stored"),
        ({"Newsletter": "true"}, "Newsletter", "Newsletter expects true or false, got 'true'"),
        ({"Newsletter": 2}, "Newsletter", "Newsletter expects true or false, got 2"),
        ({"Newsletter": []}, "Newsletter", "Newsletter expects true or false, got []"),
        ({"Newsletter": 1 + 0j}, "Newsletter", "Newsletter expects true or false, got (1+0j)"),
        ({"Newsletter": math.nan}, "Newsletter", "Newsletter expects true or false, got nan"),
        ({}, None, "no feature is given; send at least one of Orders, Plan, Newsletter"),
        ({"CustomerId": "C1", "IsRetained": 1}, None, "no feature is given"),
        ("Orders", None, "each customer is an object of column names and values, got 'Orders'"),
        (None, None, "each customer is an object of column names and values, got None"),
        (["Orders"], None, "each customer is an object of column names and values"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(row, field, expected):
    found_field, message = only_problem(row)

    assert found_field == field
    assert expected in message
    # The same in company as alone.
    good = {"Orders": 1}
    assert problems_of(good, row, good) == [(1, found_field, message)]


def test_every_problem_is_told_in_the_order_of_the_rows():
    found = problems_of({"Orders": "a", "Newsletter": 7}, {"Orders": 1}, {"Plan": 3}, {"oops": 1, "Orders": 2}, [])

    assert [(row, field) for row, field, _ in found] == [
        (0, "Orders"),
        (0, "Newsletter"),
        (2, "Plan"),
        (3, "oops"),
        (4, None),
    ]


def test_a_million_bad_rows_cost_neither_minutes_nor_gigabytes():
    wide = Schema(tuple(Column(f"column_number_{n}", NUMERIC, 1) for n in range(300)), SCHEMA.target)
    rows = [{"colum_numbr_17": 1}] * 300_000

    tracemalloc.start()
    began = time.process_time()
    found = problems_of(*rows, schema=wide)
    seconds = time.process_time() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert seconds < 10
    assert "did you mean column_number_17?" in found[0][2]
    assert len(found) >= 10_000
    assert peak < 60e6


# --- many rows answer as each alone

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.sampled_from(
        [
            "basic",
            "family",
            "gold",
            "",
            "a\x00",
            "3",
            np.int8(4),
            np.float32(2.5),
            10**400,
            [],
            "\ud800",
            1 + 0j,
            Decimal(1),
            np.str_("basic"),
        ]
    ),
)
rows_of_anything = st.one_of(
    st.dictionaries(st.sampled_from(["Orders", "Plan", "Newsletter", "CustomerId", "Leak", "Plann"]), values),
    st.sampled_from([None, [], "x", 5]),
)
sound_rows = st.fixed_dictionaries(
    {},
    optional={
        "Orders": st.none() | st.integers(-(2**70), 2**70) | st.floats(-1e38, 1e38),
        "Plan": st.none() | st.sampled_from(["basic", "family", "premium", "gold", ""]),
        "Newsletter": st.none() | st.booleans(),
    },
).filter(bool)


def outcome(rows):
    """What becomes of rows: numbers and warnings of each, or (row, field, message) of what is wrong."""
    try:
        aligned = SCHEMA.align(rows)
    except InputError as error:
        return [(problem.row, problem.field, problem.message) for problem in error.problems]
    assert aligned.warnings.keys() <= {*range(len(rows))}
    return aligned.matrix.tolist(), [aligned.warnings.get(row) for row in range(len(rows))]


@given(st.lists(rows_of_anything, max_size=8))
@settings(deadline=None)
def test_rows_of_anything_are_answered_in_bulk_as_one_by_one(rows):
    alone = [outcome([row]) for row in rows]
    refused = [(index, *rest) for index, one in enumerate(alone) if isinstance(one, list) for _, *rest in one]

    if refused:
        assert outcome(rows) == refused
    else:
        assert outcome(rows) == ([m for one in alone for m in one[0]], [w for one in alone for w in one[1]])


@st.composite
def schemas_with_a_row(draw):
    """Any columns, and a row of which most values are of their column's kind."""
    names = draw(st.lists(st.text(max_size=3).filter(bool), min_size=1, max_size=12, unique=True))
    word = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
    columns, row = [], {}
    for name in names:
        kind = draw(st.sampled_from([NUMERIC, BOOLEAN, CATEGORICAL]))
        categories = tuple(sorted(draw(st.lists(word, min_size=1, unique=True)))) if kind == CATEGORICAL else ()
        plain = {
            NUMERIC: st.integers(-(2**70), 2**70) | st.floats(-1e38, 1e38),
            BOOLEAN: st.booleans(),
            CATEGORICAL: st.sampled_from(categories or ("",)),
        }[kind]
        columns.append(Column(name, kind, draw(plain), categories))
        if kind == CATEGORICAL:
            plain |= word
        if draw(st.integers(0, 5)):
            row[name] = draw(plain if draw(st.integers(0, 20)) else values)
    return Schema(tuple(columns), Target("the target", "1", "0")), row


@given(schemas_with_a_row())
@settings(deadline=None, max_examples=300)
def test_whatever_the_columns_a_row_is_aligned_alone_as_in_company(schema_and_row):
    schema, row = schema_and_row

    def aligned(rows):
        try:
            found = schema.align(rows)
        except InputError as error:
            return [(problem.field, problem.message) for problem in error.problems if problem.row == 0]
        matrix, filled = found.matrix[:1], found.filled[:1]
        assert found.matrix.shape == found.filled.shape == (len(rows), len(schema.columns))
        assert found.matrix.flags.c_contiguous
        return matrix.dtype, matrix.tobytes(), filled.dtype, filled.tolist(), found.warnings.get(0), found.unseen.get(0)

    assert aligned([row]) == aligned([row, row])


@given(st.lists(sound_rows, min_size=1, max_size=8))
@settings(deadline=None)
def test_a_table_is_aligned_as_its_rows_are(rows):
    # pandas keeps a column of nothing as objects, and integers beyond 64 bits too.
    frame = pd.DataFrame(rows)

    by_row, by_column = SCHEMA.align(rows), SCHEMA.align_table(frame)

    assert by_column.matrix.tolist() == by_row.matrix.tolist()
    assert by_column.warnings == by_row.warnings
    shuffled = SCHEMA.align_table(frame[frame.columns[::-1]])
    assert shuffled.matrix.tolist() == by_row.matrix.tolist()


@pytest.mark.parametrize(
    "dtypes",
    [
        {"Orders": "Int64", "Plan": "string", "Newsletter": "boolean"},
        {"Orders": "float32", "Plan": "category", "Newsletter": "object"},
        {"Orders": "object", "Plan": "object", "Newsletter": "object"},
    ],
)
def test_a_table_may_use_any_of_the_types_of_pandas(dtypes):
    frame = pd.DataFrame({"Orders": [4, None], "Plan": ["family", None], "Newsletter": [False, None]}).astype(dtypes)

    aligned = SCHEMA.align_table(frame)

    assert aligned.matrix.tolist() == [[4.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    assert aligned.warnings[1] == ["missing, filled with the training mode: Orders=1, Plan=basic, Newsletter=True"]


@pytest.mark.parametrize(
    ("frame", "field", "expected"),
    [
        (pd.DataFrame([[1, 2]], columns=["Orders", "Orders"]), "Orders", "Orders is the name of several columns"),
        (pd.DataFrame({"Ordres": [1, 2]}), "Ordres", "did you mean Orders?"),
        (pd.DataFrame({"CustomerId": [1]}), None, "no feature is given"),
        (pd.DataFrame({0: [1]}), "0", "0 is not a column"),
        (pd.DataFrame({"Orders": [1, np.inf]}), "Orders", "Orders is infinite"),
        (pd.DataFrame({"Orders": pd.to_datetime(["2024-01-01"])}), "Orders", "Orders expects a number, got Timestamp"),
        (pd.DataFrame({"Plan": [1, 2]}), "Plan", "Plan expects text, got 1"),
    ],
)
def test_a_table_that_cannot_be_scored_is_refused_by_name(frame, field, expected):
    with pytest.raises(InputError) as refused:
        SCHEMA.align_table(frame)

    assert refused.value.problems[0].field == field
    assert expected in refused.value.problems[0].message


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame({"Orders": []}), pd.DataFrame(columns=["Plan"])])
def test_a_table_without_rows_has_no_answers(frame):
    assert SCHEMA.align_table(frame).matrix.shape == (0, 3)
    assert SCHEMA.align([]).matrix.shape == (0, 3)


# --- text: forms and files


def test_an_empty_form_value_is_missing_and_others_are_parsed_by_the_columns_kind():
    (row,) = SCHEMA.parse_text([{"Orders": " 3 ", "Plan": "NA", "Newsletter": "", "CustomerId": "7", "Leak": "x"}])

    assert row == {"Orders": 3, "Plan": "NA", "Newsletter": None, "CustomerId": "7", "Leak": "x"}


@pytest.mark.parametrize("spelling", sorted(MISSING_IN_FILES))
def test_a_files_spellings_of_missing_are_missing(spelling):
    cells = dict.fromkeys(["Orders", "Plan", "Newsletter", "CustomerId"], f" {spelling} ")

    assert SCHEMA.parse_text([cells], MISSING_IN_FILES) == [dict.fromkeys(cells)]


@pytest.mark.parametrize(
    ("column", "text", "value"),
    [
        ("Orders", "12", 12),
        ("Orders", "+5", 5),
        ("Orders", ".5", 0.5),
        ("Orders", "5.", 5),
        ("Orders", " 1e3 ", 1000),
        ("Orders", "007", 7),
        ("Orders", "0.1", 0.1),
        ("Newsletter", " TRUE", True),
        ("Newsletter", "no", False),
        ("Newsletter", "1", True),
        ("Plan", " basic", " basic"),
    ],
)
def test_text_is_read_as_its_column(column, text, value):
    (row,) = SCHEMA.parse_text([{column: text}])

    assert row[column] == value
    assert type(row[column]) is type(value)


@pytest.mark.parametrize(
    ("column", "text", "expected"),
    [
        ("Orders", "1_000", "Orders expects a number such as 12.5, got '1_000'"),
        ("Orders", "1,5", "Orders expects a number such as 12.5, got '1,5'"),
        ("Orders", "0x10", "Orders expects a number"),
        ("Orders", "\uff11\uff12", "Orders expects a number"),
        ("Orders", "9" * 100_000 + "x", "Orders expects a number such as 12.5, got '999"),
        ("Newsletter", "maybe", "Newsletter expects true or false, got 'maybe'"),
    ],
)
def test_text_that_is_not_of_its_columns_kind_is_refused(column, text, expected):
    with pytest.raises(InputError) as refused:
        SCHEMA.parse_text([{"Orders": "1"}, {column: text}])

    ((row, field, message),) = [(p.row, p.field, p.message) for p in refused.value.problems]
    assert (row, field) == (1, column)
    assert expected in message
    assert len(message) < 200


def test_what_is_no_text_in_a_form_is_judged_like_any_value():
    (row,) = SCHEMA.parse_text([{"Orders": io.BytesIO(b"a file"), "Plan": None}])

    assert only_problem(row)[0] == "Orders"


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e400"])
def test_what_a_form_spells_as_no_finite_number_is_refused(text):
    (row,) = SCHEMA.parse_text([{"Orders": text}])

    assert only_problem(row)[0] == "Orders"


# --- the customer key


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (None, ""),
        ("C1", "C1"),
        (" C1 ", "C1"),
        ("007", "007"),
        (7, "7"),
        (7.0, "7"),
        (np.int64(7), "7"),
        (np.float64(7), "7"),
        (7.5, "7.5"),
        (12345678901234567890, "12345678901234567890"),
    ],
)
def test_a_customer_has_one_spelling(value, key):
    assert SCHEMA.customer_key({"CustomerId": value}) == key


@pytest.mark.parametrize("value", [True, [], {}, math.nan, math.inf, "a" * 201, 10**400, "a\x00b", "\ud800"])
def test_what_cannot_be_a_customers_key_is_refused_by_name(value):
    with pytest.raises(ValueError, match="CustomerId"):
        SCHEMA.customer_key({"CustomerId": value})


def test_a_table_without_identifier_has_no_keys():
    schema = Schema(SCHEMA.columns, SCHEMA.target)

    assert schema.customer_key({"CustomerId": "C1"}) == ""
    assert schema.customer_keys([None, None]) == ["", ""]


texts = st.text(max_size=3) | st.sampled_from([" ", "NA", " NA ", "x" * 200, "x" * 201, " " * 201])
whole = st.integers() | st.sampled_from([sign * (10**n + d) for sign in (1, -1) for n in (199, 200) for d in (-1, 0)])


@given(
    st.lists(texts) | st.lists(whole) | st.lists(texts | whole | values, max_size=8),
    st.sampled_from([frozenset(), MISSING_IN_FILES, MISSING_IN_FORMS]),
)
@settings(deadline=None)
def test_many_keys_are_read_as_each_by_itself(told, missing):
    def alone(row, value):
        try:
            return SCHEMA.customer_key({"CustomerId": value}, missing), None
        except ValueError as error:
            return None, Problem("CustomerId", str(error), row)

    keys, problems = zip(*itertools.starmap(alone, enumerate(told)), strict=True) if told else ([], [])
    if any(problems):
        with pytest.raises(InputError) as refused:
            SCHEMA.customer_keys(told, missing)
        assert refused.value.problems == [problem for problem in problems if problem]
    else:
        assert SCHEMA.customer_keys(told, missing) == [*keys]


# --- learning


def learn(columns, **options):
    return learn_schema(pd.DataFrame({**columns, "y": [0, 1] * 100}), "y", **options)


def test_kinds_categories_and_modes_are_learned():
    schema = learn(
        {
            "count": [3] * 101 + list(range(99)),
            "amount": [0.5] * 100 + [None] * 100,
            "huge": [10**30] * 150 + [1] * 50,
            "flag": [True, False, False, None] * 50,
            "plan": ["b", "a", "b", None] * 50,
            "code": ["0x10", "1_000"] * 100,
            "key": [f"k{n}" for n in range(200)],
            "leak": pd.to_datetime(["2024-01-01"] * 200),
        },
        identifier="key",
        drop=["leak"],
    )

    assert [(c.name, c.kind, c.mode, c.categories) for c in schema.columns] == [
        ("count", NUMERIC, 3, ()),
        ("amount", NUMERIC, 0.5, ()),
        ("huge", NUMERIC, 1e30, ()),
        ("flag", BOOLEAN, False, ()),
        ("plan", CATEGORICAL, "b", ("a", "b")),
        ("code", CATEGORICAL, "0x10", ("0x10", "1_000")),
    ]
    assert (schema.identifier, schema.dropped) == ("key", ("leak",))
    assert schema.target == Target("y", "1", "0")


MANY = [f"value {n}" for n in range(200)]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([None] * 200, "Column x is empty in every row; leave it out with --drop x."),
        (["2024-05-01", "2024-05-02"] * 100, "Column x holds dates; turn it into a number"),
        (["1.5.2024", None] * 100, "Column x holds dates"),
        (["05/31/24 10:30:00" for _ in range(200)], "Column x holds dates"),
        (["3 Jan 2024", "17-FEB-24"] * 100, "Column x holds dates"),
        (["March 5, 2024", "unknown", "May 1 2024", None] * 50, "Column x holds dates"),
        (pd.to_datetime(["2024-05-01"] * 200), "Column x holds dates"),
        (pd.to_datetime(["2024-05-01"] * 200).tz_localize("UTC"), "Column x holds dates"),
        ([1.0, math.inf] * 100, "Column x holds infinity or numbers beyond 3.4e+38 in 100 rows; correct them"),
        ([1, 10**400] * 100, "Column x holds infinity or numbers beyond 3.4e+38 in 100 rows"),
        ([1.0, 1e39] * 100, "Column x holds infinity or numbers beyond"),
        ([1, "a"] * 100, "Column x holds values of type int, str; make them all numbers, text, or true and false"),
        ([True, "a"] * 100, "Column x holds values of type bool, str"),
        ([{}, []] * 100, "Column x holds values of type dict, list"),
        ([1j] * 200, "Column x holds values of type complex"),
        (MANY, "Column x is text with 200 different values, such as 'value 0'. If it is the customer's identifier"),
        ([str(n / 7) for n in range(199)] + ["n.a."], "Column x holds numbers, but also text such as 'n.a.'; correct"),
        (["1,5", *(f"{n},25" for n in range(199))], "Column x is text with 200 different values, such as '0,25'"),
        ([str(n) for n in range(200)], "Column x is text with 200 different values"),
        (["a\x00", "b"] * 100, "Column x holds a NUL character"),
    ],
)
def test_a_column_that_cannot_be_learned_is_named_with_the_remedy(column, expected):
    with pytest.raises(TableError) as refused:
        learn({"ok": [1, 2] * 100, "x": column})

    assert expected in str(refused.value)
    assert "--drop x" in str(refused.value)


def test_text_of_many_values_that_repeat_is_a_category():
    categories = [f"shop {n % 60}" for n in range(200)]

    assert len(learn({"x": categories}).columns[0].categories) == 60


def test_text_of_more_than_a_thousand_values_is_refused_in_a_table_of_any_length():
    frame = pd.DataFrame({"x": [f"shop {n % 1001}" for n in range(10_000)], "y": [0, 1] * 5000})

    with pytest.raises(TableError, match=r"Column x is text with 1,001 different values"):
        learn_schema(frame, "y")


@pytest.mark.parametrize(
    ("frame", "options", "expected"),
    [
        ({"x": [1, 2], "Z": [0, 1]}, {}, "The table has no column y (--target); it has x, Z."),
        ({"x": [1, 2], "yy": [0, 1]}, {}, "did you mean yy?"),
        ({"x": [1, 2], "y": [0, 1]}, {"identifier": "key"}, "The table has no column key (--id); it has x, y."),
        ({"x": [1, 2], "y": [0, 1]}, {"drop": ["leak"]}, "The table has no column leak (--drop)"),
        ({"x": [1, 2], "y": [0, 1]}, {"drop": ["x"]}, "no feature columns besides the target"),
        ({"x": [1, 2], "y": [0, None]}, {}, "The target y is missing in 1 rows; remove those rows."),
        ({"x": [1, 2], "y": [1, 1]}, {}, "The target y has one value only (1)"),
        ({"x": [1, 2, 3], "y": [0, 1, 2]}, {}, "The target y has 3 values (0, 1, 2); it must have two."),
        ({"x": [1, 2], "y": ["left", "stayed"]}, {}, "left or stayed? Say it with --positive."),
        ({"x": [1, 2], "y": ["yes", "no"]}, {"positive": "ja"}, "--positive ja is no value of y; it has no and yes."),
        ({"x": [1, 2], 5: [1, 2], "y": [0, 1]}, {}, "A column is named 5; name it with a word"),
        ({"x": [1, 2], " ": [1, 2], "y": [0, 1]}, {}, "A column is named ' '"),
    ],
)
def test_a_table_that_cannot_be_learned_is_refused_with_the_remedy(frame, options, expected):
    with pytest.raises(TableError) as refused:
        learn_schema(pd.DataFrame(frame), "y", **options)

    assert expected in str(refused.value)


def test_two_columns_of_one_name_are_refused():
    frame = pd.DataFrame([[1, 2, 0], [1, 2, 1]], columns=["x", "x", "y"])

    with pytest.raises(TableError, match="Two columns are named x; rename or delete one of them"):
        learn_schema(frame, "y")


@pytest.mark.parametrize(
    ("values", "positive", "expected"),
    [
        ([0, 1], None, ("1", "0")),
        ([0.0, 1.0], None, ("1", "0")),
        ([False, True], None, ("True", "False")),
        (["no", "Yes"], None, ("Yes", "no")),
        ([0, 1], "0", ("0", "1")),
        (["churned", "active"], "active", ("active", "churned")),
    ],
)
def test_the_target_may_be_spelled_in_any_way_and_inverted(values, positive, expected):
    target = learn_schema(pd.DataFrame({"x": [1, 2], "y": values}), "y", positive).target

    assert (target.positive, target.negative) == expected


# --- a schema is plain data

any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
names = any_text.filter(lambda name: name.strip() and name != "y")
numbers = st.integers(-(2**70), 2**70) | st.floats(-3e38, 3e38) | st.none()


@st.composite
def tables(draw):
    rows = draw(st.integers(2, 12))

    def column(elements):
        return st.lists(elements, min_size=rows, max_size=rows)

    kinds = st.one_of(column(numbers), column(st.booleans() | st.none()), column(any_text | st.none()))
    columns = draw(st.dictionaries(names, kinds, min_size=1, max_size=5))
    return pd.DataFrame({**columns, "y": [0, *[1] * (rows - 1)]})


@given(tables())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(pd.DataFrame({"x": [True, None], "y": [0, 1]}))
@example(pd.DataFrame({"x": [2**63, None], "y": [0, 1]}))
def test_a_schema_survives_json_and_aligns_its_own_table(frame):
    try:
        schema = learn_schema(frame, "y")
    except TableError:
        assume(False)

    back = Schema.from_dict(json.loads(json.dumps(schema.as_dict())))

    assert back == schema
    assert back.sha256 == schema.sha256
    aligned = schema.align_table(frame)
    assert not np.isnan(aligned.matrix).any()
    assert (aligned.matrix == back.align_table(frame).matrix).all()
    assert not any("not seen" in warning for warnings in aligned.warnings.values() for warning in warnings)


def damaged(**changes):
    column = {"name": "Orders", "kind": NUMERIC, "mode": 1, "categories": []}
    data = {"columns": [column], "target": {"name": "y", "positive": "1", "negative": "0"}}
    return {**data, "identifier": None, "dropped": [], **changes}


def column(**changes):
    return [{"name": "Orders", "kind": NUMERIC, "mode": 1, "categories": [], **changes}]


@pytest.mark.parametrize(
    "data",
    [
        damaged(columns=[]),
        damaged(columns=column(kind="number")),
        damaged(columns=column(kind=[])),
        damaged(columns=column(mode="1")),
        damaged(columns=column(mode=None)),
        damaged(columns=column(mode=10**400)),
        damaged(columns=column(name=5)),
        damaged(columns=column(name=None)),
        damaged(columns=column(categories="ab")),
        damaged(columns=column(kind=CATEGORICAL, mode="b", categories=["a"])),
        damaged(columns=column(kind=CATEGORICAL, mode="a", categories=["a", "a"])),
        damaged(columns=column(kind=CATEGORICAL, mode="a", categories=["a", 1])),
        damaged(columns=column() * 2),
        damaged(identifier="Orders"),
        damaged(identifier=5),
        damaged(dropped="Orders"),
        damaged(dropped=["Orders"]),
        damaged(target=None),
        damaged(target={"name": "y"}),
        damaged(target={"name": "Orders", "positive": "1", "negative": "0"}),
        damaged(target={"name": "y", "positive": 1, "negative": 0}),
    ],
)
def test_a_damaged_schema_is_refused(data):
    with pytest.raises((ValueError, TypeError, KeyError)):
        Schema.from_dict(data)


def test_any_difference_between_two_schemas_shows_in_their_digests():
    schemas = [
        SCHEMA,
        Schema(SCHEMA.columns[::-1], SCHEMA.target, "CustomerId", ("Leak",)),
        Schema(SCHEMA.columns, Target("IsRetained", "0", "1"), "CustomerId", ("Leak",)),
        Schema(SCHEMA.columns, SCHEMA.target, None, ("Leak",)),
        Schema(SCHEMA.columns, SCHEMA.target, "CustomerId"),
        Schema((Column("Orders", NUMERIC, 2), *SCHEMA.columns[1:]), SCHEMA.target, "CustomerId", ("Leak",)),
    ]

    assert len({schema.sha256 for schema in schemas}) == len(schemas)


# --- a file is read by the server as training read it

spaced = st.sampled_from(["", " ", "\t", "  "])
missing_cells = st.sampled_from(["", " ", "NA", " nan", "null ", "None", "#N/A", "-1.#IND", "N/A"])
number_cells = st.one_of(
    st.sampled_from(["1", "0", "+5", "-7", ".5", "5.", "1e3", "1E-3", "007", "-0.0", "1e-400", "18446744073709551616"]),
    st.integers(-(2**66), 2**66).map(str),
    st.floats(-1e38, 1e38).map(repr),
    st.floats(0, 1000).map("{:.2f}".format),
)
boolean_cells = st.sampled_from(["True", "False", "TRUE", "true", "false", "FALSE"])
text_cells = st.one_of(
    st.sampled_from(["basic", " basic", "basic ", "family plan", "a,b", 'say "hi"', "two\nlines", "0x10", "1_000"]),
    st.sampled_from(["yes", "no", "na", "NAN", "Null", "-", "?", "é", "\u00a05", "\uff11", "1 000", "1,5", "T", "on"]),
)
mixed_cells = st.one_of(number_cells, boolean_cells, text_cells, missing_cells)


@st.composite
def files(draw):
    """A customer file as text: every kind of column, every spelling, LF or CRLF, with or without a BOM."""
    rows = draw(st.integers(20, 30))

    def cells(elements):
        padded = st.tuples(spaced, elements, spaced).map("".join)
        return st.lists(st.one_of(elements, elements, padded, missing_cells), min_size=rows, max_size=rows)

    kinds = st.one_of(*map(cells, [number_cells, boolean_cells, text_cells, mixed_cells]))
    columns = draw(st.lists(kinds, min_size=1, max_size=4))
    header = [f"column {position}" for position in range(len(columns))]
    buffer = io.StringIO(newline="")
    writer = csv.writer(
        buffer, lineterminator=draw(st.sampled_from(["\n", "\r\n"])), delimiter=draw(st.sampled_from(",;\t"))
    )
    writer.writerow([*header, "IsRetained"])
    writer.writerows([*row, index % 2] for index, row in enumerate(zip(*columns, strict=True)))
    return draw(st.sampled_from(["", "\ufeff"])) + buffer.getvalue()


@given(files())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_the_server_reads_a_file_as_training_read_it(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "parity.csv"
    path.write_bytes(content.encode())
    try:
        table = train.load_table(path)
    except TableError:
        assume(False)

    uploaded = batch.read_csv(io.BytesIO(content.encode()))
    cells = [dict(zip(uploaded.layout.header, row, strict=True)) for row in uploaded.rows]
    served = table.schema.align(table.schema.parse_text(cells, MISSING_IN_FILES))
    features = table.frame[list(table.schema.names)]

    trained = table.schema.align_table(features)
    assert served.matrix.tolist() == trained.matrix.tolist()
    assert served.warnings == trained.warnings
    by_columns = table.schema.align_columns(table.schema.read_cells(uploaded.layout.header, uploaded.rows))
    assert by_columns.matrix.tolist() == served.matrix.tolist()
    assert by_columns.warnings == served.warnings


@given(cells=st.lists(st.tuples(mixed_cells, mixed_cells, mixed_cells), min_size=1, max_size=6))
@settings(deadline=None)
def test_a_table_of_text_is_read_by_columns_as_row_by_row(cells):
    schema = Schema(
        (
            Column("number", NUMERIC, 1.5),
            Column("truth", BOOLEAN, True),
            Column("word", CATEGORICAL, "a", ("a", "b")),
        ),
        Target("stays", "1", "0"),
    )

    def read(reading):
        try:
            aligned = reading()
        except InputError as error:
            return error.problems
        return aligned.matrix.tolist(), aligned.warnings

    rows = [dict(zip(schema.names, row, strict=True)) for row in cells]
    by_rows = read(lambda: schema.align(schema.parse_text(rows, MISSING_IN_FILES)))
    assert read(lambda: schema.align_columns(schema.read_cells(schema.names, cells))) == by_rows


def test_the_server_spells_customers_as_the_list_of_training_customers_does(tmp_path):
    keys = [" C 1", "C2 ", "0003", "4.0", "1e5", "é", "\u00a0x", *(f"N{n}" for n in range(40))]
    lines = [f"{key},{n % 5},{n % 2}" for n, key in enumerate(keys)]
    content = "CustomerId,Orders,IsRetained\n" + "\n".join(lines) + "\n"
    path = tmp_path / "customers.csv"
    path.write_text(content, encoding="utf-8")
    table = train.load_table(path)
    parts = train.split(table)
    run = train.train(table, directory=tmp_path / "artifacts", resamples=2, models={})

    uploaded = batch.read_csv(io.BytesIO(content.encode()))
    cells = [dict(zip(uploaded.layout.header, row, strict=True)) for row in uploaded.rows]
    served = [table.schema.customer_key(row) for row in table.schema.parse_text(cells, MISSING_IN_FILES)]

    assert run.training_customers == {served[row] for row in parts.train_rows}
    assert not run.training_customers & {served[row] for row in parts.test_rows}
