"""SQL for the paths on which Django's own way costs more than the answer: compiled once, on the driver's cursor."""

from __future__ import annotations

import selectors
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from operator import methodcaller
from typing import Any

from django.db import DEFAULT_DB_ALIAS, InterfaceError, NotSupportedError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet

_PLACEHOLDER = "\x00the value asked for"


# Whose errors Django's cursor passes on as they are.
_DRIVERS = {"sqlite", "postgresql"}

# For one look at one socket: without the descriptor of its own that the default has, or on Windows the default.
_Selector = getattr(selectors, "PollSelector", selectors.DefaultSelector)


class Statement:
    """SQL with %s for each parameter and no other percent sign. PostgreSQL keeps its plan for it."""

    def __init__(self, sql: str):
        self.sql = sql

    @cached_property
    def _on_sqlite(self) -> str:
        return self.sql.replace("%s", "?")

    @cached_property
    def numbered(self) -> str:
        """With $1 for the first parameter, as PostgreSQL itself has it."""
        first, *others = self.sql.split("%s")
        return first + "".join(f"${number}{other}" for number, other in enumerate(others, 1))

    def first_row(self, database: BaseDatabaseWrapper, parameters: Sequence[Any]) -> Sequence[Any] | None:
        return self._run(database, parameters, _fetched)

    def rows(self, database: BaseDatabaseWrapper, parameters: Sequence[Any]) -> list[Sequence[Any]]:
        return self._run(database, parameters, _all_fetched)

    def last_id(self, database: BaseDatabaseWrapper, parameters: Sequence[Any]) -> int | None:
        """The id of the row that it inserted, as drivers tell it who have no RETURNING; None if it inserted none."""
        return self._run(database, parameters, _last_id)

    def _run(self, database: BaseDatabaseWrapper, parameters: Sequence[Any], read: Callable[[Any], Any]) -> Any:
        """On the driver's own cursor: Django's costs as much again as the statement, and serves those who watch."""
        if database.force_debug_cursor or database.execute_wrappers or database.vendor not in _DRIVERS:
            with database.cursor() as cursor:
                cursor.execute(self.sql, parameters)
                return read(cursor)
        if database.connection is None:
            database.ensure_connection()
        database.validate_no_broken_transaction()
        with database.wrap_database_errors:
            if database.vendor == "postgresql":
                return self._run_on_postgresql(database, parameters, read)
            return read(database.connection.execute(self._on_sqlite, parameters))

    def _run_on_postgresql(
        self, database: BaseDatabaseWrapper, parameters: Sequence[Any], read: Callable[[Any], Any]
    ) -> Any:
        from psycopg import Cursor  # only there with PostgreSQL

        # Django's cursors write the values into the SQL, and so have it planned anew each time, which costs more than
        # to run it.
        with Cursor(database.connection) as cursor:
            cursor.execute(self.sql, parameters, prepare=True)
            return read(cursor)


def rows_together(
    database: BaseDatabaseWrapper, asked: Sequence[tuple[Statement, Sequence[Any]]]
) -> list[list[Sequence[Any]]]:
    """The rows of each statement with its parameters, on PostgreSQL: all done or none, and waited for but once."""
    try:
        return _rows_together(database, asked)
    except NotSupportedError:  # of a plan that a migration outdated; none was done
        if database.in_atomic_block:
            raise
        database.close()
        return _rows_together(database, asked)


def _rows_together(
    database: BaseDatabaseWrapper, asked: Sequence[tuple[Statement, Sequence[Any]]]
) -> list[list[Sequence[Any]]]:
    if len(asked) == 1:
        ((statement, parameters),) = asked
        return [statement.rows(database, parameters)]
    import psycopg  # only there with PostgreSQL

    database.ensure_connection()
    database.validate_no_broken_transaction()
    driver = database.connection
    with database.wrap_database_errors, ExitStack() as cursors:
        answers = [cursors.enter_context(psycopg.Cursor(driver)) for _ in asked]
        try:
            # Not driver.transaction(), which waits for the answers to BEGIN and to COMMIT.
            with driver.pipeline():
                if not database.in_atomic_block:
                    driver.execute("BEGIN")
                for cursor, (statement, parameters) in zip(answers, asked, strict=True):
                    cursor.execute(statement.sql, parameters, prepare=True)
                if not database.in_atomic_block:
                    driver.execute("COMMIT")
        except BaseException:
            if not database.in_atomic_block:
                with suppress(psycopg.Error):  # where the connection itself was lost
                    # Not driver.rollback(), after which PostgreSQL would have forgotten all prepared statements.
                    driver.pgconn.exec_(b"ROLLBACK")
            raise
        return [cursor.fetchall() for cursor in answers]


def is_trouble(error: Exception) -> bool:
    """Whether an error is the database's own, whatever it was asked."""
    return isinstance(error, (OperationalError, InterfaceError)) or takes_no_writes(error)


def takes_no_writes(error: Exception) -> bool:
    """Whether PostgreSQL says that it can only be read, as after a failover to another host."""
    return getattr(error.__cause__, "sqlstate", None) == "25006"


def leave() -> None:
    """Close this thread's connection, so that the next one leads to where writing goes on."""
    database = connections[DEFAULT_DB_ALIAS]
    if not database.in_atomic_block:
        database.close()


def was_dropped(database: BaseDatabaseWrapper) -> bool:
    """Whether PostgreSQL has ended a connection since it was used last. (Or has sent something else meanwhile.)

    To be asked before a statement that must not be tried twice: it costs a look at the socket, and no answer.
    """
    if database.connection is None:
        return False
    if database.connection.closed:
        return True
    with _Selector() as socket:
        socket.register(database.connection.fileno(), selectors.EVENT_READ)
        return bool(socket.select(0))


_fetched = methodcaller("fetchone")
_all_fetched = methodcaller("fetchall")


def _last_id(cursor: Any) -> int | None:
    return cursor.lastrowid if cursor.rowcount else None


class Prepared:
    """A query of the ORM with one text parameter, compiled once.

    build: the queryset for a value of the parameter, ended by `values_list`. Its SQL may depend on the
    database, not on the value.
    """

    def __init__(self, build: Callable[[str], QuerySet]):
        self._build = build

    @cached_property
    def _compiled(self) -> tuple[Statement, tuple[Any, ...], list[tuple[int, Any, Callable[..., Any]]]]:
        """The statement, its parameters, and for columns that need it: position, expression and converter."""
        compiler = self._build(_PLACEHOLDER).query.get_compiler(DEFAULT_DB_ALIAS)
        sql, parameters = compiler.as_sql()
        expressions = [expression for expression, *_ in compiler.select]
        converters = [
            (position, expression, convert)
            for position, (converts, expression) in compiler.get_converters(expressions).items()
            for convert in converts
        ]
        return Statement(sql), tuple(parameters), converters

    def first(self, value: str) -> list[Any] | None:
        """The first row for a value, None when there is none.

        A kept connection may have died since it was used last. Django would ask it whether it lives, which costs as
        much as asking what is to be known; so that is asked, and if it fails, once more on a new connection.
        """
        database = connections[DEFAULT_DB_ALIAS]
        database.health_check_done = True
        try:
            return self._ask(value, database)
        except (OperationalError, InterfaceError, NotSupportedError):  # the last of plans that a migration outdated
            if database.in_atomic_block:
                raise
            database.close()
            return self._ask(value, database)

    def _ask(self, value: str, database: BaseDatabaseWrapper) -> list[Any] | None:
        statement, parameters, converters = self._compiled
        row = statement.first_row(database, [value if each == _PLACEHOLDER else each for each in parameters])
        if row is None:
            return None
        values = list(row)
        for position, expression, convert in converters:
            values[position] = convert(values[position], expression, database)
        return values
