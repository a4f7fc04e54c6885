"""The cells of a CSV by columns: what is plainly right is read by pyarrow, beside which other threads can run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.ml.schema import (
    LARGEST_NUMBER,
    MAX_KEY_LENGTH,
    MISSING_IN_FILES,
    NUMERIC,
    UNSEEN_CATEGORY,
    AlignedRows,
    Schema,
    not_seen,
)

if TYPE_CHECKING:
    import pyarrow as pa

_BYTE_ORDER_MARK = "\ufeff"
_BLOCK_BYTES = 2**28  # of more than one block pyarrow would make columns in pieces; records come in less


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of some rows that can be scored: aligned, and as they were sent, from which pyarrow makes JSON.

    read: by name, the columns that the model and the identifier need, as text, null where a cell spells that it is
    missing. values: of each column that is no number, the value of each distinct cell, and at last of a missing one.
    """

    schema: Schema
    aligned: AlignedRows
    read: Mapping[str, pa.Array]
    values: Mapping[str, Sequence[Any]]

    def input_json(self) -> pa.Array:
        """By row the JSON of its features, in the order of the model's columns."""
        from pyarrow import compute

        pieces: list[str | pa.Array] = []
        for position, name in enumerate(self.schema.names):
            pieces += [f"{',' if pieces else '{'}{_json(name)}:", self._json_values(position, name)]
        return compute.binary_join_element_wise(*pieces, "}", "")

    def _json_values(self, position: int, name: str) -> pa.Array:
        import pyarrow as pa

        cells = self.read[name]
        if name in self.values:
            values = self.values[name]
            return pa.array(map(_json, values), pa.string()).take(cells.indices.fill_null(len(values) - 1))
        return _numbers_as_json(cells, self.aligned.matrix[:, position])

    def keys(self) -> list[str]:
        """The customers."""
        if self.schema.identifier not in self.read:
            return [""] * len(self.aligned.matrix)
        # As Schema.customer_key says it; what it would refuse is not here.
        keys = map(str.strip, self.read[self.schema.identifier].fill_null("").to_pylist())
        return ["" if key in MISSING_IN_FILES else key for key in keys]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _numbers_as_json(cells: pa.Array, numbers: np.ndarray) -> pa.Array:
    """JSON that gives each number back; whole ones below 2**53 as integers, like `Column.parse`.

    cells: how the numbers are spelled, null where one is missing. One text may say 0.50 where another says 0.5.
    """
    import pyarrow as pa
    from pyarrow import compute

    is_whole = np.floor(numbers) == numbers
    texts = cells
    if len(cells) < _FEW or not _are_json(cells, is_whole):
        is_missing = cells.is_null().to_numpy(zero_copy_only=False)
        texts = pa.array(numbers, mask=is_missing).cast(pa.string())
        if is_whole.any():
            is_whole &= np.abs(numbers) < 2**53
            integers = pa.array(np.where(is_whole, numbers, 0).astype(np.int64), mask=is_missing).cast(pa.string())
            texts = compute.if_else(pa.array(is_whole), integers, texts)
    return texts.fill_null("null") if texts.null_count else texts


_MINUS, _DOT, _ZERO, _NINE = b"-.09"
_MOST_DIGITS_OF_INTEGERS = 15  # any integer of so many is below 2**53
_LONGEST_PLAIN_NUMBER = 24  # of a longer one few digits matter
_FEW = 400  # are written anew as fast


def _are_json(cells: pa.Array, is_whole: np.ndarray) -> bool:
    """Whether each of some cells, which spell numbers, is JSON as it stands, and of a whole number an integer below
    2**53: 12, -0.50, but not 1e3, .5, 007 or 1.0. To look takes a quarter of the time of writing the numbers anew.

    is_whole: by cell, whether the number is; whatever where it is missing.
    """
    if cells.null_count:
        is_whole = is_whole[cells.is_valid().to_numpy(zero_copy_only=False)]
        cells = cells.drop_null()
    if not len(cells):
        return True
    bounds = _bounds(cells)
    characters = np.frombuffer(cells.buffers()[2], dtype=np.uint8)
    begins, ends = bounds[:-1], bounds[1:]
    within = characters[begins[0] : ends[-1]]
    if (within - _MINUS > _NINE - _MINUS).any():
        return False
    if np.count_nonzero(within == _DOT) != len(cells) - np.count_nonzero(is_whole):
        return False  # every fraction has a dot, so some whole number has one
    begins = begins + (characters[begins] == _MINUS)
    lengths = ends - begins
    if lengths.max() > _LONGEST_PLAIN_NUMBER or (lengths[is_whole] > _MOST_DIGITS_OF_INTEGERS).any():
        return False
    first = characters[begins]
    if (first == _DOT).any():
        return False
    second = characters[begins[(first == _ZERO) & (lengths > 1)] + 1]
    return bool((second == _DOT).all())


class CellReader:
    """Reads records that are laid out in one way. Safe to use from many threads.

    header: names all columns of the model, and none of these twice.
    """

    def __init__(self, schema: Schema, header: Sequence[str], delimiter: str):
        import pyarrow as pa
        from pyarrow import csv

        self._schema = schema
        places = {name: str(place) for place, name in enumerate(header)}
        self._names = [name for name in (*schema.names, schema.identifier) if name in places]
        positions = [places[name] for name in self._names]  # and not names, as other columns may share one
        distinct = pa.dictionary(pa.int32(), pa.string())
        kinds = [pa.string() if column.kind == NUMERIC else distinct for column in schema.columns]
        self._options = {
            "read_options": csv.ReadOptions(
                column_names=[str(place) for place in range(len(header))],
                use_threads=False,
                block_size=_BLOCK_BYTES,
            ),
            "parse_options": csv.ParseOptions(delimiter=delimiter),
            "convert_options": csv.ConvertOptions(
                column_types=dict(zip(positions, [*kinds, pa.string()], strict=False)),
                include_columns=positions,
                null_values=sorted(MISSING_IN_FILES),
                strings_can_be_null=True,
                check_utf8=False,
            ),
        }

    def read(self, records: Sequence[str]) -> Cells | None:
        """The cells of some lines that any reader of CSV splits alike; None if anything is wrong or doubtful."""
        import pyarrow as pa
        from pyarrow import csv

        text = "\n".join(records)
        if text.startswith(_BYTE_ORDER_MARK):  # here it is part of a cell, and pyarrow would drop it
            return None
        try:
            table = csv.read_csv(pa.BufferReader(text.encode()), **self._options)
        except pa.ArrowInvalid:
            return None
        if table.num_rows != len(records):
            return None
        read = {name: column.chunk(0) for name, column in zip(self._names, table.columns, strict=True)}
        if self._schema.identifier in read and _longest(read[self._schema.identifier]) > MAX_KEY_LENGTH:
            return None
        matrix = np.empty((len(records), len(self._schema.columns)))
        values: dict[str, list[Any]] = {}
        unseen: dict[int, list[str]] = {}
        missing = 0
        for position, column in enumerate(self._schema.columns):
            cells = read[column.name]
            if column.kind == NUMERIC:
                missing += cells.null_count
                try:
                    read[column.name], numbers = _as_numbers(cells)
                except pa.ArrowInvalid:
                    return None
                matrix[:, position] = numbers.to_numpy(zero_copy_only=False)  # of null NaN
                continue
            try:
                distinct = column.parse_all([*cells.dictionary.to_pylist(), ""], MISSING_IN_FILES)
            except ValueError:
                return None
            encoded, problems = column.encode_all(distinct)
            if problems:
                return None
            codes = cells.indices.fill_null(len(distinct) - 1).to_numpy()
            matrix[:, position] = encoded[codes]
            missing += np.count_nonzero(np.isnan(encoded)[codes])
            values[column.name] = distinct
            for row in np.flatnonzero(matrix[:, position] == UNSEEN_CATEGORY).tolist():
                unseen.setdefault(row, []).append(not_seen(column, distinct[codes[row]]))
        if np.count_nonzero(np.abs(matrix) <= LARGEST_NUMBER) + missing < matrix.size:
            return None  # a cell spells NaN, infinity or what is too large
        return Cells(self._schema, self._schema.align_encoded(matrix, unseen), read, values)


def _as_numbers(cells: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The cells, without blanks where that was needed, and the numbers that they spell. Raises pyarrow.ArrowInvalid."""
    import pyarrow as pa
    from pyarrow import compute

    try:
        return cells, cells.cast(pa.float64())
    except pa.ArrowInvalid:
        trimmed = compute.ascii_trim_whitespace(cells)
        return trimmed, trimmed.cast(pa.float64())


def _bounds(cells: pa.Array) -> np.ndarray:
    """Where each cell begins in the bytes of all, and where the last ends."""
    _, offsets, _ = cells.buffers()
    return np.frombuffer(offsets, dtype=np.int32)[cells.offset : cells.offset + len(cells) + 1]


def _longest(cells: pa.Array) -> int:
    """The number of bytes of the longest cell, which has no more characters."""
    return int(np.diff(_bounds(cells)).max())
