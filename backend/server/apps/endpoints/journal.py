"""Record answered requests: durably, before anybody sees the answer, and together with those who wait.

A commit costs far more than a row. So whichever thread may write next writes for every thread that waits,
in one transaction, and each gets the ids of its own rows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from django.db import InterfaceError, OperationalError, connection, transaction
from django.db.models import DateTimeField, JSONField

from apps.endpoints.models import MLRequest

# More rows than this are written by themselves: others need not wait for them, and would save little.
SHARED_ROWS = 100
# So that a statement stays well below what databases accept.
ROWS_PER_STATEMENT = 1000


class NewRequest(NamedTuple):
    """One answered request; the fields are those of MLRequest."""

    input_data: Mapping[str, Any]
    full_response: Mapping[str, Any]
    response: str
    probability: float
    created_at: datetime
    latency_ms: float
    customer_key: str
    parent_mlalgorithm_id: int
    abtest_id: int | None


Row = list[Any]


class _Entry:
    """The rows of one call; `ids` or `error` once they were written or refused."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.ids: list[int] | None = None
        self.error: Exception | None = None
        self.turn = threading.Lock()  # let go when the entry is settled, or when its thread is to write
        self.turn.acquire()

    @property
    def is_settled(self) -> bool:
        return self.ids is not None or self.error is not None


class Journal:
    """Writes the entries of all threads of a process, one transaction after the other."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: list[_Entry] = []
        self._someone_writes = False

    def record(self, requests: Sequence[NewRequest]) -> list[int]:
        """The ids of the requests, in their order, once all of them are committed; none is recorded on an error.

        Within a transaction of the caller they are part of it. Raises django.db.Error.
        """
        rows = [_prepared(request) for request in requests]
        if connection.in_atomic_block or len(rows) > SHARED_ROWS:
            return _insert(rows)
        entry = _Entry(rows)
        with self._mutex:
            self._waiting.append(entry)
            waits, self._someone_writes = self._someone_writes, True
        if waits:
            entry.turn.acquire()
        if not entry.is_settled:
            self._write_all_that_wait()
        if entry.error is not None:
            raise entry.error
        return entry.ids

    def _write_all_that_wait(self) -> None:
        """Settle whatever waits, one's own entry included, and then let the first of those that came since write."""
        with self._mutex:
            group, self._waiting = self._waiting, []
        try:
            _settle(group)
        finally:
            with self._mutex:
                next_one = self._waiting[0] if self._waiting else None
                self._someone_writes = next_one is not None
            if next_one:
                next_one.turn.release()
            for entry in group:
                if not entry.is_settled:
                    entry.error = OperationalError("The thread that wrote this was stopped.")
                entry.turn.release()


def _settle(group: list[_Entry]) -> None:
    try:
        ids = iter(_insert([row for entry in group for row in entry.rows]))
    except (OperationalError, InterfaceError) as error:  # the database's trouble, and so everybody's
        for entry in group:
            entry.error = type(error)(*error.args)
    except Exception as error:
        if len(group) == 1:
            group[0].error = error
            return
        for entry in group:  # somebody's rows; the others shall not suffer for them
            _settle([entry])
    else:
        for entry in group:
            entry.ids = [next(ids) for _ in entry.rows]


journal = Journal()


def _insert(rows: list[Row]) -> list[int]:
    """Insert rows in one transaction; returns the id of each."""
    if len(rows) == 1:  # a statement by itself is one
        return _insert_one_by_one(rows)
    with transaction.atomic():
        if connection.vendor == "postgresql":
            return _insert_with_ids_drawn_first(rows)
        return _insert_one_by_one(rows)


def _insert_one_by_one(rows: list[Row]) -> list[int]:
    """Where the database runs in this process, a statement for each row costs hardly more than one for all."""
    returns_id = connection.vendor == "postgresql"
    statement = _statement(1) + " RETURNING id" * returns_id
    ids = []
    with connection.cursor() as cursor:
        for row in rows:
            cursor.execute(statement, row)
            ids.append(cursor.fetchone()[0] if returns_id else cursor.lastrowid)
    return ids


def _insert_with_ids_drawn_first(rows: list[Row]) -> list[int]:
    """Many rows by one statement. No order is promised for what an INSERT returns, hence the ids come first."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT nextval(pg_get_serial_sequence(%s, 'id')) FROM generate_series(1, %s)",
            [MLRequest._meta.db_table, len(rows)],
        )
        ids = [pk for (pk,) in cursor.fetchall()]
        for start in range(0, len(rows), ROWS_PER_STATEMENT):
            part = range(start, min(start + ROWS_PER_STATEMENT, len(rows)))
            values = [value for index in part for value in (ids[index], *rows[index])]
            cursor.execute(_statement(len(part), with_id=True), values)
    return ids


def _prepared(request: NewRequest) -> Row:
    return [
        value if field is None else field.get_db_prep_save(value, connection)
        for field, value in zip(_fields_to_prepare(), request, strict=True)
    ]


@cache
def _fields_to_prepare() -> list[Any]:
    """For each value the field that puts it in the database's form, None where it has it already."""
    fields = [next(f for f in MLRequest._meta.concrete_fields if f.attname == name) for name in NewRequest._fields]
    return [field if isinstance(field, (DateTimeField, JSONField)) else None for field in fields]


@cache
def _statement(rows: int, with_id: bool = False) -> str:
    names = ["id"] * with_id + [
        field.column
        for name in NewRequest._fields
        for field in MLRequest._meta.concrete_fields
        if field.attname == name
    ]
    quote = connection.ops.quote_name
    values = ", ".join([f"({', '.join(['%s'] * len(names))})"] * rows)
    return f"INSERT INTO {quote(MLRequest._meta.db_table)} ({', '.join(map(quote, names))}) VALUES {values}"
