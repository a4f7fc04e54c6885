"""Rows of a file checked and scored by a classifier, wherever it is loaded: this needs no database and no Django."""

from __future__ import annotations

import difflib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apps.endpoints.csv_file import BadLine, BatchError, Chunk, Layout
from apps.endpoints.json_text import dumps
from apps.ml import columnar
from apps.ml.classifier.base import RetentionClassifier
from apps.ml.schema import MISSING_IN_FILES, AlignedRows, InputError, Problem, Schema


@dataclass(frozen=True, eq=False)
class ReadCells:
    """What `columnar.Cells` holds, of rows that were read cell by cell."""

    aligned: AlignedRows
    columns: list[list[Any]]
    of_keys: list[str]

    def input_json(self) -> list[str]:
        names = [column.name for column in self.aligned.columns]
        rows = zip(*map(_as_parsed, self.columns), strict=True)
        return [dumps(dict(zip(names, row, strict=True))) for row in rows]

    def keys(self) -> list[str]:
        return self.of_keys


def _as_parsed(column: Sequence[Any]) -> Sequence[Any]:
    """Whole numbers as `Column.parse` gives them, and as an upload that is answered at once records them."""
    try:
        numbers = np.array(column, dtype=np.float64)  # of None it makes NaN
    except ValueError:
        return column  # text
    is_whole = (np.abs(numbers) < 2**53) & (np.floor(numbers) == numbers)
    return [
        int(value) if is_int and type(value) is float else value
        for value, is_int in zip(column, is_whole.tolist(), strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Checked:
    """The records of a chunk that can be scored, as they stand in the file, and what is wrong with the others."""

    records: list[str]
    problems: list[BadLine]
    cells: columnar.Cells | ReadCells

    @property
    def aligned(self) -> AlignedRows:
        return self.cells.aligned


@dataclass(frozen=True, eq=False)
class Scored:
    """What became of a chunk of so many rows. results: what is answered for each row that could be scored."""

    rows_read: int
    checked: Checked
    results: list[dict[str, Any]]
    elapsed_ms: float


class Scorer:
    """One classifier, and files that are laid out in one way. Raises BatchError for columns that do not fit.

    Safe to use from many threads.
    """

    def __init__(self, classifier: RetentionClassifier, layout: Layout):
        self.classifier = classifier
        self.schema = classifier.schema
        self._header = layout.header
        check_columns(layout.header, self.schema)
        self._reader = columnar.CellReader(self.schema, layout.header, layout.delimiter)

    def score(self, chunk: Chunk) -> Scored:
        began = time.perf_counter()
        checked = self.check(chunk)
        results = self.answer(checked)
        return Scored(len(chunk), checked, results, (time.perf_counter() - began) * 1000)

    def check(self, chunk: Chunk) -> Checked:
        cells = self._reader.read(chunk.records) if chunk.is_plain else None
        if cells is not None:
            return Checked(chunk.records, [], cells)
        return self._check_one_by_one(chunk)

    def _check_one_by_one(self, chunk: Chunk) -> Checked:
        """`check` for any chunk, by Python alone: what is right must be read alike, and what is wrong is told."""
        read = chunk.rows()
        rows, records, lines, problems = read.cells, read.records, read.lines, read.problems
        while True:
            try:
                columns = self.schema.read_cells(self._header, rows)
                cells = ReadCells(self.schema.align_columns(columns), columns, self._customer_keys(rows))
            except InputError as error:
                # Not all that is wrong may have been told of very many rows: what remains is looked at again.
                problems += [self._bad_line(chunk.file, lines[p.row], rows[p.row], p) for p in error.problems]
                good = sorted({*range(len(rows))} - {problem.row for problem in error.problems})
                rows, records, lines = ([each[row] for row in good] for each in (rows, records, lines))
            else:
                problems.sort(key=lambda problem: problem.line)
                return Checked(records, problems, cells)

    def answer(self, checked: Checked) -> list[dict[str, Any]]:
        """What is answered for each row."""
        aligned = checked.aligned
        results = self.classifier.answers(self.classifier.predict(aligned))
        for index, warnings in aligned.warnings.items():
            results[index]["warnings"] = warnings
        return results

    def label(self, checked: Checked) -> list[tuple[float, str]]:
        """Probability and label of each row, as `answer` says them."""
        return self.classifier.labelled(self.classifier.predict(checked.aligned))

    def _customer_keys(self, rows: Sequence[list[str]]) -> list[str]:
        if self.schema.identifier not in self._header:
            return [""] * len(rows)
        position = self._header.index(self.schema.identifier)
        return self.schema.customer_keys([row[position] for row in rows], MISSING_IN_FILES)

    def _bad_line(self, file: str, line: int, row: Sequence[str], problem: Problem) -> BadLine:
        value = row[self._header.index(problem.field)] if problem.field else None
        return BadLine(line, problem.field, problem.message, value, file)


@dataclass(frozen=True)
class Columns:
    """What a file's header has of what a model reads.

    missing: what the model needs, each with the name in the file that it may stand under, or None. identifier: the
    column that names the customer, None where there is none.
    """

    recognised: list[str]
    identifier: str | None
    missing: dict[str, str | None]
    ignored: list[str]
    repeated: list[str]

    @property
    def problem(self) -> str:
        """Why the file cannot be scored; empty when it can."""
        if self.repeated:
            return f"The header names {', '.join(self.repeated)} more than once."
        if not self.missing:
            return ""
        hints = [f"{name} (is it {nearest}?)" if nearest else name for name, nearest in self.missing.items()]
        return f"The file lacks the columns {', '.join(hints)}; add them, and leave cells empty where not known."


def columns_of(header: Sequence[str], schema: Schema) -> Columns:
    read = {*schema.names, schema.identifier}
    count = Counter(header)
    missing = dict.fromkeys(name for name in schema.names if name not in count)
    others = {name.lower(): name for name in header if name not in schema.names}
    for name in missing:
        nearest = difflib.get_close_matches(name.lower(), others, n=1)
        missing[name] = others[nearest[0]] if nearest else None
    return Columns(
        recognised=[name for name in schema.names if name in count],
        identifier=schema.identifier if schema.identifier in count else None,
        missing=missing,
        ignored=[name for name in header if name not in read],
        repeated=sorted(name for name in read if name and count[name] > 1),
    )


def check_columns(header: Sequence[str], schema: Schema) -> None:
    """Raise BatchError unless a file with this header can be scored."""
    problem = columns_of(header, schema).problem
    if problem:
        raise BatchError(problem)
