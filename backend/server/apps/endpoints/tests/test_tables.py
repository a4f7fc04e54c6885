"""Tables that come as Parquet, in several files, or from other storage than this host's disk."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import io
import resource
import threading
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import CommandError, call_command
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer

from apps.endpoints import batch_jobs, parquet_file
from apps.endpoints.models import BatchJob, MLRequest
from apps.endpoints.parquet_file import ParquetFile
from apps.ml.schema import NUMERIC, Column, Schema, Target
from conftest import make_customers

UPLOAD = "/api/v1/batch-predict"
PARQUET_TYPE = "application/vnd.apache.parquet"


@pytest.fixture(autouse=True)
def _files_of_its_own(settings, tmp_path: Path, algorithms):
    settings.BATCH_DIR = str(tmp_path / "batches")


@pytest.fixture
def frame() -> pd.DataFrame:
    return make_customers(500, seed=4)


def score(input: object, output: object, *options: str) -> str:
    said = io.StringIO()
    call_command("score", str(input), str(output), "--log=none", *options, stdout=said, stderr=io.StringIO())
    return said.getvalue()


def refused(input: object, output: object, *options: str) -> str:
    with pytest.raises(CommandError) as error:
        score(input, output, *options)
    return str(error.value)


def answers_of(frame: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """What is answered for the same customers in a CSV."""
    frame.to_csv(folder / "plain.csv", index=False)
    score(folder / "plain.csv", folder / "plain-scored.csv")
    return pd.read_csv(folder / "plain-scored.csv", dtype={"label": str})[["probability", "label"]]


def as_parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def upload(api, name: str, content: bytes, **fields: str):
    return api.post(UPLOAD, {"file": SimpleUploadedFile(name, content), **fields}, format="multipart")


def work() -> None:
    call_command("batch_worker", "--once")


class TestParquet:
    def test_is_scored_as_the_same_customers_in_a_csv_and_keeps_its_types(self, frame, tmp_path):
        frame["Since"] = dt.date(2020, 2, 29)
        frame["Opens"] = dt.time(8, 30)
        frame["Note"] = ['say "hi"\nor, not', "", None, "007", "NA"] * 100
        frame["Limit"] = [decimal.Decimal("12.50"), None] * 250
        frame["Group"] = pd.Categorical(["a", "b"] * 250)
        frame["Visits"] = pd.array([1, None, 2**60, -3, 0] * 100, dtype="Int64")
        frame["At"] = pd.Timestamp("2020-02-29 12:30:00.123456", tz="Europe/Berlin")
        frame.to_parquet(tmp_path / "customers.parquet", index=False, row_group_size=120)

        score(tmp_path / "customers.parquet", tmp_path / "scored.parquet")

        given, scored = (parquet.read_table(tmp_path / f"{name}.parquet") for name in ("customers", "scored"))
        assert scored.column_names == [*given.column_names, "probability", "label"]
        for name in given.column_names:
            assert scored[name].to_pylist() == given[name].to_pylist(), name
            assert scored.schema.field(name).type == given.schema.field(name).type or name == "Group"
        answers = answers_of(frame[make_customers(1).columns], tmp_path)
        assert scored["probability"].to_pylist() == answers["probability"].to_list()
        assert scored["label"].to_pylist() == answers["label"].to_list()

    def test_is_written_of_a_csv(self, frame, tmp_path):
        frame.loc[3, "Orders"] = None
        frame["Note"] = ["", "x"] * 250
        frame.to_csv(tmp_path / "customers.csv", index=False)

        score(tmp_path / "customers.csv", tmp_path / "scored.parquet")

        scored = parquet.read_table(tmp_path / "scored.parquet")
        assert str(scored.schema.field("Orders").type) == "double"
        assert scored["Orders"].to_pylist()[2:5] == [frame["Orders"][2], None, frame["Orders"][4]]
        assert scored["Note"].to_pylist() == [None, "x"] * 250
        assert scored["probability"].to_pylist() == answers_of(frame, tmp_path)["probability"].to_list()

    def test_becomes_a_csv_where_that_is_asked_for(self, frame, tmp_path):
        (tmp_path / "customers.parquet").write_bytes(as_parquet(frame))

        score(tmp_path / "customers.parquet", tmp_path / "scored.csv")
        score(tmp_path / "customers.parquet", tmp_path / "scored.out", "--format=csv")

        pd.testing.assert_frame_equal(
            pd.read_csv(tmp_path / "scored.csv", dtype={"label": str})[["probability", "label"]],
            answers_of(frame, tmp_path),
        )
        assert (tmp_path / "scored.out").read_bytes() == (tmp_path / "scored.csv").read_bytes()

    def test_numbers_that_only_python_reads_are_the_same_numbers(self, frame, tmp_path):
        text = frame.head(3).astype(str)
        text.loc[0, "Orders"] = " 5 "
        text.loc[1, "Orders"] = "n/a"
        text.to_csv(tmp_path / "customers.csv", index=False)

        score(tmp_path / "customers.csv", tmp_path / "scored.parquet")

        orders = parquet.read_table(tmp_path / "scored.parquet")["Orders"].to_pylist()
        assert orders == [5.0, None, float(frame["Orders"][2])]

    def test_with_what_no_csv_can_hold_is_refused_by_the_name_of_the_column(self, frame, tmp_path):
        frame["Tags"] = [["a", "b"]] * 500
        (tmp_path / "customers.parquet").write_bytes(as_parquet(frame))

        told = refused(tmp_path / "customers.parquet", tmp_path / "scored.parquet")

        assert told.startswith("The column Tags holds list<")
        assert not (tmp_path / "scored.parquet").exists()

    def test_with_dates_that_no_text_stands_for_is_refused_before_anybody_is_logged(self, frame, tmp_path):
        far = pa.array([10**18] + [0] * 499, pa.timestamp("us"))
        table = pa.table({**{name: pa.array(frame[name]) for name in frame}, "Until": far})
        parquet.write_table(table, tmp_path / "customers.parquet")
        call = ["score", str(tmp_path / "customers.parquet"), str(tmp_path / "scored.parquet")]

        with pytest.raises(CommandError, match="The column Until holds dates that no text stands for"):
            call_command(*call, stdout=io.StringIO(), stderr=io.StringIO())

        assert not MLRequest.objects.exists()

    def test_that_has_a_column_of_the_result_is_told_to_rename_it(self, frame, tmp_path):
        frame.insert(0, "probability", 0.5)
        (tmp_path / "customers.parquet").write_bytes(as_parquet(frame))

        told = refused(tmp_path / "customers.parquet", tmp_path / "scored.parquet")

        assert told.startswith("The file has a column probability, which the result adds; rename it")

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b"PK\x03\x04xlsx", "a workbook or an archive"),
            (b"PAREnothing", "encrypted Parquet"),
            (gzip.compress(b"PAR1nothing"), "Parquet in gzip"),
        ],
        ids=["workbook", "encrypted", "gzip"],
    )
    def test_what_else_people_send_is_called_by_its_name(self, tmp_path, content, told):
        (tmp_path / "customers.parquet").write_bytes(content)

        assert told in refused(tmp_path / "customers.parquet", tmp_path / "s.csv")

    def test_a_column_named_with_semicolons_is_one_column(self, frame, tmp_path):
        (tmp_path / "customers.parquet").write_bytes(as_parquet(frame.assign(**{"a;b;c;d;e;f;g;h;i": 1})))

        assert score(tmp_path / "customers.parquet", tmp_path / "s.csv").startswith("500 customers")

    def test_that_is_damaged_is_refused(self, frame, tmp_path):
        whole = as_parquet(frame)
        for damaged in (whole[:-100], whole[:200] + b"\0" * 400 + whole[600:]):
            (tmp_path / "customers.parquet").write_bytes(damaged)
            assert "The file is damaged Parquet" in refused(tmp_path / "customers.parquet", tmp_path / "s.parquet")

    def test_of_two_columns_of_one_name_is_not_written(self, frame, tmp_path):
        frame["Note"] = frame["More"] = "x"
        frame.rename(columns={"More": "Note"}).to_csv(tmp_path / "customers.csv", index=False)

        assert "Note more than once" in refused(tmp_path / "customers.csv", tmp_path / "scored.parquet")

    def test_a_long_number_is_the_customer_that_it_is_in_json(self, frame, tmp_path):
        (tmp_path / "customers.parquet").write_bytes(as_parquet(frame.assign(CustomerId=1234567890123456.0)))

        call_command("score", str(tmp_path / "customers.parquet"), str(tmp_path / "s.parquet"), stdout=io.StringIO())

        assert set(MLRequest.objects.values_list("customer_key", flat=True)) == {"1234567890123456"}
        assert pd.read_parquet(tmp_path / "s.parquet")["CustomerId"].dtype == float

    def test_answers_of_an_earlier_run_are_replaced(self, frame, tmp_path):
        frame["Note"] = ["", None] * 250
        (tmp_path / "customers.parquet").write_bytes(as_parquet(frame))
        score(tmp_path / "customers.parquet", tmp_path / "scored.parquet")

        score(tmp_path / "scored.parquet", tmp_path / "again.parquet")

        assert parquet.read_table(tmp_path / "again.parquet").equals(parquet.read_table(tmp_path / "scored.parquet"))

    def test_what_is_wrong_is_told_by_row_as_in_a_csv(self, frame, tmp_path):
        text = frame.astype(str)
        text.loc[7, "Orders"] = "many"
        (tmp_path / "customers.parquet").write_bytes(as_parquet(text))

        told = refused(tmp_path / "customers.parquet", tmp_path / "scored.parquet")

        assert told.startswith("line 9: Orders expects a number such as 12.5, got 'many'")

    def test_infinity_is_refused_and_nan_is_missing(self, frame, tmp_path):
        frame["Orders"] = frame["Orders"].astype(float)
        frame.loc[1, "Orders"] = float("inf")
        table = pa.table({name: pa.array(frame[name].to_list()) for name in frame})
        parquet.write_table(table, tmp_path / "customers.parquet")
        assert "line 3: Orders is infinite" in refused(tmp_path / "customers.parquet", tmp_path / "s.parquet")

        orders = [float("nan"), *[2.0] * 499]
        parquet.write_table(
            table.set_column(table.column_names.index("Orders"), "Orders", pa.array(orders)),
            tmp_path / "customers.parquet",
        )
        assert score(tmp_path / "customers.parquet", tmp_path / "s.parquet").startswith("500 customers")


SCHEMA = Schema(columns=(Column("x", NUMERIC, 0.0),), target=Target("y", "1", "0"))
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@given(
    rows=st.lists(
        st.tuples(
            st.none() | texts,
            st.none() | st.floats(allow_nan=False),
            st.none() | st.integers(-(2**63), 2**63 - 1),
            st.none() | st.booleans(),
            st.none() | st.dates(dt.date(1, 1, 1)),
            st.none() | st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2200, 1, 1)),
            st.none() | st.decimals(-1000, 1000, places=2),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_parquet_comes_back_as_it_was(rows):
    types = {
        **{"text": pa.string(), "float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "date": pa.date32()},
        **{"time": pa.timestamp("us"), "decimal": pa.decimal128(9, 2)},
    }
    table = pa.table(
        [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), types.values(), strict=True)],
        list(types),
    )
    given = io.BytesIO()
    parquet.write_table(table, given)

    file = ParquetFile(given)
    _, *records = file.as_csv()
    columns = parquet_file.types_of(table.column_names, SCHEMA, {}, file.types, ",")
    came_back = b"".join(parquet_file.written(records, columns))

    assert parquet.read_table(io.BytesIO(came_back)).to_pylist() == table.to_pylist()


class TestAJobOfParquet:
    def test_gives_parquet_and_csv_alike_and_logs_each_customer(self, api, frame):
        job = upload(api, "shop.parquet", as_parquet(frame))
        assert job.status_code == 202
        assert job.json()["result_format"] == "parquet"
        work()

        as_asked = api.get(f"{job['Location']}/result")
        as_csv = api.get(f"{job['Location']}/result?format=csv")

        assert as_asked["Content-Type"] == PARQUET_TYPE
        assert 'filename="shop-scored.parquet"' in as_asked["Content-Disposition"]
        scored = pd.read_parquet(io.BytesIO(as_asked.getvalue()))
        ids = list(MLRequest.objects.order_by("id").values_list("id", "probability"))
        assert list(zip(scored["request_id"], scored["probability"], strict=True)) == ids
        pd.testing.assert_frame_equal(scored[frame.columns], frame, check_dtype=False)
        text = pd.read_csv(io.BytesIO(as_csv.getvalue()), dtype={"label": str})
        pd.testing.assert_frame_equal(text, scored, check_dtype=False)
        assert api.get(f"{job['Location']}/result?format=xml").status_code == 400

    def test_a_csv_is_given_as_parquet_where_that_is_asked_for(self, api, frame):
        job = upload(api, "shop.csv", frame.to_csv(index=False).encode(), format="parquet")
        assert job.status_code == 202
        work()

        scored = pd.read_parquet(io.BytesIO(api.get(f"{job['Location']}/result").getvalue()))

        assert len(scored) == 500
        assert scored["Orders"].to_list() == frame["Orders"].to_list()

    def test_may_have_a_long_name_in_any_letters(self, api, frame):
        assert upload(api, "客" * 80 + ".parquet", as_parquet(frame)).status_code == 202

    def test_is_refused_at_once_when_columns_are_missing(self, api, frame):
        refused = upload(api, "shop.parquet", as_parquet(frame.drop(columns="Orders")))

        assert refused.status_code == 400
        assert "lacks the columns Orders" in refused.content.decode()
        assert not BatchJob.objects.exists()

    def test_names_its_columns_by_its_last_bytes(self, algorithms, frame):
        whole = as_parquet(pd.concat([frame] * 20))
        columns = batch_jobs.preview_parquet(whole[-5_000:], algorithms["random_forest"])

        assert columns.recognised == ["Plan", "Orders", "RecencyDays", "MeanGapDays", "Newsletter"]
        assert columns.identifier == "CustomerId"
        assert not columns.missing
        assert batch_jobs.preview_parquet(whole[-50:], algorithms["random_forest"]) is None


class TestAFolder:
    @pytest.fixture
    def folder(self, frame, tmp_path) -> Path:
        folder = tmp_path / "customers"
        folder.mkdir()
        frame[:200].to_csv(folder / "part-0.csv", index=False)
        (folder / "part-1.csv.gz").write_bytes(gzip.compress(frame[200:350].to_csv(index=False).encode()))
        frame[:0].to_csv(folder / "part-2.csv", index=False)
        (folder / "part-3.csv").write_bytes(b"")
        frame[350:].to_csv(folder / "part-4.csv", index=False, lineterminator="\r\n")
        (folder / "_SUCCESS").write_bytes(b"")
        (folder / ".part-0.csv.crc").write_bytes(b"x")
        return folder

    def test_is_scored_as_one_file_would_be(self, folder, frame, tmp_path):
        said = score(folder, tmp_path / "scored.csv")

        answers_of(frame, tmp_path)
        assert said.startswith("500 customers")
        assert (tmp_path / "scored.csv").read_bytes() == (tmp_path / "plain-scored.csv").read_bytes()

    def test_is_a_job_too_and_goes_on_where_it_was(self, folder, frame, tmp_path, monkeypatch):
        monkeypatch.setattr(batch_jobs, "PART_ROWS", 70)
        call_command("score", str(folder), str(tmp_path / "scored.csv"), stdout=io.StringIO(), stderr=io.StringIO())

        scored = pd.read_csv(tmp_path / "scored.csv", dtype={"label": str})
        pd.testing.assert_frame_equal(scored[["probability", "label"]], answers_of(frame, tmp_path))
        assert scored["request_id"].to_list() == list(MLRequest.objects.order_by("id").values_list("id", flat=True))
        assert BatchJob.objects.get().file_name == "customers"

    def test_what_is_wrong_is_told_with_the_name_of_the_file(self, folder, frame, tmp_path):
        bad = frame[350:].astype(str)
        bad.iloc[3, bad.columns.get_loc("Orders")] = "many"
        bad.to_csv(folder / "part-4.csv", index=False)

        assert refused(folder, tmp_path / "s.csv").startswith("part-4.csv, line 5: Orders expects a number")
        with pytest.raises(CommandError, match="line 5: Orders expects a number"):
            call_command("score", str(folder), str(tmp_path / "s.csv"), stdout=io.StringIO(), stderr=io.StringIO())

    def test_whose_files_are_not_alike_is_refused(self, folder, frame, tmp_path):
        frame.rename(columns={"Orders": "Bestellungen"}).to_csv(folder / "part-4.csv", index=False)

        assert "part-4.csv has other columns than part-0.csv" in refused(folder, tmp_path / "s.csv")

    def test_without_a_table_is_refused(self, tmp_path):
        (tmp_path / "empty").mkdir()

        assert "holds no file" in refused(tmp_path / "empty", tmp_path / "s.csv")

    @pytest.mark.parametrize("name", ["more.tsv", "year=2024/more.csv", "more.csv.bz2"])
    def test_with_anything_else_is_refused_so_that_nobody_is_left_out(self, folder, frame, tmp_path, name):
        (folder / name).parent.mkdir(exist_ok=True)
        frame.to_csv(folder / name, index=False)

        assert f"holds {name.split('/')[0]}, and is to hold nothing but" in refused(folder, tmp_path / "s.csv")

    def test_may_hold_links_and_names_in_capitals(self, folder, frame, tmp_path):
        (folder / "part-4.csv").rename(tmp_path / "elsewhere")
        (folder / "part-4.CSV").symlink_to(tmp_path / "elsewhere")

        assert score(folder, tmp_path / "s.csv").startswith("500 customers")

    def test_is_no_place_for_the_result(self, folder, tmp_path):
        assert "write it elsewhere" in refused(folder, folder / "scored.csv")

    def test_of_more_files_than_a_process_may_open_is_a_job_too(self, frame, tmp_path):
        folder = tmp_path / "customers"
        folder.mkdir()
        most, least = 90, resource.getrlimit(resource.RLIMIT_NOFILE)
        for number in range(most):
            frame[number * 5 : number * 5 + 5].to_csv(folder / f"{number:03d}.csv", index=False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + most // 2, least[1]))
        try:
            call_command("score", str(folder), str(tmp_path / "s.csv"), stdout=io.StringIO(), stderr=io.StringIO())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, least)

        assert len(pd.read_csv(tmp_path / "s.csv")) == 450

    def test_of_csv_and_parquet_is_refused(self, folder, frame, tmp_path):
        (folder / "part-5.parquet").write_bytes(as_parquet(frame))

        assert refused(folder, tmp_path / "s.csv") == "part-5.parquet: It is Parquet, unlike part-0.csv."

    def test_of_parquet_whose_types_differ_has_types_that_hold_both(self, frame, tmp_path):
        folder = tmp_path / "customers"
        folder.mkdir()
        frame["Extra"] = 1
        (folder / "a.parquet").write_bytes(as_parquet(frame[:300]))
        frame["Extra"] = 1.5
        (folder / "b.parquet").write_bytes(as_parquet(frame[300:]))

        score(folder, tmp_path / "scored.parquet")

        assert pd.read_parquet(tmp_path / "scored.parquet")["Extra"].to_list() == ["1"] * 300 + ["1.5"] * 200

    def test_of_parquet_loses_no_digit_of_an_id_where_one_is_missing(self, frame, tmp_path):
        folder = tmp_path / "customers"
        folder.mkdir()
        ids = [2**53 + 1 + 2 * number for number in range(500)]
        (folder / "a.parquet").write_bytes(as_parquet(frame.assign(CustomerId=ids)[:300]))
        (folder / "b.parquet").write_bytes(as_parquet(frame.assign(CustomerId=[None, *[1.0] * 499])[:200]))

        score(folder, tmp_path / "scored.parquet")

        assert pd.read_parquet(tmp_path / "scored.parquet")["CustomerId"].to_list()[:300] == list(map(str, ids[:300]))

    def test_of_parquet_with_a_column_that_is_empty_in_one_file_holds_the_text_of_the_other(self, frame, tmp_path):
        folder = tmp_path / "customers"
        folder.mkdir()
        (folder / "a.parquet").write_bytes(as_parquet(frame.assign(Note="x")[:300]))
        (folder / "b.parquet").write_bytes(as_parquet(frame.assign(Note=float("nan"))[:200]))

        score(folder, tmp_path / "scored.parquet")

        assert pd.read_parquet(tmp_path / "scored.parquet")["Note"].isna().to_list() == [False] * 300 + [True] * 200


class TestOtherStorage:
    @pytest.fixture
    def ftp(self, tmp_path) -> str:
        """The URL of a folder on an FTP server."""
        (tmp_path / "far").mkdir()
        authorizer = DummyAuthorizer()
        authorizer.add_user("retention", "secret", str(tmp_path / "far"), perm="elradfmw")
        handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
        server = ThreadedFTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ftp://retention:secret@127.0.0.1:{server.address[1]}"
        server.close_all()
        thread.join(timeout=10)

    def test_is_read_and_written_by_its_url(self, ftp, frame, tmp_path):
        (tmp_path / "far" / "customers.parquet").write_bytes(as_parquet(frame))

        score(f"{ftp}/customers.parquet", f"{ftp}/scored.csv")

        scored = pd.read_csv(tmp_path / "far" / "scored.csv", dtype={"label": str})
        pd.testing.assert_frame_equal(scored[["probability", "label"]], answers_of(frame, tmp_path))
        assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["customers.parquet", "scored.csv"]

    def test_holds_the_files_of_jobs(self, api, ftp, frame, settings, tmp_path):
        settings.BATCH_DIR = f"{ftp}/batches"
        job = upload(api, "shop.csv", frame.to_csv(index=False).encode(), mode="async")["Location"]
        folder = tmp_path / "far" / "batches" / BatchJob.objects.get().folder
        assert [path.name for path in (folder / "input").iterdir()] == ["000000-shop.csv"]
        work()

        scored = pd.read_csv(io.BytesIO(api.get(f"{job}/result").getvalue()), dtype={"label": str})

        pd.testing.assert_frame_equal(scored[["probability", "label"]], answers_of(frame, tmp_path))
        assert api.get(f"{job}/errors").json() == {"rows_refused": 0, "errors": []}
        assert not (folder / "input").exists()
        assert not list(folder.glob(".*"))

    def test_that_nothing_here_can_read_is_said(self, frame, tmp_path):
        assert "Protocol not known: nowhere" in refused("nowhere://x/customers.csv", tmp_path / "s.csv")
        assert "There is no file" in refused(tmp_path / "none.csv", tmp_path / "s.csv")
