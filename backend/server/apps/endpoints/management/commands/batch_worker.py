from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from django.core.management.base import CommandParser
from django.db import DatabaseError, InterfaceError, connection
from django.utils import timezone

from apps.endpoints import batch_jobs, checkpoints, kept_reports, shadow
from apps.endpoints.management.base import BaseCommand
from apps.endpoints.models import BatchJob

logger = logging.getLogger("batch_worker")

POLL_SECONDS = 1
CLEAN_SECONDS = 600
REPORTS_SECONDS = 10
# How long a challenger may go on with one row when all is to end; what it says then is lost, and asked for again.
GRACE_SECONDS = 5
ENDING = (signal.SIGTERM, signal.SIGINT)


class Command(BaseCommand):
    help = (
        "Score the files of batch jobs, one after the other, until it is told to stop; and beside them what the "
        "challengers of shadow tests have to say of the requests that came. Reports of large A/B tests are counted "
        "before somebody asks for them. Start as many as you like."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--once", action="store_true", help="Stop when there is nothing to do any more.")
        parser.add_argument("--parent", type=int, metavar="PID", help="Stop when this parent process is gone.")

    def handle(self, *, once: bool, parent: int | None, **options: Any) -> None:
        stopping = threading.Event()
        if parent is not None:
            threading.Thread(target=_stop_with, args=[parent, stopping], daemon=True).start()
        before = {number: signal.signal(number, lambda *_: stopping.set()) for number in ENDING}
        try:
            if once:
                work(stopping, once=True)
                follow_shadows(stopping, once=True)
                keep_reports(stopping, once=True)
            else:
                checkpoints.begin()
                # Nobody waits for a count to end: whoever comes next counts anew.
                threading.Thread(target=keep_reports, args=[stopping], daemon=True).start()
                shadows = threading.Thread(target=follow_shadows, args=[stopping], daemon=True)
                shadows.start()
                work(stopping, once=False)
                shadows.join(GRACE_SECONDS)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _stop_with(parent: int, stopping: threading.Event) -> None:
    while os.getppid() == parent:  # on Windows it never changes
        time.sleep(0.5)
    stopping.set()


def work(stopping: threading.Event, *, once: bool) -> None:
    """Take job after job. A database or a storage that does not answer is waited for."""
    job: BatchJob | None = None
    cleaned = float("-inf")
    while not stopping.is_set():
        try:
            if job is not None:  # the database failed in the middle of it
                batch_jobs.release(job)
            job = batch_jobs.claim()
            if job is not None:
                batch_jobs.run(job, stopping.is_set)
                job = None
                continue
            if once:
                return
            if time.monotonic() - cleaned > CLEAN_SECONDS:
                batch_jobs.clean(timezone.now())
                cleaned = time.monotonic()
        except (DatabaseError, InterfaceError) as error:
            logger.error("The database does not answer (%s); trying again.", str(error).strip())
            connection.close()
            if once:
                raise
        except OSError as error:
            logger.error("The files of batch jobs cannot be reached (%s); trying again.", error)
            if once:
                raise
        stopping.wait(POLL_SECONDS)


def follow_shadows(stopping: threading.Event, *, once: bool = False) -> None:
    """Let challengers score what came."""
    follower = shadow.Follower()

    def follow() -> bool:
        follower.follow(timezone.now(), stopping.is_set)
        return follower.is_behind

    _see_to("Shadow tests", follow, POLL_SECONDS, stopping, once)


def keep_reports(stopping: threading.Event, *, once: bool = False) -> None:
    """Count what takes long before somebody asks for it."""

    def keep_up() -> bool:
        if kept_reports.keep_up(timezone.now()):
            return True
        if not once:
            connection.close()  # PostgreSQL has a process for each, and this one does nothing most of the time
        return False

    _see_to("Reports of large tests", keep_up, REPORTS_SECONDS, stopping, once)


def _see_to(what: str, step: Callable[[], bool], pause: float, stopping: threading.Event, once: bool) -> None:
    """Take step after step, at once while it says that more is to do. A database that does not answer is waited for."""
    while not stopping.is_set():
        try:
            if step():
                continue
            if once:
                return
        except Exception as error:  # whatever it is, a test that runs for weeks is not to stand still
            if isinstance(error, (DatabaseError, InterfaceError)):
                logger.error("%s wait for the database (%s); trying again.", what, str(error).strip())
            else:
                logger.exception("%s cannot be seen to; trying again.", what)
            connection.close()
            if once:
                raise
        stopping.wait(pause)
    connection.close()
