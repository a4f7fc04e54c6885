"""CSV files as people send them, read record by record in memory that does not grow with the file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import add
from typing import BinaryIO

DELIMITERS = ",;\t"
LONGEST_HEADER = 100_000
LONGEST_LINE = 10_000_000
LARGEST_CHUNK = 1_000_000  # characters, not counting the end of its last line; more of them leave the caches

# By delimiter, a quoted cell from end to end, in which no line ends.
_QUOTED = {each: re.compile(rf'(?<![^{each}\n])"(?:[^"\n]++|"")*+"(?![^{each}\n])') for each in DELIMITERS}
_QUOTED_BLANK_LINE = re.compile(r'^"\s+"$', re.MULTILINE)


class BatchError(Exception):
    """A file that cannot be scored as a whole; the message says why."""


@dataclass(frozen=True)
class BadLine:
    """What is wrong on one line of a file. The header is line 1. value: the cell, where one is to blame.

    file: its name, where the table has several.
    """

    line: int
    field: str | None
    message: str
    value: str | None = None
    file: str = ""

    def __str__(self) -> str:
        return f"{self.file + ', ' if self.file else ''}line {self.line}: {self.message}"


class BadRows(BatchError):
    """Lines that cannot be scored. Nothing was scored or logged."""

    def __init__(self, problems: Sequence[BadLine]):
        self.problems = list(problems)
        super().__init__(f"{len(self.problems)} problems")


class NoRows(BatchError):
    """A file with a header only."""


@dataclass(frozen=True)
class Layout:
    """How a file is written. mark: the byte order mark, or ""."""

    header: list[str]
    delimiter: str
    mark: str


@dataclass(frozen=True)
class Rows:
    """The cells of records that have as many as the header, and what is wrong with the others.

    cells, records, lines: by row, its cells, its text, and the line at which it begins.
    """

    cells: list[list[str]]
    records: list[str]
    lines: list[int]
    problems: list[BadLine]


@dataclass(frozen=True)
class Chunk:
    """Some records of a file, each as it stands there but for its line end, and the line at which each begins.

    is_plain: each is one line, its quotes only enclose whole cells, and csv takes every cell, so that whatever reads
    CSV finds the same cells.
    """

    layout: Layout
    records: list[str]
    lines: Sequence[int]
    is_plain: bool
    file: str = ""  # its name, where the table has several

    def __len__(self) -> int:
        return len(self.records)

    def rows(self) -> Rows:
        width = len(self.layout.header)
        rows = Rows([], [], [], [])
        reader = csv.reader(self.records, delimiter=self.layout.delimiter, strict=True)
        for cells, record, line in zip(reader, self.records, self.lines, strict=True):
            if len(cells) == width:
                rows.cells.append(cells)
                rows.records.append(record)
                rows.lines.append(line)
            else:
                problem = f"has {len(cells)} fields where the header has {width}"
                rows.problems.append(BadLine(line, None, problem, file=self.file))
        return rows


class CsvFile:
    """A CSV in UTF-8, separated by comma, semicolon or tab. Raises BatchError, BadRows while it is read.

    Blank lines are passed over, as pandas does; in a file of one column, a missing value is written "".
    """

    def __init__(self, file: BinaryIO, delimiter: str = ""):
        # What is not UTF-8 is read as surrogates, of which real UTF-8 has none: _checked finds its line and byte.
        self._lines = _Lines(_Borrowed(file, encoding="utf-8", errors="surrogateescape", newline=""))
        self._line = 1  # the number of the next
        first = self._lines.next()
        mark = "\ufeff" if first.startswith("\ufeff") else ""
        lines = [first.removeprefix(mark)]
        while lines[-1] and not lines[-1].strip("\r\n"):
            lines.append(self._lines.next())
        self._delimiter = delimiter or _delimiter(lines[-1])
        header = next((cells for _, _, cells in self._records(lines)), None)
        if header is None:
            raise BatchError("The file is empty; the first line must name the columns.")
        self.layout = Layout([name.strip() for name in header], self._delimiter, mark)

    def chunks(
        self, size: int, skip: int = 0, while_skipping: Callable[[int], object] = lambda rows: None
    ) -> Iterator[Chunk]:
        """The rows in the file's order but for the first `skip`, at most `size` at a time, fewer if they are long.

        `while_skipping` is told of each further number of rows before the first of them. Raises NoRows.
        """
        is_empty = True
        while (chunk := self._chunk(min(size, skip) or size)) is not None:
            is_empty = is_empty and not chunk
            if skip:
                skip -= len(chunk)
                while_skipping(len(chunk))
            elif chunk:
                yield chunk
        if is_empty:
            raise NoRows("The file has a header only; add a line for each customer.")

    def _chunk(self, size: int) -> Chunk | None:
        """The records that begin on the next lines, if there are any lines."""
        records, ends = self._lines.take(size)
        if not records:
            return None
        lines = map(add, records, ends)
        first, after = self._line, self._line + len(records)
        numbers: Sequence[int] = range(first, after)
        if not all(records) or any(map(str.isspace, records)):
            kept = [at for at, record in enumerate(records) if not _is_blank(record, self._delimiter)]
            numbers = [first + at for at in kept]
            records = [records[at] for at in kept]
        if _are_plain(records, self._delimiter):
            self._line = after
            return Chunk(self.layout, records, numbers, is_plain=True)
        chunk = Chunk(self.layout, [], [], is_plain=False)
        for number, record, _ in self._records(lines):
            chunk.lines.append(number)
            chunk.records.append(record)
            if self._line >= after:
                break
        return chunk

    def _records(self, lines: Iterable[str]) -> Iterator[tuple[int, str, list[str]]]:
        """By record from these lines on, its line, its text and its cells, as Python's csv reads them, all checked."""
        text: list[str] = []

        def checked() -> Iterator[str]:
            for line in chain(lines, iter(self._lines.next, "")):
                _check(line, self._line)
                self._line += 1
                text.append(line)
                yield line

        number = self._line
        try:
            for cells in csv.reader(checked(), delimiter=self._delimiter, strict=True):
                if cells and not (len(cells) == 1 and cells[0].isspace()):
                    yield number, "".join(text).rstrip("\r\n"), cells
                text.clear()
                number = self._line
        except csv.Error as error:
            raise BadRows([BadLine(number, None, f"is no valid CSV: {error}")]) from None


class _Lines:
    """The lines of a text, many at a time, as going over each to read it would take longer than to score it.

    A line ends in LF, CR or both. One that is longer than LONGEST_LINE may be given in pieces that are no shorter.
    """

    def __init__(self, text: io.TextIOWrapper):
        self._blocks = self._read(text)
        self._records: list[str] = []
        self._ends: list[str] = []
        self._taken = 0

    def take(self, most: int) -> tuple[list[str], list[str]]:
        """The next lines, apart from their ends; none after the last, and else at most so many."""
        while self._taken == len(self._records):
            block = next(self._blocks, None)
            if block is None:
                return [], []
            self._records, self._ends = block
            self._taken = 0
        begin, self._taken = self._taken, min(self._taken + most, len(self._records))
        return self._records[begin : self._taken], self._ends[begin : self._taken]

    def next(self) -> str:
        """The next line with its end; "" after the last."""
        return "".join(chain(*self.take(1)))

    @staticmethod
    def _read(text: io.TextIOWrapper) -> Iterator[tuple[list[str], list[str]]]:
        rest = ""
        while block := text.read(LARGEST_CHUNK):
            block = rest + block
            returns = block.count("\r")
            if returns == 0 or returns == block.count("\n") == block.count("\r\n"):
                end = "\r\n" if returns else "\n"
                records = block.split(end)
                rest = records.pop()
                ends = [end] * len(records)
            else:
                lines = io.StringIO(block, newline="").readlines()
                rest = "" if lines[-1].endswith("\n") else lines.pop()  # CR may be half of an end
                records, ends = _without_ends(lines)
            if len(rest) >= LONGEST_LINE:
                records, ends, rest = [*records, rest], [*ends, ""], ""
            yield records, ends
        if rest:
            yield _without_ends([rest])


def _without_ends(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    records = [line.rstrip("\r\n") for line in lines]
    return records, [line[len(record) :] for line, record in zip(lines, records, strict=True)]


class _Borrowed(io.TextIOWrapper):
    """Leaves the file open, which is the caller's."""

    def close(self) -> None:
        pass


def _check(line: str, number: int) -> None:
    """Raise BadRows unless a line is text and of a length that can be held."""
    problem = None
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) - 0xDC00
            problem = f"holds a byte that is not UTF-8 (0x{byte:02x}); save the file as UTF-8"
    if problem is None and "\x00" in line:
        problem = "holds a NUL character"
    if problem is None and len(line) >= LONGEST_LINE:
        problem = f"is longer than {LONGEST_LINE:,} characters"
    if problem is not None:
        raise BadRows([BadLine(number, None, problem)])


def _is_blank(record: str, delimiter: str) -> bool:
    return not record or (record.isspace() and delimiter not in record)


def _are_plain(records: Sequence[str], delimiter: str) -> bool:
    """Whether each of some lines is a record as `Chunk.is_plain` says, and holds nothing that would be refused."""
    text = "\n".join(records)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    if "\x00" in text:
        return False
    has_quotes = '"' in text
    longest, longest_cell = max(map(len, records), default=0), csv.field_size_limit()
    if longest + len("\r\n") >= LONGEST_LINE:
        return False
    if longest > longest_cell:
        cells = chain.from_iterable(record.split(delimiter) for record in records)
        if has_quotes or max(map(len, cells)) > longest_cell:
            return False
    return not has_quotes or ('"' not in _QUOTED[delimiter].sub("", text) and not _QUOTED_BLANK_LINE.search(text))


def _delimiter(first_line: str) -> str:
    """The one that splits the first line into the most fields."""
    beginning = first_line[:LONGEST_HEADER].splitlines()[:1]
    return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader(beginning, delimiter=delimiter), [])))
