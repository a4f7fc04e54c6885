"""Record what an event loop answers: all that comes within one round of it in one transaction.

Where nobody is kept waiting the loop writes by itself, which costs least: into SQLite when nobody else writes, and into
PostgreSQL, for whose answer it need not stop, on a connection that is open. Else a thread does. What the loop answers
meanwhile is written together afterwards.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from django.db import DEFAULT_DB_ALIAS, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from apps.endpoints.journal import Entry, Insertion, NewRequest, Pieces, conditional, journal, settle
from apps.endpoints.premise import Premise
from apps.endpoints.sql import was_dropped
from apps.endpoints.turns import NotFree, at_once, in_turn

if TYPE_CHECKING:
    from apps.endpoints.pipeline import Answers, Pipeline

Group = Sequence[tuple[Entry, "asyncio.Future[int | None]"]]

# PRAGMA synchronous: up to this a commit does not wait for the disk.
_NORMAL = 1


async def record_if(premise: Premise, request: NewRequest) -> int | None:
    """`Journal.record_if` for the running event loop.

    None, and nothing recorded, also where the connection does not serve for that. Raises django.db.Error.
    """
    global _journal
    loop = asyncio.get_running_loop()
    if _journal is None or _journal.loop is not loop:
        _journal = _LoopJournal(loop)
    return await _journal.record_if(premise, request)


class _LoopJournal:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # Under a loop, connections belong to contexts: here to this one, in place of one for each request.
        self._context = contextvars.copy_context()
        self._database: BaseDatabaseWrapper = self._context.run(lambda: connections[DEFAULT_DB_ALIAS])
        self._adapted_time = self._database.ops.adapt_datetimefield_value
        self._driver: Any = None
        self._waits_for_disk = True
        # On PostgreSQL the loop and the thread share the thread's connection: one of them writes at a time.
        self._shared: BaseDatabaseWrapper | None = None
        self._pipeline: Pipeline | None = None
        self._waiting: list[tuple[Entry, asyncio.Future[int | None]]] = []
        self._is_writing = False
        self._for_thread: SimpleQueue[Group] = SimpleQueue()
        threading.Thread(target=self._write_in_thread, name="journal", daemon=True).start()

    async def record_if(self, premise: Premise, request: NewRequest) -> int | None:
        told = self.loop.create_future()
        self._waiting.append((conditional(premise, request, self._adapted_time), told))
        if not self._is_writing:
            self._is_writing = True
            self._write_soon()
        return await told

    def _write_soon(self) -> None:
        """After whatever else has come in this round of the loop."""
        self.loop.call_soon(self._write, context=self._context)

    def _write(self) -> None:
        group, self._waiting = self._waiting, []
        try:
            is_written = self._write_by_itself(group)
        except Exception:
            # NotFree, or of a connection or a value that does not serve, as the thread will find, and tell.
            self._for_thread.put(group)
        else:
            if is_written:
                self._tell(group)

    def _write_by_itself(self, group: Group) -> bool:
        """Whether it is written; else it is on its way. Raises an exception, and writes nothing, if it would wait."""
        if self._database.vendor == "postgresql":
            self._send(group)
            return False
        if self._database.vendor != "sqlite" or self._would_wait():
            raise NotFree
        _settle(group, at_once)
        return True

    def _send(self, group: Group) -> None:
        pipeline = self._free_pipeline()
        insertion = Insertion(entry for entry, _ in group)
        pieces = Pieces(insertion.rows_of)
        told = pipeline.ask(pieces.asked)
        told.add_done_callback(partial(self._take, group, insertion, pieces), context=self._context)

    def _free_pipeline(self) -> Pipeline:
        """Raises NotFree where the thread is to open a connection, or to see whether one still serves."""
        database = self._shared
        if database is None or database.connection is None or database.errors_occurred:
            raise NotFree
        if database.execute_wrappers or database.force_debug_cursor:  # for who watches what is executed
            raise NotFree
        if (database.close_at is not None and time.monotonic() >= database.close_at) or was_dropped(database):
            raise NotFree
        if self._pipeline is None or self._pipeline.driver is not database.connection:
            from apps.endpoints.pipeline import Pipeline  # psycopg is only there with PostgreSQL

            if self._pipeline is not None:
                self._pipeline.close()
            self._pipeline = Pipeline(self.loop, database.connection)
        return self._pipeline

    def _take(self, group: Group, insertion: Insertion, pieces: Pieces, told: asyncio.Future[Answers | None]) -> None:
        try:
            answers = told.result()
            if answers is None:  # it has refused one, and the thread finds out which: others shall not suffer for it
                self._for_thread.put(group)
                return
            for entry, ids in insertion.ids_of_entries(pieces.ids(map(int, answer) for answer in answers)):
                entry.ids = ids
        except Exception as error:
            self._shared.errors_occurred = True  # so that the thread looks at the connection
            _fail(group, error)
        self._tell(group)

    def _would_wait(self) -> bool:
        """Whether commits wait for the disk. From now on none waits for somebody else's."""
        self._database.ensure_connection()
        driver = self._database.connection
        if driver is not self._driver:
            driver.execute("PRAGMA busy_timeout = 0")
            ((synchronous,),) = driver.execute("PRAGMA synchronous")
            self._driver, self._waits_for_disk = driver, synchronous > _NORMAL
        return self._waits_for_disk

    def _write_in_thread(self) -> None:
        self._shared = connections[DEFAULT_DB_ALIAS]
        while True:
            group = self._for_thread.get()
            _settle(group, in_turn)
            self.loop.call_soon_threadsafe(self._tell, group)

    def _tell(self, group: Group) -> None:
        for entry, told in group:
            if told.done():  # who asked was given up
                continue
            if entry.error is not None:
                told.set_exception(entry.error)
            else:
                told.set_result(entry.ids[0])
        if self._waiting:
            self._write_soon()
        else:
            self._is_writing = False


_journal: _LoopJournal | None = None


def _settle(group: Group, when: Callable[..., Any]) -> None:
    """Raises NotFree, and has written nothing, if `when` does."""
    entries = [entry for entry, _ in group]
    try:
        if journal.can_record_if():
            settle(entries, when)
            journal.close_if_due()
        else:
            connections[DEFAULT_DB_ALIAS].close()  # nobody else uses it, who would find out
            for entry in entries:
                entry.ids = [None]
    except NotFree:
        raise
    except Exception as error:  # whatever it is: nobody may wait for ever
        _fail(group, error)


def _fail(group: Group, error: Exception) -> None:
    for entry, _ in group:
        if not entry.is_settled:
            entry.error = OperationalError(f"Recording failed: {error!r}")
