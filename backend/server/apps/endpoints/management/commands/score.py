from __future__ import annotations

import gzip
import io
import os
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from django.core.management.base import CommandError, CommandParser
from tqdm import tqdm

from apps.endpoints import batch
from apps.endpoints.csv_file import BadRows, BatchError
from apps.endpoints.management.base import BaseCommand
from apps.endpoints.models import Status
from apps.endpoints.prediction import PredictionError, Wanted
from apps.ml.artifacts import ArtifactError
from apps.ml.registry import DEFAULT_ENDPOINT

SHOWN_PROBLEMS = 20
GZIP = ".gz"
READ_BYTES = 2**20  # at a time: whoever reads often lets go of the lock of Python often, and waits to get it back


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Command(BaseCommand):
    help = "Score a CSV of customers into another: the same lines, with the columns probability and label added."

    def create_parser(self, *args: Any, **kwargs: Any) -> CommandParser:
        # Every command of Django has a --version of its own, to which this one's gives no room otherwise.
        return super().create_parser(*args, conflict_handler="resolve", **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("input", metavar="INPUT", type=Path, help="A CSV; one that ends in .gz is read as gzip.")
        parser.add_argument("output", metavar="OUTPUT", type=Path, help="Replaced if it is there; .gz as for INPUT.")
        parser.add_argument(
            "--log", choices=["none"], required=True, help="What is recorded: none, so that no feedback can follow."
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
        **options: Any,
    ) -> None:
        wanted = Wanted(status, version, algorithm, default_status=Status.PRODUCTION)
        began = time.monotonic()
        try:
            with (
                _told_by_sigterm(),
                _reading(input) as (source, raw),
                _replacing(output, input) as target,
                _progress(raw) as progress,
            ):
                answered_by, rows = batch.score_file(source, target, endpoint, wanted, progress=progress)
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
        seconds = time.monotonic() - began
        self.stdout.write(
            f"{rows:,} customers were scored by {answered_by} into {output} in {seconds:.1f} s; nothing was recorded."
        )


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
