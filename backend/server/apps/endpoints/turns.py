"""Processes that write into one SQLite file take turns, or agree on who does a job for all of them.

SQLite lets a writer who finds the file locked sleep for a millisecond or longer and try again, while a row takes a
tenth of that. Here the next one is woken as soon as the file is free.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from django.db import OperationalError, connection

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

# Seconds; a turn takes a thousandth of it.
LONG = 1.0

T = TypeVar("T")

_threads = threading.Lock()


def in_turn(write: Callable[[], T]) -> T:
    """What `write`, a transaction, returns; no other process is in its own turn meanwhile.

    Others, who know nothing of turns, may hold the file, and whose turn it is waits for them as SQLite does. Whoever
    has waited long for a turn then goes on without one, so that at most one other's patience adds to one's own.
    """
    lock = _lock("turn")
    if lock is None:
        return write()
    began = time.monotonic()
    # The lock of the file is one for all threads of a process.
    if _threads.acquire(timeout=LONG):
        try:
            _change(lock, fcntl.LOCK_EX)
            if time.monotonic() - began < LONG:
                return write()
        finally:
            _change(lock, fcntl.LOCK_UN)
            _threads.release()
    return write()


class NotFree(Exception):
    """Somebody else writes; nothing has been written."""


def at_once(write: Callable[[], T]) -> T:
    """`in_turn` for who must wait for nobody. Raises NotFree.

    write: one transaction, on a connection that does not wait for SQLite's own lock either.
    """
    lock = _lock("turn")
    try:
        return write() if lock is None else _at_once(lock, write)
    except OperationalError as error:
        # The lowest byte says what it is, the others why.
        if getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise NotFree from None
        raise


def _at_once(lock: int, write: Callable[[], T]) -> T:
    if not _threads.acquire(blocking=False):
        raise NotFree
    try:
        _change(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return write()
    except BlockingIOError:
        raise NotFree from None
    finally:
        _change(lock, fcntl.LOCK_UN)
        _threads.release()


def take_for_good(job: str) -> bool:
    """Whether it falls to this process to see to a job until it ends; where there are no locks, to each of them.

    A process that it forks would hold on to it after its end.
    """
    lock = _lock(job)
    if lock is None:
        return True
    try:
        _change(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _change(lock: int, to: int) -> None:
    """Raises BlockingIOError where it is not to wait, and would."""
    try:
        fcntl.flock(lock, to)
    except BlockingIOError:
        raise
    except OSError:  # of a file system without locks: SQLite has its own
        pass


@cache
def _lock(what: str) -> int | None:
    """The open file that is locked, beside the database, whose name ends on what it is for.

    None for a database in memory, and where there can be none.
    """
    path = Path(connection.settings_dict["NAME"])
    if fcntl is None or connection.vendor != "sqlite" or not path.is_file():
        return None
    try:
        like = path.stat()
        beside = path.with_name(f"{path.name}-{what}")
        lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, like.st_mode & 0o777)
        if os.geteuid() == 0:  # as SQLite does it, so that the server's own user may open it too
            os.fchown(lock, like.st_uid, like.st_gid)
    except OSError as error:
        logger.warning("Processes cannot lock a file beside %s, and are slower for it: %s", path, error)
        return None
    return lock


def _forget() -> None:
    """A lock that a process is forked with would be one with its parent's, or held by a thread that is not there."""
    global _threads
    _lock.cache_clear()
    _threads = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
