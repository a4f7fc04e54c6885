from __future__ import annotations

import getpass
import gzip
import io
import os
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from django.core.files import File
from django.core.management.base import CommandError, CommandParser
from django.utils import timezone
from tqdm import tqdm

from apps.endpoints import batch, batch_jobs
from apps.endpoints.csv_file import BadRows, BatchError
from apps.endpoints.management.base import BaseCommand
from apps.endpoints.models import BatchJob, Status
from apps.endpoints.prediction import PredictionError, Wanted
from apps.ml.artifacts import ArtifactError
from apps.ml.registry import DEFAULT_ENDPOINT

SHOWN_PROBLEMS = 20
ENDING = (signal.SIGTERM, signal.SIGINT)
GZIP = ".gz"
READ_BYTES = 2**20  # at a time: whoever reads often lets go of the lock of Python often, and waits to get it back


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Command(BaseCommand):
    help = "Score a CSV of customers into another: the same lines, with request_id, probability and label added."

    def create_parser(self, *args: Any, **kwargs: Any) -> CommandParser:
        # Every command of Django has a --version of its own, to which this one's gives no room otherwise.
        return super().create_parser(*args, conflict_handler="resolve", **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("input", metavar="INPUT", type=Path, help="A CSV; one that ends in .gz is read as gzip.")
        parser.add_argument("output", metavar="OUTPUT", type=Path, help="Replaced if it is there; .gz as for INPUT.")
        parser.add_argument(
            "--log",
            choices=BatchJob.Log.values,
            default=BatchJob.Log.ALL.value,
            help="What is logged; with none no feedback can follow, no request_id is given. By default %(default)s.",
        )
        parser.add_argument(
            "--on-error",
            choices=BatchJob.OnError.values,
            default=BatchJob.OnError.FAIL.value,
            help="What becomes of rows that cannot be scored; skip leaves them out. By default %(default)s.",
        )
        parser.add_argument("--endpoint", default=DEFAULT_ENDPOINT, help="By default %(default)s.")
        parser.add_argument("--status", help="By default production, unless a version or an algorithm is named.")
        parser.add_argument("--version", help="Of the algorithm that answers.")
        parser.add_argument("--algorithm", help="The algorithm's name, such as extra_trees.")

    def handle(
        self,
        *,
        input: Path,
        output: Path,
        endpoint: str,
        status: str | None,
        version: str | None,
        algorithm: str | None,
        log: str,
        on_error: str,
        **options: Any,
    ) -> None:
        wanted = Wanted(status, version, algorithm, default_status=Status.PRODUCTION)
        began = time.monotonic()
        try:
            if log == BatchJob.Log.NONE and on_error == BatchJob.OnError.FAIL:
                said = self._score(input, output, endpoint, wanted)
            else:
                said = self._score_as_job(input, output, endpoint, wanted, log, on_error)
        except BadRows as error:
            raise CommandError(_told(error)) from None
        except (BatchError, PredictionError, ArtifactError) as error:
            raise CommandError(str(error)) from None
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise CommandError(f"{input} is damaged or no gzip: {error}") from None
        except OSError as error:
            raise CommandError(f"{error.filename or output}: {error.strerror or error}") from None
        except KeyboardInterrupt as interruption:
            number = signal.SIGTERM if isinstance(interruption, _Terminated) else signal.SIGINT
            raise CommandError("Interrupted; nothing was written.", returncode=128 + number) from None
        self.stdout.write(said.format(seconds=f"{time.monotonic() - began:.1f} s"))

    def _score(self, input: Path, output: Path, endpoint: str, wanted: Wanted) -> str:
        with (
            _told_by_sigterm(),
            _reading(input) as (source, raw),
            _replacing(output, input) as target,
            _progress(raw) as progress,
        ):
            answered_by, rows = batch.score_file(source, target, endpoint, wanted, progress=progress)
        return f"{rows:,} customers were scored by {answered_by} into {output} in {{seconds}}; nothing was recorded."

    def _score_as_job(self, input: Path, output: Path, endpoint: str, wanted: Wanted, log: str, on_error: str) -> str:
        """A job in the foreground. Whatever dies, the server's workers go on with it and nobody is logged twice."""
        with _replacing(output, input) as target:
            with input.open("rb") as file:
                job, _ = batch_jobs.submit(
                    *(File(file, input.name), endpoint, wanted),
                    by=getpass.getuser(),
                    now=timezone.now(),
                    on_error=on_error,
                    log=log,
                    claimed=True,
                )
            with _stopping() as number, tqdm(unit=" customers", unit_scale=True, disable=None) as bar:

                def is_stopping() -> bool:
                    bar.total, bar.n = job.rows_total, job.rows_read
                    bar.refresh()
                    return bool(number)

                batch_jobs.run(job, is_stopping)
            job.refresh_from_db()
            if job.state == BatchJob.State.FAILED:
                raise CommandError(_told_by(job))
            if job.state != BatchJob.State.SUCCEEDED:
                raise CommandError(
                    f"Interrupted. Job {job.pk} is {job.state}; unless it was cancelled, the next worker goes on with "
                    f"it (`manage.py batch_worker`), and its result is at /api/v1/batch-jobs/{job.pk}/result.",
                    returncode=128 + number[0] if number else 1,
                )
            for block in batch_jobs.result(job)[1]:
                target.buffer.write(block)
        refused = (
            f"; {job.rows_refused:,} of {job.rows_total:,} rows were refused (job {job.pk})" if job.rows_refused else ""
        )
        logged = "each was logged" if log == BatchJob.Log.ALL else "nothing was logged"
        return (
            f"{job.rows_scored:,} customers were scored by {job.parent_mlalgorithm} into {output} in {{seconds}}; "
            f"{logged}{refused}."
        )


def _told_by(job: BatchJob) -> str:
    lines = [job.problem]
    with suppress(batch_jobs.JobError):
        lines += [f"line {e['line']}: {e['reason']}" for e in batch_jobs.first_errors(job, most=SHOWN_PROBLEMS)]
    return "\n".join([*lines, "Nothing was written."])


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Which of Ctrl-C and SIGTERM have come: a job stops between two parts of it."""
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in ENDING}
    try:
        yield came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _told(error: BadRows) -> str:
    lines = [f"line {problem.line}: {problem.message}" for problem in error.problems[:SHOWN_PROBLEMS]]
    more = len(error.problems) - SHOWN_PROBLEMS
    if len(error.problems) >= batch.MOST_PROBLEMS:
        lines.append(f"(and at least {more:,} more; the rest of the file was not read)")
    elif more > 0:
        lines.append(f"(and {more:,} more)")
    return "\n".join([*lines, "Nothing was written."])


@contextmanager
def _told_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is done here as Ctrl-C does, and leaves no part of a file behind."""

    def end(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _reading(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The table as bytes, and the file that they come from."""
    with path.open("rb", READ_BYTES) as raw:
        if path.suffix == GZIP:
            with io.BufferedReader(gzip.open(raw), READ_BYTES) as unpacked:
                yield unpacked, raw
        else:
            yield raw, raw


@contextmanager
def _replacing(path: Path, source: Path) -> Iterator[TextIO]:
    """A file beside `path` that takes its place when all is well, and else goes."""
    if path.exists() and path.samefile(source):
        raise CommandError("OUTPUT is INPUT itself; name another file.")
    if path.exists() and not path.is_file():
        raise CommandError(f"{path} is no file that could be replaced; name another.")
    if not path.parent.is_dir():
        raise CommandError(f"There is no folder {path.parent}; create it, or name another file.")
    path = path.resolve()  # a link stays one
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        opened = gzip.open if path.suffix == GZIP else open
        with opened(part, "wt", encoding="utf-8", newline="") as target:
            yield target
        with part.open("r+b") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _progress(raw: BinaryIO) -> Iterator[Any]:
    """A bar over the bytes of the file, with the rate in rows."""
    began, rows = time.monotonic(), 0
    with tqdm(total=os.fstat(raw.fileno()).st_size, unit="B", unit_scale=True, disable=None) as bar:

        def advance(more: int) -> None:
            nonlocal rows
            rows += more
            bar.set_postfix_str(f"{rows / (time.monotonic() - began):,.0f} customers/s", refresh=False)
            bar.update(raw.tell() - bar.n)

        yield advance
