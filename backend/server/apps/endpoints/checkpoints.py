"""A thread of its own brings SQLite's write-ahead log into the database file.

Left to itself, SQLite lets somebody's commit do so when the log has grown, and all who want to write wait with him,
for the disk too. Beside this thread they go on.
"""

from __future__ import annotations

import logging
import threading
import time

from django.db import connection

from apps.endpoints.turns import in_turn, take_for_good

logger = logging.getLogger(__name__)

# Seconds. About what SQLITE_SYNCHRONOUS=NORMAL may lose with the power, unless somebody's reading takes long. Whoever
# begins the log anew waits for the disk, so a log that grows slowly is not copied often.
PAUSE = 2
SHORT_PAUSE = 0.25
# Pages of 4 KB: of a log that grows fast, and of a long one. SQLite begins it anew when all of it has been copied;
# while others write without a pause, that comes to pass only if they wait for what is left, and for the disk.
GROWING_LOG = 1_000
LONG_LOG = 8_000
# Seconds between tries: after an error, and of processes that would take over.
LATER = 1


def begin() -> None:
    """Copy from now on, in one of the processes that ask for it; nothing where the database is no SQLite file."""
    if connection.vendor == "sqlite" and not connection.is_in_memory_db():
        threading.Thread(target=_keep_copying, name="checkpoints", daemon=True).start()


def copy_log(pages_before: int = 0) -> int:
    """Copy and flush what is in the log, and return how many pages that is.

    Not what was committed since somebody began to read who has not ended. If the log is long, it is copied once more
    while those who take turns wait. pages_before: what this returned last; so many mean that nobody has written.
    """
    _, pages, _ = _checkpoint()
    if pages > LONG_LOG and pages != pages_before:
        _, pages, _ = in_turn(_checkpoint)
    return pages


def _checkpoint() -> tuple[int, int, int]:
    """Whether somebody else is at it, pages in the log, and those of them that are in the file."""
    with connection.cursor() as cursor:
        # The other kinds keep writers out while they wait for readers.
        cursor.execute("PRAGMA wal_checkpoint(PASSIVE)")
        return cursor.fetchone()


def _keep_copying() -> None:
    while not take_for_good("checkpoints"):
        time.sleep(LATER)
    was_told, pages = False, 0
    while True:
        before = pages
        try:
            pages = copy_log(before)
        except Exception as error:  # whatever it is: as long as this process lives, no other one takes over
            if not was_told:
                logger.error("SQLite's write-ahead log cannot be copied (%s); trying again.", error, exc_info=True)
            was_told = True
            connection.close()
            time.sleep(LATER)
        else:
            was_told = False
            time.sleep(SHORT_PAUSE if pages > GROWING_LOG and pages != before else PAUSE)
