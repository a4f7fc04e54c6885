"""Many rows at once: a CSV of customers in, one answer per line out, in the file's order."""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from typing import Any, BinaryIO, Protocol, TypeVar

from apps.endpoints import prediction
from apps.endpoints.csv_file import BadLine, BadRows, BatchError, Chunk, CsvFile, Layout
from apps.endpoints.models import MLAlgorithm
from apps.endpoints.prediction import Answer, Wanted
from apps.endpoints.tables import Table
from apps.ml import columnar
from apps.ml.schema import MISSING_IN_FILES, AlignedRows, InputError, Problem, Schema

# With their types in Parquet.
REQUEST_ID = {"request_id": "int64"}
ADDED_COLUMNS = {"probability": "float64", "label": "string"}
CHUNK_ROWS = 10_000
MOST_PROBLEMS = 1_000
MOST_THREADS = 4  # each holds chunks, and one thread reads and writes for all

Result = TypeVar("Result")


@dataclass(frozen=True)
class TextTable:
    """A CSV as text. By row, rows: its cells; records: how it stands in the file; lines: where it begins there."""

    layout: Layout
    rows: list[list[str]]
    records: list[str]
    lines: list[int]


@dataclass(frozen=True)
class Batch:
    table: TextTable
    answers: list[Answer]

    def as_csv(self) -> str:
        """The upload with the columns probability and label at its end."""
        answered = AnsweredCsv(self.table.layout)
        answers = [(answer.probability, answer.label) for answer in self.answers]
        return answered.header() + answered.body(self.table.records, answers)


class AnsweredCsv:
    """Writes a CSV back, marked and separated as it was, with what was answered at its end.

    Records are given back as they stand in the file, but for their line ends, formulas included. The columns of an
    earlier answer are replaced, for which the others are written anew.
    """

    def __init__(self, layout: Layout, *, with_ids: bool = False):
        self._layout = layout
        logged = {**REQUEST_ID, **ADDED_COLUMNS}
        self.added = logged if with_ids else ADDED_COLUMNS
        self._earlier = next((len(added) for added in (logged, ADDED_COLUMNS) if _ends_with(layout.header, added)), 0)
        self.names = [*layout.header[: len(layout.header) - self._earlier], *self.added]

    def header(self) -> str:
        return self._layout.mark + self._written([self.names])

    def body(self, records: Sequence[str], answers: Iterable[Sequence[Any]]) -> str:
        delimiter = self._layout.delimiter
        if not self._earlier:
            cells = map(str, chain.from_iterable(answers))
            lines = map(delimiter.join, zip(records, *[cells] * len(self.added), strict=True))
            return "\r\n".join([*lines, ""])
        rows = csv.reader(records, delimiter=delimiter, strict=True)
        return self._written([*row[: -self._earlier], *answer] for row, answer in zip(rows, answers, strict=True))

    def _written(self, rows: Iterable[Sequence[Any]]) -> str:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, delimiter=self._layout.delimiter).writerows(rows)
        return buffer.getvalue()


def _ends_with(header: Sequence[str], added: Collection[str]) -> bool:
    return list(header[-len(added) :]) == list(added)


@dataclass(frozen=True, eq=False)
class ReadCells:
    """What `columnar.Cells` holds, of rows that were read cell by cell."""

    aligned: AlignedRows
    of_columns: list[list[Any]]
    of_keys: list[str]

    def columns(self) -> list[list[Any]]:
        return self.of_columns

    def keys(self) -> list[str]:
        return self.of_keys


@dataclass(frozen=True, eq=False)
class Checked:
    """The records of a chunk that can be scored, as they stand in the file, and what is wrong with the others."""

    records: list[str]
    problems: list[BadLine]
    cells: columnar.Cells | ReadCells

    @property
    def aligned(self) -> AlignedRows:
        return self.cells.aligned

    @cached_property
    def columns(self) -> list[list[Any]]:
        """The features as they were sent, by column of the model."""
        return self.cells.columns()

    @cached_property
    def keys(self) -> list[str]:
        """The customers."""
        return self.cells.keys()


class Scorer:
    """One algorithm, and files that are laid out in one way. Raises BatchError for columns that do not fit.

    Safe to use from many threads.
    """

    def __init__(self, algorithm: MLAlgorithm, layout: Layout):
        self.algorithm = algorithm
        self._classifier = prediction.classifier_of(algorithm)
        self.schema = self._classifier.schema
        self._header = layout.header
        _check_columns(layout.header, self.schema)
        self._reader = columnar.CellReader(self.schema, layout.header, layout.delimiter)

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
        results = [self._classifier.postprocessing(row) for row in self._classifier.predict(checked.aligned)]
        for result, warnings in zip(results, checked.aligned.warnings, strict=True):
            if warnings:
                result["warnings"] = warnings
        return results

    def label(self, checked: Checked) -> list[tuple[float, str]]:
        """Probability and label of each row, as `answer` says them."""
        return self._classifier.labelled(self._classifier.predict(checked.aligned))

    def _customer_keys(self, rows: Sequence[list[str]]) -> list[str]:
        if self.schema.identifier not in self._header:
            return [""] * len(rows)
        position = self._header.index(self.schema.identifier)
        return self.schema.customer_keys([row[position] for row in rows])

    def _bad_line(self, file: str, line: int, row: Sequence[str], problem: Problem) -> BadLine:
        value = row[self._header.index(problem.field)] if problem.field else None
        return BadLine(line, problem.field, problem.message, value, file)


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


class Output(Protocol):
    """Where an answered table is written to."""

    def begin(self, answered: AnsweredCsv, table: Table, schema: Schema) -> None:
        """Raises BatchError for columns that cannot be written so."""

    def write(self, text: str) -> None:
        """Some whole records of the CSV."""


def score_table(
    table: Table,
    output: Output,
    endpoint_name: str,
    wanted: Wanted,
    *,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[MLAlgorithm, int]:
    """Score every row of a table by one algorithm into another and record nothing, in memory that does not grow.

    `progress` is told of each further number of rows. Returns the algorithm and the number of rows. What is in
    `output` is of use only then. Raises BatchError, BadRows (of at least the first problems), PredictionError.
    """
    (algorithm,) = prediction.choose(endpoint_name, wanted, in_test=False).algorithms
    scorer = Scorer(algorithm, table.layout)
    answered = AnsweredCsv(table.layout)
    output.begin(answered, table, scorer.schema)
    problems: list[BadLine] = []
    scored = 0

    def answer(chunk: Chunk) -> tuple[int, list[BadLine], str]:
        checked = scorer.check(chunk)
        if problems or checked.problems:  # then nothing is written
            return len(chunk), checked.problems, ""
        return len(chunk), [], answered.body(checked.records, scorer.label(checked))

    with closing(in_order(answer, table.chunks(CHUNK_ROWS), min(os.cpu_count() or 1, MOST_THREADS))) as answers:
        for rows, found, text in answers:
            problems += found
            if len(problems) >= MOST_PROBLEMS:
                break
            output.write(text)
            scored += rows
            progress(rows)
    if problems:
        raise BadRows(problems)
    return algorithm, scored


def in_order(work: Callable[[Chunk], Result], chunks: Iterable[Chunk], threads: int) -> Iterator[Result]:
    """What some threads make of the chunks, in their order, while the caller goes on; few chunks are held at a time.

    Where the chunks end in a BatchError, it is raised after what was made of those before.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        failure = None
        try:
            for chunk in chunks:
                waiting.append(pool.submit(work, chunk))
                del chunk
                if len(waiting) > threads:
                    yield waiting.popleft().result()
        except BatchError as error:
            failure = error
        while waiting:
            yield waiting.popleft().result()
    if failure is not None:
        raise failure


def read_csv(file: BinaryIO, most_rows: float = math.inf) -> TextTable:
    """All of a CSV. Raises BatchError, BadRows, TooManyRows."""
    source = CsvFile(file)
    table = TextTable(source.layout, [], [], [])
    problems: list[BadLine] = []
    for chunk in source.chunks(CHUNK_ROWS):
        read = chunk.rows()
        table.rows.extend(read.cells)
        table.records.extend(read.records)
        table.lines.extend(read.lines)
        problems += read.problems
        if len(table.rows) + len(problems) > most_rows:
            raise TooManyRows(f"The file has more than {most_rows:,} rows.")
    if problems:
        raise BadRows(problems)
    return table


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


def _check_columns(header: Sequence[str], schema: Schema) -> None:
    problem = columns_of(header, schema).problem
    if problem:
        raise BatchError(problem)
