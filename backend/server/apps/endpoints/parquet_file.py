"""Parquet, read as CSV and written from CSV.

So one reader decides what a cell means, whatever the form. pyarrow writes each value as text from which it reads the
same value again, a missing text apart from an empty one.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

from apps.endpoints.csv_file import BatchError
from apps.ml.schema import MISSING_IN_FILES, NUMERIC, Column, Schema

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"PAR1"
ROWS_AT_ONCE = 10_000
BUFFER_BYTES = 2**20
GROUP_BYTES = 2**24  # of text that becomes one row group


class ParquetFile:
    """Raises BatchError for a damaged file, and for columns that hold no text, number or date."""

    def __init__(self, raw: BinaryIO):
        import pyarrow as pa
        from pyarrow import parquet

        if not raw.seekable():
            raise BatchError("Parquet cannot be read from a pipe; write it into a file first.")
        try:
            self._file = parquet.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(error) from None
        self.types: pa.Schema = self._file.schema_arrow
        self._written = pa.schema([(field.name, _written(field)) for field in self.types])

    def as_csv(self) -> Iterator[bytes]:
        """Blocks of UTF-8, the names of the columns first."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        batches = self._file.iter_batches(ROWS_AT_ONCE, use_threads=False)
        tables = (pa.Table.from_batches([batch]) for batch in batches)
        is_first = True
        try:
            for table in chain([self.types.empty_table()], tables):
                rows = table.cast(self._written)
                for place, (name, column) in enumerate(zip(rows.column_names, rows.columns, strict=True)):
                    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
                        _check_dates(name, column)
                    elif pa.types.is_float64(column.type):
                        rows = rows.set_column(place, name, _without_exponents(column))
                if rows.num_columns == 1:  # of which a missing value would be a blank line
                    rows = rows.set_column(0, rows.field(0).name, rows.column(0).cast(pa.string()).fill_null(""))
                text = io.BytesIO()
                arrow_csv.write_csv(rows, text, arrow_csv.WriteOptions(include_header=is_first))
                is_first = False
                yield text.getvalue()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(error) from None


def types_of_both(some: pa.Schema, others: pa.Schema) -> pa.Schema:
    """By column, a type that holds what either holds: text where no other does without loss."""
    import pyarrow as pa

    if len(set(some.names)) < len(some.names) or some.names != others.names:  # which is refused elsewhere
        return some
    return pa.schema([(name, _type_of_both(some.field(name).type, others.field(name).type)) for name in some.names])


def _type_of_both(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    import pyarrow as pa
    from pyarrow import types

    if one == other:
        return one
    try:
        both = pa.unify_schemas([pa.schema([("", each)]) for each in (one, other)], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.string()
    kind = both.field(0).type
    loses = (
        (types.is_floating(kind) and (types.is_integer(one) or types.is_integer(other)))
        or (types.is_integer(kind) and pa.uint64() in (one, other))
        or types.is_timestamp(kind)
    )
    return pa.string() if loses else kind


def holds_footer(end: bytes) -> bool:
    """Whether so many of a file's last bytes are enough to know its columns by, or the file is damaged."""
    return not end.endswith(MAGIC) or int.from_bytes(end[-8:-4], "little") + 8 <= len(end)


def names_by_end(end: bytes) -> list[str]:
    """The columns of a file, by as many of its last bytes as hold its footer. Raises BatchError."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        types = parquet.read_schema(io.BytesIO(MAGIC + end))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(error) from None
    for field in types:
        _written(field)
    return [name.strip() for name in types.names]


def types_of(
    names: Sequence[str], schema: Schema, more: Mapping[str, str], file_types: pa.Schema | None, delimiter: str
) -> pa.Schema:
    """As what an answered CSV is written in Parquet.

    names: its columns; `more` has those that were added at the end, with their types. file_types: of a table that came
    as Parquet; of another, what the model reads as a number is one, and all else is text.
    Raises BatchError for two columns of one name.
    """
    import pyarrow as pa

    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if more.keys() & {*repeated}:
        raise BatchError(
            f"The file has a column {', '.join(sorted(more.keys() & {*repeated}))}, which the result adds; "
            "rename it, or ask for CSV."
        )
    if repeated:
        raise BatchError(f"Parquet names each column once; the file names {', '.join(repeated)} more than once.")
    kept = names[: len(names) - len(more)]
    if file_types is not None:
        types = [_read_back(field) for field in file_types]
    else:
        numbers = {column.name for column in schema.columns if column.kind == NUMERIC}
        types = [pa.float64() if name in numbers else pa.string() for name in kept]
    columns = [*zip(kept, types, strict=False), *((name, pa.type_for_alias(alias)) for name, alias in more.items())]
    return pa.schema(columns, {"came_as": "csv" if file_types is None else "parquet", "delimiter": delimiter})


def as_bytes(columns: pa.Schema) -> bytes:
    return columns.serialize().to_pybytes()


def from_bytes(data: bytes) -> pa.Schema:
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(data))


def written(pieces: Iterable[bytes], columns: pa.Schema) -> Iterator[bytes]:
    """A Parquet file in blocks, of whole records of a CSV."""
    sink = _Sink()
    with closing(ParquetWriter(sink, columns)) as writer:
        for piece in pieces:
            writer.write(piece)
            yield sink.taken()
    yield sink.taken()


class _Sink(io.RawIOBase):
    """Keeps what is written until it is taken."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self._blocks.append(bytes(block))
        self._position += len(self._blocks[-1])
        return len(self._blocks[-1])

    def tell(self) -> int:
        return self._position

    def taken(self) -> bytes:
        blocks, self._blocks = self._blocks, []
        return b"".join(blocks)


class ParquetWriter:
    """Writes rows that come as CSV. columns: as `types_of` gives them."""

    def __init__(self, sink: BinaryIO, columns: pa.Schema):
        from pyarrow import parquet

        self._columns = columns
        self._waiting: list[bytes] = []
        self._writer = parquet.ParquetWriter(sink, columns.remove_metadata())

    def write(self, records: bytes) -> None:
        """Some whole records, in UTF-8."""
        self._waiting.append(records)
        if sum(map(len, self._waiting)) >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        text = b"".join(self._waiting)
        self._waiting.clear()
        if text:
            self._writer.write_table(_typed(text, self._columns))


def _typed(text: bytes, columns: pa.Schema) -> pa.Table:
    """Records of a CSV as a table of these columns."""
    import pyarrow as pa
    from pyarrow import compute
    from pyarrow import csv as arrow_csv

    is_from_csv = columns.metadata[b"came_as"] == b"csv"
    delimiter = columns.metadata[b"delimiter"].decode()
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(text),
            arrow_csv.ReadOptions(column_names=columns.names, use_threads=False, block_size=len(text) + 1),
            arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            arrow_csv.ConvertOptions(
                column_types=columns,
                null_values=sorted(MISSING_IN_FILES) if is_from_csv else [""],
                strings_can_be_null=not is_from_csv,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowException as error:
        if not is_from_csv:
            raise BatchError(f"The table cannot be written as Parquet: {error}. Ask for CSV.") from None
        table = _typed_one_by_one(text, columns, delimiter)
    if is_from_csv:
        for place, field in enumerate(columns):
            if pa.types.is_string(field.type):
                cells = table.column(place)
                missing = pa.scalar(None, pa.string())
                table = table.set_column(place, field, compute.if_else(compute.equal(cells, ""), missing, cells))
    return table


def _typed_one_by_one(text: bytes, columns: pa.Schema, delimiter: str) -> pa.Table:
    """`_typed` by Python, which reads numbers that pyarrow takes for none."""
    import pyarrow as pa

    rows = csv.reader(io.StringIO(text.decode(), newline=""), delimiter=delimiter, strict=True)
    cells = list(zip(*rows, strict=True))
    return pa.table(
        [
            pa.array(column if pa.types.is_string(field.type) else _numbers(field, column), field.type)
            for field, column in zip(columns, cells, strict=True)
        ],
        schema=columns,
    )


def _numbers(field: pa.Field, cells: Sequence[str]) -> list[float | None]:
    if field.type == "int64":
        return [int(cell) for cell in cells]
    return Column(field.name, NUMERIC, 0.0).parse_all(cells, MISSING_IN_FILES)


def _check_dates(name: str, column: pa.ChunkedArray) -> None:
    """Raise BatchError for dates of which there is no text that is read as a date again."""
    import pyarrow as pa
    from pyarrow import compute

    try:
        for end in compute.min_max(column).values():
            end.cast(pa.string()).cast(column.type)
    except pa.ArrowException:
        raise BatchError(
            f"The column {name} holds dates that no text stands for, such as those after the year 9999; "
            "leave it out, or make it text."
        ) from None


def _without_exponents(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole numbers as such, so that a customer whose key came as 1e15 is found as 1000000000000000."""
    import numpy as np
    import pyarrow as pa

    numbers = column.drop_null().to_numpy()
    is_whole = (np.abs(numbers) < 2**53) & (np.floor(numbers) == numbers)
    is_negative_zero = np.signbit(numbers) & (numbers == 0)
    return column.cast(pa.int64()) if (is_whole & ~is_negative_zero).all() else column


def _damaged(error: Exception) -> BatchError:
    return BatchError(f"The file is damaged Parquet: {str(error).strip()}. Write it and send it again.")


def _written(field: pa.Field) -> pa.DataType:
    """As what type a column is written as text. Raises BatchError where none can be."""
    import pyarrow as pa
    from pyarrow import types

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    if types.is_string_view(kind):
        return pa.string()
    if types.is_float16(kind):
        return pa.float32()
    plain = (
        *(types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null),
        *(types.is_string, types.is_large_string, types.is_date, types.is_time, types.is_timestamp),
    )
    if not any(is_kind(kind) for is_kind in plain):
        raise BatchError(f"The column {field.name} holds {kind}; leave it out, or make it text or a number.")
    return kind


def _read_back(field: pa.Field) -> pa.DataType:
    """What type is read from the text of a column: its own, where there is a reader for it."""
    import pyarrow as pa

    kind = _written(field)
    if pa.types.is_decimal(kind) and not pa.types.is_decimal128(kind):
        return pa.string()
    is_category = pa.types.is_dictionary(field.type) and pa.types.is_string(kind)
    return pa.dictionary(pa.int32(), kind) if is_category else kind
