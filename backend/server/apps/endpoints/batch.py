"""Many rows at once: a CSV of customers in, one answer per line out, in the file's order."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO

from django.db import transaction

from apps.endpoints import prediction
from apps.endpoints.prediction import Answer, Wanted
from apps.ml.schema import MISSING_IN_FILES, InputError, Schema

DELIMITERS = ",;\t"
ADDED_COLUMNS = ("probability", "label")


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
    """A CSV as text: `lines` holds the line in the file at which each row ends."""

    header: list[str]
    rows: list[list[str]]
    lines: list[int]


@dataclass(frozen=True)
class Batch:
    table: Table
    answers: list[Answer]

    def as_csv(self) -> str:
        """The upload, with probability and label added (or replaced, where it had them)."""
        kept = [position for position, name in enumerate(self.table.header) if name not in ADDED_COLUMNS]
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*(self.table.header[position] for position in kept), *ADDED_COLUMNS])
        for row, answer in zip(self.table.rows, self.answers, strict=True):
            writer.writerow([*(row[position] for position in kept), repr(answer.probability), answer.label])
        return buffer.getvalue()


def predict_file(file: BinaryIO, endpoint_name: str, wanted: Wanted, *, now: datetime) -> Batch:
    """Score every row of a CSV by one algorithm and record each; all of them or none.

    A batch is no part of a running A/B test. Raises BatchError, BadRows, PredictionError.
    """
    algorithm = prediction.choose(endpoint_name, wanted, in_test=False).algorithms[0]
    schema = prediction.classifier_of(algorithm).schema
    table = read_csv(file)
    _check_columns(table.header, schema)
    known = [
        position for position, name in enumerate(table.header) if name in schema.names or name == schema.identifier
    ]
    cells = [{table.header[position]: row[position] for position in known} for row in table.rows]
    try:
        rows = schema.parse_text(cells, MISSING_IN_FILES)
        with transaction.atomic():
            answers = prediction.score(algorithm, rows, now=now)
    except InputError as error:
        raise BadRows([BadLine(table.lines[p.row], p.field, p.message) for p in error.problems]) from None
    return Batch(table, answers)


def read_csv(file: BinaryIO) -> Table:
    """A CSV in UTF-8, separated by comma, semicolon or tab. Raises BatchError, BadRows."""
    text = _decode(file.read())
    first_line = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows, lines, problems = [], [], []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row) and len(row) <= 1:
                continue
            if not header:
                header = [name.strip() for name in row]
            elif len(row) != len(header):
                problems.append(
                    BadLine(reader.line_num, None, f"has {len(row)} fields where the header has {len(header)}")
                )
            else:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise BadRows([BadLine(reader.line_num, None, f"is no valid CSV: {error}")]) from None
    if problems:
        raise BadRows(problems)
    if not header:
        raise BatchError("The file is empty; the first line must name the columns.")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise BatchError(f"The header names {', '.join(repeated)} more than once.")
    if not rows:
        raise BatchError("The file has a header only; add a line for each customer.")
    return Table(header, rows, lines)


def _decode(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"holds a byte that is not UTF-8 (0x{data[error.start]:02x}); save the file as UTF-8"
        raise BadRows([BadLine(line, None, message)]) from None
    if "\x00" in text:
        raise BadRows([BadLine(text.count("\n", 0, text.index("\x00")) + 1, None, "holds a NUL character")])
    return text


def _check_columns(header: Sequence[str], schema: Schema) -> None:
    absent = [name for name in schema.names if name not in header]
    if not absent:
        return
    lowered = {name.lower(): name for name in header if name not in schema.names}
    hints = [f"{name} (the file has {lowered[name.lower()]})" if name.lower() in lowered else name for name in absent]
    raise BatchError(f"The file lacks the columns {', '.join(hints)}; add them, and leave cells empty where not known.")
