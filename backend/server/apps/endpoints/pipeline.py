"""Statements for PostgreSQL for whose answers an event loop waits beside all else, by psycopg's own libpq.

A cursor of psycopg would wait in a thread, to which rows, and from which ids would have to be handed.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Sequence
from itertools import count
from typing import Any

import psycopg
from psycopg.pq import DiagnosticField, ExecStatus, PGresult

from apps.endpoints.sql import Statement

# Of each statement's rows the first column, as PostgreSQL writes it.
Answers = list[list[bytes]]

# What PostgreSQL says of a prepared statement that it no longer has, or that a migration has outdated.
_NO_LONGER_PREPARED = {b"26000", b"0A000"}


class Pipeline:
    """The statements of one call after another on a connection that is free, in autocommit and nobody else's meanwhile.

    Those of one call are one transaction: so PostgreSQL takes what comes before a Sync.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, driver: psycopg.Connection):
        self.driver = driver
        self._loop = loop
        self._libpq = driver.pgconn
        # uvloop gives up a socket at the first sign of an error, when there may be more to read. It looks at the
        # selector in its place.
        self._selector = selectors.DefaultSelector()
        self._socket = self._selector.register(self._libpq.socket, selectors.EVENT_READ).fd
        self._names: dict[str, bytes] = {}  # of prepared statements
        self._numbers = count()
        self._preparing: list[str] = []
        self._answers: Answers = []
        self._is_refused = self._is_sending = False
        self._told: asyncio.Future[Answers | None] | None = None

    def close(self) -> None:
        """Nothing may be on its way. The connection stays as it is."""
        self._selector.close()

    def ask(self, asked: Sequence[tuple[Statement, Sequence[Any]]]) -> asyncio.Future[Answers | None]:
        """None when PostgreSQL refuses a statement, and so does none of them.

        An exception of the future: the connection is lost, and whether they were done is unknown. One raised here:
        nothing was sent, as this is no connection, loop or value for it.
        """
        texts = [(statement, [_text(value) for value in values]) for statement, values in asked]
        self._loop.add_reader(self._selector.fileno(), self._go_on)
        try:
            self._libpq.enter_pipeline_mode()
        except BaseException:
            self._loop.remove_reader(self._selector.fileno())
            raise
        self._preparing, self._answers, self._is_refused = [], [], False
        self._told = told = self._loop.create_future()
        try:
            for statement, values in texts:
                self._send(statement, values)
            self._libpq.pipeline_sync()
            self._flush()
        except Exception as error:  # of what was sent, a part may have arrived
            self._end(error)
        return told

    def _send(self, statement: Statement, values: Sequence[bytes | None]) -> None:
        sql = statement.numbered
        if self.driver.prepare_threshold is None:  # as it is told who has a pool between that takes no prepared ones
            self._libpq.send_query_params(sql.encode(), values)
            return
        if sql not in self._names:
            self._names[sql] = b"_loop_%d" % next(self._numbers)
            self._preparing.append(sql)
            self._libpq.send_prepare(self._names[sql], sql.encode())
        self._libpq.send_query_prepared(self._names[sql], values)

    def _flush(self) -> None:
        """Send what the socket takes. Until that is all, its room is waited for as well."""
        was_sending, self._is_sending = self._is_sending, bool(self._libpq.flush())
        if self._is_sending != was_sending:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._is_sending else 0)
            self._selector.modify(self._socket, events)

    def _go_on(self) -> None:
        try:
            if self._is_sending:
                self._flush()
            self._libpq.consume_input()
            is_over = False
            while not self._libpq.is_busy():
                result = self._libpq.get_result()
                if result is None:  # the end of a statement, or, before the Sync, of the connection
                    if is_over:
                        raise psycopg.OperationalError("The connection is lost.")
                    is_over = True
                    continue
                is_over = False
                if result.status == ExecStatus.PIPELINE_SYNC:
                    self._libpq.exit_pipeline_mode()
                    self._end()
                    return
                self._take(result)
        except Exception as error:
            self._end(error)

    def _take(self, result: PGresult) -> None:
        if result.status == ExecStatus.TUPLES_OK:
            self._answers.append([result.get_value(row, 0) for row in range(result.ntuples)])
        elif result.status == ExecStatus.COMMAND_OK:
            del self._preparing[0]
        elif result.status == ExecStatus.PIPELINE_ABORTED:
            self._is_refused = True
        elif result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED) == b"ERROR":
            self._is_refused = True
            if result.error_field(DiagnosticField.SQLSTATE) in _NO_LONGER_PREPARED:
                self._names.clear()
        else:  # PostgreSQL may have gone on, unless it says that this ended the transaction
            raise psycopg.OperationalError(result.get_error_message())

    def _end(self, error: Exception | None = None) -> None:
        for sql in self._preparing:  # which came to nothing
            self._names.pop(sql, None)
        self._loop.remove_reader(self._selector.fileno())
        told, self._told = self._told, None
        if error is None:
            told.set_result(None if self._is_refused else self._answers)
        else:
            self._libpq.finish()
            told.set_exception(error)


def _text(value: Any) -> bytes | None:
    """A value as PostgreSQL reads it where the statement says of which type it is. Raises ValueError."""
    if value is None:
        return None
    text = (value if type(value) is str else str(value)).encode()
    if b"\0" in text:  # libpq would take it for the end
        raise ValueError("PostgreSQL takes no NUL.")
    return text
