"""Many threads of one process record at once: each gets its own rows' ids, and nobody suffers for another's row."""

from __future__ import annotations

import json

import pytest

from tests import processes

pytestmark = pytest.mark.whole

# Threads of one process, as a worker has them. With BAD the first records what is refused.
SCRIPT = """
import json, sys, threading
from django.db import IntegrityError, connection
from django.utils import timezone
from apps.endpoints import journal as module
from apps.endpoints.models import MLAlgorithm, MLRequest
from apps.endpoints.premise import Premise
from apps.ml.registry import registry
from django.contrib.auth.models import User
from knox.models import AuthToken

THREADS, CALLS = 12, 25
known, unknown = registry.register_run()[0].pk, 10**9
registry.served("classifier")
now = registry.known("classifier")
token = AuthToken.objects.create(User.objects.create_user("ann"))[0].digest
holds = Premise(token, now.endpoint_id, "classifier", now.newest_step)
fails = holds._replace(newest_step=now.newest_step - 1)
transactions, insert = [], module._insert_together
module._insert_together = lambda rows_of: transactions.append(sum(map(len, rows_of.values()))) or insert(rows_of)
told, refused, unfounded, together = {}, [], [], threading.Barrier(THREADS)

def client(number):
    together.wait()
    for call in range(CALLS):
        algorithm, label = known, "1"
        if BAD and number == 0:  # for an algorithm that is not there, which PostgreSQL is not asked about
            algorithm, label = (unknown, "1") if connection.vendor == "sqlite" else (known, None)
        keys = [f"{number}-{call}-{row}" for row in range(1 + call % 3)]
        rows = [
            module.NewRequest({"Orders": call}, {}, label, call / CALLS, timezone.now(), 1.0, key, algorithm, None)
            for key in keys
        ]
        try:
            if len(rows) > 1:
                told.update(zip(module.journal.record(rows), keys, strict=True))
                continue
            if (pk := module.journal.record_if(fails if call % 2 else holds, rows[0])) is None:
                unfounded.append(keys[0])
            else:
                told[pk] = keys[0]
        except IntegrityError:
            refused.append(number)
    connection.close()

threads = [threading.Thread(target=client, args=(number,)) for number in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
found = dict(MLRequest.objects.values_list("pk", "customer_key"))
sys.stdout.write(json.dumps({
    "own": told == found, "rows": len(found), "refused": len(refused), "by": sorted(set(refused)),
    "unfounded": len(unfounded), "calls": THREADS * CALLS,
    "transactions": len(transactions), "largest": max(transactions),
}))
"""

# Every third call has one row and a premise, which does not hold in every second of these.
UNFOUNDED = range(3, 25, 6)
ROWS = sum(1 + call % 3 for call in range(25)) - len(UNFOUNDED)


@pytest.fixture
def recorded(database_url, trained):
    """What came of the threads' calls; with bad=True one of them records what cannot be."""
    env = processes.environment(database_url, trained)
    processes.manage("migrate", env=env)

    def record(bad: bool = False) -> dict[str, object]:
        script = SCRIPT.replace("BAD", str(bad))
        return json.loads(processes.manage("shell", "--no-imports", "-c", script, env=env).stdout)

    return record


def test_each_id_belongs_to_its_own_row_though_one_thread_writes_for_many(recorded):
    came = recorded()

    assert came["own"]
    assert came["unfounded"] == 12 * len(UNFOUNDED)
    assert came["rows"] == 12 * ROWS
    assert came["largest"] > 3  # more rows than any one call has
    assert came["transactions"] < came["calls"]


def test_a_row_that_cannot_be_recorded_is_refused_to_its_own_caller_alone(recorded):
    came = recorded(bad=True)

    assert came["own"]
    assert (came["refused"], came["by"]) == (25 - len(UNFOUNDED), [0])
    assert came["rows"] == 11 * ROWS


ALL_OR_NONE = """
import json, sys
from django.db import IntegrityError, transaction
from django.utils import timezone
from apps.endpoints.journal import NewRequest, journal
from apps.endpoints.models import MLRequest
from apps.ml.registry import registry

algorithm = registry.register_run()[0].pk

def record(count, bad=None):
    labels = [None if number == bad else "1" for number in range(count)]
    journal.record([NewRequest({}, {}, label, 0.5, timezone.now(), 1.0, "key", algorithm, None) for label in labels])

def is_refused(count, bad):
    try:
        record(count, bad)
    except IntegrityError:
        return True

refused, rows = [], []
for count in (30, 150, 250):
    for bad in (0, count // 2, count - 1):
        refused.append(is_refused(count, bad))
        rows.append(MLRequest.objects.count())
        with transaction.atomic():
            record(1)
            refused.append(is_refused(count, bad))
            record(count)
        rows.append(MLRequest.objects.count())
        MLRequest.objects.all().delete()
sys.stdout.write(json.dumps([refused, rows]))
"""


def test_of_a_list_with_a_row_that_is_refused_none_is_recorded_and_the_callers_transaction_goes_on(
    database_url, trained
):
    env = processes.environment(database_url, trained)
    processes.manage("migrate", env=env)

    refused, rows = json.loads(processes.manage("shell", "--no-imports", "-c", ALL_OR_NONE, env=env).stdout)

    assert refused == [True] * 18
    assert rows == [0, 31] * 3 + [0, 151] * 3 + [0, 251] * 3


# The main thread waits for one that waits for the database, and is interrupted as Ctrl-C does it.
INTERRUPTED = """
import json, os, signal, sqlite3, sys, threading, time
from django.db import connection
from django.utils import timezone
from apps.endpoints.journal import NewRequest, journal
from apps.endpoints.models import MLRequest
from apps.ml.registry import registry

algorithm = registry.register_run()[0].pk

def record(key):
    journal.record([NewRequest({}, {}, "1", 0.5, timezone.now(), 1.0, key, algorithm, None)])

other_writer = sqlite3.connect(connection.settings_dict["NAME"], isolation_level=None)
other_writer.execute("BEGIN IMMEDIATE")
first = threading.Thread(target=record, args=("first",))
first.start()
time.sleep(0.5)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    record("interrupted")
except KeyboardInterrupt:
    sys.stdout.write("interrupted ")
other_writer.execute("ROLLBACK")
first.join()
record("later")
sys.stdout.write(json.dumps(list(MLRequest.objects.order_by("pk").values_list("customer_key", flat=True))))
"""


def test_a_caller_that_is_interrupted_while_it_waits_holds_nobody_up(trained, tmp_path):
    env = processes.environment(f"sqlite:///{tmp_path / 'server.sqlite3'}", trained)
    processes.manage("migrate", env=env)

    came = processes.manage("shell", "--no-imports", "-c", INTERRUPTED, env=env, timeout=60).stdout

    assert came == 'interrupted ["first", "later"]'
