from __future__ import annotations

import getpass
import gzip
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from django.core.management.base import CommandError, CommandParser
from django.utils import timezone
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from tqdm import tqdm

from apps.endpoints import batch, batch_jobs, parquet_file, storage, tables
from apps.endpoints.batch import AnsweredCsv
from apps.endpoints.csv_file import BadRows, BatchError
from apps.endpoints.management.base import BaseCommand
from apps.endpoints.models import BatchJob, Status
from apps.endpoints.parquet_file import ParquetWriter
from apps.endpoints.prediction import PredictionError, Wanted
from apps.endpoints.storage import Source
from apps.endpoints.tables import Table
from apps.ml.artifacts import ArtifactError
from apps.ml.registry import DEFAULT_ENDPOINT
from apps.ml.schema import Schema

SHOWN_PROBLEMS = 20
ENDING = (signal.SIGTERM, signal.SIGINT)
GZIP = ".gz"
TABLES = (".csv", ".csv.gz", ".parquet")
ASIDE = (".", "_")  # as names begin of what Spark and others put beside part files


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Command(BaseCommand):
    help = (
        "Score a table of customers into another: the same rows, with request_id, probability and label added. "
        "CSV or Parquet, files of this machine or URLs that fsspec understands, such as s3://bucket/customers.parquet."
    )

    def create_parser(self, *args: Any, **kwargs: Any) -> CommandParser:
        # Every command of Django has a --version of its own, to which this one's gives no room otherwise.
        return super().create_parser(*args, conflict_handler="resolve", **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "input",
            metavar="INPUT",
            help="A CSV, one in gzip, or Parquet; or a folder of such files, alike in their columns, taken by name.",
        )
        parser.add_argument("output", metavar="OUTPUT", help="A file, replaced if it is there; gzip if it ends in .gz.")
        parser.add_argument(
            "--format",
            choices=BatchJob.Format.values,
            help="Of OUTPUT. By default parquet if its name ends so, else csv.",
        )
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
        input: str,
        output: str,
        format: str | None,
        endpoint: str,
        status: str | None,
        version: str | None,
        algorithm: str | None,
        log: str,
        on_error: str,
        **options: Any,
    ) -> None:
        wanted = Wanted(status, version, algorithm, default_status=Status.PRODUCTION)
        is_parquet = output.removesuffix(GZIP).endswith(".parquet")
        form = format or (BatchJob.Format.PARQUET if is_parquet else BatchJob.Format.CSV)
        began = time.monotonic()
        try:
            files, found = _found(input)
            _check_apart(files, found, output)
            sources = [storage.source(files, each, _base_name(each["name"])) for each in found]
            if log == BatchJob.Log.NONE and on_error == BatchJob.OnError.FAIL:
                said = self._score(sources, output, form, endpoint, wanted)
            else:
                said = self._score_as_job(sources, input, output, form, endpoint, wanted, log, on_error)
        except BadRows as error:
            raise CommandError(_told(error)) from None
        except (BatchError, PredictionError, ArtifactError) as error:
            raise CommandError(str(error)) from None
        except OSError as error:
            raise CommandError(f"{error.filename or output}: {error.strerror or error}") from None
        except KeyboardInterrupt as interruption:
            raise CommandError("Interrupted; nothing was written.", returncode=_code(interruption)) from None
        self.stdout.write(said.format(seconds=f"{time.monotonic() - began:.1f} s"))

    def _score(self, sources: Sequence[Source], output: str, form: str, endpoint: str, wanted: Wanted) -> str:
        with (
            _told_by_sigterm(),
            tables.opened(sources) as table,
            _replacing(output) as target,
            _progress(table, sources) as progress,
        ):
            writer = _ParquetOutput(target) if form == BatchJob.Format.PARQUET else _CsvOutput(target)
            with closing(writer):
                answered_by, rows = batch.score_table(table, writer, endpoint, wanted, progress=progress)
        return f"{rows:,} customers were scored by {answered_by} into {output} in {{seconds}}; nothing was recorded."

    def _score_as_job(
        self,
        sources: Sequence[Source],
        input: str,
        output: str,
        form: str,
        endpoint: str,
        wanted: Wanted,
        log: str,
        on_error: str,
    ) -> str:
        """A job in the foreground. Whatever dies, the server's workers go on with it and nobody is logged twice."""
        if not all(source.is_file for source in sources):
            raise CommandError(f"{input} can be read only once; write it into a file, or use --log none.")
        with _replacing(output) as target:
            with _told_by_sigterm():
                job, _ = batch_jobs.submit(
                    sources,
                    endpoint,
                    wanted,
                    by=getpass.getuser(),
                    now=timezone.now(),
                    on_error=on_error,
                    log=log,
                    result_format=form,
                    file_name=_shown_name(input),
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
                    f"{job.problem or 'Interrupted.'} Job {job.pk} is {job.state}; unless it was cancelled, the next "
                    "worker goes on with it (`manage.py batch_worker`), and its result is at "
                    f"/api/v1/batch-jobs/{job.pk}/result.",
                    returncode=128 + number[0] if number else 1,
                )
            try:
                with _told_by_sigterm():
                    for block in batch_jobs.result(job)[1]:
                        target.write(block)
            except (OSError, KeyboardInterrupt, BatchError, batch_jobs.JobError) as error:
                raise CommandError(
                    f"{str(error) or 'Interrupted'}. {output} was not written, but job {job.pk} is done: fetch "
                    f"/api/v1/batch-jobs/{job.pk}/result instead of scoring everybody again.",
                    returncode=_code(error),
                ) from None
        refused = (
            f"; {job.rows_refused:,} of {job.rows_total:,} rows were refused (job {job.pk})" if job.rows_refused else ""
        )
        logged = "each was logged" if log == BatchJob.Log.ALL else "nothing was logged"
        return (
            f"{job.rows_scored:,} customers were scored by {job.parent_mlalgorithm} into {output} in {{seconds}}; "
            f"{logged}{refused}."
        )


class _CsvOutput:
    def __init__(self, target: BinaryIO):
        self._target = target

    def begin(self, answered: AnsweredCsv, table: Table, schema: Schema) -> None:
        self.write(answered.header())

    def write(self, text: str) -> None:
        self._target.write(text.encode())

    def close(self) -> None:
        """There is nothing to add."""


class _ParquetOutput:
    def __init__(self, target: BinaryIO):
        self._target = target
        self._writer: ParquetWriter | None = None

    def begin(self, answered: AnsweredCsv, table: Table, schema: Schema) -> None:
        columns = parquet_file.types_of(answered.names, schema, answered.added, table.types, table.layout.delimiter)
        self._writer = ParquetWriter(self._target, columns)

    def write(self, text: str) -> None:
        self._writer.write(text.encode())

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def _found(named: str) -> tuple[AbstractFileSystem, list[dict[str, Any]]]:
    """The files that INPUT names, as their file system describes them. Raises BatchError."""
    try:
        files, path = url_to_fs(named)
        found = _described(files, path, named)
    except FileNotFoundError:
        raise BatchError(f"There is no file {named}.") from None
    except BatchError:
        raise
    except Exception as error:  # of a kind of URL that nothing here can read, or whatever its storage raises
        raise BatchError(f"{named} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if any(each.get("size") is None for each in found):
        raise BatchError(f"{named} does not say how large it is; fetch it first, and name the file.")
    return files, sorted(found, key=lambda each: each["name"])


def _described(files: AbstractFileSystem, path: str, named: str) -> list[dict[str, Any]]:
    """A file, or all of a folder."""
    found = [files.info(path)]
    if found[0]["type"] != "directory":
        return found
    listed = [each for each in files.ls(path, detail=True) if each["name"].rstrip("/") != path.rstrip("/")]
    found = [each for each in listed if not _base_name(each["name"]).startswith(ASIDE)]
    if storage.is_local(files):  # which says of a link what it is, and not to what it leads
        found = [files.info(each["name"]) for each in found]
    others = [_base_name(each["name"]) for each in found if each["type"] != "file" or not _is_table(each["name"])]
    if others or not found:
        raise BatchError(
            f"{named} holds {', '.join(sorted(others)[:5]) or 'no file'}, and is to hold nothing but files whose "
            f"names end in {', '.join(TABLES)}."
        )
    return found


def _check_apart(files: AbstractFileSystem, found: Sequence[dict[str, Any]], output: str) -> None:
    """Raise CommandError if OUTPUT is one of the files that are read."""
    try:
        others, path = url_to_fs(output)
    except (ImportError, ValueError) as error:
        raise CommandError(f"{output} cannot be written: {error}") from None
    if len(found) > 1 and others == files and path.rpartition("/")[0] == found[0]["name"].rpartition("/")[0]:
        raise CommandError("OUTPUT would be one more file in the folder that is INPUT; write it elsewhere.")
    for each in found if others == files and others.exists(path) else ():
        if each["name"] == path or (storage.is_local(files) and Path(each["name"]).samefile(path)):
            raise CommandError("OUTPUT is INPUT itself; name another file.")


def _is_table(path: str) -> bool:
    return path.lower().endswith(TABLES)


def _shown_name(named: str) -> str:
    """The last part of a path or URL, without what a signed URL ends in."""
    name = named.partition("?")[0] if "://" in named else named
    return os.fsencode(_base_name(name)).decode(errors="replace")


def _base_name(path: str) -> str:
    return path.replace(os.sep, "/").rstrip("/").rsplit("/", 1)[-1]


def _code(error: BaseException) -> int:
    """As which the process ends; after a signal as shells say it."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)
    return 1


def _told_by(job: BatchJob) -> str:
    lines = [job.problem]
    with suppress(batch_jobs.JobError):
        lines += [
            f"{each['file'] + ', ' if 'file' in each else ''}line {each['line']}: {each['reason']}"
            for each in batch_jobs.first_errors(job, most=SHOWN_PROBLEMS)
        ]
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
    lines = [str(problem) for problem in error.problems[:SHOWN_PROBLEMS]]
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
def _replacing(named: str) -> Iterator[BinaryIO]:
    """A file beside OUTPUT that takes its place when all is well, and else goes."""
    files, path = url_to_fs(named)
    if storage.is_local(files):
        path = str(Path(path).resolve())  # a link stays one
        if not Path(path).parent.is_dir():
            raise CommandError(f"There is no folder {Path(path).parent}; create it, or name another file.")
    if files.exists(path) and not files.isfile(path):
        raise CommandError(f"{named} is no file that could be replaced; name another.")
    with storage.replacing(files, path) as file:
        if path.endswith(GZIP):
            with gzip.open(file, "wb") as target:
                yield target
        else:
            yield file


@contextmanager
def _progress(table: Table, sources: Sequence[Source]) -> Iterator[Any]:
    """A bar over the bytes of the files, with the rate in rows."""
    began, rows = time.monotonic(), 0
    with tqdm(total=sum(source.size for source in sources), unit="B", unit_scale=True, disable=None) as bar:

        def advance(more: int) -> None:
            nonlocal rows
            rows += more
            bar.set_postfix_str(f"{rows / (time.monotonic() - began):,.0f} customers/s", refresh=False)
            bar.update(table.position - bar.n)

        yield advance
