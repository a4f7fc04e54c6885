"""The admin's pages of batch jobs: what a file holds, who may submit, watch and cancel, and what came of it."""

from __future__ import annotations

import csv
import gzip
import io
from datetime import timedelta
from pathlib import Path

import pytest
from django.contrib.auth.models import Permission, User
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import call_command
from django.test import Client
from django.utils import timezone

from apps.endpoints import abtests, batch_jobs, lifecycle
from apps.endpoints.models import BatchJob, MLRequest
from apps.endpoints.tests.test_admin import confirm, page, rows_of, said_by, staff, text_of
from conftest import make_customers

__all__ = ["staff"]

ADD = page("batchjob") + "add/"
COLUMNS = page("batchjob") + "columns/"
SCRIPT = {"X-Requested-With": "XMLHttpRequest"}
HEADER = b"CustomerId,Plan,Orders,RecencyDays,MeanGapDays,Newsletter"


@pytest.fixture(autouse=True)
def _files_of_its_own(settings, tmp_path: Path, algorithms):
    settings.BATCH_DIR = tmp_path / "batches"


@pytest.fixture
def customers() -> bytes:
    return make_customers(60, seed=4).to_csv(index=False).encode()


@pytest.fixture
def submit(admin_client, algorithms):
    """Sends the form as a browser does, by default for the forest."""

    def send(content: bytes, client: Client = admin_client, name: str = "shop.csv", headers=None, **fields: object):
        values = {"parent_mlalgorithm": algorithms["random_forest"].pk, "on_error": "fail", "log": "all", **fields}
        return client.post(ADD, {"file": SimpleUploadedFile(name, content), **values}, headers=headers)

    return send


@pytest.fixture
def preview(admin_client, algorithms):
    """What the page says of a file's columns."""

    def look(beginning: bytes, client: Client = admin_client, algorithm: object = None) -> dict:
        algorithm = algorithms["random_forest"].pk if algorithm is None else algorithm
        response = client.post(f"{COLUMNS}?algorithm={algorithm}", beginning, content_type="application/octet-stream")
        assert response.status_code == 200, response
        return response.json()

    return look


def work() -> None:
    call_command("batch_worker", once=True)


def damaged(customers: bytes, rows: int = 1) -> bytes:
    """The last rows without a number where one is needed."""
    lines = customers.decode().splitlines()
    for at in range(-rows, 0):
        cells = lines[at].split(",")
        cells[2] = "many"
        lines[at] = ",".join(cells)
    return "\n".join(lines).encode()


# --- The columns of a file --------------------------------------------------------------------------------
def test_a_file_that_fits_is_told_column_by_column(preview, customers):
    assert preview(customers) == {
        "recognised": ["Plan", "Orders", "RecencyDays", "MeanGapDays", "Newsletter"],
        "identifier": "CustomerId",
        "missing": {},
        "ignored": ["IsRetained"],
        "repeated": [],
        "problem": "",
    }


def test_a_missing_column_is_named_with_the_one_that_may_be_meant(preview):
    found = preview(b"plan,Orders,Recency_Days,Colour\nbasic,1,2,red\n")

    assert found["recognised"] == ["Orders"]
    assert found["identifier"] is None
    assert found["missing"] == {
        "Plan": "plan",
        "RecencyDays": "Recency_Days",
        "MeanGapDays": None,
        "Newsletter": None,
    }
    assert found["ignored"] == ["plan", "Recency_Days", "Colour"]
    assert found["problem"].startswith(
        "The file lacks the columns Plan (is it plan?), RecencyDays (is it Recency_Days?)"
    )


def test_a_column_that_comes_twice_is_a_problem(preview):
    assert preview(HEADER + b",Plan\n")["problem"] == "The header names Plan more than once."


@pytest.mark.parametrize("delimiter", [b";", b"\t"])
def test_other_delimiters_are_understood(preview, delimiter):
    found = preview(b"\xef\xbb\xbf" + HEADER.replace(b",", delimiter) + b"\n")

    assert found["problem"] == ""
    assert found["identifier"] == "CustomerId"


@pytest.mark.parametrize("pieces", [1, 60])
def test_the_beginning_of_gzip_is_enough(preview, pieces):
    content = make_customers(40_000).to_csv(index=False).encode()
    size = len(content) // pieces + 1
    packed = b"".join(gzip.compress(content[at : at + size]) for at in range(0, len(content), size))
    assert len(packed) > batch_jobs.BEGINNING

    found = preview(packed[: batch_jobs.BEGINNING])

    assert found["problem"] == ""
    assert len(found["recognised"]) == 5


def test_little_gzip_does_not_unpack_into_much_memory(preview):
    found = preview(gzip.compress(b"x" * 50_000_000)[: batch_jobs.BEGINNING])

    assert found == {"problem": "The first line of the file is too long to look at; it must name the columns."}


@pytest.mark.parametrize(
    ("beginning", "problem"),
    [
        (b"", "The file is empty; the first line must name the columns."),
        (b"Plan,\xff\n", "Line 1: holds a byte that is not UTF-8 (0xff); save the file as UTF-8."),
        (b"\x1f\x8bnonsense", "The file is damaged gzip"),
        (b"x" * batch_jobs.BEGINNING, "The first line of the file is too long to look at"),
    ],
)
def test_what_is_no_table_is_said(preview, beginning, problem):
    assert preview(beginning)["problem"].startswith(problem)


def test_a_beginning_that_is_cut_in_the_middle_of_a_character_is_no_problem(preview):
    beginning = HEADER + b"\nC1," + "é".encode() * batch_jobs.BEGINNING

    assert preview(beginning[: batch_jobs.BEGINNING])["problem"] == ""


@pytest.mark.parametrize("algorithm", ["", "0", "x", "9" * 40])
def test_an_algorithm_that_is_not_served_reads_nothing(preview, algorithm):
    assert "not served any more" in preview(HEADER + b"\n", algorithm=algorithm)["problem"]


def test_a_model_that_cannot_be_loaded_is_said(preview, algorithms):
    algorithms["random_forest"].artifact_sha256 = "0" * 64
    algorithms["random_forest"].save()

    assert "is not the one that was registered" in preview(HEADER + b"\n")["problem"]


# --- Submitting -------------------------------------------------------------------------------------------
def test_a_file_is_submitted_and_its_page_shows_it(submit, admin_client, algorithms, customers):
    response = submit(customers, parent_mlalgorithm=algorithms["extra_trees"].pk, on_error="skip", log="none")

    job = BatchJob.objects.get()
    assert response.url == page("batchjob", job)
    assert (job.created_by, job.file_name, job.file_bytes) == ("admin", "shop.csv", len(customers))
    assert (job.parent_mlalgorithm, job.on_error, job.log) == (algorithms["extra_trees"], "skip", "none")
    text = text_of(admin_client.get(response.url))
    assert "Queued Waiting for a worker; none is before it." in text
    assert "score the other rows" in text


def test_the_upload_is_streamed_to_where_jobs_keep_their_files(submit, customers, monkeypatch):
    taken = []
    take = batch_jobs.job_files.take
    monkeypatch.setattr(batch_jobs.job_files, "take", lambda sent: taken.extend(sent) or take(sent))

    submit(customers)

    assert Path(taken[0].movable).parent == batch_jobs.job_files.uploads()


def test_a_script_is_told_where_to_go_or_what_is_wrong(submit, customers):
    accepted = submit(customers, headers=SCRIPT)
    refused = submit(b"Plan\nbasic\n", headers=SCRIPT)

    assert accepted.json() == {"url": page("batchjob", BatchJob.objects.get())}
    assert refused.status_code == 400
    assert refused.json()["problems"][0].startswith("The file lacks the columns Orders")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "The file is empty"),
        (b"plan\nbasic\n", "The file lacks the columns Plan (is it plan?)"),
        (b"\xff\xfe\n", "Line 1: holds a byte that is not UTF-8"),
        (b"\x1f\x8bnonsense", "The file is damaged gzip"),
    ],
)
def test_a_file_that_does_not_fit_is_explained_in_the_form(submit, content, problem, tmp_path):
    assert problem in text_of(submit(content))
    assert not BatchJob.objects.exists()
    assert not [path for path in (tmp_path / "batches").rglob("*") if path.is_file()]


def test_a_full_disk_is_explained_in_the_form(submit, customers, monkeypatch):
    def full(upload: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch_jobs.job_files, "take", full)

    assert "The server could not keep the file: No space left on device." in text_of(submit(customers))


def test_a_form_without_a_file_says_so(admin_client, algorithms):
    fields = {"parent_mlalgorithm": algorithms["random_forest"].pk, "on_error": "fail", "log": "all"}

    assert "This field is required." in text_of(admin_client.post(ADD, fields))


def test_a_file_that_is_too_large_is_refused_unread(submit, customers, settings, admin_client, tmp_path):
    settings.BATCH_MAX_BYTES = 1000

    for_people = submit(customers)
    for_scripts = submit(customers, headers=SCRIPT)

    (said,) = said_by(for_people)
    assert for_people.url == ADD
    assert said == "The file is too large: it may have 1000\xa0bytes. Send it in parts."
    assert (for_scripts.status_code, for_scripts.json()) == (413, {"problems": [said]})
    assert not (tmp_path / "batches").exists()


def test_the_one_in_production_is_chosen_at_first_also_while_it_is_tested(admin_client, algorithms):
    def chosen() -> int:
        return (
            admin_client.get(ADD)
            .context["adminform"]
            .form.get_initial_for_field(
                admin_client.get(ADD).context["adminform"].form.fields["parent_mlalgorithm"], "parent_mlalgorithm"
            )
        )

    assert chosen() == algorithms["random_forest"]
    abtests.start("Spring", algorithms["extra_trees"], algorithms["random_forest"], by="ada", now=timezone.now())
    assert chosen() == algorithms["random_forest"]
    assert "random forest 1.0.0 (A/B testing)" in text_of(admin_client.get(ADD))


def test_the_form_offers_what_is_served(admin_client, algorithms, submit, customers):
    tree = algorithms["decision_tree"]
    lifecycle.set_status(tree, "retired", by="sam", now=timezone.now())

    assert "decision tree" not in text_of(admin_client.get(ADD))
    assert "Select a valid choice" in text_of(submit(customers, parent_mlalgorithm=tree.pk))


def test_without_any_model_the_form_can_be_seen(admin_client, algorithms):
    for algorithm in algorithms.values():
        lifecycle.set_status(algorithm, "retired", by="sam", now=timezone.now())

    assert admin_client.get(ADD).status_code == 200


# --- A job ------------------------------------------------------------------------------------------------
def test_a_job_that_has_succeeded_gives_its_result_and_how_it_is_distributed(submit, admin_client, customers):
    submit(customers)
    work()
    job = BatchJob.objects.get()

    text = text_of(admin_client.get(page("batchjob", job)))
    result = admin_client.get(page("batchjob", job, "result"))

    rows = list(csv.DictReader(io.StringIO(result.getvalue().decode())))
    assert len(rows) == 60
    assert "shop-scored.csv" in result.headers["Content-Disposition"]
    assert {int(row["request_id"]) for row in rows} == set(MLRequest.objects.values_list("pk", flat=True))
    assert "Succeeded 60 of 60 rows" in text
    assert "The files of this job are kept until" in text
    assert "Download the errors" not in text
    reached = 0
    for decile in range(10):
        low, high = decile / 10, (decile + 1) / 10
        count = sum(low <= float(row["probability"]) < high or float(row["probability"]) == high == 1 for row in rows)
        reached += count
        assert f"{low:.1f} to {high:.1f} {count} {count / 60:.1%} {reached} ({reached / 60:.1%})" in text


def test_a_job_that_failed_says_why_and_lists_the_first_errors(submit, admin_client, customers):
    submit(damaged(customers, rows=25))
    work()
    job = BatchJob.objects.get()

    text = text_of(admin_client.get(page("batchjob", job)))
    errors = admin_client.get(page("batchjob", job, "errors"))

    assert "The job failed. 25 of 60 rows cannot be scored; nobody was scored or logged." in text
    assert "Failed Every row had been looked at when it ended, 25 refused." in text
    assert text.count(" Orders many ") == 20
    assert "The first 20 are shown; the download has them all." in text
    assert "Download the result" not in text
    assert len(errors.getvalue().decode().splitlines()) == 26


def test_a_job_that_skips_shows_both(submit, admin_client, customers):
    submit(damaged(customers), on_error="skip")
    work()

    text = text_of(admin_client.get(page("batchjob", BatchJob.objects.get())))

    assert "Customers scored 59 Rows refused 1 Rows in the file 60" in text
    assert "Download the result" in text
    assert "Download the errors" in text
    assert " 61 Orders many " in text


def test_what_the_file_holds_is_text_on_the_page(submit, admin_client, customers):
    submit(damaged(customers).replace(b"many", b"<script>alert(1)</script>" + b"y" * 300), on_error="skip")
    work()

    html = admin_client.get(page("batchjob", BatchJob.objects.get())).content.decode()

    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "y" * 101 not in html


def test_files_that_are_gone_are_said_to_be(submit, admin_client, customers):
    submit(customers)
    work()
    batch_jobs.clean(timezone.now() + timedelta(days=8))
    job = BatchJob.objects.get()

    text = text_of(admin_client.get(page("batchjob", job)))
    response = admin_client.get(page("batchjob", job, "result"))

    assert "The files of this job are gone: they are kept for 7 days." in text
    assert "Download" not in text
    assert "0.9 to 1.0" in text
    assert response.url == page("batchjob", job)
    assert said_by(response) == [f"The files of job {job.pk} are gone: they are kept for 7 days."]


def test_a_result_that_is_not_there_yet_is_explained(submit, admin_client, customers):
    submit(customers)
    job = BatchJob.objects.get()

    response = admin_client.get(page("batchjob", job, "result"))

    assert said_by(response) == [f"Job {job.pk} is queued; its result is there when it has succeeded."]


def test_the_progress_tells_the_step_the_pace_and_the_time_left(submit, admin_client, customers):
    submit(customers)
    job = BatchJob.objects.get()
    url = page("batchjob", job, "progress")
    now = timezone.now()

    def told(**fields: object) -> dict:
        BatchJob.objects.filter(pk=job.pk).update(**fields)
        return admin_client.get(url).json()

    checking = told(state="checking", started_at=now - timedelta(seconds=10), bytes_read=job.file_bytes // 2)
    scoring = told(
        **{"state": "scoring", "checked_at": now - timedelta(seconds=10), "rows_total": 40_000},
        **{"rows_read": 10_000, "rows_scored": 9_990, "rows_refused": 20},
    )
    interrupted = told(problem="It was interrupted: disk full.")
    work()
    done = told(state="succeeded", finished_at=now)

    assert (checking["state"], checking["is_finished"]) == ("Checking", False)
    assert checking["percent"] == pytest.approx(50, abs=1)
    assert checking["sentence"] == "Checking every row before any is scored, about 10 s left."
    assert scoring["percent"] == 25
    assert scoring["sentence"].startswith("10,000 of 40,000 rows, ")
    assert "rows per second, 20 refused, about 30 s left." in scoring["sentence"]
    assert interrupted["sentence"].endswith("left. It was interrupted: disk full.")
    assert done["is_finished"]


def test_a_job_that_waits_says_how_many_are_before_it(submit, admin_client, customers):
    for _ in range(3):
        submit(customers)

    last = BatchJob.objects.order_by("pk").last()

    sentence = admin_client.get(page("batchjob", last, "progress")).json()["sentence"]
    assert sentence == "Waiting for a worker; 2 jobs are before it."


def test_the_list_shows_the_newest_first_and_how_each_went(submit, admin_client, customers):
    submit(damaged(customers), name="bad.csv")
    submit(customers, name="good.csv")
    work()
    submit(customers, name="new.csv")

    rows = rows_of(admin_client.get(page("batchjob")))

    assert [row["file_name"] for row in rows] == ["new.csv", "good.csv", "bad.csv"]
    assert [row["status"] for row in rows] == ["Queued", "Succeeded", "Failed"]
    assert [row["scored"] for row in rows] == ["0", "60", "0"]
    assert [row["refused"] for row in rows] == ["0", "0", "1"]
    assert {row["created_by"] for row in rows} == {"admin"}
    assert {row["parent_mlalgorithm"] for row in rows} == {"random forest 1.0.0"}
    assert len(rows_of(admin_client.get(page("batchjob"), {"state__exact": "failed"}))) == 1


def test_a_job_is_cancelled_and_one_that_has_ended_is_not(submit, admin_client, customers):
    submit(customers)
    job = BatchJob.objects.get()

    assert "Cancel" in text_of(admin_client.get(page("batchjob", job)))
    assert said_by(confirm(admin_client, "batchjob", job, "cancel")) == [f"Batch job {job.pk} is cancelled."]
    job.refresh_from_db()
    assert job.state == "cancelled"
    assert page("batchjob", job, "cancel") not in admin_client.get(page("batchjob", job)).content.decode()

    submit(customers)
    work()
    job = BatchJob.objects.latest("pk")
    assert said_by(confirm(admin_client, "batchjob", job, "cancel"))[-1] == (
        f"Job {job.pk} has succeeded, and cannot be cancelled any more."
    )


# --- For whom ---------------------------------------------------------------------------------------------
def test_who_may_only_view_neither_submits_nor_cancels(staff, submit, customers):
    submit(customers)
    job = BatchJob.objects.get()
    client = staff("view_batchjob")

    assert client.get(page("batchjob")).status_code == 200
    assert client.get(page("batchjob", job, "progress")).status_code == 200
    assert "Cancel" not in text_of(client.get(page("batchjob", job)))
    assert client.post(page("batchjob", job, "cancel"), {"_form_submitted": "True"}).status_code == 403
    assert client.get(ADD).status_code == 403
    assert submit(customers, client=client).status_code == 403
    assert client.post(COLUMNS, HEADER, content_type="application/octet-stream").status_code == 403
    job.refresh_from_db()
    assert (job.state, BatchJob.objects.count()) == ("queued", 1)


def test_who_may_add_submits_and_cancels_what_is_their_own(staff, submit, customers):
    submit(customers)
    client = staff("add_batchjob", "view_batchjob")
    submit(customers, client=client)
    theirs = BatchJob.objects.get(created_by="sam")
    other = BatchJob.objects.get(created_by="admin")

    assert client.post(page("batchjob", other, "cancel"), {"_form_submitted": "True"}).status_code == 403
    confirm(client, "batchjob", theirs, "cancel")

    assert set(BatchJob.objects.values_list("created_by", "state")) == {("sam", "cancelled"), ("admin", "queued")}


def test_who_may_change_cancels_any_job(staff, submit, customers):
    submit(customers)

    confirm(staff("view_batchjob", "change_batchjob"), "batchjob", BatchJob.objects.get(), "cancel")

    assert BatchJob.objects.get().state == "cancelled"


def test_who_may_add_and_not_view_is_told_that_it_went_well(staff, submit, customers):
    response = submit(customers, client=staff("add_batchjob"))

    assert response.url == "/admin/"
    assert said_by(response) == [f"Batch job {BatchJob.objects.get().pk} will score shop.csv."]


def test_without_the_permission_nothing_can_be_seen(staff, submit, customers):
    submit(customers)
    job = BatchJob.objects.get()
    client = staff("view_mlrequest", "add_batchjob")

    for url in (page("batchjob", job), *(page("batchjob", job, name) for name in ("progress", "result", "errors"))):
        assert client.get(url).status_code == 403


def test_nothing_of_a_strangers_file_is_kept_or_read(client, submit, customers, tmp_path):
    response = submit(customers, client=client)

    assert response.url.startswith("/admin/login/")
    assert not (tmp_path / "batches").exists()


def test_another_sites_form_submits_nothing(customers, admin_user, algorithms):
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(admin_user)
    file = SimpleUploadedFile("shop.csv", customers)
    fields = {"parent_mlalgorithm": algorithms["random_forest"].pk, "on_error": "fail", "log": "all"}

    assert strict.post(ADD, {"file": file, **fields}).status_code == 403
    assert strict.post(COLUMNS, HEADER, content_type="application/octet-stream").status_code == 403
    strict.get(ADD)
    token = strict.cookies["csrftoken"].value
    file.seek(0)
    assert strict.post(ADD, {"file": file, **fields, "csrfmiddlewaretoken": token}).status_code == 302


def test_a_permission_that_is_granted_opens_the_page(staff):
    client = staff()
    assert client.get(ADD).status_code == 403

    User.objects.get(username="sam").user_permissions.add(Permission.objects.get(codename="add_batchjob"))

    assert client.get(ADD).status_code == 200
