"""Processes that write into one SQLite file take turns.

SQLite lets a writer who finds the file locked sleep for a millisecond or longer and try again, while a row takes a
tenth of that. Here the next one is woken as soon as the file is free. SQLite's own lock still guards the file, from
those too who know nothing of this one.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from types import TracebackType

from django.db import connection

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class _Turn(AbstractContextManager):
    """A lock between processes. Threads of one process must not use it at the same time."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


@cache
def turn_to_write() -> AbstractContextManager:
    """Within it no other process is in its own, if the database is a file of SQLite; else nothing."""
    path = Path(connection.settings_dict["NAME"])
    if fcntl and connection.vendor == "sqlite" and path.is_file():  # and not in memory
        with suppress(OSError):  # SQLite, which needs a file there too, says what is wrong
            return _Turn(path.with_name(f"{path.name}-turn"))
    return nullcontext()


# A lock that a process is forked with would be one with its parent's.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=turn_to_write.cache_clear)
