"""Files of any size, scored by workers: submitted, taken by one worker at a time, and done part by part.

A part is one transaction: its logged requests and the row that says it is done are committed together, after its
answers are in a file. So whatever dies, a job goes on after its last part, and nobody is scored twice.
"""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.db import DatabaseError, IntegrityError, InterfaceError, connection, transaction
from django.db.models import DateTimeField, ExpressionWrapper, Q
from django.db.models.functions import Now
from django.utils import timezone

from apps.endpoints import cluster, job_files, parquet_file, prediction, tables
from apps.endpoints.batch import CHUNK_ROWS, AnsweredCsv, in_order, made_ahead
from apps.endpoints.csv_file import BadLine, BadRows, BatchError, Chunk, CsvFile
from apps.endpoints.journal import NewRequests, insert_in_bulk, prepared_in_bulk
from apps.endpoints.json_text import dumps
from apps.endpoints.models import BatchJob, BatchPart, MLAlgorithm
from apps.endpoints.prediction import PredictionError, Wanted
from apps.endpoints.scoring import Columns, Scored, Scorer, columns_of
from apps.endpoints.storage import BLOCK, Source
from apps.endpoints.tables import Table
from apps.endpoints.turns import in_turn

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

# A chunk has so many rows, and fewer of a wide table, since its characters are limited. On SQLite, where other writers
# wait while a part is written, a part is one chunk; elsewhere several, until they have so many rows.
PART_ROWS = 5_000
MOST_CHUNKS_OF_A_PART = 4
CHECKING_THREADS = 2  # beside the one that reads
BINS = 20
MOST_FRUITLESS_TURNS = 5
# After something that may pass, such as a full disk; longer each time.
RETRY_SECONDS = 10
# Nobody writes to an upload any more, or will submit it, after so many seconds.
FORGOTTEN = 24 * 3600
# How much of a file is enough to know its columns, and how much of it to unpack.
BEGINNING = 100_000
MOST_UNPACKED = 2_000_000
# How much of the end of a Parquet file holds its footer, which describes all its row groups.
LONGEST_FOOTER = 1_000_000


class JobError(Exception):
    """What cannot be done with a job; the message says why."""


class KeyReused(JobError):
    """An Idempotency-Key came again with something else."""


class NotFinished(JobError):
    """There is no result yet, or there will be none."""


class Gone(JobError):
    """The files of a job are kept for a time only."""


class Ended(JobError):
    """A job that has ended cannot be cancelled."""


class _Lost(Exception):
    """The job is this worker's no longer: it was cancelled, or another one has taken it over."""


class _Stopped(Exception):
    """The worker has been told to stop."""


# --- Submitting -------------------------------------------------------------------------------------------


def preview(beginning: bytes, algorithm: MLAlgorithm) -> Columns:
    """What an algorithm would read of a file, by the file's first BEGINNING bytes, or all if it has no more.

    Raises BatchError, BadRows, PredictionError.
    """
    schema = prediction.classifier_of(algorithm).schema
    table = tables.beginning_of(beginning, MOST_UNPACKED)
    is_cut = len(beginning) >= BEGINNING or len(table) >= MOST_UNPACKED
    if is_cut and b"\n" not in table and b"\r" not in table:
        raise BatchError("The first line of the file is too long to look at; it must name the columns.")
    return columns_of(CsvFile(io.BytesIO(table)).layout.header, schema)


def preview_parquet(end: bytes, algorithm: MLAlgorithm) -> Columns | None:
    """The same of a Parquet file, whose columns are named at its end; None if these bytes do not reach so far.

    Raises BatchError, PredictionError.
    """
    if not parquet_file.holds_footer(end):
        return None
    return columns_of(parquet_file.names_by_end(end), prediction.classifier_of(algorithm).schema)


def uploaded(file: UploadedFile) -> Source:
    """What a client has sent, as what a job is made of. It stays open."""

    @contextmanager
    def opened() -> Iterator[BinaryIO]:
        file.seek(0)
        yield file

    movable = file.temporary_file_path() if hasattr(file, "temporary_file_path") else ""
    return Source(file.name or "", file.size, opened, movable=movable)


def submit(
    sources: Sequence[Source],
    endpoint_name: str,
    wanted: Wanted,
    *,
    by: str,
    now: datetime,
    on_error: str = BatchJob.OnError.FAIL,
    log: str = BatchJob.Log.ALL,
    result_format: str = "",
    file_name: str = "",
    idempotency_key: str = "",
    claimed: bool = False,
) -> tuple[BatchJob, bool]:
    """A job for a file, or several of one table, by the algorithm that serves the endpoint now; and whether it is new.

    result_format: as the files, if not told. file_name: as people know what was sent; by default the file's own.
    claimed: it is the caller's to `run`, and no other worker's. With a key that its sender has used before it is the
    job of that time. A batch is no part of a running A/B test. Raises PredictionError, BatchError for a file whose
    header does not fit, KeyReused, OSError.
    """
    digest = ""
    if idempotency_key:
        options = [endpoint_name, *(str(wish) for wish in (wanted.status, wanted.version, wanted.algorithm))]
        digest = job_files.digest(sources, *options, on_error, log, result_format)
        earlier = _earlier(by, idempotency_key, digest)
        if earlier:
            return earlier, False
    (algorithm,) = prediction.choose(endpoint_name, wanted, in_test=False).algorithms
    with tables.opened(sources) as table:
        scorer = Scorer(prediction.classifier_of(algorithm), table.layout)
        if not result_format:
            result_format = BatchJob.Format.CSV if table.types is None else BatchJob.Format.PARQUET
        if result_format == BatchJob.Format.PARQUET:
            _types(table, scorer, is_logged=log == BatchJob.Log.ALL)
    folder = job_files.take(sources)
    try:
        with transaction.atomic():
            job = BatchJob.objects.create(
                parent_mlalgorithm=algorithm,
                created_by=by,
                created_at=now,
                file_name=(file_name or sources[0].name)[:255],
                file_bytes=sum(source.size for source in sources),
                on_error=on_error,
                log=log,
                result_format=result_format,
                folder=folder,
                idempotency_key=idempotency_key,
                digest=digest,
                **_claimed(now) if claimed else {},
            )
    except IntegrityError:  # the same request, at the same moment
        job_files.remove(folder)
        earlier = _earlier(by, idempotency_key, digest)
        if earlier is None:
            raise
        return earlier, False
    except BaseException:
        job_files.remove(folder)
        raise
    return job, True


def _types(table: Table, scorer: Scorer, *, is_logged: bool) -> pa.Schema:
    """As what the result's columns are written in Parquet. Raises BatchError."""
    answered = AnsweredCsv(table.layout, with_ids=is_logged)
    return parquet_file.types_of(answered.names, scorer.schema, answered.added, table.types, table.layout.delimiter)


def _claimed(now: datetime) -> dict[str, Any]:
    return {"turn": 1, "fruitless_turns": 1, "started_at": now, "lease_until": _from_now()}


def _earlier(by: str, key: str, digest: str) -> BatchJob | None:
    job = BatchJob.objects.filter(created_by=by, idempotency_key=key).first() if key else None
    if job and job.digest != digest:
        raise KeyReused(f"This Idempotency-Key was used for job {job.pk}, with another file or other options.")
    return job


def cancel(job: BatchJob, *, now: datetime) -> BatchJob:
    """End a job before it has ended by itself. What it has logged stays. Raises Ended."""
    BatchJob.objects.unfinished().filter(pk=job.pk).update(state=BatchJob.State.CANCELLED, finished_at=now)
    job.refresh_from_db()
    if job.state != BatchJob.State.CANCELLED:
        raise Ended(f"Job {job.pk} has {job.state}, and cannot be cancelled any more.")
    return job


# --- How far it is ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """Of the step that a job is in, or of the scoring when it is over; None where nobody can say."""

    rows_per_second: float | None = None
    seconds_left: float | None = None


def pace(job: BatchJob, now: datetime) -> Pace:
    if job.checked_at:
        seconds = ((job.finished_at or now) - job.checked_at).total_seconds()
        if not job.rows_read or seconds <= 0:
            return Pace()
        rate = job.rows_read / seconds
        return Pace(rate, None if job.is_finished else (job.rows_total - job.rows_read) / rate)
    if job.is_finished or not job.bytes_read:
        return Pace()
    seconds = (now - job.started_at).total_seconds()
    return Pace(None, max(0.0, seconds * (job.file_bytes / job.bytes_read - 1)))


def expires_at(job: BatchJob) -> datetime | None:
    """When its files go; None while it is not finished, or when they have gone."""
    is_kept = job.finished_at and job.folder
    return job.finished_at + timedelta(days=settings.BATCH_KEEP_DAYS) if is_kept else None


# --- What came of it --------------------------------------------------------------------------------------


def result(job: BatchJob, form: str = "") -> tuple[int | None, Iterator[bytes]]:
    """The bytes of the result, and how many they are, if that is known. form: by default as was asked for the job.

    Raises NotFinished, Gone, BatchError for a form in which it cannot be written.
    """
    if not job.is_finished:
        raise NotFinished(f"Job {job.pk} is {job.state}; its result is there when it has succeeded.")
    if job.state != BatchJob.State.SUCCEEDED:
        how = "was" if job.state == BatchJob.State.CANCELLED else "has"
        where = f"See /api/v1/batch-jobs/{job.pk}/errors." if job.rows_refused else ""
        told = [f"Job {job.pk} has no result: it {how} {job.state}.", job.problem, where]
        raise NotFinished(" ".join(filter(None, told)))
    names = [job_files.HEADER, *job.parts.order_by("number").values_list("file", flat=True)]
    if (form or job.result_format) == BatchJob.Format.CSV:
        return _contents(job, names)
    _contents(job, names[:1])  # raises Gone
    if not job_files.exists(job.folder, job_files.COLUMNS):
        raise BatchError("Parquet names each column once, and the file names one more than once; ask for CSV.")
    with job_files.opened(job.folder, job_files.COLUMNS) as file:
        columns = parquet_file.from_bytes(file.read())
    parts = (_content(job.folder, name) for name in names[1:])
    return None, parquet_file.written(parts, columns)


def _content(folder: str, name: str) -> bytes:
    with job_files.opened(folder, name) as file:
        return file.read()


def errors(job: BatchJob) -> tuple[int, Iterator[bytes]]:
    """The bytes of the CSV of what is wrong with the file, and how many they are. Raises NotFinished, Gone."""
    if job.checked_at is None and not job.is_finished:
        raise NotFinished(f"Job {job.pk} is {job.state}; what is wrong is known when every row has been looked at.")
    if job.folder and not job_files.exists(job.folder, job_files.ERRORS):
        raise NotFinished(f"Job {job.pk} ended before every row had been looked at. {job.problem}".strip())
    return _contents(job, [job_files.ERRORS])


def first_errors(job: BatchJob, most: int) -> list[dict[str, Any]]:
    """The first lines of the same as dicts of line, column, value and reason. Raises NotFinished, Gone."""
    errors(job)
    with job_files.opened(job.folder, job_files.ERRORS) as file:
        rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        return [{**row, "line": int(row["line"])} for row, _ in zip(rows, range(most), strict=False)]


def _contents(job: BatchJob, names: list[str]) -> tuple[int, Iterator[bytes]]:
    gone = Gone(f"The files of job {job.pk} are gone: they are kept for {settings.BATCH_KEEP_DAYS} days.")
    if not job.folder:
        raise gone
    try:
        size = sum(job_files.size(job.folder, name) for name in names)
    except FileNotFoundError:
        raise gone from None

    def read() -> Iterator[bytes]:
        for name in names:
            with job_files.opened(job.folder, name) as file:
                while block := file.read(BLOCK):
                    yield block

    return size, read()


# --- Working ----------------------------------------------------------------------------------------------


def claim() -> BatchJob | None:
    """A job for this worker, from now on its own; None when there is nothing to do."""
    if not BatchJob.objects.free().exists():
        return None
    with transaction.atomic():
        job = BatchJob.objects.free().select_for_update(skip_locked=True).order_by("pk").first()
        if job is None:
            return None
        job.turn += 1
        job.fruitless_turns += 1
        job.started_at = job.started_at or timezone.now()
        BatchJob.objects.filter(pk=job.pk).update(
            turn=job.turn,
            fruitless_turns=job.fruitless_turns,
            started_at=job.started_at,
            lease_until=_from_now(),
        )
    return job


def release(job: BatchJob, **more: Any) -> None:
    """Leave a job to whichever worker comes first."""
    BatchJob.objects.unfinished().filter(pk=job.pk, turn=job.turn).update(**{"lease_until": None, **more})


def run(job: BatchJob, is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Go on with a claimed job until it has ended, is lost to another, or the worker stops.

    Raises django.db.Error, after which the job is still this worker's, and `release` lets others go on with it.
    """
    try:
        if job.fruitless_turns > MOST_FRUITLESS_TURNS:
            raise BatchError(f"{job.problem or 'Its workers died.'} It was tried {MOST_FRUITLESS_TURNS} times.")
        _Run(job, is_stopping).work()
    except _Lost:
        logger.info("Job %s was cancelled or taken over.", job.pk)
    except _Stopped:
        release(job, fruitless_turns=0)
    except BadRows as error:
        first = error.problems[0]
        _fail(job, str(first) if first.file else f"Line {first.line}: {first.message}")
    except (BatchError, PredictionError) as error:
        _fail(job, str(error))
    except cluster.Unreachable as error:
        logger.error("Job %s waits: %s", job.pk, error)
        release(job, problem=str(error), fruitless_turns=0, lease_until=_from_now(RETRY_SECONDS))
    except (DatabaseError, InterfaceError):
        raise
    except Exception as error:
        logger.exception("Job %s was interrupted, and will be tried again.", job.pk)
        again = _from_now(RETRY_SECONDS * job.fruitless_turns)
        release(job, problem=f"It was interrupted: {error}.", lease_until=again)


def _fail(job: BatchJob, problem: str) -> None:
    mine = BatchJob.objects.unfinished().filter(pk=job.pk, turn=job.turn)
    if mine.update(state=BatchJob.State.FAILED, problem=problem, finished_at=timezone.now(), lease_until=None):
        job_files.forget_inputs(job.folder)
        logger.warning("Job %s failed: %s", job.pk, problem)


@dataclass(frozen=True)
class _Part:
    """What is to be written of a stretch of rows. bytes_read: of the files, up to its end or further.

    records, answers, requests: of those that could be scored.
    """

    rows_read: int
    bytes_read: int
    records: list[str]
    answers: list[tuple[float, str]]
    requests: list[Any]


class _Run:
    """One worker's turn at a job."""

    def __init__(self, job: BatchJob, is_stopping: Callable[[], bool]):
        self._job = job
        self._is_stopping = is_stopping
        self._renewed = time.monotonic()
        self._algorithm: MLAlgorithm = job.parent_mlalgorithm

    def work(self) -> None:
        if self._job.checked_at is None:
            self._check()
        self._score()
        self._change(state=BatchJob.State.SUCCEEDED, problem="", finished_at=timezone.now(), lease_until=None)
        logger.info("Job %s has scored %s customers.", self._job.pk, f"{self._job.rows_scored:,}")
        job_files.forget_inputs(self._job.folder)

    def _check(self) -> None:
        """Look at every row, before any is scored, and write down what is wrong."""
        job = self._job
        self._change(state=BatchJob.State.CHECKING, bytes_read=0)
        refused = rows = 0
        broken: BadRows | None = None
        with self._table() as table, _errors_file(job, are_several=table.are_several) as write_errors:
            scorer = Scorer(prediction.classifier_of(self._algorithm), table.layout)
            try:
                chunks = table.chunks(CHUNK_ROWS)
                with closing(in_order(partial(_looked_at, scorer), chunks, threads=CHECKING_THREADS)) as looked_at:
                    for read, problems, passed in looked_at:
                        write_errors(problems)
                        rows += read
                        refused += read - passed
                        self._stay(bytes_read=table.position, rows_refused=refused)
            except BadRows as error:  # what follows cannot be read
                write_errors(error.problems)
                broken = error
        if broken:
            self._change(rows_refused=refused)
            raise broken
        self._change(rows_total=rows, rows_refused=refused)
        if refused and job.on_error == BatchJob.OnError.FAIL:
            raise BatchError(f"{refused:,} of {rows:,} rows cannot be scored; nobody was scored or logged.")
        with job_files.published(job.folder, job_files.HEADER) as file:
            file.write(AnsweredCsv(table.layout, with_ids=self._is_logged).header().encode())
        with suppress(BatchError):  # then the result is CSV only
            columns = parquet_file.as_bytes(_types(table, scorer, is_logged=self._is_logged))
            with job_files.published(job.folder, job_files.COLUMNS) as file:
                file.write(columns)
        self._change(checked_at=timezone.now(), bytes_read=0, fruitless_turns=0)

    def _score(self) -> None:
        self._change(state=BatchJob.State.SCORING)
        job = self._job
        number = job.parts.count()
        if job.rows_read == job.rows_total:
            return
        with self._table() as table:
            answered = AnsweredCsv(table.layout, with_ids=self._is_logged)
            chunks = table.chunks(PART_ROWS, skip=job.rows_read, while_skipping=self._stay)
            with ThreadPoolExecutor(1) as beside, closing(self._parts(table, chunks)) as parts:
                for part in parts:
                    if self._is_stopping():
                        raise _Stopped
                    self._write(number, part, answered, beside)
                    number += 1

    def _parts(self, table: Table, chunks: Iterator[Chunk]) -> Iterator[_Part]:
        """The next parts are made ready while one is written."""
        classifier = prediction.classifier_of(self._algorithm)
        if settings.DASK_SCHEDULER:
            scored = cluster.scored(settings.DASK_SCHEDULER, classifier, str(settings.BATCH_DIR), chunks, self._stay)
            with closing(scored):
                read = ((some, table.position) for some in _gathered(scored))
                yield from in_order(lambda each: self._ready(*each), read, threads=1)
        else:
            scorer = Scorer(classifier, table.layout)
            first = list(islice(chunks, 1))  # in this thread, whose connection keeps the lease
            scored = map(scorer.score, chain(first, chunks))
            yield from made_ahead(self._ready(some, table.position) for some in _gathered(scored))

    def _ready(self, some: Sequence[Scored], bytes_read: int) -> _Part:
        return _Part(
            rows_read=sum(scored.rows_read for scored in some),
            bytes_read=bytes_read,
            records=[record for scored in some for record in scored.checked.records],
            answers=[(result["probability"], result["label"]) for scored in some for result in scored.results],
            requests=prepared_in_bulk(list(map(self._requests, some))) if self._is_logged else [],
        )

    def _requests(self, scored: Scored) -> NewRequests:
        results, cells = scored.results, scored.checked.cells
        return NewRequests(
            input_data=cells.input_json(),
            full_response=list(map(dumps, results)),
            response=[result["label"] for result in results],
            probability=[result["probability"] for result in results],
            created_at=timezone.now(),
            latency_ms=scored.elapsed_ms,
            customer_key=cells.keys(),
            parent_mlalgorithm_id=self._algorithm.pk,
        )

    def _write(self, number: int, part: _Part, answered: AnsweredCsv, beside: ThreadPoolExecutor) -> None:
        """beside: the thread that writes all files, since no two may share a connection to another host."""
        job = self._job
        histogram = _added(job.histogram, [probability for probability, _ in part.answers])
        # A worker that was taken for dead may come back, and must not write over another one's part.
        name = f"part-{number:06d}-{job.turn}.csv"

        def publish(answers: Iterable[Sequence[Any]]) -> None:
            with job_files.published(job.folder, name) as file:
                file.write(answered.body(part.records, answers).encode())

        def write() -> None:
            with transaction.atomic():
                self._change(
                    rows_read=job.rows_read + part.rows_read,
                    rows_scored=job.rows_scored + len(part.answers),
                    bytes_read=part.bytes_read,
                    histogram=histogram,
                    fruitless_turns=0,
                    problem="",
                    lease_until=_from_now(),
                )
                # The file reaches the disk while the database writes.
                publishing: list[Future[None]] = []

                def begin(ids: Sequence[int]) -> None:
                    answers = ((pk, *answer) for pk, answer in zip(ids, part.answers, strict=True))
                    publishing.append(beside.submit(publish, answers))

                if self._is_logged:
                    insert_in_bulk(part.requests, begin)
                else:
                    publishing.append(beside.submit(publish, part.answers))
                publishing[0].result()
                BatchPart.objects.create(job=job, number=number, file=name)

        in_turn(write)

    @property
    def _is_logged(self) -> bool:
        return self._job.log == BatchJob.Log.ALL

    def _table(self) -> AbstractContextManager[Table]:
        return tables.opened(job_files.inputs(self._job.folder))

    def _stay(self, **progress: Any) -> None:
        """Between parts: stop if told so, and now and then tell how far it is, and that the worker lives."""
        if self._is_stopping():
            raise _Stopped
        if time.monotonic() - self._renewed > min(1, settings.BATCH_LEASE_SECONDS / 4):
            self._change(lease_until=_from_now(), **progress)
            self._renewed = time.monotonic()

    def _change(self, **fields: Any) -> None:
        """Raises _Lost, and changes nothing, when the job is this worker's no longer."""
        mine = BatchJob.objects.unfinished().filter(pk=self._job.pk, turn=self._job.turn)
        if not mine.update(**fields):
            raise _Lost
        for name, value in fields.items():
            setattr(self._job, name, value)


def _gathered(scored: Iterable[Scored]) -> Iterator[list[Scored]]:
    """What is to be written at once."""
    some: list[Scored] = []
    most = 1 if connection.vendor == "sqlite" else MOST_CHUNKS_OF_A_PART
    for each in scored:
        some.append(each)
        if len(some) == most or sum(one.rows_read for one in some) >= PART_ROWS:
            yield some
            some = []
    if some:
        yield some


def _looked_at(scorer: Scorer, chunk: Chunk) -> tuple[int, list[BadLine], int]:
    """How many rows there are, what is wrong with some, and how many can be scored."""
    checked = scorer.check(chunk)
    return len(chunk), checked.problems, len(checked.records)


@contextmanager
def _errors_file(job: BatchJob, *, are_several: bool) -> Iterator[Callable[[Iterable[BadLine]], None]]:
    """A function that writes problems into the job's file of errors, which is there when all is well."""
    with job_files.published(job.folder, job_files.ERRORS) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text)
        writer.writerow(["line", "column", "value", "reason", *["file"] * are_several])
        yield lambda problems: writer.writerows(
            (p.line, p.field, p.value, p.message, *[p.file] * are_several) for p in problems
        )
        text.detach()


def _added(histogram: Sequence[int], probabilities: Sequence[float]) -> list[int]:
    bins = np.minimum((np.array(probabilities) * BINS).astype(int), BINS - 1)
    counted = np.bincount(bins, minlength=BINS)
    return (counted + np.array(histogram or [0] * BINS)).tolist()


def _from_now(seconds: float | None = None) -> Any:
    """By the clock of the database, which is the same for all hosts."""
    wait = settings.BATCH_LEASE_SECONDS if seconds is None else seconds
    return ExpressionWrapper(Now() + timedelta(seconds=wait), output_field=DateTimeField())


# --- Tidying up -------------------------------------------------------------------------------------------


def clean(now: datetime) -> None:
    """Remove the files of jobs that ended long ago or were cancelled, and uploads that became no job."""
    kept_since = now - timedelta(days=settings.BATCH_KEEP_DAYS)
    nobodys = Q(lease_until=None) | Q(lease_until__lt=Now())
    over = Q(finished_at__lt=kept_since) | Q(nobodys, state=BatchJob.State.CANCELLED)
    for job in BatchJob.objects.exclude(folder="").filter(over):
        job_files.remove(job.folder)
        job.folder = ""
        job.save(update_fields=["folder"])
    for folder in job_files.older_than(FORGOTTEN):
        if not BatchJob.objects.filter(folder=folder).exists():
            job_files.remove(folder)
    job_files.forget_uploads(FORGOTTEN)
