"""Many tasks of one event loop record at once: each gets its own row's id, and the loop waits for nobody."""

from __future__ import annotations

import json

import pytest

from tests import postgresql, processes

pytestmark = pytest.mark.whole

# What the scripts share.
BEGIN = """
import asyncio, gc, json, os, sqlite3, sys, threading, time
try:
    from uvloop import run  # where there is one, the server has it
except ImportError:
    from asyncio import run
os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"  # as server.asgi does it
from django.contrib.auth.models import User
from django.db import Error, connection
from django.utils import timezone
from knox.models import AuthToken
from apps.endpoints import journal as module, loop_journal
from apps.endpoints.models import MLRequest
from apps.endpoints.premise import Premise
from apps.ml.registry import registry

algorithm = registry.register_run()[0].pk
registry.served("classifier")
now = registry.known("classifier")
token = AuthToken.objects.create(User.objects.create_user("ann"))[0].digest
holds = Premise(token, now.endpoint_id, "classifier", now.newest_step)
fails = holds._replace(newest_step=now.newest_step - 1)
writers, insert = [], module._insert_together

def writing(rows_of):
    writers.append((threading.current_thread().name, sum(map(len, rows_of.values()))))
    return insert(rows_of)

module._insert_together = writing

def row(key, label="1", **customer):
    return module.NewRequest(customer, {}, label, 0.5, timezone.now(), 1.0, key, algorithm, None)

def record(key, premise=holds, label="1", **customer):
    return loop_journal.record_if(premise, row(key, label, **customer))

def own(told):
    return told == list(MLRequest.objects.order_by("pk").values_list("pk", flat=True))

async def longest_pause():
    # Of the loop, in seconds.
    longest, last = 0, time.monotonic()
    for _ in range(50):
        await asyncio.sleep(0.01)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    return longest

def end(**came):
    connection.close()
    sys.stdout.write(json.dumps(came))
"""


@pytest.fixture
def run(trained):
    """What a script says that runs on the database of a URL."""

    def run(url: str, script: str, **settings: str) -> dict[str, object]:
        env = processes.environment(url, trained, **settings)
        processes.manage("migrate", env=env)
        return json.loads(processes.manage("shell", "--no-imports", "-c", BEGIN + script, env=env, timeout=90).stdout)

    return run


@pytest.fixture
def sqlite_url(tmp_path):
    return f"sqlite:///{tmp_path / 'server.sqlite3'}"


MANY = """
TASKS, CALLS = 40, 10
told, refused, unfounded = {}, [], 0

async def client(number):
    global unfounded
    for call in range(CALLS):
        key = f"{number}-{call}"
        try:
            pk = await record(key, fails if call % 5 == 4 else holds, None if number == 0 else "1")
        except Error:
            refused.append(number)
            continue
        if pk is None:
            unfounded += 1
        else:
            told[pk] = key

def others():
    for call in range(CALLS):
        keys = [f"thread-{call}-{number}" for number in range(3)]
        told.update(zip(module.journal.record([row(key) for key in keys]), keys, strict=True))
    connection.close()

async def main():
    await asyncio.gather(*map(client, range(TASKS)), asyncio.to_thread(others))

run(main())
found = dict(MLRequest.objects.values_list("pk", "customer_key"))
end(own=told == found, rows=len(found), refused=sorted(set(refused)), refusals=len(refused), unfounded=unfounded,
    largest=max(rows for _, rows in writers))
"""


def test_each_id_belongs_to_its_own_row_beside_threads_and_what_is_refused(run, database_url):
    came = run(database_url, MANY)

    assert came["own"]
    assert came["rows"] == 39 * 8 + 10 * 3
    # A premise that fails comes first: then there is nothing to refuse.
    assert (came["refused"], came["refusals"], came["unfounded"]) == ([0], 8, 40 * 2)
    assert came["largest"] > 3


WHO_WRITES = """
async def main():
    return await asyncio.gather(*[record(str(key)) for key in range(5)])

run(main())
end(writers=writers)
"""


def test_what_came_together_is_one_transaction_by_the_loop_itself_on_sqlite(run, sqlite_url):
    assert run(sqlite_url, WHO_WRITES)["writers"] == [["MainThread", 5]]


def test_it_waits_for_no_disk(run, sqlite_url):
    assert run(sqlite_url, WHO_WRITES, SQLITE_SYNCHRONOUS="FULL")["writers"] == [["journal", 5]]


WHO_GOES_ON = """
async def main():
    first = await asyncio.gather(*[record(str(key)) for key in range(5)])
    return [*first, *await asyncio.gather(*[record(str(key)) for key in range(40)]), await record("last")]

told = run(main())
driver = loop_journal._journal._shared.connection
prepared = bool(driver and driver.execute("SELECT FROM pg_prepared_statements WHERE name LIKE '_loop%'").rowcount)
end(own=own(told), writers=writers, prepared=prepared)
"""


@pytest.mark.parametrize(
    ("query", "prepared"),
    [("", True), ("?DISABLE_SERVER_SIDE_CURSORS=True", False)],
    ids=["by itself", "behind a pooler, which hands a connection on"],
)
def test_on_postgresql_a_thread_opens_the_connection_and_the_loop_uses_it(run, postgresql_url, query, prepared):
    came = run(postgresql.new_database(postgresql_url) + query, WHO_GOES_ON)

    assert came == {"own": True, "writers": [["journal", 5]], "prepared": prepared}


def test_a_connection_that_is_closed_after_each_use_is_the_threads(run, postgresql_url):
    came = run(postgresql.new_database(postgresql_url) + "?conn_max_age=0", WHO_GOES_ON)

    assert (came["own"], came["writers"]) == (True, [["journal", 5], ["journal", 40], ["journal", 1]])


WHILE_HELD = """
async def main():
    first = await record("first")
    HOLD
    # For two premises, and so by several statements.
    waiting = asyncio.gather(record("second"), record("never", fails))
    longest = await longest_pause()
    was_done = waiting.done()
    LET_GO
    second, never = await waiting
    assert never is None
    return was_done, longest, [first, second, await record("third")]

was_done, longest, told = run(main())
end(was_done=was_done, longest=longest, own=own(told),
    writers=[name for name, _ in writers])
"""
BY_A_PROGRAM = (
    'other = sqlite3.connect(connection.settings_dict["NAME"], isolation_level=None); other.execute("BEGIN IMMEDIATE")',
    'other.execute("ROLLBACK")',
)
BY_A_TURN = (
    "import fcntl; other = open(connection.settings_dict['NAME'] + '-turn', 'a'); fcntl.flock(other, fcntl.LOCK_EX)",
    "other.close()",
)


@pytest.mark.parametrize(("hold", "let_go"), [BY_A_PROGRAM, BY_A_TURN], ids=["another program", "another process"])
def test_while_another_writes_the_loop_goes_on_and_a_thread_waits(run, sqlite_url, hold, let_go):
    came = run(sqlite_url, WHILE_HELD.replace("HOLD", hold).replace("LET_GO", let_go))

    assert not came["was_done"] and came["longest"] < 0.3
    assert came["own"]
    assert came["writers"][-2:] == ["journal", "MainThread"]


LOCKED = """
async def main():
    first = await record("first")
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("LOCK TABLE endpoints_mlrequest")
        # More than goes out at once.
        waiting = asyncio.gather(*[record(str(key), text="x" * 300_000) for key in range(40)], return_exceptions=True)
        await asyncio.sleep(0.5)
        longest = await longest_pause()
        was_done = waiting.done()
        LET_GO
        cursor.execute("ROLLBACK")
    return was_done, longest, first, await waiting, await record("last")

was_done, longest, first, between, last = run(main())
connection.close()
failed = [type(one).__name__ for one in between if isinstance(one, Exception)]
told = [first, *[one for one in between if isinstance(one, int)], last]
end(was_done=was_done, longest=longest, failed=failed, own=own(told))
"""
LET_THEM_FAIL = """cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid()"
        )
        await asyncio.sleep(0.5)"""


@pytest.mark.parametrize(("let_go", "failed"), [("", 0), (LET_THEM_FAIL, 40)], ids=["answers", "ends the connection"])
def test_while_postgresql_takes_its_time_the_loop_goes_on(run, postgresql_url, let_go, failed):
    came = run(postgresql.new_database(postgresql_url), LOCKED.replace("LET_GO", let_go))

    assert not came["was_done"] and came["longest"] < 0.3
    assert came["failed"] == ["OperationalError"] * failed
    assert came["own"]


ONE_IS_REFUSED = """
with connection.cursor() as cursor:
    cursor.execute(BEFORE)

async def main():
    first = await record("first")
    # For two premises, and so by several statements.
    told = await asyncio.gather(record("a"), REFUSED, record("c"), record("never", fails), return_exceptions=True)
    by_thread = len(writers)
    return [first, *told, *await asyncio.gather(*[record(str(key)) for key in range(40)])], len(writers) - by_thread

(first, a, refused, c, never, *later), later_by_thread = run(main())
end(refused=type(refused).__name__, never=never, own=own([first, a, c, *later]), later_by_thread=later_by_thread)
"""
NOTHING = "SELECT 1"
AT_THE_END = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE integrity_constraint_violation; END$$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON endpoints_mlrequest DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.customer_key = 'b') EXECUTE FUNCTION refuse()
"""


@pytest.mark.parametrize(
    ("before", "refused", "error"),
    [
        (NOTHING, 'record("b", label=None)', "IntegrityError"),
        (AT_THE_END, 'record("b")', "IntegrityError"),
        (NOTHING, r'record("b\0")', "DataError"),
    ],
    ids=["at once", "at the end of the transaction", "before it is sent, as a part would arrive"],
)
def test_a_row_that_is_refused_harms_no_other_and_the_loop_writes_on(run, postgresql_url, before, refused, error):
    script = ONE_IS_REFUSED.replace("BEFORE", repr(before)).replace("REFUSED", refused)
    came = run(postgresql.new_database(postgresql_url), script)

    assert came == {"refused": error, "never": None, "own": True, "later_by_thread": 0}


DROPPED_ROW = """
with connection.cursor() as cursor:
    cursor.execute("CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NULL; END$$")
    cursor.execute("CREATE TRIGGER drop_it BEFORE INSERT ON endpoints_mlrequest FOR EACH ROW"
                   " WHEN (NEW.customer_key = 'b') EXECUTE FUNCTION drop_it()")

async def main():
    await record("first")
    told = await asyncio.gather(record("a"), record("b"), record("c"), return_exceptions=True)
    return [type(one).__name__ for one in told], await record("last")

failed, last = run(main())
end(failed=failed, own=MLRequest.objects.get(customer_key="last").pk == last)
"""


def test_rows_whose_ids_cannot_be_told_apart_get_none(run, postgresql_url):
    came = run(postgresql.new_database(postgresql_url), DROPPED_ROW)

    assert came == {"failed": ["OperationalError"] * 3, "own": True}


FORGOTTEN = """
async def main():
    told = [await record("first"), await record("second")]
    loop_journal._journal._shared.connection.execute("DEALLOCATE ALL")  # as somebody between may do it
    return [*told, await record("third"), await record("fourth")]

told = run(main())
end(own=own(told), writers=writers)
"""


def test_statements_that_postgresql_has_forgotten_are_prepared_anew(run, postgresql_url):
    came = run(postgresql.new_database(postgresql_url), FORGOTTEN)

    assert came == {"own": True, "writers": [["journal", 1], ["journal", 1]]}


BROKEN = """
async def main():
    first = await record("first")
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE endpoints_mlrequest RENAME TO elsewhere")
    failed = [type(one).__name__ for one in await asyncio.gather(record("a"), record("b"), return_exceptions=True)]
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE elsewhere RENAME TO endpoints_mlrequest")
    connection.close()
    return failed, [first, await record("last")]

failed, told = run(main())
end(failed=failed, own=own(told))
"""


def test_an_error_reaches_everyone_it_concerns_and_the_next_is_recorded(run, database_url):
    came = run(database_url, BROKEN)

    assert came["failed"] in (["OperationalError"] * 2, ["ProgrammingError"] * 2)
    assert came["own"]


DRIVER = """
would_wait = loop_journal._LoopJournal._would_wait

def fails_once(self):
    loop_journal._LoopJournal._would_wait = would_wait
    raise sqlite3.OperationalError("disk I/O error")

loop_journal._LoopJournal._would_wait = fails_once

async def main():
    return [await record("first"), await record("second")]

told = run(main())
end(own=own(told), writers=writers)
"""


def test_an_error_of_the_driver_holds_up_nobody(run, sqlite_url):
    came = run(sqlite_url, DRIVER)

    assert came["own"]
    assert came["writers"] == [["journal", 1], ["MainThread", 1]]


DROPPED = """
OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"

def drop():
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_terminate_backend(pid) {OTHERS}")
        while cursor.execute(f"SELECT 1 {OTHERS}").fetchone():
            time.sleep(0.01)
    time.sleep(0.1)  # the news travels
    connection.close()

async def main():
    told, nones, descriptors = [await record("first")], [], []
    for number in range(4):
        await asyncio.to_thread(drop)
        nones.append(await record("none"))
        told += [await record("by the thread"), await record("by the loop")]
        descriptors.append(len(os.listdir("/proc/self/fd")))
    return told, nones, descriptors

gc.disable()
told, nones, descriptors = run(main())
connection.close()
end(nones=nones, own=own(told), leaks=len(set(descriptors)) > 1)
"""


def test_a_connection_that_postgresql_has_ended_is_missed_once(run, postgresql_url):
    came = run(postgresql.new_database(postgresql_url), DROPPED)

    assert came == {"nones": [None] * 4, "own": True, "leaks": False}


GIVEN_UP = """
async def main():
    HOLD
    gone, waiting = asyncio.create_task(record("gone")), asyncio.create_task(record("stays"))
    await asyncio.sleep(0.3)
    gone.cancel()
    LET_GO
    return await waiting, await record("later")

told = run(main())
end(keys=list(MLRequest.objects.filter(pk__in=told).order_by("pk").values_list("customer_key", flat=True)))
"""


def test_a_caller_who_gave_up_holds_up_nobody(run, sqlite_url):
    hold, let_go = BY_A_PROGRAM

    assert run(sqlite_url, GIVEN_UP.replace("HOLD", hold).replace("LET_GO", let_go))["keys"] == ["stays", "later"]
