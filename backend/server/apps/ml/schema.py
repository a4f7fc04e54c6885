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
from dataclasses import asdict, dataclass, field
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any

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

# The trees compare in single precision; what does not fit there would become infinite.
LARGEST_NUMBER = float(np.finfo(np.float32).max)

_TRUE_TEXT = frozenset(["true", "t", "yes", "y", "1", "on"])
_FALSE_TEXT = frozenset(["false", "f", "no", "n", "0", "off"])
_POSITIVE_TEXT = frozenset(["true", "yes", "y", "1"])
_FULL_DATE = re.compile(r"\s*(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))([T ].*)?\s*")
# PostgreSQL stores neither NUL characters nor lone surrogates, so no text of ours may hold one.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_PROBLEMS_WITH_A_SUGGESTION = 10


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
        try:
            if "_" in stripped:  # float() would take 1_000 for a number
                raise ValueError
            number = float(stripped)
        except ValueError:
            raise ValueError(f"{self.name} expects a number such as 12.5, got {_shown(text)}") from None
        return int(number) if number.is_integer() and abs(number) < 2**53 else number


@dataclass(frozen=True)
class Target:
    """The column to predict, and how the training table spells its two values as text."""

    name: str
    positive: str
    negative: str


@dataclass(frozen=True)
class AlignedRows:
    """Rows as the model sees them.

    matrix: (rows, columns) float64, no NaN. warnings: for each row what was filled or not recognised.
    """

    matrix: np.ndarray
    warnings: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Schema:
    columns: tuple[Column, ...]
    target: Target
    identifier: str | None = None
    dropped: tuple[str, ...] = field(default=())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schema:
        return cls(
            columns=tuple(Column(c["name"], c["kind"], c["mode"], tuple(c["categories"])) for c in data["columns"]),
            target=Target(**data["target"]),
            identifier=data["identifier"],
            dropped=tuple(data["dropped"]),
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
    def ignored(self) -> frozenset[str]:
        """Columns that a row may carry without their being features: identifier, target, dropped."""
        return frozenset([self.target.name, *self.dropped, *([self.identifier] if self.identifier else [])])

    def features_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The feature values of a row as they were sent."""
        return {name: value for name, value in row.items() if name in self._columns_by_name}

    def customer_key(self, row: Mapping[str, Any]) -> str:
        """The row's identifier as text, "" when it has none. Raises ValueError with a sentence."""
        value = row.get(self.identifier) if self.identifier else None
        if value is None:
            return ""
        if isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf:
            value = str(int(value) if value == int(value) else value)
        if not isinstance(value, str):
            raise ValueError(f"{self.identifier} expects text or a number, got {_shown(value)}")
        if len(value) > MAX_KEY_LENGTH:
            raise ValueError(f"{self.identifier} is longer than {MAX_KEY_LENGTH} characters")
        if _UNSTORABLE.search(value):
            raise ValueError(f"{self.identifier} holds a character that cannot be stored")
        return value.strip()

    def parse_text(
        self, rows: Sequence[Mapping[str, str]], missing: frozenset[str] = MISSING_IN_FORMS
    ) -> list[dict[str, Any]]:
        """Rows of text cells (a form, a CSV) as typed rows; cells spelled as in `missing` become None.

        Unknown columns pass through untouched, for `align` to judge. Raises InputError.
        """
        problems: list[Problem] = []
        parsed = []
        for index, row in enumerate(rows):
            typed: dict[str, Any] = {}
            for name, text in row.items():
                column = self._columns_by_name.get(name)
                if column is None:
                    typed[name] = text
                elif text.strip() in missing:
                    typed[name] = None
                else:
                    try:
                        typed[name] = column.parse(text)
                    except ValueError as error:
                        problems.append(Problem(name, str(error), index))
            parsed.append(typed)
        if problems:
            raise InputError(problems)
        return parsed

    def align(self, rows: Sequence[Mapping[str, Any]]) -> AlignedRows:
        """Check rows and turn them into the matrix that the model was trained on.

        Absent keys and None take the training mode; an unseen category is scored as unknown; both are
        reported as warnings of their row. Raises InputError for an unknown column, a wrong type, NaN,
        infinity, and a row without any feature.
        """
        problems = [problem for index, row in enumerate(rows) for problem in self._row_problems(index, row)]
        rows = [row if isinstance(row, Mapping) else {} for row in rows]
        matrix = np.empty((len(rows), len(self.columns)))
        filled: list[list[str]] = [[] for _ in rows]
        unseen: list[list[str]] = [[] for _ in rows]
        for position, column in enumerate(self.columns):
            fill = column.encode(column.mode)
            for index, row in enumerate(rows):
                value = row.get(column.name)
                if value is None:
                    matrix[index, position] = fill
                    filled[index].append(f"{column.name}={column.mode}")
                    continue
                try:
                    number = column.encode(value)
                except ValueError as error:
                    problems.append(Problem(column.name, str(error), index))
                    continue
                matrix[index, position] = number
                if column.kind == CATEGORICAL and number == UNSEEN_CATEGORY:
                    unseen[index].append(f"{column.name}: {_shown(value)} was not seen in training, scored as unknown")
        if problems:
            raise InputError(problems)
        warnings = tuple(
            (("missing, filled with the training mode: " + ", ".join(names),) if names else ()) + tuple(unknown)
            for names, unknown in zip(filled, unseen, strict=True)
        )
        return AlignedRows(matrix, warnings)

    def _row_problems(self, index: int, row: Any) -> list[Problem]:
        if not isinstance(row, Mapping):
            return [Problem(None, f"each customer is an object of column names and values, got {_shown(row)}", index)]
        unknown = [name for name in row if name not in self._columns_by_name and name not in self.ignored]
        if unknown:
            return [
                Problem(str(name), self._unknown_column(name, suggest=count < _PROBLEMS_WITH_A_SUGGESTION), index)
                for count, name in enumerate(unknown)
            ]
        if not self.features_of(row):
            return [Problem(None, f"no feature is given; send at least one of {', '.join(self.names[:20])}", index)]
        return []

    def _unknown_column(self, name: Any, *, suggest: bool) -> str:
        nearest = self.nearest(name) if suggest else None
        remedy = f"did you mean {nearest}?" if nearest else f"columns are {', '.join(self.names[:20])}"
        return f"{_shown(name)} is not a column of this model; {remedy}"

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
    for name, option in [(target, "--target"), *([(identifier, "--id")] if identifier else [])]:
        if name not in frame.columns:
            raise TableError(_no_such_column(name, option, frame.columns))
    for name in drop:
        if name not in frame.columns:
            raise TableError(_no_such_column(name, "--drop", frame.columns))
    learned_target = _learn_target(frame[target], positive)
    features = [name for name in frame.columns if name not in {target, identifier, *drop}]
    if not features:
        raise TableError("The table has no feature columns besides the target, the identifier and what is dropped.")
    return Schema(
        columns=tuple(_learn_column(name, frame[name]) for name in features),
        target=learned_target,
        identifier=identifier,
        dropped=tuple(drop),
    )


def outcomes(frame: pd.DataFrame, target: Target) -> np.ndarray:
    """The target column as (rows,) int, 1 where the customer was retained."""
    return (frame[target.name].map(spelled) == target.positive).to_numpy(dtype=np.int64)


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as rows of plain values, None where it is missing."""
    columns = {
        name: [None if gone else value for value, gone in zip(column.tolist(), column.isna(), strict=True)]
        for name, column in frame.items()
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def spelled(value: Any) -> str:
    """A target value as text, so that 1, 1.0 and "1" are one spelling."""
    if isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) and float(value).is_integer():
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
        raise TableError(f"--positive {positive} is no value of {column.name}; it has {values[0]} and {values[1]}.")
    (negative,) = [value for value in values if value != positive]
    return Target(str(column.name), positive, negative)


def _learn_column(name: Any, column: pd.Series) -> Column:
    from pandas.api import types

    remedy = f"leave it out with --drop {name}"
    present = column.dropna()
    if present.empty:
        raise TableError(f"Column {name} is empty in every row; {remedy}.")
    if types.is_datetime64_any_dtype(present):
        raise TableError(f"Column {name} holds dates; turn it into a number (days since ...) or {remedy}.")
    if types.is_bool_dtype(present) or all(isinstance(value, bool) for value in present):
        return Column(str(name), BOOLEAN, bool(present.mode().iloc[0]))
    if types.is_numeric_dtype(present) and not types.is_complex_dtype(present):
        infinite = int((present.astype(float).abs() > LARGEST_NUMBER).sum())
        if infinite:
            raise TableError(
                f"Column {name} holds infinity or numbers beyond {LARGEST_NUMBER:.1e} in {infinite:,} rows; "
                f"correct them, leave them empty, or {remedy}."
            )
        mode = present.mode().iloc[0].item()
        return Column(str(name), NUMERIC, int(mode) if float(mode).is_integer() and abs(mode) < 2**53 else mode)
    if not all(isinstance(value, str) for value in present):
        raise TableError(f"Column {name} mixes numbers, text or other types; make them one type, or {remedy}.")
    categories = sorted(present.unique())
    if all(_FULL_DATE.fullmatch(category) for category in categories[:MAX_CATEGORIES]):
        raise TableError(f"Column {name} holds dates; turn it into a number (days since ...) or {remedy}.")
    if len(categories) > MAX_CATEGORIES or (len(categories) > 50 and len(categories) > len(present) / 2):
        raise TableError(
            f"Column {name} is text with {len(categories):,} different values. If it is the customer's identifier, "
            f"say --id {name}; else group its values, or {remedy}."
        )
    return Column(str(name), CATEGORICAL, str(present.mode().iloc[0]), tuple(categories))


def _no_such_column(name: str, option: str, columns: Iterable[Any]) -> str:
    names = [str(column) for column in columns]
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(names[:20])}."
    return f"The table has no column {name} ({option}); {hint}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
