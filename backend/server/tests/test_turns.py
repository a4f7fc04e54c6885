"""Processes that write into one SQLite file take turns, and what one of them leaves behind stops nobody."""

from __future__ import annotations

import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from django.db import connection

from apps.endpoints.turns import in_turn
from tests import processes

SCRIPT = """
import os, signal, sys, time
from apps.endpoints.turns import in_turn

def say():
    with open(PATH, "a") as moments:
        moments.write(f"{time.monotonic()} ")

def child(seconds, end="over"):
    pid = os.fork()
    if pid:
        return pid
    def write():
        say()
        time.sleep(seconds)
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        say()
    in_turn(write)
    os._exit(0)

in_turn(lambda: None)  # so that each child is forked with a lock of its parent's
first = child(LASTS, END)
time.sleep(0.2)
second = child(0.1)
for pid in (first, second):
    os.waitpid(pid, 0)
"""

PREDICT = "/api/v1/classifier/predict?status=production"


def moments_of(env, tmp_path, lasts, end="over"):
    """When the first process began and, if it did, ended its turn, and the second one."""
    path = tmp_path / "moments"
    script = SCRIPT.replace("PATH", repr(str(path))).replace("LASTS", str(lasts)).replace("END", repr(end))
    processes.manage("shell", "--no-imports", "-c", script, env=env)
    return [float(word) for word in path.read_text().split()]


@pytest.mark.whole
def test_the_next_process_writes_when_the_one_before_is_done(env, tmp_path):
    began, ended, next_began, next_ended = moments_of(env, tmp_path, lasts=0.5)

    assert began < ended <= next_began < next_ended


@pytest.mark.whole
def test_or_when_it_was_killed(env, tmp_path):
    began, next_began, next_ended = moments_of(env, tmp_path, lasts=0.5, end="killed")

    assert 0.4 < next_began - began < 5
    assert next_began < next_ended


@pytest.mark.whole
def test_who_has_waited_long_writes_all_the_same(env, tmp_path):
    began, ended, next_began, next_ended = moments_of(env, tmp_path, lasts=1.5)

    assert began < ended <= next_began < next_ended


@pytest.mark.whole
def test_nobody_waits_for_two_others(env):
    script = (
        "import os, sys, time\n"
        "from apps.endpoints.turns import in_turn\n"
        "in_turn(lambda: None)\n"
        "children = []\n"
        "began = time.monotonic()\n"
        "for _ in range(4):\n"
        "    children.append(os.fork())\n"
        "    if not children[-1]:\n"
        "        in_turn(lambda: time.sleep(2))\n"
        "        os._exit(0)\n"
        "for pid in children:\n"
        "    os.waitpid(pid, 0)\n"
        "sys.stdout.write(str(time.monotonic() - began))"
    )

    assert 2 < float(processes.manage("shell", "--no-imports", "-c", script, env=env).stdout) < 7  # and not 8


@pytest.mark.whole
def test_while_another_program_holds_the_file_everybody_is_told_to_come_back(env, database, tmp_path):
    env = {**env, "WEB_CONCURRENCY": "4", "WEB_THREADS": "1", "DATABASE_URL": f"{env['DATABASE_URL']}?timeout=2"}
    with processes.running(env, tmp_path / "log", wait_for="/readyz") as server, ThreadPoolExecutor(12) as pool:
        server.headers = processes.token_header(env)
        ask = lambda _=None: server.post(PREDICT, json={"Orders": 3}).status_code  # noqa: E731
        assert set(pool.map(ask, range(24))) == {200}

        holder = sqlite3.connect(database, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        assert set(pool.map(ask, range(4))) == {503}
        holder.execute("ROLLBACK")

        assert set(pool.map(ask, range(24))) == {200}


@pytest.mark.whole
def test_the_lock_belongs_to_whom_the_database_belongs(env, database, tmp_path):
    database.chmod(0o640)
    moments_of(env, tmp_path, lasts=0)

    lock = Path(f"{database}-turn").stat()
    assert stat.S_IMODE(lock.st_mode) == 0o640
    assert (lock.st_uid, lock.st_gid) == (database.stat().st_uid, database.stat().st_gid)


@pytest.mark.whole
def test_where_there_are_no_locks_everybody_writes_all_the_same(env, tmp_path):
    script = (
        "import fcntl, sys\n"
        "def refuse(*args): raise OSError('No locks available')\n"
        "fcntl.flock = refuse\n"
        "from apps.endpoints.turns import in_turn, take_for_good\n"
        "sys.stdout.write(in_turn(lambda: 'written') + str(take_for_good('checkpoints')))"
    )

    assert processes.manage("shell", "--no-imports", "-c", script, env=env).stdout == "writtenTrue"


def test_without_a_file_there_is_nothing_to_wait_for(db):
    if connection.vendor == "sqlite":
        assert "memory" in str(connection.settings_dict["NAME"])

    assert in_turn(lambda: in_turn(lambda: 5)) == 5
