"""Reading files by chunks: whole lines by pyarrow where all is plainly right, and else exactly as Python's csv does."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from apps.endpoints import batch, csv_file, scoring
from apps.endpoints.csv_file import BadRows, BatchError, CsvFile, Layout
from apps.ml import columnar
from apps.ml.schema import BOOLEAN, CATEGORICAL, MAX_KEY_LENGTH, MISSING_IN_FILES, NUMERIC, Column, Schema, Target

SCHEMA = Schema(
    (
        Column("number", NUMERIC, 1.5),
        Column("truth", BOOLEAN, True),
        Column("word", CATEGORICAL, "a", ("a", "b", "é", "x\ny")),
        Column("count", NUMERIC, 3),
    ),
    Target("stays", "1", "0"),
    identifier="id",
)
HEADER = ["word", "other", "id", "number", "other", "truth", "count"]

ODD_NUMBERS = (
    "+5 1_000 0x1F 0x1p3 1e400 -1e400 1e-400 4.9e-324 2.4703282292062328e-324 3.5e38 "
    "3.4028235677973366e38 inf -Infinity infinity nan(1) NAN +nan nan(ind) 1e . - 5. .5 1e+05 1d5 1,5 "
    "00012 -0 -0.0 1\u20092 1\u00a0 \uff11 9007199254740993 "
    "0.1000000000000000055511151231257827021181583404541015625 "
    "1.00000000000000011102230246251565404236316680908203125"
)

numbers = st.one_of(
    st.floats().map(repr),
    st.integers(-(10**25), 10**25).map(str),
    st.decimals(allow_nan=False, allow_infinity=False, places=25).map(str),
    st.from_regex(r"[+-]?[0-9]{0,20}\.?[0-9]{0,25}([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(ODD_NUMBERS.split(" ")),
)
words = st.one_of(
    st.sampled_from(["a", "b", "é", "x\ny", "c", "True", "no", "T", "1", "0", "yes ", "on", "\ufeffa", "\ufeff5"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=5),
    st.text("\"',;\t\r\n x", max_size=5),
    st.just("k" * (MAX_KEY_LENGTH + 1)),
)
missing = st.sampled_from(sorted(MISSING_IN_FILES))
plain_rows = st.tuples(
    st.sampled_from("abc"),
    st.just("-"),
    st.sampled_from(["1", "C 2"]),
    st.floats(-1e30, 1e30).map(repr),
    st.just("-"),
    st.sampled_from(["True", "False", ""]),
    st.integers(-99, 99).map(str) | missing,
)


@st.composite
def cells(draw):
    spaced = st.tuples(st.sampled_from(["", " ", "\t"]), numbers | words | missing, st.sampled_from(["", " ", "\x1f"]))
    return draw(numbers | words | missing | spaced.map("".join))


@st.composite
def files(draw, header=HEADER):
    """A file as text, with its delimiter: mostly rows that can be scored, among them some of anything."""
    delimiter = draw(st.sampled_from(csv_file.DELIMITERS))
    anything = st.lists(cells(), min_size=len(header), max_size=len(header)) | st.lists(cells(), max_size=9)
    buffer = io.StringIO(newline="")
    buffer.write(draw(st.sampled_from(["", "", "\ufeff"])) + draw(st.sampled_from(["", "", "\n", "\r\n\n"])))
    buffer.write(delimiter.join(header) + draw(st.sampled_from(["\n", "\r\n", "\r"])))
    rows = draw(st.lists(plain_rows | plain_rows | anything, min_size=1, max_size=12))
    for row in rows:
        end = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
        way = draw(st.sampled_from(["minimal", "all", "raw"]))
        if way == "raw":
            buffer.write(delimiter.join(row) + end)
        else:
            quoting = csv.QUOTE_ALL if way == "all" else csv.QUOTE_MINIMAL
            csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=quoting).writerow(row)
        buffer.write(draw(st.sampled_from(["", "", "", "\n", " \n", "\t\n", '" "\n'])))
    text = buffer.getvalue()
    return (text.rstrip("\r\n") if draw(st.booleans()) else text), delimiter


def read_by_csv(text: str, delimiter: str) -> tuple[list[tuple[int, list[str]]], str | None]:
    """By Python's csv alone: the line and the cells of each row, up to what it refuses, and why it does."""
    rows = []
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in reader:
            if row and not (len(row) == 1 and row[0].isspace()):
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        return rows[1:], f"line {line}: is no valid CSV: {error}"
    return rows[1:], None


def chunks_of(data: bytes, size: int, skip: int = 0) -> tuple[list[csv_file.Chunk], str | None]:
    chunks = []
    try:
        chunks.extend(CsvFile(io.BytesIO(data)).chunks(size, skip))
    except BadRows as error:
        (problem,) = error.problems
        return chunks, f"line {problem.line}: {problem.message}"
    except BatchError as error:
        return chunks, str(error)
    return chunks, None


def all_rows(chunks: list[csv_file.Chunk]) -> list[tuple[int, list[str]]]:
    return [
        (line, cells)
        for chunk in chunks
        for line, cells in zip(
            chunk.lines, csv.reader(chunk.records, delimiter=chunk.layout.delimiter, strict=True), strict=True
        )
    ]


lenient = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


class TestChunks:
    @lenient
    @given(file=files(), size=st.integers(1, 5), skip=st.integers(0, 5))
    @example(file=(",".join(HEADER) + '\n"a\nb",1,2,3,4,5,6\n"a",1,2,3,4,5,6', ","), size=1, skip=0)
    def test_hold_what_csv_reads_with_the_lines_where_it_stands(self, file, size, skip):
        text, delimiter = file
        expected, refused = read_by_csv(text, delimiter)

        chunks, problem = chunks_of(text.encode(), size)

        if refused is None and not expected:
            assert problem == "The file has a header only; add a line for each customer."
            return
        assert problem == refused
        rows = all_rows(chunks)
        assert rows == expected[: len(rows)]
        assert refused or len(rows) == len(expected)
        assert all(0 < len(chunk) <= size for chunk in chunks)
        if refused is None:
            later, problem = chunks_of(text.encode(), size, skip)
            assert problem is None
            assert all_rows(later) == expected[skip:]

    @lenient
    @given(
        data=st.binary(max_size=80) | st.text('ab,;\t"\r\n \x00é\ufeff', max_size=60).map(str.encode),
        size=st.integers(1, 4),
    )
    def test_of_any_bytes_are_read_or_refused_alike_whatever_their_size(self, data, size):
        chunks, problem = chunks_of(b"a,b\n" + data, size)
        other_chunks, other_problem = chunks_of(b"a,b\n" + data, 1)

        assert problem == other_problem
        assert problem or all_rows(chunks) == all_rows(other_chunks)

    def test_are_plain_unless_a_line_ends_within_quotes_or_quotes_stand_within_a_cell(self):
        for row, is_plain in [
            ("1,2", True),
            ('"1,1","2"', True),
            ('"1 ""one""",', True),
            ('"",""', True),
            ('1"2"3,4', False),
            ('"1\n1",2', False),
            (' "1",2', False),
            (f"{'x' * csv.field_size_limit()},1", True),
        ]:
            chunks, problem = chunks_of(f"a,b\n{row}\n1,2\n".encode(), 10)
            assert problem is None
            assert [chunk.is_plain for chunk in chunks] == [is_plain], row

    def test_take_no_more_than_so_many_characters(self, monkeypatch):
        monkeypatch.setattr(csv_file, "LARGEST_CHUNK", 1_000)
        row = ",".join(["1.5"] * 100)
        header = ",".join(f"c{number}" for number in range(100))

        chunks, _ = chunks_of("\n".join([header, *[row] * 20]).encode(), 10_000)

        assert sum(map(len, chunks)) == 20
        assert max(sum(map(len, chunk.records)) for chunk in chunks) <= 1_000 + len(row)

    def test_a_cell_that_csv_refuses_for_its_length_is_refused(self):
        long = "x" * (csv.field_size_limit() + 1)

        for cell in (long, f'"{long}"'):
            _, problem = chunks_of(f"a,b\n1,2\n{cell},1\n".encode(), 10)
            assert problem == f"line 3: is no valid CSV: field larger than field limit ({csv.field_size_limit()})"

    def test_a_character_may_lie_across_what_is_read_at_a_time(self):
        text = "a,b\n" + "".join(f"{'x' * number}é{'€' * number},😀\n" for number in range(300))

        chunks, problem = chunks_of(text.encode(), 7)

        assert problem is None
        assert [cells for _, cells in all_rows(chunks)] == [line.split(",") for line in text.splitlines()[1:]]


def scorer_of(schema: Schema, layout: Layout) -> scoring.Scorer:
    """A scorer of no model: it checks."""
    return scoring.Scorer(SimpleNamespace(schema=schema), layout)


def check_both_ways(schema: Schema, chunks: list[csv_file.Chunk]) -> None:
    for chunk in chunks:
        scorer = scorer_of(schema, chunk.layout)
        fast, slow = scorer.check(chunk), scorer._check_one_by_one(chunk)
        assert fast.aligned.matrix.tobytes() == slow.aligned.matrix.tobytes()
        assert fast.aligned.filled.tolist() == slow.aligned.filled.tolist()
        assert fast.aligned.warnings == slow.aligned.warnings
        assert (fast.records, fast.problems) == (slow.records, slow.problems)
        assert fast.cells.keys() == slow.cells.keys()
        assert parsed(fast.cells.input_json()) == parsed(slow.cells.input_json())


def parsed(texts: Iterable[object]) -> str:
    """What JSON says, with 1 and 1.0 told apart."""
    return repr([json.loads(str(text)) for text in texts])


class TestChecking:
    @settings(lenient, max_examples=150)
    @given(file=files(), size=st.integers(1, 13))
    def test_by_columns_gives_what_checking_cell_by_cell_gives(self, file, size):
        text, _ = file
        check_both_ways(SCHEMA, chunks_of(text.encode(), size)[0])

    @settings(lenient, max_examples=1000)
    @given(
        cell=cells(),
        kind=st.sampled_from([NUMERIC, NUMERIC, NUMERIC, BOOLEAN, CATEGORICAL]),
        is_first=st.booleans(),
        is_quoted=st.booleans(),
    )
    def test_by_columns_gives_for_any_cell_what_checking_it_alone_gives(self, cell, kind, is_first, is_quoted):
        schema = Schema(tuple(column for column in SCHEMA.columns if column.kind == kind)[:1], SCHEMA.target)
        if is_quoted:
            cell = '"' + cell.replace('"', '""') + '"'
        record = f"{cell},x" if is_first else f"x,{cell}"
        header = f"{schema.names[0]},x" if is_first else f"x,{schema.names[0]}"
        check_both_ways(schema, chunks_of(f"{header}\n{record}\n".encode(), 5)[0])

    @settings(lenient, max_examples=300)
    @given(numbers=st.lists(st.floats(-1e38, 1e38) | st.integers(-(2**54), 2**54).map(float) | st.none(), min_size=1))
    @example([0.0, -0.0, 1e9, 1e10, 123456789012.0, -1e15, 2.0**53 - 1, 2.0**53, -(2.0**53), 1e16, 1e22, None])
    @example([1e-5, 1e-7, 5e-324, 1 / 3, 123456789012.5, 3.0])
    def test_by_columns_gives_for_many_numbers_the_same_json(self, numbers):
        schema = Schema((Column("n", NUMERIC, 0.5),), SCHEMA.target)
        lines = [f"{'' if number is None else repr(number)},x" for number in numbers]

        check_both_ways(schema, chunks_of("\n".join(["n,x", *lines]).encode(), 20)[0])

    @settings(lenient, max_examples=300)
    @given(
        spelled=st.lists(
            st.from_regex(r"-?([0-9]{1,20}|[0-9]{0,18}\.[0-9]{1,22}|[0-9]{1,3}\.)", fullmatch=True), max_size=9
        )
    )
    @example(["12", "-0.5", "0", "-7", "", "0.10", "100"])
    @example(["0.0000001", "12345.678901234567890123", "0.99999999999999999999"])
    @example(["123456789012345", "-999999999999999"])
    @example(["-0"])
    @example(["-0.0", "1.0"])
    @example(["1.5", "1."])
    @example(["007", "0.5"])
    @example(["00.5"])
    @example(["-.5"])
    @example(["9007199254740993"])
    @example(["1e3", "0.5"])
    def test_by_columns_gives_for_numbers_however_spelled_the_same_json(self, spelled):
        schema = Schema((Column("n", NUMERIC, 0.5),), SCHEMA.target)
        lines = [f"{number},x" for number in spelled]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(columnar, "_FEW", 0)  # as if they were many
            check_both_ways(schema, chunks_of("\n".join(["n,x", "1,x", *lines]).encode(), 20)[0])

    def test_takes_the_way_by_columns_for_what_is_plainly_right(self):
        """Else the test above would compare a way with itself."""
        layout = Layout(HEADER, ";", "")
        scorer = scorer_of(SCHEMA, layout)

        for record in ["c;;C 1; 1.5;;True;NA", '"a";"x;y";"1";"2e5";"";"";"<NA>"', "é;;;-0.1;;no;7", "a;;;5.;;;"]:
            chunk = csv_file.Chunk(layout, [record] * 3, range(2, 5), is_plain=True)
            assert not isinstance(scorer.check(chunk).cells, scoring.ReadCells), record
        for record in ["a;;;1_0;;;", "a;;;inf;;;", "a;;;NAN;;;", "a;;;1e39;;;", "a;;;1;;maybe;", "a;;1", "a;;;0x1;;;"]:
            chunk = csv_file.Chunk(layout, [record] * 3, range(2, 5), is_plain=True)
            assert isinstance(scorer.check(chunk).cells, scoring.ReadCells), record

    def test_ten_thousand_columns_are_no_matter(self):
        columns = tuple(Column(f"c{number}", NUMERIC, 0) for number in range(10_000))
        schema = Schema(columns, Target("stays", "1", "0"))
        rows = [",".join(str(column + row) for column in range(10_000)) for row in range(300)]
        chunks, _ = chunks_of("\n".join([",".join(schema.names), *rows]).encode(), 10_000)
        checked = [scorer_of(schema, chunk.layout).check(chunk) for chunk in chunks]

        assert len(chunks) > 1
        assert [row for each in checked for row in each.aligned.matrix[:, 9_999].tolist()] == [
            float(9_999 + row) for row in range(300)
        ]


class TestAnswers:
    def test_stand_after_records_that_stay_as_they_are(self):
        answered = batch.AnsweredCsv(Layout(["a", "b"], ";", ""))

        assert answered.header() == "a;b;probability;label\r\n"
        assert answered.body(['"1"; x ', '"=1\n2";'], [(0.5, "0"), (1e-05, "1")]) == (
            '"1"; x ;0.5;0\r\n"=1\n2";;1e-05;1\r\n'
        )

    def test_replace_those_that_stand_there_already(self):
        for earlier in (["probability", "label"], ["request_id", "probability", "label"]):
            answered = batch.AnsweredCsv(Layout(["a", *earlier], ",", ""), with_ids=True)

            assert answered.header() == "a,request_id,probability,label\r\n"
            assert answered.body(['"x\ny","1",2' + ",3" * (len(earlier) - 2)], [(7, 0.25, "0")]) == (
                '"x\ny",7,0.25,0\r\n'
            )
