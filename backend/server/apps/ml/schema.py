"""The columns of a table: learned once, at training, then used to check and align every row.

A schema is plain data (it travels in the manifest of a training run) and knows no dataset: names, kinds,
categories and modes are whatever the training table had.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import compress, islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

NUMERIC, BOOLEAN, CATEGORICAL = "numeric", "boolean", "categorical"

# How a table in a file spells "missing": the spellings that pandas.read_csv takes for it.
_SPELLINGS = "#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null"
MISSING_IN_FILES = frozenset(["", "#N/A N/A", *_SPELLINGS.split()])
MISSING_IN_FORMS = frozenset([""])

UNSEEN_CATEGORY = -1.0
MAX_CATEGORIES = 1000
MAX_KEY_LENGTH = 200
# What is nearer to zero is short enough for a key, with its sign.
_SHORT_WHOLE = 10 ** (MAX_KEY_LENGTH - 1)

# The trees compare in single precision; what does not fit there would become infinite.
LARGEST_NUMBER = float(np.finfo(np.float32).max)

_TRUE_TEXT = frozenset(["true", "t", "yes", "y", "1", "on"])
_FALSE_TEXT = frozenset(["false", "f", "no", "n", "0", "off"])
_POSITIVE_TEXT = frozenset(["true", "yes", "y", "1"])
_MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_FULL_DATE = re.compile(
    rf"\s*(\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}}|\d{{1,2}}[-/.]\d{{1,2}}[-/.](\d{{4}}|\d{{2}})"
    rf"|\d{{1,2}}[-/. ]+{_MONTH}[-/., ]+(\d{{4}}|\d{{2}})|{_MONTH} \d{{1,2}},? \d{{4}})([T ].*)?\s*",
    re.IGNORECASE,
)
# PostgreSQL stores neither NUL characters nor lone surrogates, so no text of ours may hold one.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# Values of these types need no closer look than `Column.encode_all` gives them.
_PLAIN_TYPES = {NUMERIC: {int, float, type(None)}, BOOLEAN: {bool, type(None)}, CATEGORICAL: {str, type(None)}}

# Looking for the nearest name is slow, and a body of ten megabytes holds millions of bad rows.
_SUGGESTIONS = 10
_PROBLEMS = 10_000
# Rows that are looked at without letting other threads run.
_SLICE = 1_000


class TableError(ValueError):
    """A training table that cannot be learned from; the message names the column and the remedy."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one value. `row` counts from 0 within the rows that were given."""

    field: str | None
    message: str
    row: int = 0


class InputError(ValueError):
    """Rows that cannot be scored. `problems` lists why, in the order of the rows."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = sorted(problems, key=lambda problem: problem.row)
        super().__init__("; ".join(problem.message for problem in self.problems[:3]))


@dataclass(frozen=True)
class Column:
    """One feature column. `mode` is its most frequent training value; `categories` are sorted."""

    name: str
    kind: str
    mode: float | bool | str
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _PLAIN_TYPES:
            raise ValueError(f"{self.name} is of no known kind: {_shown(self.kind)}")
        if len(set(self.categories)) < len(self.categories):
            raise ValueError(f"{self.name} lists a category twice")
        if self.encode(self.mode) == UNSEEN_CATEGORY and self.kind == CATEGORICAL:
            raise ValueError(f"{self.name} has the mode {_shown(self.mode)}, which is none of its categories")

    @cached_property
    def _codes(self) -> dict[str, float]:
        return {category: float(code) for code, category in enumerate(self.categories)}

    def encode(self, value: Any) -> float:
        """The number that the model sees for a present value; `UNSEEN_CATEGORY` for an unknown category.

        Raises ValueError with a sentence when the value has the wrong type or is not finite.
        """
        if self.kind == CATEGORICAL:
            if not isinstance(value, str):
                raise ValueError(f"{self.name} expects text, got {_shown(value)}")
            if _UNSTORABLE.search(value):
                raise ValueError(f"{self.name} holds a character that cannot be stored (NUL or half a surrogate pair)")
            return self._codes.get(value, UNSEEN_CATEGORY)
        if self.kind == BOOLEAN:
            if isinstance(value, (bool, np.bool_)) or (isinstance(value, Real) and value in (0, 1)):
                return float(value)
            raise ValueError(f"{self.name} expects true or false, got {_shown(value)}")
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
            raise ValueError(f"{self.name} expects a number, got {_shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isnan(number):
            raise ValueError(f"{self.name} is NaN; leave it out or send null when it is not known")
        if abs(number) > LARGEST_NUMBER:
            raise ValueError(f"{self.name} is infinite or beyond {LARGEST_NUMBER:.1e}")
        return number

    def encode_all(self, values: Sequence[Any]) -> tuple[np.ndarray, list[Problem]]:
        """`encode` for many values: (values,) float64, NaN where a value is None; and what is wrong with the rest.

        numpy takes what is plainly right, `encode` looks at the others one by one.
        """
        numbers = np.full(len(values), np.nan)
        doubtful: Iterable[int] = range(len(values))
        if len(values) > 1 and set(map(type, values)) <= _PLAIN_TYPES[self.kind]:
            known = list(map(self._codes.get, values)) if self.kind == CATEGORICAL else values
            with suppress(OverflowError):  # an integer beyond float64
                numbers = np.array(known, dtype=np.float64)
                doubtful = np.flatnonzero(~(np.abs(numbers) <= LARGEST_NUMBER)).tolist()
        problems = []
        for index in doubtful:
            if values[index] is not None:
                try:
                    numbers[index] = self.encode(values[index])
                except ValueError as error:
                    problems.append(Problem(self.name, str(error), index))
        return numbers, problems

    def parse(self, text: str) -> float | bool | str:
        """The value that a form field or a CSV cell spells. Raises ValueError with a sentence."""
        if self.kind == CATEGORICAL:
            return text
        stripped = text.strip()
        if self.kind == BOOLEAN:
            if stripped.lower() in _TRUE_TEXT:
                return True
            if stripped.lower() in _FALSE_TEXT:
                return False
            raise ValueError(f"{self.name} expects true or false, got {_shown(text)}")
        number = _number(stripped)
        if number is None:
            raise ValueError(f"{self.name} expects a number such as 12.5, got {_shown(text)}")
        return int(number) if number.is_integer() and abs(number) < 2**53 else number

    def parse_all(self, texts: Sequence[str], missing: frozenset[str]) -> list[float | bool | str | None]:
        """`parse` for many cells, None for one that is spelled as in `missing`; whole numbers may stay floats."""
        if self.kind == NUMERIC:
            joined = "".join(texts)
            if joined.isascii() and "_" not in joined:
                with suppress(ValueError):
                    numbers = [float(text or "nan") for text in texts]
                    return [
                        number if number == number or text.strip() not in missing else None
                        for number, text in zip(numbers, texts, strict=True)
                    ]
        return [None if text.strip() in missing else self.parse(text) for text in texts]


@dataclass(frozen=True)
class Target:
    """The column to predict, and how the training table spells its two values as text."""

    name: str
    positive: str
    negative: str


class AlignedRows(NamedTuple):
    """Rows as the model sees them.

    matrix: (rows, columns) float64, no NaN. filled: (rows, columns) bool, where the training mode stands for
    a missing value. unseen: by row, the sentences about categories that training did not meet.
    """

    matrix: np.ndarray
    filled: np.ndarray
    unseen: Mapping[int, Sequence[str]]
    columns: Sequence[Column]

    @property
    def warnings(self) -> dict[int, list[str]]:
        """What was filled or not recognised, by row, of the rows where anything was."""
        found: dict[int, list[str]] = {}
        if b"\1" in self.filled.tobytes():
            sentences: dict[bytes, str] = {}  # many rows lack the same values
            for index in np.flatnonzero(self.filled.any(axis=1)).tolist():
                pattern = self.filled[index].tobytes()
                if pattern not in sentences:
                    names = ", ".join(f"{column.name}={column.mode}" for column in compress(self.columns, pattern))
                    sentences[pattern] = f"missing, filled with the training mode: {names}"
                found[index] = [sentences[pattern]]
        for index, unseen in self.unseen.items():
            found.setdefault(index, []).extend(unseen)
        return found


def checked_key(text: str, name: str) -> str:
    """A customer's key, which came under a name, without spaces around it. Raises ValueError with a sentence."""
    if len(text) > MAX_KEY_LENGTH:
        raise ValueError(f"{name} is longer than {MAX_KEY_LENGTH} characters")
    if _UNSTORABLE.search(text):
        raise ValueError(f"{name} holds a character that cannot be stored")
    return text.strip()


@dataclass(frozen=True)
class Schema:
    columns: tuple[Column, ...]
    target: Target
    identifier: str | None = None
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("the table has no feature column")
        if len({*self.names, *self.ignored}) < len(self.names) + len(self.ignored):
            raise ValueError("a column is listed twice")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schema:
        """What `as_dict` returned, after a way through JSON. Raises ValueError, TypeError or KeyError if damaged."""
        target = data["target"]
        return cls(
            columns=tuple(
                Column(_text(column["name"]), _text(column["kind"]), column["mode"], _texts(column["categories"]))
                for column in data["columns"]
            ),
            target=Target(_text(target["name"]), _text(target["positive"]), _text(target["negative"])),
            identifier=None if data["identifier"] is None else _text(data["identifier"]),
            dropped=_texts(data["dropped"]),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def sha256(self) -> str:
        """A digest of the whole schema: two schemas with the same digest read every row alike."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @cached_property
    def _columns_by_name(self) -> dict[str, Column]:
        return {column.name: column for column in self.columns}

    @cached_property
    def _known(self) -> frozenset[str]:
        return self.ignored.union(self.names)

    @cached_property
    def ignored(self) -> frozenset[str]:
        """Columns that a row may carry without their being features: identifier, target, dropped."""
        return frozenset([self.target.name, *self.dropped, *([self.identifier] if self.identifier else [])])

    def features_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The feature values, as they were sent, of a row that `align` takes."""
        features = dict(row)
        for name in self.ignored:
            features.pop(name, None)
        return features

    def customer_key(self, row: Mapping[str, Any], missing: frozenset[str] = frozenset()) -> str:
        """The row's identifier as text, "" when it has none, or one spelled as in `missing`.

        Raises ValueError with a sentence.
        """
        return self._key(row.get(self.identifier), missing) if self.identifier else ""

    def _key(self, value: Any, missing: frozenset[str]) -> str:
        if value is None:
            return ""
        if type(value) is int and abs(value) < _SHORT_WHOLE:
            return str(value)
        if isinstance(value, str):
            return "" if value.strip() in missing else checked_key(value, self.identifier)
        if isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf:
            return checked_key(str(int(value) if value == int(value) else value), self.identifier)
        raise ValueError(f"{self.identifier} expects text or a number, got {_shown(value)}")

    def parse_text(
        self, rows: Sequence[Mapping[str, str]], missing: frozenset[str] = MISSING_IN_FORMS
    ) -> list[dict[str, Any]]:
        """Rows of text cells (a form, a CSV) as typed rows; cells spelled as in `missing` become None.

        Unknown columns, and what is no text, pass through untouched, for `align` to judge. Raises InputError.
        """
        problems: list[Problem] = []
        parsed = []
        for index, row in enumerate(rows):
            typed: dict[str, Any] = dict(row)
            for name, text in row.items():
                column = self._columns_by_name.get(name)
                if not isinstance(text, str) or (column is None and name != self.identifier):
                    continue
                if text.strip() in missing:
                    typed[name] = None
                elif column is not None:
                    try:
                        typed[name] = column.parse(text)
                    except ValueError as error:
                        problems.append(Problem(name, str(error), index))
            parsed.append(typed)
            if len(problems) > _PROBLEMS:
                break
        if problems:
            raise InputError(problems)
        return parsed

    def read_cells(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], missing: frozenset[str] = MISSING_IN_FILES
    ) -> list[list[Any]]:
        """By column of the model, what `parse_text` reads in a table of text that has them all, and faster.

        Whole numbers may stay floats. Raises InputError.
        """
        places = {name: place for place, name in enumerate(header)}
        positions = [places[name] for name in self.names]
        try:
            return [
                column.parse_all([row[position] for row in rows], missing)
                for column, position in zip(self.columns, positions, strict=True)
            ]
        except ValueError:  # from one cell; all that is wrong is found row by row
            cells = [{name: row[at] for name, at in zip(self.names, positions, strict=True)} for row in rows]
            typed = self.parse_text(cells, missing)
            return [[row[name] for row in typed] for name in self.names]

    def align_columns(self, columns: Sequence[Sequence[Any]]) -> AlignedRows:
        """`align` for the values of each column of the model, None where one is missing. Raises InputError."""
        return self._aligned(len(columns[0]), columns, [])

    def customer_keys(self, values: Sequence[Any], missing: frozenset[str] = frozenset()) -> list[str]:
        """`customer_key` of rows with these values of the identifier. Raises InputError."""
        if not self.identifier:
            return [""] * len(values)
        kinds = set(map(type, values)) if len(values) > 1 else set()
        if kinds == {int} and max(map(abs, values)) < _SHORT_WHOLE:
            return list(map(str, values))
        if kinds == {str} and max(map(len, values)) <= MAX_KEY_LENGTH and not _UNSTORABLE.search("".join(values)):
            return ["" if key in missing else key for key in map(str.strip, values)]
        keys, problems = [], []
        for index, value in enumerate(values):
            try:
                keys.append(self._key(value, missing))
            except ValueError as error:
                problems.append(Problem(self.identifier, str(error), index))
        if problems:
            raise InputError(problems)
        return keys

    def align(self, rows: Sequence[Mapping[str, Any]]) -> AlignedRows:
        """Check rows and turn them into the matrix that the model was trained on.

        Absent keys and None take the training mode; an unseen category is scored as unknown; both are
        reported as warnings of their row. Raises InputError for an unknown column, a wrong type, NaN,
        infinity, and a row without any feature.
        """
        if len(rows) == 1 and type(rows[0]) is dict and (aligned := self._aligned_alone(rows[0])):
            return aligned
        problems: list[Problem] = []
        if not all(self._all_fit(rows[begin : begin + _SLICE]) for begin in range(0, len(rows), _SLICE)):
            for index, row in enumerate(rows):
                problems += self._row_problems(index, row, suggest=len(problems) < _SUGGESTIONS)
                if len(problems) > _PROBLEMS:
                    raise InputError(problems)
            rows = [row if type(row) is dict or isinstance(row, Mapping) else {} for row in rows]
        return self._aligned(len(rows), ([row.get(name) for row in rows] for name in self.names), problems)

    def align_table(self, frame: pd.DataFrame) -> AlignedRows:
        """`align` for a table: NaN means missing, and what is wrong with a column's name is said once, of row 0."""
        problems: list[Problem] = []
        if len(frame):
            problems += self._row_problems(0, dict.fromkeys(frame.columns))
        for name in frame.columns[frame.columns.duplicated()].unique():
            problems.append(Problem(str(name), f"{name} is the name of several columns"))
        if problems:
            raise InputError(problems)
        nothing = [None] * len(frame)
        columns = (plain_values(frame[name]) if name in frame.columns else nothing for name in self.names)
        return self._aligned(len(frame), columns, problems)

    def _aligned(self, rows: int, columns: Iterable[Sequence[Any]], problems: list[Problem]) -> AlignedRows:
        matrix = np.empty((rows, len(self.columns)))
        unseen: dict[int, list[str]] = {}
        for position, (column, values) in enumerate(zip(self.columns, columns, strict=True)):
            matrix[:, position], found = column.encode_all(values)
            problems += found
            if len(problems) > _PROBLEMS:
                break
            if column.kind == CATEGORICAL:
                for index in np.flatnonzero(matrix[:, position] == UNSEEN_CATEGORY).tolist():
                    unseen.setdefault(index, []).append(not_seen(column, values[index]))
        if problems:
            raise InputError(problems)
        return self.align_encoded(matrix, unseen)

    def align_encoded(self, matrix: np.ndarray, unseen: Mapping[int, Sequence[str]]) -> AlignedRows:
        """Fill, in place, what is missing from (rows, columns) checked and encoded values, which is NaN."""
        filled = np.isnan(matrix)
        np.copyto(matrix, self._encoded_modes, where=filled)
        return AlignedRows(matrix, filled, unseen, self.columns)

    def _aligned_alone(self, row: dict[str, Any]) -> AlignedRows | None:
        """`align` for one row without any problem, in plain Python: numpy's price is by the call. None for others."""
        if not row.keys() <= self._known or row.keys().isdisjoint(self._columns_by_name):
            return None
        numbers: list[float] = []
        missing: list[int] = []
        unseen = []
        for position, (column, plain_type, codes, mode) in enumerate(self._plain_encodings):
            value = row.get(column.name)
            if value is None:
                missing.append(position)
                numbers.append(mode)
                continue
            kind = type(value)
            if codes is None:
                if (kind is float or kind is int) and -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
                    numbers.append(value)
                    continue
            elif kind is plain_type and value in codes:
                numbers.append(codes[value])
                continue
            try:
                numbers.append(column.encode(value))
            except ValueError:
                return None
            if column.kind == CATEGORICAL and numbers[-1] == UNSEEN_CATEGORY:
                unseen.append(not_seen(column, value))
        filled = self._nothing_filled
        if missing:
            filled = filled.copy()
            filled[0, missing] = True
        matrix = np.array([numbers], dtype=np.float64)
        return AlignedRows(matrix, filled, {0: unseen} if unseen else {}, self.columns)

    @cached_property
    def _nothing_filled(self) -> np.ndarray:
        nothing = np.zeros((1, len(self.columns)), dtype=np.bool_)
        nothing.setflags(write=False)
        return nothing

    @cached_property
    def _plain_encodings(self) -> list[tuple[Column, type, Mapping[Any, float] | None, float]]:
        """Each column, the type of its plain values, their numbers (None where they are numbers), and its mode's."""
        plain = {NUMERIC: (float, None), BOOLEAN: (bool, {False: 0.0, True: 1.0})}
        return [
            (column, *plain.get(column.kind, (str, column._codes)), column.encode(column.mode))
            for column in self.columns
        ]

    @cached_property
    def _encoded_modes(self) -> np.ndarray:
        return np.array([column.encode(column.mode) for column in self.columns])

    def _all_fit(self, rows: Sequence[Any]) -> bool:
        """Whether `_row_problems` finds none. The rows of a list mostly have the same names, which need one look."""
        return set(map(type, rows)) <= {dict} and all(map(self._fits, set(map(tuple, rows))))

    def _fits(self, names: Sequence[Any]) -> bool:
        return self._known.issuperset(names) and not self._columns_by_name.keys().isdisjoint(names)

    def _row_problems(self, index: int, row: Any, *, suggest: bool = True) -> list[Problem]:
        if type(row) is not dict and not isinstance(row, Mapping):  # asked in this order, it takes a tenth of the time
            return [Problem(None, f"each customer is an object of column names and values, got {_shown(row)}", index)]
        if not row.keys() <= self._known:
            unknown = islice((name for name in row if name not in self._known), _PROBLEMS)
            return [
                Problem(str(name), self._unknown_column(name, suggest and count < _SUGGESTIONS), index)
                for count, name in enumerate(unknown)
            ]
        if row.keys().isdisjoint(self._columns_by_name):
            return [Problem(None, self._no_feature, index)]
        return []

    def _unknown_column(self, name: Any, suggest: bool) -> str:
        nearest = self.nearest(name) if suggest else None
        remedy = f"did you mean {nearest}?" if nearest else f"columns are {self._first_names}"
        return f"{_shown(name)} is not a column of this model; {remedy}"

    @cached_property
    def _first_names(self) -> str:
        return ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")

    @cached_property
    def _no_feature(self) -> str:
        return f"no feature is given; send at least one of {self._first_names}"

    def nearest(self, name: Any) -> str | None:
        """The feature column whose name looks most like `name`, if any does."""
        lowered = {column.lower(): column for column in self.names}
        found = difflib.get_close_matches(str(name)[:100].lower(), lowered, n=1)
        return lowered[found[0]] if found else None


def learn_schema(
    frame: pd.DataFrame,
    target: str,
    positive: str | None = None,
    identifier: str | None = None,
    drop: Sequence[str] = (),
) -> Schema:
    """The schema of a training table: one row per customer, one column per feature, and the target.

    positive: the target's value that means "retained", as text; by default 1, true or yes.
    Raises TableError, which names the column and the remedy.
    """
    for name in frame.columns:
        if not isinstance(name, str) or not name.strip():
            raise TableError(f"A column is named {_shown(name)}; name it with a word, or delete it.")
    for name in frame.columns[frame.columns.duplicated()]:
        raise TableError(f"Two columns are named {name}; rename or delete one of them.")
    named = [(target, "--target"), *((name, "--drop") for name in drop)]
    for name, option in [*named, (identifier, "--id")] if identifier else named:
        if name not in frame.columns:
            raise TableError(_no_such_column(name, option, frame.columns))
    learned_target = _learn_target(frame[target], positive)
    features = [name for name in frame.columns if name not in {target, identifier, *drop}]
    if not features:
        raise TableError("The table has no feature columns besides the target, the identifier and what is dropped.")
    return Schema(
        columns=tuple(_learn_column(str(name), frame[name]) for name in features),
        target=learned_target,
        identifier=identifier,
        dropped=tuple(drop),
    )


def outcomes(frame: pd.DataFrame, target: Target) -> np.ndarray:
    """The target column as (rows,) int, 1 where the customer was retained."""
    return (frame[target.name].map(spelled) == target.positive).to_numpy(dtype=np.int64)


def plain_values(column: pd.Series) -> list[Any]:
    """A table's column as plain values, None where it is missing."""
    missing = column.isna()
    if not missing.any():
        return column.tolist()
    return [None if gone else value for value, gone in zip(column.tolist(), missing.tolist(), strict=True)]


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as rows of plain values, None where it is missing."""
    columns = [plain_values(column) for _, column in frame.items()]
    return [dict(zip(frame.columns, values, strict=True)) for values in zip(*columns, strict=True)]


def spelled(value: Any) -> str:
    """A target value as text, so that 1, 1.0 and "1" are one spelling."""
    if isinstance(value, Real) and not isinstance(value, Integral) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _learn_target(column: pd.Series, positive: str | None) -> Target:
    missing = int(column.isna().sum())
    if missing:
        raise TableError(f"The target {column.name} is missing in {missing:,} rows; remove those rows.")
    values = sorted({spelled(value) for value in column.unique()})
    if len(values) == 1:
        raise TableError(
            f"The target {column.name} has one value only ({values[0]}); "
            "a model needs customers who stayed and customers who left."
        )
    if len(values) != 2:
        shown = ", ".join(values[:5]) + (", ..." if len(values) > 5 else "")
        raise TableError(f"The target {column.name} has {len(values)} values ({shown}); it must have two.")
    if positive is None:
        candidates = [value for value in values if value.lower() in _POSITIVE_TEXT]
        if len(candidates) != 1:
            raise TableError(
                f"Which value of {column.name} means that the customer stayed: "
                f"{values[0]} or {values[1]}? Say it with --positive."
            )
        positive = candidates[0]
    elif positive not in values:
        alike = [value for value in values if value.lower() == positive.lower()]
        if len(alike) != 1:
            raise TableError(f"--positive {positive} is no value of {column.name}; it has {values[0]} and {values[1]}.")
        (positive,) = alike
    (negative,) = [value for value in values if value != positive]
    return Target(str(column.name), positive, negative)


def _learn_column(name: str, column: pd.Series) -> Column:
    from pandas.api import types

    remedy = f"leave it out with --drop {name}"
    dates = TableError(f"Column {name} holds dates; turn it into a number (days since ...) or {remedy}.")
    present = column.dropna()
    if present.empty:
        raise TableError(f"Column {name} is empty in every row; {remedy}.")
    if types.is_datetime64_any_dtype(present):
        raise dates
    if types.is_bool_dtype(present) or all(isinstance(value, bool) for value in present):
        return Column(name, BOOLEAN, bool(present.mode().iloc[0]))
    if present.dtype == object and all(isinstance(value, Real) for value in present):
        # pandas keeps integers beyond 64 bits as Python's; one that is too large for a float counts as infinite.
        present = present.map(lambda value: float(value) if abs(value) <= LARGEST_NUMBER else math.inf)
    if types.is_numeric_dtype(present) and not types.is_complex_dtype(present):
        infinite = int((present.astype(float).abs() > LARGEST_NUMBER).sum())
        if infinite:
            raise TableError(
                f"Column {name} holds infinity or numbers beyond {LARGEST_NUMBER:.1e} in {infinite:,} rows; "
                f"correct them, leave them empty, or {remedy}."
            )
        mode = present.mode().iloc[0].item()
        return Column(name, NUMERIC, int(mode) if float(mode).is_integer() and abs(mode) < 2**53 else mode)
    if not all(isinstance(value, str) for value in present):
        kinds = ", ".join(sorted({type(value).__name__ for value in present}))
        raise TableError(
            f"Column {name} holds values of type {kinds}; make them all numbers, text, or true and false, or {remedy}."
        )
    categories = sorted(present.unique())
    if sum(bool(_FULL_DATE.fullmatch(category)) for category in categories) > len(categories) / 2:
        raise dates
    if any(_UNSTORABLE.search(category) for category in categories):
        raise TableError(f"Column {name} holds a NUL character or half a surrogate pair; correct it, or {remedy}.")
    if len(categories) > MAX_CATEGORIES or (len(categories) > 50 and len(categories) > len(present) / 2):
        text = [category for category in categories if _number(category) is None]
        if 0 < len(text) < len(categories) / 2:
            raise TableError(
                f"Column {name} holds numbers, but also text such as {_shown(text[0])}; "
                f"correct those cells, leave them empty, or {remedy}."
            )
        raise TableError(
            f"Column {name} is text with {len(categories):,} different values, such as {_shown(categories[0])}. "
            f"If it is the customer's identifier, say --id {name}; else group its values, or {remedy}."
        )
    return Column(name, CATEGORICAL, str(present.mode().iloc[0]), tuple(categories))


def _no_such_column(name: str, option: str, columns: Iterable[Any]) -> str:
    names = [str(column) for column in columns]
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(names[:20])}."
    return f"The table has no column {name} ({option}); {hint}"


def _number(text: str) -> float | None:
    """The number that a text spells, if it spells one, as pandas reads a file: not 1_000, no foreign digits."""
    try:
        return float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        return None


def not_seen(column: Column, value: str) -> str:
    return f"{column.name}: {_shown(value)} was not seen in training, scored as unknown"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        value = value[:60]
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: Any) -> str:
    if not isinstance(value, str) or _UNSTORABLE.search(value):
        raise TypeError(f"{_shown(value)} is not text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{_shown(values)} is not a list")
    return tuple(_text(value) for value in values)
