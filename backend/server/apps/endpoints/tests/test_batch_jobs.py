"""Batch jobs: a file of any size is accepted at once, scored by a worker, and fetched when it is done."""

from __future__ import annotations

import csv
import gzip
import io
import os
import shutil
import signal
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import CommandError, call_command
from django.utils import timezone

from apps.endpoints import batch_jobs, csv_file
from apps.endpoints.models import BatchJob, MLRequest
from apps.ml.registry import registry
from conftest import make_customers

UPLOAD = "/api/v1/batch-predict"
JOBS = "/api/v1/batch-jobs"


@pytest.fixture(autouse=True)
def _files_of_its_own(settings, tmp_path: Path, algorithms):
    settings.BATCH_DIR = tmp_path / "batches"


@pytest.fixture
def customers() -> bytes:
    return make_customers(60, seed=4).to_csv(index=False).encode()


@pytest.fixture(params=[csv_file.LARGEST_CHUNK, 120], ids=["of many rows a chunk", "of few"])
def a_table(request, monkeypatch) -> None:
    """Of a wide one, of which a chunk has few rows, several chunks may be one part."""
    monkeypatch.setattr(csv_file, "LARGEST_CHUNK", request.param)


def upload(api, content: bytes, name: str = "shop.csv", headers: dict[str, str] | None = None, **fields: str):
    file = SimpleUploadedFile(name, content)
    return api.post(UPLOAD, {"file": file, **fields}, format="multipart", headers=headers)


def submitted(api, content: bytes, **fields: str) -> str:
    """The address of a new job."""
    response = upload(api, content, mode="async", **fields)
    assert response.status_code == 202, response.content
    return response.headers["Location"]


def work() -> None:
    call_command("batch_worker", once=True)


def table(response) -> list[dict[str, str]]:
    assert response.status_code == 200, response.content
    return list(csv.DictReader(io.StringIO(response.getvalue().decode("utf-8-sig"))))


class TestASmallUpload:
    def test_is_answered_at_once(self, api, customers, settings):
        settings.BATCH_SYNC_ROWS = 60

        assert upload(api, customers).status_code == 201
        assert not BatchJob.objects.exists()

    @pytest.mark.parametrize(
        ("fields", "headers"),
        [
            ({"mode": "async"}, {}),
            ({"on_error": "skip"}, {}),
            ({"log": "none"}, {}),
            ({}, {"Prefer": "respond-async"}),
            ({}, {"Prefer": "wait=1, Respond-Async"}),
            ({}, {"Idempotency-Key": "night"}),
        ],
    )
    def test_becomes_a_job_where_that_is_asked_for(self, api, customers, fields, headers):
        response = upload(api, customers, headers=headers, **fields)

        assert response.status_code == 202
        job = BatchJob.objects.get()
        assert response.headers["Location"] == f"{JOBS}/{job.pk}"
        assert response.json()["state"] == "queued"
        assert ("Preference-Applied" in response.headers) == ("Prefer" in headers)


class TestALargerUpload:
    def test_is_a_job_of_whom_it_says_and_of_the_algorithm_it_says(self, api, algorithms, customers, settings):
        settings.BATCH_SYNC_ROWS = 59

        response = upload(api, customers)

        assert response.status_code == 202
        told = api.get(response.headers["Location"]).json()
        assert told["algorithm"] == algorithms["random_forest"].name
        assert told["version"] == "1.0.0"
        assert told["created_by"] == "anonymous"
        assert told["file_name"] == "shop.csv"
        assert told["file_bytes"] == len(customers)
        assert not MLRequest.objects.exists()

    def test_is_refused_before_it_is_read_when_it_is_too_large(self, api, customers, settings):
        settings.BATCH_MAX_BYTES = 1000

        assert upload(api, customers).status_code == 413

    def test_is_streamed_to_the_disk_on_which_jobs_keep_their_files(self, api, settings, tmp_path, monkeypatch):
        content = make_customers(80_000).to_csv(index=False).encode()
        assert len(content) > settings.FILE_UPLOAD_MAX_MEMORY_SIZE
        seen = []
        submit = batch_jobs.submit
        monkeypatch.setattr(batch_jobs, "submit", lambda f, *a, **k: seen.append(f[0].movable) or submit(f, *a, **k))

        assert upload(api, content).status_code == 202

        assert Path(seen[0]).parent == tmp_path / "batches" / "uploads"
        assert [path.name for path in (tmp_path / "batches").rglob("*") if path.is_file()] == ["000000-shop.csv"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "The file is empty"),
            (b"Plan,Orders\nbasic,1\n", "lacks the columns RecencyDays, MeanGapDays, Newsletter"),
            (b"\xff\xfe\n", "not UTF-8"),
            (b"\x1f\x8bnonsense", "damaged gzip"),
        ],
    )
    def test_whose_header_does_not_fit_is_refused_at_once(self, api, content, message, tmp_path):
        response = upload(api, content, mode="async")

        assert response.status_code == 400
        assert message in response.json()["message"]
        assert not BatchJob.objects.exists()
        assert not [path for path in (tmp_path / "batches").rglob("*") if path.is_file()]


class TestAJob:
    @pytest.mark.usefixtures("a_table")
    def test_gives_the_file_back_with_the_ids_of_the_logged_requests(self, api, algorithms, customers, monkeypatch):
        monkeypatch.setattr(batch_jobs, "PART_ROWS", 7)
        job = submitted(api, customers)

        work()

        told = api.get(job).json()
        assert told["state"] == "succeeded"
        assert (told["rows_total"], told["rows_scored"], told["rows_refused"]) == (60, 60, 0)
        assert sum(told["histogram"]) == 60
        assert told["rows_per_second"] > 0
        assert told["expires_at"] > told["finished_at"]
        rows = table(api.get(f"{job}/result"))
        given = list(csv.DictReader(io.StringIO(customers.decode())))
        added = ("request_id", "probability", "label")
        assert [{name: row[name] for name in given[0]} for row in rows] == given
        assert list(rows[0])[-3:] == list(added)
        for row in rows:
            logged = MLRequest.objects.get(pk=row["request_id"])
            assert (logged.customer_key, logged.probability, logged.response) == (
                row["CustomerId"],
                float(row["probability"]),
                row["label"],
            )
            assert logged.parent_mlalgorithm == algorithms["random_forest"]

    def test_answers_and_logs_what_an_upload_is_answered_with_at_once(self, api, customers):
        at_once = upload(api, customers, format="csv").content.decode()
        job = submitted(api, customers)
        work()

        rows = table(api.get(f"{job}/result"))

        assert [{**row, "request_id": None} for row in rows] == [
            {**row, "request_id": None} for row in csv.DictReader(io.StringIO(at_once))
        ]
        logged = MLRequest.objects.order_by("pk").values_list("input_data", "full_response", "customer_key")
        assert list(logged[:60]) == list(logged[60:])

    def test_logs_any_text_as_it_was_sent_in_the_row_of_its_id(self, api):
        odd = ["a\\tb", "\\N", "\\.", 'say ""', "tab\tbed", "two\nlines", "back\\", "é😀", "'; --", "%s", "{}", "basic"]
        sent = make_customers(300, seed=6)
        sent["Plan"] = [odd[row % len(odd)] for row in range(300)]
        sent["CustomerId"] = [f"{odd[row % 7]}{row}" for row in range(300)]
        sent["RecencyDays"] = [[1e10, 1e-7, 2.5, 3.0, None][row % 5] for row in range(300)]
        job = submitted(api, sent.to_csv(index=False).encode())

        work()

        rows = table(api.get(f"{job}/result"))
        logged = MLRequest.objects.in_bulk([int(row["request_id"]) for row in rows])
        assert len(logged) == 300
        for row, (_, customer) in zip(rows, sent.iterrows(), strict=True):
            request = logged[int(row["request_id"])]
            assert row["CustomerId"] == request.customer_key == customer["CustomerId"]
            assert request.input_data == {
                "Plan": customer["Plan"],
                "Orders": customer["Orders"],
                "RecencyDays": None if pd.isna(customer["RecencyDays"]) else customer["RecencyDays"],
                "MeanGapDays": None if pd.isna(customer["MeanGapDays"]) else customer["MeanGapDays"],
                "Newsletter": customer["Newsletter"],
            }
            response = request.full_response
            assert (str(response["probability"]), response["label"]) == (row["probability"], row["label"])
            assert any("Plan" in warning for warning in response.get("warnings", [])) == (customer["Plan"] != "basic")

    @pytest.mark.usefixtures("a_table")
    def test_logs_nothing_where_that_is_asked_for_and_says_so(self, api, customers):
        job = submitted(api, customers, log="none")

        work()

        assert not MLRequest.objects.exists()
        assert api.get(job).json()["log"] == "none"
        assert list(table(api.get(f"{job}/result"))[0])[-2:] == ["probability", "label"]

    def test_takes_gzip(self, api, customers):
        response = upload(api, gzip.compress(customers), name="shop.csv.gz")
        assert response.status_code == 202
        work()

        result = api.get(f"{response.headers['Location']}/result")

        assert len(table(result)) == 60
        assert 'filename="shop-scored.csv"' in result.headers["Content-Disposition"]

    def test_is_scored_by_the_algorithm_that_served_when_it_was_submitted(self, api, algorithms, customers):
        job = submitted(api, customers)
        api.post(
            "/api/v1/mlalgorithmstatuses",
            {"status": "production", "parent_mlalgorithm": algorithms["decision_tree"].pk},
        )
        api.post(
            "/api/v1/mlalgorithmstatuses",
            {"status": "retired", "parent_mlalgorithm": algorithms["random_forest"].pk},
        )

        work()

        assert api.get(job).json()["state"] == "succeeded"
        assert {request.parent_mlalgorithm for request in MLRequest.objects.all()} == {algorithms["random_forest"]}

    def test_is_scored_by_the_champion_of_a_running_test_and_is_no_part_of_it(self, api, algorithms, customers):
        test = {
            "title": "forest or trees",
            "parent_mlalgorithm_1": algorithms["random_forest"].pk,
            "parent_mlalgorithm_2": algorithms["extra_trees"].pk,
        }
        assert api.post("/api/v1/abtests", test).status_code == 201
        submitted(api, customers)

        work()

        answered_by = {(request.parent_mlalgorithm, request.abtest) for request in MLRequest.objects.all()}
        assert answered_by == {(algorithms["random_forest"], None)}

    def test_whose_model_cannot_be_loaded_any_more_fails_and_says_why(self, api, customers, settings, artifacts_dir):
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        job = submitted(api, customers)
        registry.clear()
        (artifacts_dir / "1.0.0" / "random_forest.joblib").write_bytes(b"damaged")

        work()

        told = api.get(job).json()
        assert told["state"] == "failed"
        assert "random forest 1.0.0 is not available" in told["problem"]

    def test_whose_files_vanish_is_tried_several_times_and_then_fails(self, api, customers, monkeypatch):
        job = submitted(api, customers)
        shutil.rmtree(Path(batch_jobs.settings.BATCH_DIR) / BatchJob.objects.get().folder / "input")
        monkeypatch.setattr(batch_jobs, "RETRY_SECONDS", -1)

        work()

        told = api.get(job).json()
        assert told["state"] == "failed"
        assert "No such file" in told["problem"]
        assert "5 times" in told["problem"]


class TestBadRows:
    @pytest.fixture
    def bad(self) -> bytes:
        frame = make_customers(20, seed=4).astype(object)
        frame.loc[3, "Orders"] = "many"
        frame.loc[9, "Orders"] = "1,000"
        frame.loc[9, "Newsletter"] = "maybe"
        lines = frame.to_csv(index=False).splitlines(keepends=True)
        return "".join([*lines[:15], "basic,1\n", *lines[15:]]).encode()

    def test_make_a_job_fail_before_any_is_scored_or_logged(self, api, bad, monkeypatch):
        monkeypatch.setattr(batch_jobs, "PART_ROWS", 5)
        job = submitted(api, bad)

        work()

        told = api.get(job).json()
        assert told["state"] == "failed"
        assert told["problem"] == "3 of 21 rows cannot be scored; nobody was scored or logged."
        assert not MLRequest.objects.exists()
        response = api.get(f"{job}/result")
        assert response.status_code == 409
        message = response.json()["message"]
        assert "has failed. 3 of 21 rows" in message and message.endswith(f"See {job}/errors.")
        errors = api.get(f"{job}/errors").json()
        assert errors["rows_refused"] == 3
        assert [(error["line"], error["column"], error["value"]) for error in errors["errors"]] == [
            (5, "Orders", "many"),
            (11, "Orders", "1,000"),
            (11, "Newsletter", "maybe"),
            (16, "", ""),
        ]
        assert errors["errors"][3]["reason"] == "has 2 fields where the header has 7"
        assert table(api.get(f"{job}/errors?format=csv")) == [
            {**error, "line": str(error["line"])} for error in errors["errors"]
        ]

    @pytest.mark.usefixtures("a_table")
    def test_are_left_out_where_that_is_asked_for(self, api, bad, monkeypatch):
        monkeypatch.setattr(batch_jobs, "PART_ROWS", 5)
        job = submitted(api, bad, on_error="skip")

        work()

        told = api.get(job).json()
        assert (told["state"], told["rows_total"], told["rows_scored"], told["rows_refused"]) == (
            "succeeded",
            21,
            18,
            3,
        )
        kept = [row["CustomerId"] for row in table(api.get(f"{job}/result"))]
        assert kept == [f"C{n:05d}" for n in range(1, 21) if n not in (4, 10)]
        assert MLRequest.objects.count() == 18
        assert len(api.get(f"{job}/errors").json()["errors"]) == 4

    def test_that_end_the_table_fail_the_job_also_where_bad_ones_may_be_skipped(self, api, customers):
        lines = customers.splitlines(keepends=True)
        job = submitted(api, b"".join([*lines[:30], b"\xff" + lines[30], *lines[31:]]), on_error="skip")

        work()

        told = api.get(job).json()
        assert told["state"] == "failed"
        assert told["problem"].startswith("Line 31: holds a byte that is not UTF-8 (0xff)")
        assert api.get(f"{job}/errors").json()["errors"][0]["line"] == 31
        assert not MLRequest.objects.exists()

    @pytest.mark.parametrize("state", ["queued", "cancelled"])
    def test_are_not_known_before_they_were_looked_at(self, api, customers, state):
        job = submitted(api, customers)
        if state == "cancelled":
            api.delete(job)

        for address in (f"{job}/errors", f"{job}/errors?format=csv", f"{job}/result"):
            response = api.get(address)

            assert response.status_code == 409
            assert response.json()["message"]


class TestCancelling:
    def test_a_job_that_waits_ends_it_and_its_files_go(self, api, customers, tmp_path):
        job = submitted(api, customers)

        response = api.delete(job)

        assert (response.status_code, response.json()["state"]) == (200, "cancelled")
        work()
        batch_jobs.clean(timezone.now())
        assert api.get(job).json()["state"] == "cancelled"
        assert not MLRequest.objects.exists()
        assert not [path for path in (tmp_path / "batches").rglob("*") if path.is_file()]
        assert api.get(f"{job}/result").status_code == 409

    def test_a_job_that_is_being_scored_stops_it_between_two_parts(self, api, customers, monkeypatch):
        monkeypatch.setattr(batch_jobs, "PART_ROWS", 10)
        job = submitted(api, customers)
        running = batch_jobs.claim()

        def is_stopping() -> bool:
            if MLRequest.objects.count() == 20:
                api.delete(job)
            return False

        batch_jobs.run(running, is_stopping)

        assert api.get(job).json()["state"] == "cancelled"
        assert MLRequest.objects.count() == 20

    def test_twice_is_as_once_and_what_has_ended_is_not_cancelled(self, api, customers):
        cancelled, done = submitted(api, customers), submitted(api, customers)
        api.delete(cancelled)
        work()

        assert api.delete(cancelled).status_code == 200
        response = api.delete(done)
        assert response.status_code == 409
        assert "has succeeded" in response.json()["message"]


class TestAnIdempotencyKey:
    def test_makes_a_file_that_is_sent_again_the_same_job(self, api, customers, tmp_path):
        first, second = (upload(api, customers, headers={"Idempotency-Key": "night"}) for _ in range(2))

        assert first.headers["Location"] == second.headers["Location"]
        assert second.status_code == 202
        assert BatchJob.objects.count() == 1
        assert len(list((tmp_path / "batches").glob("*/input"))) == 1

    @pytest.mark.parametrize("fields", [{"on_error": "skip"}, {"log": "none"}, {"version": "1.0.0"}, {"more": "rows"}])
    def test_is_refused_for_another_file_or_other_options(self, api, customers, fields):
        upload(api, customers, headers={"Idempotency-Key": "night"})
        content = customers + customers.splitlines(keepends=True)[1] if fields.pop("more", None) else customers

        response = upload(api, content, headers={"Idempotency-Key": "night"}, algorithm="random_forest", **fields)

        assert response.status_code == 422
        assert "Idempotency-Key" in response.json()["message"]

    def test_is_each_sender_s_own(self, api, customers):
        upload(api, customers, headers={"Idempotency-Key": "night"})
        BatchJob.objects.update(created_by="ann")

        upload(api, customers, headers={"Idempotency-Key": "night"})

        assert BatchJob.objects.count() == 2

    def test_of_unreasonable_length_is_refused(self, api, customers):
        response = upload(api, customers, headers={"Idempotency-Key": "n" * 201})

        assert response.status_code == 400
        assert response.json()["errors"][0]["field"] == "Idempotency-Key"


class TestATurn:
    """One worker's hold on a job, which ends when it is not heard of for BATCH_LEASE_SECONDS."""

    def test_is_nobody_else_s(self, api, customers):
        submitted(api, customers)

        assert batch_jobs.claim() is not None
        assert batch_jobs.claim() is None

    @pytest.mark.usefixtures("a_table")
    def test_that_ended_in_silence_is_taken_over_where_it_was(self, api, customers, monkeypatch):
        monkeypatch.setattr(batch_jobs, "PART_ROWS", 10)
        job = submitted(api, customers)
        dead = batch_jobs.claim()
        batch_jobs.run(dead, lambda: MLRequest.objects.count() >= 30)
        BatchJob.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
        assert 30 <= MLRequest.objects.count() < 60

        work()

        rows = table(api.get(f"{job}/result"))
        assert [row["CustomerId"] for row in rows] == [f"C{n:05d}" for n in range(1, 61)]
        assert sorted(int(row["request_id"]) for row in rows) == list(
            MLRequest.objects.order_by("pk").values_list("pk", flat=True)
        )
        assert sum(api.get(job).json()["histogram"]) == 60

    def test_that_was_lost_cannot_write_any_more(self, api, customers, monkeypatch):
        monkeypatch.setattr(batch_jobs, "PART_ROWS", 10)
        job = submitted(api, customers)
        slow = batch_jobs.claim()
        asked = []

        def is_stopping() -> bool:  # is asked before each part: during the third, another worker does it all
            asked.append(None)
            if MLRequest.objects.count() == 20 and BatchJob.objects.get().turn == slow.turn:
                BatchJob.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
                work()
            return False

        batch_jobs.run(slow, is_stopping)

        assert api.get(job).json()["state"] == "succeeded"
        assert MLRequest.objects.count() == 60
        rows = table(api.get(f"{job}/result"))
        assert {int(row["request_id"]) for row in rows} == set(MLRequest.objects.values_list("pk", flat=True))

    def test_that_was_lost_and_fails_takes_nothing_from_the_next_one(self, api, customers):
        job = submitted(api, customers)
        lost = batch_jobs.claim()
        BatchJob.objects.update(lease_until=timezone.now() - timedelta(seconds=1))
        next_one = batch_jobs.claim()

        lost.fruitless_turns = batch_jobs.MOST_FRUITLESS_TURNS + 1  # it gives up
        batch_jobs.run(lost)
        batch_jobs.run(next_one)

        assert len(table(api.get(f"{job}/result"))) == 60

    def test_is_renewed_while_what_was_done_before_is_passed_over(self, api, customers, monkeypatch, settings):
        monkeypatch.setattr(batch_jobs, "PART_ROWS", 10)
        settings.BATCH_LEASE_SECONDS = 600
        job = submitted(api, customers)
        batch_jobs.run(batch_jobs.claim(), lambda: MLRequest.objects.count() == 40)
        monkeypatch.setattr(settings, "BATCH_LEASE_SECONDS", 0)  # so that it is due at every chance
        renewed = []
        stay = batch_jobs._Run._stay
        monkeypatch.setattr(
            batch_jobs._Run,
            "_stay",
            lambda run, **progress: renewed.append(run._job.rows_read) or stay(run, **progress),
        )

        work()

        assert renewed == [40] * 4
        assert len(table(api.get(f"{job}/result"))) == 60


class TestTheFiles:
    def test_are_kept_for_a_time_and_the_job_stays_known(self, api, customers, settings, tmp_path):
        job = submitted(api, customers)
        work()
        assert table(api.get(f"{job}/result"))

        batch_jobs.clean(timezone.now() + timedelta(days=settings.BATCH_KEEP_DAYS, minutes=1))

        for address in (f"{job}/result", f"{job}/errors", f"{job}/errors?format=csv"):
            response = api.get(address)
            assert response.status_code == 410
            assert "kept for 7 days" in response.json()["message"]
        assert api.get(job).json()["state"] == "succeeded"
        assert not [path for path in (tmp_path / "batches").rglob("*") if path.is_file()]

    def test_of_uploads_that_became_no_job_go_and_nobody_else_s(self, api, customers, tmp_path):
        root = tmp_path / "batches"
        job = submitted(api, customers)
        (root / "uploads").mkdir(exist_ok=True)
        mine = [root / ("0" * 32), root / "uploads" / "x.upload"]
        others = [root / "somebody", root / "uploads" / "notes.txt"]
        for path in (mine[0], others[0]):
            path.mkdir()
        for path in (mine[1], others[1]):
            path.touch()
        for path in root.rglob("*"):
            os.utime(path, (0, 0))

        batch_jobs.clean(timezone.now())

        assert not any(path.exists() for path in mine)
        assert all(path.exists() for path in others)
        work()
        assert len(table(api.get(f"{job}/result"))) == 60

    def test_of_an_upload_go_when_its_job_has_ended(self, api, customers, tmp_path):
        submitted(api, customers)
        submitted(api, customers.replace(b"family", b"family,"))

        work()

        assert not list((tmp_path / "batches").glob("*/input"))


class TestTheList:
    def test_has_the_newest_first_and_can_be_filtered(self, api, customers):
        first, second = submitted(api, customers), submitted(api, customers)
        api.delete(first)

        def addresses(query: str = "") -> list[str]:
            return [f"{JOBS}/{job['id']}" for job in api.get(JOBS + query).json()["results"]]

        assert addresses() == [second, first]
        assert addresses("?state=queued") == [second]
        assert addresses("?created_by=somebody") == []
        assert api.get(f"{JOBS}?state=nonsense").status_code == 400


def test_a_result_opened_by_pandas_is_the_upload_and_three_columns(api, customers):
    job = submitted(api, customers)
    work()

    frame = pd.read_csv(io.BytesIO(api.get(f"{job}/result").getvalue()))

    given = pd.read_csv(io.BytesIO(customers))
    pd.testing.assert_frame_equal(frame[list(given.columns)], given)


class TestTheCommand:
    """manage.py score without --log none: a job in the foreground."""

    @pytest.fixture
    def file(self, customers, tmp_path) -> Path:
        path = tmp_path / "shop.csv"
        path.write_bytes(customers)
        return path

    def test_logs_every_customer_and_writes_what_the_job_s_result_is(self, api, file, tmp_path):
        said = score(file, tmp_path / "scored.csv")

        assert said.startswith("60 customers were scored by random forest 1.0.0 into ")
        assert said.endswith("; each was logged.\n")
        job = BatchJob.objects.get()
        assert (job.state, job.file_name, MLRequest.objects.count()) == ("succeeded", "shop.csv", 60)
        assert (tmp_path / "scored.csv").read_bytes() == api.get(f"{JOBS}/{job.pk}/result").getvalue()
        assert file.exists()

    def test_reads_and_writes_gzip(self, file, tmp_path):
        (tmp_path / "shop.csv.gz").write_bytes(gzip.compress(file.read_bytes()))

        score(tmp_path / "shop.csv.gz", tmp_path / "scored.csv.gz")

        assert len(gzip.decompress((tmp_path / "scored.csv.gz").read_bytes()).splitlines()) == 61

    def test_names_bad_lines_and_writes_and_logs_nothing(self, file, tmp_path):
        file.write_bytes(file.read_bytes().replace(b"family", b"family,", 1))

        with pytest.raises(CommandError) as refused:
            score(file, tmp_path / "scored.csv")

        assert "1 of 60 rows cannot be scored" in str(refused.value)
        assert "has 8 fields where the header has 7" in str(refused.value)
        assert not (tmp_path / "scored.csv").exists()
        assert not MLRequest.objects.exists()

    @pytest.mark.parametrize("log", ["all", "none"])
    def test_leaves_bad_lines_out_where_that_is_asked_for(self, file, tmp_path, log):
        file.write_bytes(file.read_bytes().replace(b"family", b"family,", 1))

        said = score(file, tmp_path / "scored.csv", "--on-error=skip", f"--log={log}")

        assert "59 customers were scored" in said and "1 of 60 rows were refused" in said
        assert len((tmp_path / "scored.csv").read_text().splitlines()) == 60
        assert MLRequest.objects.count() == (59 if log == "all" else 0)

    def test_that_is_interrupted_leaves_the_rest_to_the_next_worker(self, api, file, tmp_path, monkeypatch):
        monkeypatch.setattr(batch_jobs, "PART_ROWS", 10)
        change = batch_jobs._Run._change

        def interrupted(run, **fields):
            change(run, **fields)
            if fields.get("rows_read") == 20:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(batch_jobs._Run, "_change", interrupted)
        with pytest.raises(CommandError) as refused:
            score(file, tmp_path / "scored.csv")
        monkeypatch.undo()

        job = BatchJob.objects.get()
        assert refused.value.returncode == 143
        assert f"Job {job.pk} is scoring" in str(refused.value)
        assert not (tmp_path / "scored.csv").exists()
        work()
        assert len(table(api.get(f"{JOBS}/{job.pk}/result"))) == MLRequest.objects.count() == 60


def score(input: Path, output: Path, *options: str) -> str:
    said = io.StringIO()
    call_command("score", str(input), str(output), *options, stdout=said, stderr=io.StringIO())
    return said.getvalue()
