"""CSV files as people send them, read row by row in memory that does not grow with the file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import BinaryIO

DELIMITERS = ",;\t"
LONGEST_HEADER = 100_000
LONGEST_LINE = 10_000_000


class BatchError(Exception):
    """A file that cannot be scored as a whole; the message says why."""


@dataclass(frozen=True)
class BadLine:
    """What is wrong on one line of the file. The header is line 1. value: the cell, where one is to blame."""

    line: int
    field: str | None
    message: str
    value: str | None = None


class BadRows(BatchError):
    """Lines that cannot be scored. Nothing was scored or logged."""

    def __init__(self, problems: Sequence[BadLine]):
        self.problems = list(problems)
        super().__init__(f"{len(self.problems)} problems")


@dataclass(frozen=True)
class Layout:
    """How a file is written. mark: the byte order mark, or ""."""

    header: list[str]
    delimiter: str
    mark: str


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file, each with the line at which it begins; problems: rows that are not among them."""

    rows: list[list[str]]
    lines: list[int]
    problems: list[BadLine]

    def __len__(self) -> int:
        return len(self.rows) + len(self.problems)


class CsvFile:
    """A CSV in UTF-8, separated by comma, semicolon or tab. Raises BatchError, BadRows while it is read.

    Blank lines are passed over, as pandas does; in a file of one column, a missing value is written "".
    """

    def __init__(self, file: BinaryIO):
        # What is not UTF-8 is read as surrogates, of which real UTF-8 has none: _checked finds its line and byte.
        text = _Borrowed(file, encoding="utf-8", errors="surrogateescape", newline="")
        lines = _checked(text)
        blank: list[str] = []
        first = ""
        for first in lines:
            if not blank:
                mark = "\ufeff" if first.startswith("\ufeff") else ""
                first = first.removeprefix(mark)
            if first.strip("\r\n"):
                break
            blank.append(first)
        else:
            raise BatchError("The file is empty; the first line must name the columns.")
        delimiter = _delimiter(first)
        self._reader = csv.reader(chain(blank, [first], lines), delimiter=delimiter, strict=True)
        self._rows = self._read()
        header = next(self._rows, None)
        if header is None:
            raise BatchError("The file is empty; the first line must name the columns.")
        self.layout = Layout([name.strip() for name in header[1]], delimiter, mark)

    def chunks(self, size: int, *, skip: int = 0) -> Iterator[Chunk]:
        """The rows after the first `skip` in the file's order, `size` at a time.

        Raises BatchError for a file without any.
        """
        width = len(self.layout.header)
        is_empty = not sum(1 for _ in islice(self._rows, skip))
        while several := list(islice(self._rows, size)):
            is_empty = False
            fitting = [(line, row) for line, row in several if len(row) == width]
            yield Chunk(
                rows=[row for _, row in fitting],
                lines=[line for line, _ in fitting],
                problems=[
                    BadLine(line, None, f"has {len(row)} fields where the header has {width}")
                    for line, row in several
                    if len(row) != width
                ],
            )
        if is_empty:
            raise BatchError("The file has a header only; add a line for each customer.")

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        line = 1
        try:
            for row in self._reader:
                if row and not (len(row) == 1 and row[0].isspace()):
                    yield line, row
                line = self._reader.line_num + 1
        except csv.Error as error:
            raise BadRows([BadLine(line, None, f"is no valid CSV: {error}")]) from None


class _Borrowed(io.TextIOWrapper):
    """Leaves the file open, which is the caller's."""

    def close(self) -> None:
        pass


def _checked(text: io.TextIOWrapper) -> Iterator[str]:
    """The lines, each with its end, if they are text and of a length that can be held."""
    for number, line in enumerate(iter(partial(text.readline, LONGEST_LINE), ""), start=1):
        problem = None
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError as error:
                byte = ord(line[error.start]) - 0xDC00
                problem = f"holds a byte that is not UTF-8 (0x{byte:02x}); save the file as UTF-8"
        if problem is None and "\x00" in line:
            problem = "holds a NUL character"
        if problem is None and len(line) == LONGEST_LINE:
            problem = f"is longer than {LONGEST_LINE:,} characters"
        if problem is not None:
            raise BadRows([BadLine(number, None, problem)])
        yield line


def _delimiter(first_line: str) -> str:
    """The one that splits the first line into the most fields."""
    beginning = first_line[:LONGEST_HEADER].splitlines()[:1]
    return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader(beginning, delimiter=delimiter), [])))
