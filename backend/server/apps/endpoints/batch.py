"""Many rows at once: a CSV of customers in, one answer per line out, in the file's order."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO, TextIO

from apps.endpoints import prediction
from apps.endpoints.csv_file import BadLine, BadRows, BatchError, Chunk, CsvFile, Layout
from apps.endpoints.models import MLAlgorithm
from apps.endpoints.prediction import Answer, Wanted
from apps.ml.schema import MISSING_IN_FILES, InputError, Schema

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
        buffer = io.StringIO(newline="")
        answered = AnsweredCsv(buffer, self.table.layout)
        answered.write(self.table.rows, ((answer.probability, answer.label) for answer in self.answers))
        return buffer.getvalue()


class AnsweredCsv:
    """Writes a CSV back, marked and separated as it was, with the columns probability and label at its end.

    Those of an earlier answer are replaced. Cells are given back as they came, formulas included.
    """

    def __init__(self, output: TextIO, layout: Layout):
        header = layout.header
        was_answered = tuple(header[-len(ADDED_COLUMNS) :]) == ADDED_COLUMNS
        self._kept = len(header) - len(ADDED_COLUMNS) if was_answered else None
        output.write(layout.mark)
        self._writer = csv.writer(output, delimiter=layout.delimiter)
        self.write([header], [ADDED_COLUMNS])

    def write(self, rows: Sequence[list[str]], answers: Iterable[Sequence[Any]]) -> None:
        kept = self._kept
        self._writer.writerows([*row[:kept], *answer] for row, answer in zip(rows, answers, strict=True))


def predict_file(file: BinaryIO, endpoint_name: str, wanted: Wanted, *, now: datetime) -> Batch:
    """Score every row of a CSV by one algorithm and record each; all of them or none.

    A batch is no part of a running A/B test. Raises BatchError, BadRows, PredictionError.
    """
    choice = prediction.choose(endpoint_name, wanted, in_test=False)
    (algorithm,) = choice.algorithms
    schema = prediction.classifier_of(algorithm).schema
    table = read_csv(file)
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
    classifier = prediction.classifier_of(algorithm)
    source = CsvFile(file)
    header = source.layout.header
    _check_columns(header, classifier.schema)
    answered = AnsweredCsv(output, source.layout)
    problems: list[BadLine] = []
    scored = 0
    for chunk in source.chunks(CHUNK_ROWS):
        problems += chunk.problems
        try:
            aligned = classifier.schema.align_cells(header, chunk.rows)
        except InputError as error:
            problems += [BadLine(chunk.lines[p.row], p.field, p.message) for p in error.problems]
        if len(problems) >= MOST_PROBLEMS:
            break
        if not problems:
            results = [classifier.postprocessing(row) for row in classifier.predict(aligned)]
            answered.write(chunk.rows, ((result["probability"], result["label"]) for result in results))
            scored += len(chunk.rows)
        progress(len(chunk.rows))
    if problems:
        raise BadRows(sorted(problems, key=lambda problem: problem.line))
    return algorithm, scored


def read_csv(file: BinaryIO) -> Table:
    """All of a CSV. Raises BatchError, BadRows."""
    source = CsvFile(file)
    whole = Chunk([], [], [])
    for chunk in source.chunks(CHUNK_ROWS):
        whole.rows.extend(chunk.rows)
        whole.lines.extend(chunk.lines)
        whole.problems.extend(chunk.problems)
    if whole.problems:
        raise BadRows(whole.problems)
    return Table(source.layout, whole.rows, whole.lines)


def _check_columns(header: Sequence[str], schema: Schema) -> None:
    repeated = sorted(name for name in {*schema.names, schema.identifier} if name and header.count(name) > 1)
    if repeated:
        raise BatchError(f"The header names {', '.join(repeated)} more than once.")
    absent = [name for name in schema.names if name not in header]
    if not absent:
        return
    others = {name.lower(): name for name in header if name not in schema.names}
    hints = []
    for name in absent:
        nearest = difflib.get_close_matches(name.lower(), others, n=1)
        hints.append(f"{name} (is it {others[nearest[0]]}?)" if nearest else name)
    raise BatchError(f"The file lacks the columns {', '.join(hints)}; add them, and leave cells empty where not known.")
