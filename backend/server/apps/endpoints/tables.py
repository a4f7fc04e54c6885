"""Tables of customers as they lie in files: CSV, CSV in gzip, or Parquet; one file, or several that go on."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

from apps.endpoints import parquet_file
from apps.endpoints.csv_file import BadRows, BatchError, Chunk, CsvFile, Layout, NoRows
from apps.endpoints.parquet_file import ParquetFile
from apps.endpoints.storage import BLOCK, Source

if TYPE_CHECKING:
    import pyarrow as pa

GZIP_MAGIC = b"\x1f\x8b"
# What else people send.
OTHERS = {
    b"PK\x03\x04": "The file is a workbook or an archive; save the table as CSV or Parquet.",
    b"PARE": "The file is encrypted Parquet; write it without encryption.",
}


class Table:
    """The rows of some files. All have the same columns, in one order, and are written in one way.

    types: of the columns, where the files are Parquet. position: how many bytes of the files were read.
    Raises BatchError, BadRows while it is read.
    """

    def __init__(self, sources: Sequence[Source], files: ExitStack):
        self._sources = [source for source in sources if source.size] or list(sources[:1])
        self._all = files
        self._before = 0
        self.types: pa.Schema | None = None
        self._first = self._opened(self._sources[0])
        self.layout: Layout = self._first.layout
        if self.types is not None and self.are_several:
            self.types = self._types_of_all(self.types)

    @property
    def are_several(self) -> bool:
        return len(self._sources) > 1

    @property
    def position(self) -> int:
        return self._before + (self._raw.tell() if self._raw and self._raw.seekable() else 0)

    def chunks(self, size: int, skip: int = 0, while_skipping: Callable[[], object] = lambda: None) -> Iterator[Chunk]:
        """The rows in order but for the first `skip`, at most `size` at a time, fewer if they are long.

        `while_skipping` is called now and then before the first of them. A chunk's rows are of one file.
        """

        def skipping(rows: int) -> None:
            nonlocal skip
            skip -= rows
            while_skipping()

        is_empty = True
        for source in self._sources:
            file = self._first if source is self._sources[0] else self._opened(source)
            name = self._name(source)
            if (file.layout.header, file.layout.delimiter) != (self.layout.header, self.layout.delimiter):
                raise BatchError(
                    f"{name} has other columns than {self._sources[0].name}, or separates them otherwise; "
                    "the files of one table must be alike."
                )
            try:
                for chunk in file.chunks(size, skip, skipping):
                    yield replace(chunk, file=name) if name else chunk
                is_empty = False
            except NoRows:
                pass
            except BatchError as error:
                raise _of_file(error, name) from None
            self._before += source.size
            self._raw = None
            self._open.close()
        if is_empty:
            raise NoRows("The file has a header only; add a line for each customer.")

    def _types_of_all(self, types: pa.Schema) -> pa.Schema:
        """Types that hold what any of the files holds: a column of whole numbers may be one of fractions in another."""
        for source in self._sources[1:]:
            with source.open() as raw:
                if is_parquet(raw):
                    types = parquet_file.types_of_both(types, ParquetFile(raw).types)
        return types

    def _name(self, source: Source) -> str:
        return source.name if self.are_several else ""

    def _opened(self, source: Source) -> CsvFile:
        self._open = self._all.enter_context(ExitStack())
        self._raw = raw = self._open.enter_context(source.open())
        try:
            is_first = source is self._sources[0]
            if not is_first and is_parquet(raw) is (self.types is None):
                raise BatchError(f"It is {'no ' * (not is_parquet(raw))}Parquet, unlike {self._sources[0].name}.")
            if is_parquet(raw):
                parquet = ParquetFile(raw)
                if is_first:
                    self.types = parquet.types
                return CsvFile(io.BufferedReader(_Stream(parquet.as_csv()), BLOCK), delimiter=",")
            for magic, sentence in OTHERS.items():
                if _begins_with(raw, magic):
                    raise BatchError(sentence)
            if _begins_with(raw, GZIP_MAGIC):
                return CsvFile(io.BufferedReader(_Stream(_unpacked(raw)), BLOCK))
            return CsvFile(raw)
        except BatchError as error:
            raise _of_file(error, self._name(source)) from None


@contextmanager
def opened(sources: Sequence[Source]) -> Iterator[Table]:
    """Raises BatchError, also for a first file whose header cannot be read."""
    with ExitStack() as files:
        yield Table(sources, files)


def _of_file(error: BatchError, name: str) -> BatchError:
    """The error with the name of the file, where it is one of several."""
    if not name:
        return error
    if isinstance(error, BadRows):
        return BadRows([replace(problem, file=name) for problem in error.problems])
    return BatchError(f"{name}: {error}")


def is_plain_csv(file: BinaryIO) -> bool:
    """Whether a file is neither compressed nor Parquet."""
    return not _begins_with(file, GZIP_MAGIC) and not is_parquet(file)


def is_parquet(file: BinaryIO) -> bool:
    return _begins_with(file, parquet_file.MAGIC)


def _begins_with(file: BinaryIO, magic: bytes) -> bool:
    if hasattr(file, "peek"):  # works for a pipe too
        return file.peek(len(magic)).startswith(magic)
    file.seek(0)
    beginning = file.read(len(magic))
    file.seek(0)
    return beginning == magic


class _Stream(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


# --- Compressed -------------------------------------------------------------------------------------------


def _unpacked(raw: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.open(raw) as table:
            while block := table.read(BLOCK):
                if block.startswith(parquet_file.MAGIC):
                    raise BatchError("The file is Parquet in gzip; send the Parquet as it is.")
                yield block
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> BatchError:
    return BatchError(f"The file is damaged gzip: {error}. Compress it and send it again.")


def beginning_of(data: bytes, most: int) -> bytes:
    """The CSV in the first bytes of a file, or as much of it as they hold; no more than `most`. Raises BatchError."""
    if not data.startswith(GZIP_MAGIC):
        return data[:most]
    found = b""
    while data and len(found) < most:  # a file may be compressed in several pieces
        piece = zlib.decompressobj(wbits=31)
        try:
            found += piece.decompress(data, most - len(found))
        except zlib.error as error:
            if found:
                break
            raise _damaged(error) from None
        data = piece.unused_data
    return found
