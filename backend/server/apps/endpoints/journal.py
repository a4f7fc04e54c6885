"""Record answered requests: durably, before anybody sees the answer, and together with those who wait.

A commit costs far more than a row. So whichever thread may write next writes for every thread that waits,
in one transaction, and each gets the ids of its own rows.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from django.db import DEFAULT_DB_ALIAS, InterfaceError, OperationalError, connection, connections, models, transaction

from apps.endpoints.json_text import dumps
from apps.endpoints.models import MLRequest
from apps.endpoints.premise import HOLDS, Premise
from apps.endpoints.sql import Statement, is_trouble, leave, rows_together, takes_no_writes, was_dropped
from apps.endpoints.turns import NotFree, in_turn

if TYPE_CHECKING:
    import pyarrow as pa
    from psycopg import Copy

# More rows than this are written by themselves: others need not wait for them, and would save little.
SHARED_ROWS = 100
# In one statement. SQLite may take no more than 999 values. PostgreSQL keeps a plan for each number of rows, which is
# large for many, and to plan anew each time takes it longer than several statements do.
ROWS_OF_A_STATEMENT = {"sqlite": 100, "postgresql": 16}


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


_CREATED_AT = NewRequest._fields.index("created_at")


class NewRequests(NamedTuple):
    """Many answered requests: by request what differs, with its JSON as text, and what they share."""

    input_data: Sequence[str] | pa.Array
    full_response: Sequence[str]
    response: Sequence[str]
    probability: Sequence[float]
    created_at: datetime
    latency_ms: float
    customer_key: Sequence[str]
    parent_mlalgorithm_id: int


# As PostgreSQL's COPY reads them; the first first, as the others make it.
_ESCAPES = {"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"}

Row = Sequence[Any]

T = TypeVar("T")


class Entry:
    """The rows of one call; `ids` or `error` once they were written or refused.

    premise: of each of the rows, if they have one; their ids are None where it did not hold.
    """

    def __init__(self, rows: list[Row], premise: Premise | None = None):
        self.rows = rows
        self.premise = premise
        self.ids: Sequence[int | None] | None = None
        self.error: Exception | None = None
        self.writes = False  # whether its thread is the one that writes
        self.turn = threading.Lock()  # let go when the entry is settled, or when its thread is to write
        self.turn.acquire()

    @property
    def is_settled(self) -> bool:
        return self.ids is not None or self.error is not None


class Journal:
    """Writes the entries of all threads of a process, one transaction after the other."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: list[Entry] = []
        self._someone_writes = False

    def record(self, requests: Sequence[NewRequest]) -> Sequence[int]:
        """The ids of the requests, in their order, once all of them are committed; none is recorded on an error.

        Within a transaction of the caller they are part of it. Raises django.db.Error.
        """
        if connection.in_atomic_block or len(requests) > SHARED_ROWS:
            return insert(requests)
        return self._settled(Entry(prepared(requests)))

    def can_record_if(self) -> bool:
        """Whether this thread's connection is one on which `record_if` works, and open as far as can be seen.

        One that has failed or served its time is closed first, as Django does it before it handles a request.
        """
        database = connections[DEFAULT_DB_ALIAS]
        if not database.in_atomic_block:
            database.close_if_unusable_or_obsolete()
        return database.vendor == "sqlite" or (database.vendor == "postgresql" and not was_dropped(database))

    def close_if_due(self) -> None:
        """Close this thread's connection if it has served its time, as Django does it after a request."""
        database = connections[DEFAULT_DB_ALIAS]
        if database.close_at is not None and not database.in_atomic_block:
            database.close_if_unusable_or_obsolete()

    def record_if(self, premise: Premise, request: NewRequest) -> int | None:
        """The id of the request once it is committed; None, and nothing recorded, if the premise does not hold.

        On SQLite and PostgreSQL only. Raises django.db.Error.
        """
        database = connections[DEFAULT_DB_ALIAS]
        entry = conditional(premise, request, database.ops.adapt_datetimefield_value)
        if database.in_atomic_block:
            return _insert(entry.rows, premise)[0]
        return self._settled(entry)[0]

    def _settled(self, entry: Entry) -> Sequence[int | None]:
        """The ids of an entry's rows, after this thread or another has written them."""
        try:
            with self._mutex:
                self._waiting.append(entry)
                entry.writes, self._someone_writes = not self._someone_writes, True
            if not entry.writes:
                entry.turn.acquire()
        except BaseException:
            self._give_up(entry)
            raise
        if not entry.is_settled:
            self._write_all_that_wait()
        if entry.error is not None:
            raise entry.error
        return entry.ids

    def _give_up(self, entry: Entry) -> None:
        """The entry's thread was interrupted while it waited. If it was its turn to write, it writes for the others."""
        with self._mutex:
            if entry in self._waiting:
                self._waiting.remove(entry)
        if entry.writes and not entry.is_settled:
            self._write_all_that_wait()

    def _write_all_that_wait(self) -> None:
        """Settle whatever waits, one's own entry included, and then let the first of those that came since write."""
        group: list[Entry] = []
        try:
            with self._mutex:
                group, self._waiting = self._waiting, []
            if group:
                settle(group)
        finally:
            with self._mutex:
                next_one = self._waiting[0] if self._waiting else None
                self._someone_writes = next_one is not None
                if next_one:
                    next_one.writes = True
                    next_one.turn.release()
            for entry in group:
                if not entry.is_settled:
                    entry.error = OperationalError("The thread that wrote this was stopped.")
                entry.turn.release()


def conditional(premise: Premise, request: NewRequest, adapted_time: Callable[[datetime], Any]) -> Entry:
    """What is recorded if the premise holds."""
    return Entry([_row(request, adapted_time)], premise)


def settle(group: list[Entry], when: Callable[[Callable[[], T]], T] = in_turn) -> None:
    """Write the rows of entries in one transaction, and give each its ids or its error.

    when: in_turn or at_once. Raises NotFree, and has written nothing, if it is not in_turn and would have to wait.
    """
    try:
        ids_of_entries = when(lambda: _insert_entries(group))
    except NotFree:
        raise
    except Exception as error:
        if is_trouble(error):  # and so everybody's
            for entry in group:
                entry.error = type(error)(*error.args)
                entry.error.__cause__ = error.__cause__
            if takes_no_writes(error):
                leave()
            return
        if len(group) == 1:
            group[0].error = error
            return
        if when is not in_turn:
            raise NotFree from error  # one after the other they take longer
        for entry in group:  # somebody's rows; the others shall not suffer for them
            settle([entry])
    else:
        for entry, ids in ids_of_entries:
            entry.ids = ids


def _insert_entries(group: list[Entry]) -> list[tuple[Entry, Sequence[int | None]]]:
    """Insert the rows of entries in one transaction; returns each entry with the ids of its rows."""
    if len(group) == 1:
        return [(group[0], _insert(group[0].rows, group[0].premise))]
    insertion = Insertion(group)
    return insertion.ids_of_entries(_insert_together(insertion.rows_of))


class Insertion:
    """The rows of several entries, by their premises."""

    def __init__(self, group: Iterable[Entry]):
        self._entries_of: dict[Premise | None, list[Entry]] = defaultdict(list)
        for entry in group:
            self._entries_of[entry.premise].append(entry)
        self.rows_of: dict[Premise | None, list[Row]] = {
            premise: [row for entry in entries for row in entry.rows] for premise, entries in self._entries_of.items()
        }

    def ids_of_entries(self, ids_of: Iterable[Sequence[int | None]]) -> list[tuple[Entry, Sequence[int | None]]]:
        """Each entry with those of its rows, given those of each premise's."""
        found = []
        for entries, ids in zip(self._entries_of.values(), ids_of, strict=True):
            of_entries = iter(ids)
            found += [(entry, list(islice(of_entries, len(entry.rows)))) for entry in entries]
        return found


journal = Journal()


def insert(requests: Sequence[NewRequest]) -> Sequence[int]:
    """Record requests in a transaction of their own, or of the caller; returns their ids. Raises django.db.Error."""
    return _insert(prepared(requests))


def prepared_in_bulk(some: Sequence[NewRequests]) -> list[Row] | pa.Array:
    """What `insert_in_bulk` takes. Needs no connection, so that another thread can make it."""
    if connection.vendor == "postgresql":
        import pyarrow as pa

        return pa.concat_arrays(map(_lines, some))
    return list(chain.from_iterable(map(_rows, some)))


def insert_in_bulk(prepared: list[Row] | pa.Array, told: Callable[[Sequence[int]], object]) -> None:
    """Insert requests in the caller's transaction. Raises django.db.Error.

    told: given their ids as soon as they are known, where it can be before all are inserted.
    """
    if not len(prepared):
        told([])
    elif connection.vendor == "postgresql":
        with _copying(len(prepared)) as (ids, copy):
            told(ids)
            copy.write(_numbered(ids, prepared))
    elif connection.vendor == "sqlite":
        _insert_by_statements_of_many(prepared, may_leave_a_part=True, told=told)
    else:
        told(_insert_one_by_one(prepared))


def _insert(rows: list[Row], premise: Premise | None = None) -> Sequence[int | None]:
    """Insert rows in one transaction; returns the id of each, all None where their premise fails."""
    (ids,) = _insert_together({premise: rows}) if rows else ([],)
    return ids


def _insert_together(rows_of: Mapping[Premise | None, list[Row]]) -> list[Sequence[int | None]]:
    """`_insert` for the rows of several premises, all in one transaction."""
    vendor = connection.vendor  # once, since each look goes through a proxy
    if vendor == "postgresql":
        return _insert_together_in_postgresql(rows_of)
    most = ROWS_OF_A_STATEMENT.get(vendor, 1)
    is_one_statement = len(rows_of) == 1 and all(len(rows) <= most for rows in rows_of.values())
    with nullcontext() if is_one_statement else transaction.atomic():
        if vendor == "sqlite":
            undoes = not is_one_statement
            return [
                _insert_by_statements_of_many(rows, premise, may_leave_a_part=undoes)
                for premise, rows in rows_of.items()
            ]
        return [_insert_one_by_one(rows) for rows in rows_of.values()]


def _insert_one_by_one(rows: Sequence[Row]) -> list[int]:
    database = connections[DEFAULT_DB_ALIAS]
    return [_insert_statement(1).last_id(database, row) for row in rows]


# A statement for each row would cost a wait each: for PostgreSQL's answer, or for one's turn in Python, since another
# thread takes over at its end.


def _insert_by_statements_of_many(
    rows: Sequence[Row],
    premise: Premise | None = None,
    *,
    may_leave_a_part: bool,
    told: Callable[[Sequence[int]], object] = lambda ids: None,
) -> Sequence[int | None]:
    """In SQLite nobody else writes during a transaction, so the ids that it gives out follow each other.

    may_leave_a_part: of what a row that is refused ends, as the transaction is then undone.
    """
    database = connections[DEFAULT_DB_ALIAS]
    ids, last_id = range(0), 0
    for some, statement, values in _statements(rows, premise, may_leave_a_part):
        last_id = statement.last_id(database, values)
        if last_id is None:
            return [None] * len(rows)
        if not ids:
            first_id = last_id - len(some) + 1
            ids = range(first_id, first_id + len(rows))
            told(ids)
    if last_id != ids[-1]:
        raise InterfaceError(f"{len(rows)} rows were given the ids from {ids[0]} to {last_id}.")
    return ids


def _insert_together_in_postgresql(rows_of: Mapping[Premise | None, list[Row]]) -> list[Sequence[int | None]]:
    count = sum(map(len, rows_of.values()))
    if count > SHARED_ROWS and [*rows_of] == [None]:
        with transaction.atomic(), _copying(count) as (ids, copy):
            for pk, row in zip(ids, rows_of[None], strict=True):
                copy.write_row([pk, *row])
        return [ids]
    # Without a savepoint a refused row would end the caller's transaction, as one by itself does.
    with transaction.atomic() if connection.in_atomic_block and count > 1 else nullcontext():
        pieces = Pieces(rows_of)
        answers = rows_together(connections[DEFAULT_DB_ALIAS], pieces.asked)
        return pieces.ids([pk for (pk,) in answer] for answer in answers)


class Pieces:
    """Rows of several premises for PostgreSQL. asked: the statements, each with its values."""

    def __init__(self, rows_of: Mapping[Premise | None, list[Row]]):
        self._premises = [*rows_of]
        self._pieces: list[tuple[Premise | None, int]] = []
        self.asked: list[tuple[Statement, Sequence[Any]]] = []
        for premise, rows in rows_of.items():
            for some, statement, values in _statements(rows, premise):
                self._pieces.append((premise, len(some)))
                self.asked.append((statement, values))

    def ids(self, answers: Iterable[Iterable[int]]) -> list[Sequence[int | None]]:
        """Of the rows of each premise, given those that each statement has answered.

        It draws them for its rows in the order that it asks for; that of its answer is open. Raises InterfaceError.
        """
        ids_of: dict[Premise | None, list[int | None]] = {premise: [] for premise in self._premises}
        for (premise, count), answer in zip(self._pieces, answers, strict=True):
            ids = sorted(answer) or [None] * count
            if len(ids) != count:
                raise InterfaceError(f"{count} rows were given {len(ids)} ids.")
            ids_of[premise] += ids
        return [*ids_of.values()]


def _statements(
    rows: Sequence[Row], premise: Premise | None, may_leave_a_part: bool = False
) -> Iterator[tuple[Sequence[Row], Statement, Sequence[Any]]]:
    """Some of the rows after others, the statement that inserts them, and its values."""
    # At one moment for all of them, so that the premise holds for all or none.
    values_of_premise = premise.values(max(row[_CREATED_AT] for row in rows)) if premise else []
    most = ROWS_OF_A_STATEMENT[connection.vendor]
    for begin in range(0, len(rows), most):
        some = rows[begin : begin + most]
        statement = _insert_statement(len(some), premise is not None, may_leave_a_part)
        yield some, statement, [*chain.from_iterable(some), *values_of_premise]


@cache
def _insert_statement(rows: int, are_conditional: bool = False, may_leave_a_part: bool = False) -> Statement:
    """For the values of so many rows, and then those of their premise. Where there is RETURNING it gives the ids."""
    names = NewRequest._fields
    # Within a transaction SQLite copies each page that a statement of many rows changes, to undo it if one is refused,
    # which takes as long as the rows. With OR FAIL it does not, and the rows before that one stay.
    conflict = " OR FAIL" if may_leave_a_part and connection.vendor == "sqlite" else ""
    insert, returning = f"INSERT{conflict} INTO {_table_and_columns()}", ""
    values = ["%s"] * len(names)
    is_postgresql = connection.vendor == "postgresql"
    if is_postgresql:
        returning = " RETURNING id"
        # It does not see from a SELECT's place what types its values are to have.
        values = [f"CAST(%s AS {_type_of(MLRequest._meta.get_field(name))})" for name in names]
    row = ", ".join(values)
    where = f" WHERE {HOLDS}" if are_conditional else ""
    if rows == 1:
        return Statement(f"{insert} SELECT {row}{where}{returning}")
    if not (are_conditional or is_postgresql):
        return Statement(f"{insert} VALUES {', '.join([f'({row})'] * rows)}")
    places = ", ".join(f"({row}, {place})" for place in range(rows))
    *columns, place = (f"column{number}" for number in range(1, len(names) + 2))
    select = f"SELECT {', '.join(columns)} FROM (VALUES {places}) AS asked{where} ORDER BY {place}"
    return Statement(f"{insert} {select}{returning}")


@contextmanager
def _copying(count: int) -> Iterator[tuple[list[int], Copy]]:
    """Ids for so many rows, and what takes the rows, each with its id first, and inserts them in the end.

    COPY tells no ids, so these are drawn first, and each is certain to be its own row's.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT array_agg(nextval((SELECT pg_get_serial_sequence(%s, 'id')::regclass)))"
            " FROM generate_series(1, %s)",
            [MLRequest._meta.db_table, count],
        )
        (ids,) = cursor.fetchone()
        with connection.wrap_database_errors, cursor.copy(f"COPY {_table_and_columns('id')} FROM STDIN") as copy:
            yield ids, copy


def _rows(requests: NewRequests) -> Iterator[Row]:
    texts = requests.input_data
    count = len(texts)
    columns = [
        texts if isinstance(texts, list) else texts.to_pylist(),
        requests.full_response,
        requests.response,
        requests.probability,
        [connection.ops.adapt_datetimefield_value(requests.created_at)] * count,
        [requests.latency_ms] * count,
        requests.customer_key,
        [requests.parent_mlalgorithm_id] * count,
        [None] * count,
    ]
    return zip(*columns, strict=True)


def _lines(requests: NewRequests) -> pa.Array:
    """The requests as PostgreSQL's COPY reads them, a line each, but for the id at its beginning.

    By pyarrow, beside which other threads can run.
    """
    import pyarrow as pa
    from pyarrow import compute

    def escaped(texts: Iterable[str] | pa.Array) -> pa.Array:
        array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
        characters = array.buffers()[2]
        all_of_them = characters.to_pybytes() if characters else b""
        for character, escape in _ESCAPES.items():
            if character.encode() in all_of_them:
                array = compute.replace_substring(array, character, escape)
        return array

    values = [
        "",
        escaped(requests.input_data),
        escaped(requests.full_response),
        escaped(requests.response),
        pa.array(requests.probability, pa.float64()).cast(pa.string()),
        str(connection.ops.adapt_datetimefield_value(requests.created_at)),
        str(requests.latency_ms),
        escaped(requests.customer_key),
        str(requests.parent_mlalgorithm_id),
        pa.scalar(None, pa.string()),
    ]
    return compute.binary_join_element_wise(*values, "\t", null_handling="replace", null_replacement=r"\N")


def _numbered(ids: Sequence[int], lines: pa.Array) -> memoryview:
    """`_lines` with their ids."""
    import pyarrow as pa
    from pyarrow import compute

    numbers = pa.array(ids, pa.int64()).cast(pa.string())
    _, offsets, characters = compute.binary_join_element_wise(numbers, lines, "\n", "").buffers()
    return memoryview(characters)[: memoryview(offsets).cast("B").cast("i")[len(ids)]]


def prepared(requests: Sequence[NewRequest]) -> list[Row]:
    """The values of requests as the database takes them, in the order of the fields."""
    adapted_time = cache(connection.ops.adapt_datetimefield_value)  # the rows of a call share one moment
    return [_row(request, adapted_time) for request in requests]


def _row(request: NewRequest, adapted_time: Callable[[datetime], Any]) -> Row:
    return [
        dumps(request.input_data),
        dumps(request.full_response),
        request.response,
        request.probability,
        adapted_time(request.created_at),
        request.latency_ms,
        request.customer_key,
        request.parent_mlalgorithm_id,
        request.abtest_id,
    ]


def _type_of(field: models.Field) -> str:
    # A cast to varchar(n) would cut a longer text where an INSERT refuses it.
    return "text" if isinstance(field, models.CharField) else field.db_type(connection)


def _table_and_columns(*more: str) -> str:
    column_of = {field.attname: field.column for field in MLRequest._meta.concrete_fields}
    names = [column_of[name] for name in (*more, *NewRequest._fields)]
    quote = connection.ops.quote_name
    return f"{quote(MLRequest._meta.db_table)} ({', '.join(map(quote, names))})"
