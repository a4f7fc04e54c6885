"""Many rows at once: a CSV of customers in, one answer per line out, in the file's order."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO

from apps.endpoints import prediction
from apps.endpoints.prediction import Answer, Wanted
from apps.ml.schema import MISSING_IN_FILES, InputError, Schema

DELIMITERS = ",;\t"
ADDED_COLUMNS = ("probability", "label")
LONGEST_HEADER = 100_000


class BatchError(Exception):
    """A file that cannot be scored as a whole; the message says why."""


@dataclass(frozen=True)
class BadLine:
    """What is wrong on one line of the file. The header is line 1."""

    line: int
    field: str | None
    message: str


class BadRows(BatchError):
    """Lines that cannot be scored. Nothing was scored or logged."""

    def __init__(self, problems: Sequence[BadLine]):
        self.problems = list(problems)
        super().__init__(f"{len(self.problems)} problems")


@dataclass(frozen=True)
class Table:
    """A CSV as text.

    lines: the line in the file at which each row begins. mark: the byte order mark, or "".
    """

    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    delimiter: str
    mark: str


@dataclass(frozen=True)
class Batch:
    table: Table
    answers: list[Answer]

    def as_csv(self) -> str:
        """The upload, marked and separated as it was, with the columns probability and label at its end.

        Those of an earlier answer are replaced. Cells are given back as they came, formulas included.
        """
        header = self.table.header
        kept = len(header) - len(ADDED_COLUMNS) if tuple(header[-len(ADDED_COLUMNS) :]) == ADDED_COLUMNS else None
        buffer = io.StringIO(newline="")
        buffer.write(self.table.mark)
        writer = csv.writer(buffer, delimiter=self.table.delimiter)
        writer.writerow([*header[:kept], *ADDED_COLUMNS])
        for row, answer in zip(self.table.rows, self.answers, strict=True):
            writer.writerow([*row[:kept], answer.probability, answer.label])
        return buffer.getvalue()


def predict_file(file: BinaryIO, endpoint_name: str, wanted: Wanted, *, now: datetime) -> Batch:
    """Score every row of a CSV by one algorithm and record each; all of them or none.

    A batch is no part of a running A/B test. Raises BatchError, BadRows, PredictionError.
    """
    choice = prediction.choose(endpoint_name, wanted, in_test=False)
    (algorithm,) = choice.algorithms
    schema = prediction.classifier_of(algorithm).schema
    table = read_csv(file)
    _check_columns(table.header, schema)
    read = {*schema.names, schema.identifier}
    cells = [{name: cell for name, cell in zip(table.header, row, strict=True) if name in read} for row in table.rows]
    try:
        answers = prediction.score(choice, schema.parse_text(cells, MISSING_IN_FILES), now=now)
    except InputError as error:
        raise BadRows([BadLine(table.lines[p.row], p.field, p.message) for p in error.problems]) from None
    return Batch(table, answers)


def read_csv(file: BinaryIO) -> Table:
    """A CSV in UTF-8, separated by comma, semicolon or tab. Raises BatchError, BadRows.

    Blank lines are passed over, as pandas does; in a file of one column, a missing value is written "".
    """
    text = _decode(file.read())
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix(mark)
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows, lines, problems = [], [], []
    line = 1
    try:
        for row in reader:
            if not row or (len(row) == 1 and row[0].isspace()):
                pass
            elif not header:
                header = [name.strip() for name in row]
            elif len(row) != len(header):
                problems.append(BadLine(line, None, f"has {len(row)} fields where the header has {len(header)}"))
            else:
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadRows([BadLine(line, None, f"is no valid CSV: {error}")]) from None
    if problems:
        raise BadRows(problems)
    if not header:
        raise BatchError("The file is empty; the first line must name the columns.")
    if not rows:
        raise BatchError("The file has a header only; add a line for each customer.")
    return Table(header, rows, lines, delimiter, mark)


def _decode(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = len(data[: error.start + 1].splitlines())
        message = f"holds a byte that is not UTF-8 (0x{data[error.start]:02x}); save the file as UTF-8"
        raise BadRows([BadLine(line, None, message)]) from None
    if "\x00" in text:
        line = len(data[: data.index(b"\x00") + 1].splitlines())
        raise BadRows([BadLine(line, None, "holds a NUL character")])
    return text


def _delimiter(text: str) -> str:
    """The one that splits the first line into the most fields."""
    first_line = text.lstrip("\r\n")[:LONGEST_HEADER].splitlines()[:1]
    return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader(first_line, delimiter=delimiter), [])))


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
