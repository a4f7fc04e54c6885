"""A real Dask cluster, started as the README says: what it scores is what this process scores, whatever dies."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from django.core.files.base import ContentFile
from django.core.management import CommandError, call_command
from django.utils import timezone

import train
from apps.endpoints import batch_jobs, cluster
from apps.endpoints.csv_file import BatchError, Chunk, CsvFile, Layout
from apps.endpoints.models import BatchJob, MLRequest
from apps.endpoints.prediction import Wanted, classifier_of
from apps.ml.artifacts import ArtifactError, open_run
from conftest import make_customers
from tests.postgresql import free_port
from tests.processes import REPOSITORY, outside_world
from tests.test_readme import tagged

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("cluster")]

ROWS = 20_000
CUSTOMERS = make_customers(ROWS, seed=5).to_csv(index=False).encode()
NOWHERE = "tcp://127.0.0.1:9"


class Cluster:
    """A scheduler, and hosts of one worker each."""

    def __init__(self, folder: Path):
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.log = folder / "cluster.log"
        self._scheduler = self._start("cluster-scheduler")
        self.hosts: list[subprocess.Popen] = []

    def _start(self, tag: str) -> subprocess.Popen:
        command = tagged(tag).text.replace("tcp://10.0.0.5:8786", self.address)
        command = command.replace("10.0.0.5 --port 8786", self.address.removeprefix("tcp://").replace(":", " --port "))
        command = command.replace("--nworkers auto", "--nworkers 1 --nthreads 1")
        with self.log.open("ab") as output:
            return subprocess.Popen(
                ["bash", "-c", command],
                cwd=REPOSITORY,
                env={**outside_world(), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def workers(self) -> dict[str, int]:
        """The workers that the scheduler knows, and the process of each."""
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            return client.run(os.getpid)

    def have_hosts(self, number: int) -> None:
        """Start as many as are wanting, and wait for them."""
        self.hosts = [host for host in self.hosts if host.poll() is None]
        self.hosts += [self._start("cluster-worker") for _ in range(number - len(self.hosts))]
        deadline = time.monotonic() + 90
        while len(self.workers()) < number:
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.2)

    def kill_a_host(self) -> None:
        kill(self.hosts.pop())

    def stop(self) -> None:
        for process in [*self.hosts, self._scheduler]:
            kill(process)


def kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.have_hosts(2)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def two_hosts(started: Cluster) -> Cluster:
    started.have_hosts(2)
    return started


@pytest.fixture(autouse=True)
def _files_of_its_own(settings, tmp_path: Path, algorithms):
    settings.BATCH_DIR = tmp_path / "batches"


def submit(content: bytes = CUSTOMERS, **options: str) -> BatchJob:
    wanted = Wanted(None, None, None, default_status="production")
    sources = [batch_jobs.uploaded(ContentFile(content, "c.csv"))]
    return batch_jobs.submit(sources, "classifier", wanted, by="ana", now=timezone.now(), claimed=True, **options)[0]


def run(job: BatchJob, between_parts: Callable[[], bool] = lambda: False) -> BatchJob:
    batch_jobs.run(job, between_parts)
    job.refresh_from_db()
    return job


def result(job: BatchJob) -> bytes:
    assert job.state == BatchJob.State.SUCCEEDED, job.problem
    return b"".join(batch_jobs.result(job)[1])


def logged(job: BatchJob) -> list[tuple]:
    """What the rows of a job say, in its order."""
    fields = [field.attname for field in MLRequest._meta.concrete_fields]
    differing = {"id", "created_at", "latency_ms"}
    ids = [int(line.split(b",")[-3]) for line in result(job).splitlines()[1:]]
    rows = MLRequest.objects.in_bulk(ids) if len(ids) < 500 else {row.pk: row for row in MLRequest.objects.all()}
    return [[getattr(rows[pk], name) for name in fields if name not in differing] for pk in ids]


def without_ids(content: bytes) -> bytes:
    return re.sub(rb",[0-9]+(,[^,]+,[01]\r\n)", rb",\1", content)


@pytest.fixture
def alone(settings) -> BatchJob:
    """A job that no cluster had a hand in."""
    assert not settings.DASK_SCHEDULER
    return run(submit())


def test_results_and_logged_requests_are_those_of_this_process_alone(two_hosts, alone, settings):
    settings.DASK_SCHEDULER = two_hosts.address

    together = run(submit())

    assert without_ids(result(together)) == without_ids(result(alone)) != result(alone)
    assert logged(together) == logged(alone)
    assert MLRequest.objects.count() == 2 * ROWS


def test_rows_that_cannot_be_scored_are_left_out_alike(two_hosts, settings):
    lines = CUSTOMERS.splitlines()[:300]
    lines[100] = b"C00100,basic,many,2,3,True,1"
    broken = b"\n".join([*lines[:200], b'"C""1",unheard of,1,2,,false,0', *lines[200:]])
    settings.BATCH_DIR = f"file://{settings.BATCH_DIR}"
    apart = run(submit(broken, on_error="skip", log="none"))
    settings.DASK_SCHEDULER = two_hosts.address

    together = run(submit(broken, on_error="skip", log="none"))

    assert result(together) == result(apart)
    assert (together.rows_refused, together.rows_scored) == (1, 299)


def test_a_worker_that_is_killed_in_the_middle_costs_nobody_an_answer_or_a_second_one(two_hosts, alone, settings):
    settings.DASK_SCHEDULER = two_hosts.address
    job = submit()
    killed = []

    def kill_one() -> bool:
        if job.rows_read and not killed:
            killed.append(two_hosts.kill_a_host())
        return False

    disturbed = run(job, kill_one)

    assert killed
    assert without_ids(result(disturbed)) == without_ids(result(alone))
    assert logged(disturbed) == logged(alone)
    assert MLRequest.objects.count() == 2 * ROWS


def test_a_job_that_is_stopped_or_cancelled_leaves_the_cluster_nothing_to_do(two_hosts, settings):
    settings.DASK_SCHEDULER = two_hosts.address
    job = submit()

    stopped = run(job, lambda: job.rows_read > 0)

    assert (stopped.state, stopped.lease_until) == (BatchJob.State.SCORING, None)
    assert 0 < stopped.rows_read < ROWS
    cancelled = submit()
    run(cancelled, lambda: bool(cancelled.rows_read and batch_jobs.cancel(cancelled, now=timezone.now())))
    assert cancelled.state == BatchJob.State.CANCELLED
    assert run(batch_jobs.claim()).rows_scored == ROWS


def test_a_scheduler_that_does_not_answer_is_waited_for(two_hosts, settings, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1)
    settings.DASK_SCHEDULER = NOWHERE

    waiting = run(submit())

    assert waiting.state == BatchJob.State.SCORING
    assert waiting.problem.startswith(f"The Dask scheduler at {NOWHERE} does not answer (")
    assert waiting.fruitless_turns == 0
    BatchJob.objects.update(lease_until=None)
    settings.DASK_SCHEDULER = two_hosts.address
    assert run(batch_jobs.claim()).rows_scored == ROWS


def test_score_says_that_the_scheduler_does_not_answer(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1)
    settings.DASK_SCHEDULER = NOWHERE
    (tmp_path / "c.csv").write_bytes(CUSTOMERS)

    with pytest.raises(CommandError, match=rf"The Dask scheduler at {NOWHERE} does not answer \(.*\)\. Job \d+ is"):
        call_command("score", tmp_path / "c.csv", tmp_path / "scored.csv")

    assert not (tmp_path / "scored.csv").exists()


def test_a_scheduler_that_is_killed_while_rows_are_scored_is_noticed(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 2)
    short_lived = Cluster(tmp_path)
    try:
        short_lived.have_hosts(1)
        settings.DASK_SCHEDULER = short_lived.address
        job = submit()
        waiting = run(job, lambda: bool(job.rows_read and short_lived.stop()))
    finally:
        short_lived.stop()

    assert waiting.state == BatchJob.State.SCORING
    assert waiting.problem.startswith(f"The Dask scheduler at {short_lived.address} does not answer (")
    assert "\n" not in waiting.problem


def test_a_cluster_without_workers_is_waited_for_until_the_worker_is_told_to_stop(tmp_path, settings, caplog):
    empty = Cluster(tmp_path)
    try:
        settings.DASK_SCHEDULER = empty.address
        waited = run(submit(), lambda: "has no workers; waiting for some" in caplog.text)
    finally:
        empty.stop()

    assert (waited.state, waited.rows_read, waited.lease_until) == (BatchJob.State.SCORING, 0, None)


def test_storage_that_the_workers_do_not_share_fails_the_job_with_a_sentence(two_hosts, algorithms):
    chunks = CsvFile(io.BytesIO(CUSTOMERS)).chunks(100)
    classifier = classifier_of(algorithms["random_forest"])

    with (
        pytest.raises(
            BatchError, match=r"There is no /here/artifacts/[0-9a-f]{64}: BATCH_DIR must be the same storage"
        ),
        closing(cluster.scored(two_hosts.address, classifier, "memory://here", chunks, lambda: None)) as scored,
    ):
        next(scored)


def test_a_part_that_kills_its_workers_fails_the_job_with_a_sentence(two_hosts, algorithms, tmp_path):
    classifier = classifier_of(algorithms["random_forest"])
    poison = Poison(Layout([], ",", ""), [], [], is_plain=True)

    with (
        pytest.raises(BatchError, match="A part of the file ended several workers of the Dask cluster"),
        closing(cluster.scored(two_hosts.address, classifier, str(tmp_path), [poison], lambda: None)) as scored,
    ):
        next(scored)


class Poison(Chunk):
    """Ends the process in which it is unpickled."""

    def __reduce__(self):
        return os._exit, (1,)


class TestTraining:
    @pytest.fixture
    def parts(self, tmp_path) -> train.Split:
        make_customers(4_000).to_csv(tmp_path / "customers.csv", index=False)
        return train.split(train.load_table(tmp_path / "customers.csv"))

    def test_gives_the_same_models(self, two_hosts, parts):
        there, here = train.fit(parts, dask=two_hosts.address), train.fit(parts)

        for key, fitted in there.items():
            assert fitted.model.get_params() == here[key].model.get_params()
            assert fitted.probability(parts.test_matrix).tolist() == here[key].probability(parts.test_matrix).tolist()

    def test_by_the_command_writes_a_run_of_the_same_scores(self, two_hosts, customers_csv, trained, tmp_path):
        told = ["--data", str(customers_csv), "--artifacts-dir", str(tmp_path), "--dask", two_hosts.address]

        assert train.main(told) == 0

        mine, theirs = (open_run(folder, "1.0.0").manifest for folder in (tmp_path, trained))
        assert mine["metrics"] == theirs["metrics"]
        assert mine["samples"] == theirs["samples"]

    def test_without_a_cluster_is_refused_with_a_sentence(self, parts, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "CLUSTER_SECONDS", 1)
        with pytest.raises(train.ClusterError, match=f"The Dask scheduler at {NOWHERE} does not answer"):
            train.fit(parts, dask=NOWHERE)

        empty = Cluster(tmp_path)
        monkeypatch.setattr(train, "CLUSTER_SECONDS", 30)
        try:
            with pytest.raises(train.ClusterError, match=f"The Dask cluster at {empty.address} has no workers"):
                train.fit(parts, dask=empty.address)
        finally:
            empty.stop()

    def test_without_dask_says_how_to_install_it(self, customers_csv, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "distributed", None)  # as if it were not installed

        assert train.main(["--data", str(customers_csv), "--artifacts-dir", str(tmp_path), "--dask", NOWHERE]) == 2

        assert capsys.readouterr().err == "--dask needs Dask: pip install -r requirements-dask.txt\n"


class TestAModelInStorage:
    @pytest.fixture(params=["folder", "file://{}", "memory://store"])
    def storage(self, request, tmp_path) -> str:
        return str(tmp_path / "store") if request.param == "folder" else request.param.format(tmp_path / "store")

    def test_is_published_once_and_loaded_by_its_hashes(self, storage, algorithms):
        classifier = classifier_of(algorithms["extra_trees"])

        model = cluster.publish(classifier, storage)

        assert cluster.publish(classifier, storage) == model
        assert model.artifact == algorithms["extra_trees"].artifact_sha256
        loaded = cluster.load(model)
        assert (type(loaded), loaded.version) == (type(classifier), classifier.version)
        sample = classifier.run.manifest["samples"][0]["row"]
        assert loaded.compute_prediction(sample) == classifier.compute_prediction(sample)

    def test_is_not_unpickled_when_it_is_not_what_its_name_says_and_repaired_when_published_again(
        self, tmp_path, algorithms
    ):
        classifier = classifier_of(algorithms["decision_tree"])
        model = cluster.publish(classifier, str(tmp_path))
        (tmp_path / cluster.ARTIFACTS / model.artifact).write_bytes(b"half")

        with pytest.raises(ArtifactError, match="is not what its name says"):
            cluster.load(model)

        cluster.publish(classifier, str(tmp_path))
        cluster.load(model)
        assert sorted(file.name for file in (tmp_path / cluster.ARTIFACTS).iterdir()) == sorted(
            [model.artifact, model.manifest]
        )

    def test_of_another_scikit_learn_is_refused_where_it_is_loaded(self, artifacts_dir, tmp_path, algorithms):
        classifier = classifier_of(algorithms["random_forest"])
        manifest = artifacts_dir / "1.0.0/manifest.json"
        trained_with = classifier.run.manifest["libraries"]["scikit-learn"]
        manifest.write_text(
            manifest.read_text().replace(f'"scikit-learn": "{trained_with}"', '"scikit-learn": "0.24.2"')
        )
        elsewhere = type(classifier)("1.0.0", artifacts_dir)

        with pytest.raises(ArtifactError, match=r"was made with scikit-learn 0\.24\.2"):
            cluster.load(cluster.publish(elsewhere, str(tmp_path)))
