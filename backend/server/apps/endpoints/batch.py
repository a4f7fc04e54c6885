"""Many rows at once: a CSV of customers in, one answer per line out, in the file's order."""

from __future__ import annotations

import csv
import io
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any, BinaryIO, Protocol, TypeVar

from apps.endpoints import prediction
from apps.endpoints.csv_file import BadLine, BadRows, BatchError, Chunk, CsvFile, Layout
from apps.endpoints.models import MLAlgorithm
from apps.endpoints.prediction import Answer, Wanted
from apps.endpoints.scoring import Scorer, check_columns
from apps.endpoints.tables import Table
from apps.ml.schema import MISSING_IN_FILES, InputError, Schema

# With their types in Parquet.
REQUEST_ID = {"request_id": "int64"}
ADDED_COLUMNS = {"probability": "float64", "label": "string"}
CHUNK_ROWS = 10_000
MOST_PROBLEMS = 1_000
MOST_THREADS = 4  # each holds chunks, and one thread reads and writes for all
MOST_AHEAD = 2

Item = TypeVar("Item")
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
    earlier answer are replaced.
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
        cells = map(str, chain.from_iterable(answers))
        kept = self._without_earlier(records) if self._earlier else records
        lines = map(self._layout.delimiter.join, zip(kept, *[cells] * len(self.added), strict=True))
        return "\r\n".join([*lines, ""])

    def _without_earlier(self, records: Sequence[str]) -> list[str]:
        delimiter = self._layout.delimiter
        split = [record.rsplit(delimiter, self._earlier) for record in records]
        if not any(piece.count('"') % 2 for pieces in split for piece in pieces):
            return [pieces[0] for pieces in split]
        rows = csv.reader(records, delimiter=delimiter, strict=True)  # a delimiter may be quoted
        return [self._written([row[: -self._earlier]]).removesuffix("\r\n") for row in rows]

    def _written(self, rows: Iterable[Sequence[Any]]) -> str:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, delimiter=self._layout.delimiter).writerows(rows)
        return buffer.getvalue()


def _ends_with(header: Sequence[str], added: Collection[str]) -> bool:
    return list(header[-len(added) :]) == list(added)


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
    check_columns(header, schema)
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
    scorer = Scorer(prediction.classifier_of(algorithm), table.layout)
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


def in_order(work: Callable[[Item], Result], chunks: Iterable[Item], threads: int) -> Iterator[Result]:
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


def made_ahead(results: Iterator[Result]) -> Iterator[Result]:
    """The same, made by a thread of their own, a few ahead of the caller."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, results, end) for _ in range(MOST_AHEAD))
        while (result := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, results, end))
            yield result
            del result


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
