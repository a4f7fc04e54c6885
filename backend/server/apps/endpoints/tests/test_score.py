"""manage.py score: a CSV of customers into another CSV, in memory that does not grow with the file."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import CommandError, call_command
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem

from apps.endpoints import batch, csv_file, storage
from apps.endpoints.models import BatchJob, MLRequest
from apps.ml.registry import registry
from conftest import make_customers
from tests import processes

BATCH = "/api/v1/batch-predict"


@pytest.fixture
def customers(tmp_path: Path) -> Path:
    path = tmp_path / "customers.csv"
    make_customers(500, seed=4).to_csv(path, index=False)
    return path


def score(input: Path | str, output: Path, *options: str) -> str:
    said = io.StringIO()
    call_command("score", str(input), str(output), "--log=none", *options, stdout=said, stderr=io.StringIO())
    return said.getvalue()


def refused(input: Path | str, output: Path, *options: str) -> str:
    """What is said; whatever stood in the output's folder still does, and nothing more."""
    before = {path: path.read_bytes() for path in output.parent.iterdir() if path.is_file()}
    with pytest.raises(CommandError) as error:
        score(input, output, *options)
    assert {path: path.read_bytes() for path in output.parent.iterdir() if path.is_file()} == before
    return str(error.value)


def uploaded(api, path: Path, **fields: str) -> bytes:
    file = SimpleUploadedFile("customers.csv", path.read_bytes())
    response = api.post(BATCH, {"file": file, "format": "csv", **fields}, format="multipart")
    assert response.status_code == 201, response.content
    return response.content


class TestTheResult:
    def test_is_byte_for_byte_what_an_upload_is_answered_with_and_nothing_is_recorded(
        self, api, algorithms, customers, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(batch, "CHUNK_ROWS", 7)

        said = score(customers, tmp_path / "scored.csv")

        assert said.startswith(f"500 customers were scored by {algorithms['random_forest']} into ")
        assert said.endswith("nothing was recorded.\n")
        assert not MLRequest.objects.exists()
        assert (tmp_path / "scored.csv").read_bytes() == uploaded(api, customers)

    def test_comes_from_the_algorithm_named(self, api, algorithms, customers, tmp_path):
        for option, fields in [
            ("--status=staging", {"status": "staging"}),
            ("--algorithm=decision_tree", {"algorithm": "decision_tree"}),
        ]:
            score(customers, tmp_path / "scored.csv", option)

            assert (tmp_path / "scored.csv").read_bytes() == uploaded(api, customers, **fields)

    def test_comes_from_the_endpoint_and_version_named(self, api, algorithms, customers, tmp_path):
        registry.register_run("loyalty")

        score(customers, tmp_path / "scored.csv", "--endpoint=loyalty", "--version=1.0.0")

        assert (tmp_path / "scored.csv").read_bytes() == uploaded(api, customers, endpoint="loyalty")

    def test_and_the_customers_may_be_packed_by_gzip(self, api, algorithms, customers, tmp_path):
        packed = tmp_path / "customers.csv.gz"
        packed.write_bytes(gzip.compress(customers.read_bytes()))

        score(packed, tmp_path / "scored.csv.gz")

        assert gzip.decompress((tmp_path / "scored.csv.gz").read_bytes()) == uploaded(api, customers)

    def test_replaces_an_earlier_one_and_may_be_scored_again(self, algorithms, customers, tmp_path):
        once, twice = tmp_path / "once.csv", tmp_path / "twice.csv"
        once.write_text("what was here before")

        score(customers, once)
        score(once, twice)

        assert twice.read_bytes() == once.read_bytes()

    def test_keeps_the_lines_as_they_are_and_so_does_the_answer_to_an_upload(self, api, algorithms, tmp_path):
        lines = [
            '"C1","basic",2,5.0, ,True',
            'C2,premium , 3,7e1,"NA",no',
            '"C\n3",family,1,9,,yes',
            "=C4,family,01,9.50,1.25,FALSE",
        ]
        header = "CustomerId,Plan,Orders,RecencyDays,MeanGapDays,Newsletter"
        path = tmp_path / "customers.csv"
        path.write_bytes("\r\n".join([header, *lines]).encode())

        score(path, tmp_path / "scored.csv")

        scored = (tmp_path / "scored.csv").read_bytes()
        assert scored == uploaded(api, path)
        rows = scored.decode().removeprefix(f"{header},probability,label\r\n").removesuffix("\r\n").split("\r\n")
        assert [row.rsplit(",", 2)[0] for row in rows] == lines

    def test_is_the_same_however_many_threads_work(self, algorithms, customers, tmp_path, monkeypatch):
        monkeypatch.setattr(batch, "CHUNK_ROWS", 7)
        monkeypatch.setattr(batch.os, "cpu_count", lambda: 8)
        results = set()
        for threads in (1, 2, 4):
            monkeypatch.setattr(batch, "MOST_THREADS", threads)
            score(customers, tmp_path / "scored.csv")
            results.add((tmp_path / "scored.csv").read_bytes())

        assert len(results) == 1


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device. ", 1),
        (KeyboardInterrupt(), "Interrupted. ", 130),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_a_result_that_cannot_be_written_is_told_with_the_job_that_holds_it(
    algorithms, customers, tmp_path, error, said, code
):
    scored = tmp_path / "full.csv"
    whole = storage.replacing

    @contextmanager
    def that_fails(files, path):
        with whole(files, path) as file:
            yield Failing(error) if path.endswith("full.csv") else file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "replacing", that_fails)
        with pytest.raises(CommandError) as told:
            call_command("score", str(customers), str(scored), stdout=io.StringIO(), stderr=io.StringIO())

    job = BatchJob.objects.get()
    assert str(told.value).startswith(said)
    assert told.value.returncode == code
    assert f"job {job.pk} is done: fetch /api/v1/batch-jobs/{job.pk}/result instead" in str(told.value)
    assert MLRequest.objects.count() == 500
    assert not scored.exists()


class Failing:
    def __init__(self, error: BaseException):
        self.error = error

    def write(self, block: bytes) -> int:
        raise self.error


class TestWhatIsRefused:
    def test_bad_lines_of_every_part_of_the_file_in_their_order(self, algorithms, customers, tmp_path, monkeypatch):
        monkeypatch.setattr(batch, "CHUNK_ROWS", 50)
        lines = customers.read_text().splitlines()
        header = lines[0].split(",")
        for number in (3, 120, 499):
            cells = lines[number - 1].split(",")
            cells[header.index("RecencyDays")] = "soon"
            lines[number - 1] = ",".join(cells)
        lines[302 - 1] += ",more"
        customers.write_text("\n".join(lines))

        said = refused(customers, tmp_path / "scored.csv").splitlines()

        assert [line.split(":")[0] for line in said] == [
            "line 3",
            "line 120",
            "line 302",
            "line 499",
            "Nothing was written.",
        ]
        assert said[0] == "line 3: RecencyDays expects a number such as 12.5, got 'soon'"
        assert said[2] == f"line 302: has {len(header) + 1} fields where the header has {len(header)}"

    def test_of_a_file_that_is_wrong_throughout_the_first_lines_are_told(self, algorithms, tmp_path):
        table = make_customers(3_000, seed=4).astype({"RecencyDays": object})
        table["RecencyDays"] = "soon"
        table.to_csv(tmp_path / "bad.csv", index=False)

        said = refused(tmp_path / "bad.csv", tmp_path / "scored.csv").splitlines()

        assert [line.split(":")[0] for line in said[:20]] == [f"line {number}" for number in range(2, 22)]
        assert "more" in said[20]

    def test_the_result_of_an_earlier_run_is_kept(self, algorithms, customers, tmp_path):
        (tmp_path / "scored.csv").write_text("of yesterday")
        customers.write_text("Plan,Orders\nbasic,1\n")

        assert "The file lacks the columns" in refused(customers, tmp_path / "scored.csv")

    def test_files_that_cannot_be_read_or_written(self, algorithms, customers, tmp_path):
        assert "There is no file" in refused(tmp_path / "none.csv", tmp_path / "scored.csv")
        assert "name another file" in refused(customers, customers)
        (tmp_path / "folder").mkdir()
        assert "name another" in refused(customers, tmp_path / "folder")
        with pytest.raises(CommandError, match=r"There is no folder .*nowhere"):
            score(customers, tmp_path / "nowhere" / "scored.csv")

    def test_storage_that_cannot_be_read(self, algorithms, tmp_path):
        for url, why in [
            ("ftp://127.0.0.1:9/customers.csv", "cannot be read: Connection refused"),
            ("nonsense://customers.csv", "cannot be read: Protocol not known: nonsense"),
            ("zip://none.csv::nowhere.zip", "There is no file"),
        ]:
            said = refused(url, tmp_path / "scored.csv")
            assert url in said and why in said

    def test_a_file_of_unknown_size(self, algorithms, customers, tmp_path):
        class Streaming(LocalFileSystem):
            """As HTTP may, it does not say how large a file is."""

            protocol = "streaming"

            def info(self, path, **kwargs):
                return {**super().info(path, **kwargs), "size": None}

        register_implementation("streaming", Streaming, clobber=True)

        assert "does not say how large it is; fetch it first" in refused(f"streaming://{customers}", tmp_path / "s.csv")

    def test_a_gzip_that_is_none_or_broke_off(self, algorithms, customers, tmp_path):
        packed = tmp_path / "customers.csv.gz"
        packed.write_bytes(b"\x1f\x8b" + customers.read_bytes())
        assert "damaged gzip" in refused(packed, tmp_path / "scored.csv")
        packed.write_bytes(gzip.compress(customers.read_bytes())[:-200])
        assert "damaged gzip" in refused(packed, tmp_path / "scored.csv")

    def test_an_algorithm_or_endpoint_that_is_not_there(self, algorithms, customers, tmp_path):
        assert "name one of: status=production" in refused(customers, tmp_path / "s.csv", "--version=9.9.9")
        assert "There is no endpoint 'churn'" in refused(customers, tmp_path / "s.csv", "--endpoint=churn")

    def test_before_any_training_it_says_how_to_train(self, db, customers, tmp_path):
        assert "python research/train.py" in refused(customers, tmp_path / "scored.csv")

    def test_a_line_that_memory_should_not_hold(self, algorithms, tmp_path, monkeypatch):
        monkeypatch.setattr(csv_file, "LONGEST_LINE", 50_000)
        header = b"Plan,Orders,RecencyDays,MeanGapDays,Newsletter\n"
        (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(header + b'basic,"' + b"x" * 10_000_000))

        assert "line 2: is longer than 50,000 characters" in refused(tmp_path / "bomb.csv.gz", tmp_path / "scored.csv")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_behind(tmp_path, trained, number):
    env = processes.environment(f"sqlite:///{tmp_path / 'db.sqlite3'}", trained, DEBUG="1")
    processes.manage("migrate", env=env)
    processes.manage("register_algorithms", env=env)
    folder = tmp_path / "results"
    folder.mkdir()
    os.mkfifo(tmp_path / "customers.csv")
    command = [
        sys.executable,
        "manage.py",
        "score",
        str(tmp_path / "customers.csv"),
        str(folder / "s.csv"),
        "--log=none",
    ]
    with (
        subprocess.Popen(command, cwd=processes.BACKEND, env=env, stderr=subprocess.PIPE, text=True) as running,
        (tmp_path / "customers.csv").open("w") as customers,
    ):
        customers.write(make_customers(200, seed=4).to_csv(index=False))
        customers.flush()
        deadline = time.monotonic() + 60
        while not list(folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(number)
        said = running.stderr.read()

    assert said.splitlines()[-1] == "CommandError: Interrupted; nothing was written."
    assert "Traceback" not in said
    assert running.returncode == 128 + number
    assert not list(folder.iterdir())


PEAK = """
import resource, runpy, sys
sys.argv = ["manage.py", *sys.argv[1:]]
try:
    runpy.run_path("manage.py", run_name="__main__")
finally:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_file(tmp_path, trained):
    env = processes.environment(f"sqlite:///{tmp_path / 'db.sqlite3'}", trained, DEBUG="1")
    processes.manage("migrate", env=env)
    processes.manage("register_algorithms", env=env)
    peaks = []
    for rows in (20_000, 120_000):
        path = tmp_path / f"{rows}.csv"
        make_customers(rows, seed=1).to_csv(path, index=False)
        command = [sys.executable, "-c", PEAK, "score", str(path), str(tmp_path / "out.csv"), "--log", "none"]
        done = subprocess.run(command, cwd=processes.BACKEND, env=env, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split("PEAK")[1]))
        with (tmp_path / "out.csv").open(newline="") as scored:
            assert sum(1 for _ in csv.reader(scored)) == rows + 1

    assert peaks[1] - peaks[0] < 25, peaks
