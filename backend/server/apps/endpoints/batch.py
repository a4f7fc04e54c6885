"""Many rows at once: a CSV of customers in, one answer per line out, in the file's order."""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO, TextIO

from apps.endpoints import prediction
from apps.endpoints.csv_file import BadLine, BadRows, BatchError, Chunk, CsvFile, Layout
from apps.endpoints.models import MLAlgorithm
from apps.endpoints.prediction import Answer, Wanted
from apps.ml.schema import MISSING_IN_FILES, AlignedRows, InputError, Problem, Schema

REQUEST_ID = "request_id"
ADDED_COLUMNS = ("probability", "label")
CHUNK_ROWS = 1_000  # ten times as many take twice as long to read
MOST_PROBLEMS = 1_000


@dataclass(frozen=True)
class Table:
    """A CSV as text. lines: the line in the file at which each row begins."""

    layout: Layout
    rows: list[list[str]]
    lines: list[int]


@dataclass(frozen=True)
class Batch:
    table: Table
    answers: list[Answer]

    def as_csv(self) -> str:
        """The upload with the columns probability and label at its end."""
        answered = AnsweredCsv(self.table.layout)
        answers = [(answer.probability, answer.label) for answer in self.answers]
        return answered.header() + answered.body(self.table.rows, answers)


class AnsweredCsv:
    """Writes a CSV back, marked and separated as it was, with what was answered at its end.

    The columns of an earlier answer are replaced. Cells are given back as they came, formulas included.
    """

    def __init__(self, layout: Layout, *, with_ids: bool = False):
        self._layout = layout
        self._added = (REQUEST_ID, *ADDED_COLUMNS) if with_ids else ADDED_COLUMNS
        earlier = next(
            (added for added in ((REQUEST_ID, *ADDED_COLUMNS), ADDED_COLUMNS) if _ends_with(layout.header, added)), ()
        )
        self._kept = len(layout.header) - len(earlier)

    def header(self) -> str:
        return self._layout.mark + self.body([self._layout.header], [self._added])

    def body(self, rows: Sequence[list[str]], answers: Iterable[Sequence[Any]]) -> str:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, delimiter=self._layout.delimiter)
        kept = self._kept
        writer.writerows([*row[:kept], *answer] for row, answer in zip(rows, answers, strict=True))
        return buffer.getvalue()


def _ends_with(header: Sequence[str], added: tuple[str, ...]) -> bool:
    return tuple(header[-len(added) :]) == added


@dataclass(frozen=True)
class Checked:
    """The rows of a chunk that can be scored, and what is wrong with the others.

    columns: the features of the rows as they were sent, by column of the model. keys: the customers.
    """

    rows: list[list[str]]
    columns: list[list[Any]]
    aligned: AlignedRows
    keys: list[str]
    problems: list[BadLine]


class Scorer:
    """One algorithm, and files that are laid out in one way. Raises BatchError for columns that do not fit."""

    def __init__(self, algorithm: MLAlgorithm, layout: Layout):
        self.algorithm = algorithm
        self._classifier = prediction.classifier_of(algorithm)
        self.schema = self._classifier.schema
        self._header = layout.header
        _check_columns(layout.header, self.schema)

    def check(self, chunk: Chunk) -> Checked:
        rows, lines = chunk.rows, chunk.lines
        problems = list(chunk.problems)
        while True:
            try:
                columns = self.schema.read_cells(self._header, rows)
                aligned = self.schema.align_columns(columns)
                keys = self._customer_keys(rows)
            except InputError as error:
                # Not all that is wrong may have been told of very many rows: what remains is looked at again.
                problems += [self._bad_line(lines[p.row], rows[p.row], p) for p in error.problems]
                bad = {problem.row for problem in error.problems}
                lines = [line for index, line in enumerate(lines) if index not in bad]
                rows = [row for index, row in enumerate(rows) if index not in bad]
            else:
                problems.sort(key=lambda problem: problem.line)
                return Checked(rows, columns, aligned, keys, problems)

    def answer(self, checked: Checked) -> list[dict[str, Any]]:
        """What is answered for each row."""
        results = [self._classifier.postprocessing(row) for row in self._classifier.predict(checked.aligned)]
        for result, warnings in zip(results, checked.aligned.warnings, strict=True):
            if warnings:
                result["warnings"] = warnings
        return results

    def _customer_keys(self, rows: Sequence[list[str]]) -> list[str]:
        if self.schema.identifier not in self._header:
            return [""] * len(rows)
        position = self._header.index(self.schema.identifier)
        return self.schema.customer_keys([row[position] for row in rows])

    def _bad_line(self, line: int, row: Sequence[str], problem: Problem) -> BadLine:
        value = row[self._header.index(problem.field)] if problem.field else None
        return BadLine(line, problem.field, problem.message, value)


class TooManyRows(BatchError):
    """A file that is not to be held in memory."""


def predict_file(file: BinaryIO, endpoint_name: str, wanted: Wanted, *, now: datetime, most_rows: int) -> Batch:
    """Score every row of a CSV by one algorithm and record each; all of them or none.

    A batch is no part of a running A/B test. Raises BatchError, BadRows, TooManyRows, PredictionError.
    """
    choice = prediction.choose(endpoint_name, wanted, in_test=False)
    (algorithm,) = choice.algorithms
    schema = prediction.classifier_of(algorithm).schema
    table = read_csv(file, most_rows)
    header = table.layout.header
    _check_columns(header, schema)
    read = {*schema.names, schema.identifier}
    cells = [{name: cell for name, cell in zip(header, row, strict=True) if name in read} for row in table.rows]
    try:
        answers = prediction.score(choice, schema.parse_text(cells, MISSING_IN_FILES), now=now)
    except InputError as error:
        raise BadRows([BadLine(table.lines[p.row], p.field, p.message) for p in error.problems]) from None
    return Batch(table, answers)


def score_file(
    file: BinaryIO,
    output: TextIO,
    endpoint_name: str,
    wanted: Wanted,
    *,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[MLAlgorithm, int]:
    """Score every row of a CSV by one algorithm into another CSV and record nothing, in memory that does not grow.

    `progress` is told of each further number of rows. Returns the algorithm and the number of rows. What is in
    `output` is of use only then. Raises BatchError, BadRows (of at least the first problems), PredictionError.
    """
    (algorithm,) = prediction.choose(endpoint_name, wanted, in_test=False).algorithms
    source = CsvFile(file)
    scorer = Scorer(algorithm, source.layout)
    answered = AnsweredCsv(source.layout)
    output.write(answered.header())
    problems: list[BadLine] = []
    scored = 0
    for chunk in source.chunks(CHUNK_ROWS):
        checked = scorer.check(chunk)
        problems += checked.problems
        if len(problems) >= MOST_PROBLEMS:
            break
        if not problems:
            results = scorer.answer(checked)
            output.write(answered.body(checked.rows, [(result["probability"], result["label"]) for result in results]))
            scored += len(checked.rows)
        progress(len(chunk))
    if problems:
        raise BadRows(problems)
    return algorithm, scored


def read_csv(file: BinaryIO, most_rows: float = math.inf) -> Table:
    """All of a CSV. Raises BatchError, BadRows, TooManyRows."""
    source = CsvFile(file)
    whole = Chunk([], [], [])
    for chunk in source.chunks(CHUNK_ROWS):
        whole.rows.extend(chunk.rows)
        whole.lines.extend(chunk.lines)
        whole.problems.extend(chunk.problems)
        if len(whole) > most_rows:
            raise TooManyRows(f"The file has more than {most_rows:,} rows.")
    if whole.problems:
        raise BadRows(whole.problems)
    return Table(source.layout, whole.rows, whole.lines)


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
    missing = dict.fromkeys(name for name in schema.names if name not in header)
    others = {name.lower(): name for name in header if name not in schema.names}
    for name in missing:
        nearest = difflib.get_close_matches(name.lower(), others, n=1)
        missing[name] = others[nearest[0]] if nearest else None
    return Columns(
        recognised=[name for name in schema.names if name in header],
        identifier=schema.identifier if schema.identifier in header else None,
        missing=missing,
        ignored=[name for name in header if name not in read],
        repeated=sorted(name for name in read if name and header.count(name) > 1),
    )


def _check_columns(header: Sequence[str], schema: Schema) -> None:
    problem = columns_of(header, schema).problem
    if problem:
        raise BatchError(problem)
