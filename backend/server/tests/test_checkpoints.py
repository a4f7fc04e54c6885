"""What is recorded in SQLite reaches the database file, and whoever records does not wait for it."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from apps.endpoints import checkpoints
from tests import processes

PREDICT = "/api/v1/classifier/predict?status=production"


def connected(database):
    """A connection that never copies the log itself, until it closes as the last."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA wal_autocheckpoint=0")
    return closing(connection)


def rows_in_the_file(database, tmp_path, table="filled"):
    """How many there are without the log, as after a power failure that took what had not been flushed."""
    copy = tmp_path / "copy.sqlite3"
    shutil.copy(database, copy)
    with closing(sqlite3.connect(copy)) as connection:
        try:
            return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        except sqlite3.DatabaseError:  # there is no such table yet, or the file was written while it was copied
            return 0


def comes_true(condition, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def process(env, tmp_path, script=""):
    """A process of the product that copies the log, after what a script does."""
    script = f"{script}\nprint('begins', flush=True)\ncheckpoints.begin()\ntime.sleep(600)"
    script = f"import time\nfrom apps.endpoints import checkpoints\n{script}"
    return processes.worker(env, tmp_path / "log", "shell", "--no-imports", "-c", script)


def fill(writer, pages):
    """Commits of ten pages each."""
    writer.execute("CREATE TABLE IF NOT EXISTS filled (page BLOB)")
    for _ in range(pages // 10):
        writer.execute("BEGIN IMMEDIATE")
        writer.executemany("INSERT INTO filled VALUES (?)", [(b"x" * 4000,)] * 10)
        writer.execute("COMMIT")


@pytest.mark.whole
def test_what_a_server_has_answered_is_in_the_file_a_moment_later(env, database, tmp_path):
    with processes.running(env, tmp_path / "log", wait_for="/readyz") as server:
        for _ in range(5):
            assert server.post(PREDICT, json={"Orders": 3}).status_code == 200

        assert comes_true(lambda: rows_in_the_file(database, tmp_path, "endpoints_mlrequest") == 5)


@pytest.mark.whole
def test_a_worker_does_it_where_no_server_runs(env, database, tmp_path):
    with processes.worker(env, tmp_path / "log"), connected(database) as writer:
        fill(writer, 10)

        assert comes_true(lambda: rows_in_the_file(database, tmp_path) == 10)


@pytest.mark.whole
def test_the_log_stays_short_while_somebody_writes_without_a_pause(env, database, tmp_path):
    writing = (
        "import sys, time\n"
        "from django.db import connection\n"
        "from apps.endpoints.turns import in_turn\n"
        "cursor = connection.cursor()\n"
        "cursor.execute('PRAGMA wal_autocheckpoint=0')\n"
        "rows, until = 0, time.monotonic() + 6\n"
        "while time.monotonic() < until:\n"
        "    rows += 1\n"
        "    in_turn(lambda: cursor.execute('INSERT INTO filled VALUES (zeroblob(4000))'))\n"
        "sys.stdout.write(str(rows))"
    )
    with process(env, tmp_path, "checkpoints.LONG_LOG = 200"), connected(database) as writer:
        fill(writer, 10)
        assert comes_true(lambda: rows_in_the_file(database, tmp_path) == 10)
        rows = int(processes.manage("shell", "--no-imports", "-c", writing, env=env).stdout)

        # Each took three pages of the log.
        assert Path(f"{database}-wal").stat().st_size < rows * 3 * 4096 / 2


@pytest.mark.whole
def test_a_long_reader_and_a_long_writer_are_not_waited_for_and_hold_up_nobody(env, database, tmp_path):
    with (
        process(env, tmp_path, "checkpoints.LONG_LOG = 10"),
        connected(database) as reader,
        connected(database) as writer,
    ):
        fill(writer, 10)
        assert comes_true(lambda: rows_in_the_file(database, tmp_path) == 10)
        writer.execute("PRAGMA busy_timeout=2000")  # whoever waited for the reader would hold it up for longer
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM filled").fetchone() == (10,)
        until = time.monotonic() + 4
        while time.monotonic() < until:
            fill(writer, 10)
        reader.execute("COMMIT")
        writer.execute("BEGIN IMMEDIATE")

        assert comes_true(lambda: rows_in_the_file(database, tmp_path) >= 20)


@pytest.mark.whole
def test_once_nobody_writes_any_more_it_looks_seldom(env, database, tmp_path):
    tells = (
        "checkpoints.GROWING_LOG = checkpoints.LONG_LOG = 5\n"
        "checkpoints.SHORT_PAUSE = 0.02\n"
        "checkpoint = checkpoints._checkpoint\n"
        "def told():\n"
        "    print('looks', flush=True)\n"
        "    return checkpoint()\n"
        "checkpoints._checkpoint = told"
    )
    log = tmp_path / "log"
    with process(env, tmp_path, tells), connected(database) as writer:
        fill(writer, 30)
        assert comes_true(lambda: rows_in_the_file(database, tmp_path) == 30)
        time.sleep(1)
        looks = log.read_text().count("looks")
        time.sleep(2 * checkpoints.PAUSE)

        assert 1 <= log.read_text().count("looks") - looks <= 3


@pytest.mark.whole
def test_one_process_does_it_and_when_it_is_killed_the_next(env, database, tmp_path):
    log = tmp_path / "log"
    with process(env, tmp_path) as first, connected(database) as writer:
        fill(writer, 10)
        assert comes_true(lambda: rows_in_the_file(database, tmp_path) == 10)
        with process(env, tmp_path):
            assert comes_true(lambda: log.read_text().count("begins") == 2)
            os.kill(first.pid, signal.SIGSTOP)  # so that it holds on to what it has taken, and does nothing
            fill(writer, 10)
            time.sleep(2 * checkpoints.LATER + checkpoints.PAUSE)
            assert rows_in_the_file(database, tmp_path) == 10

            first.kill()

            assert comes_true(lambda: rows_in_the_file(database, tmp_path) == 20)


@pytest.mark.whole
def test_no_error_ends_it(env, database, tmp_path):
    fails_once = (
        "copy = checkpoints.copy_log\n"
        "def fail(before):\n"
        "    checkpoints.copy_log = copy\n"
        "    raise ValueError('of what nobody thought')\n"
        "checkpoints.copy_log = fail"
    )
    with process(env, tmp_path, fails_once), connected(database) as writer:
        fill(writer, 10)

        assert comes_true(lambda: rows_in_the_file(database, tmp_path) == 10)

    assert "of what nobody thought" in (tmp_path / "log").read_text()


@pytest.mark.whole
def test_a_file_that_cannot_be_read_is_told_once_and_tried_again(env, database, tmp_path):
    whole = tmp_path / "whole"
    database.rename(whole)
    database.write_bytes(b"no database " * 1000)
    log = tmp_path / "log"
    with process(env, tmp_path):
        assert comes_true(lambda: "cannot be copied" in log.read_text())
        time.sleep(2 * checkpoints.LATER)
        whole.rename(database)
        with connected(database) as writer:
            fill(writer, 10)

            assert comes_true(lambda: rows_in_the_file(database, tmp_path) == 10)

    assert log.read_text().count("cannot be copied") == 1


def test_where_the_database_is_no_file_there_is_nothing_to_do(db):
    checkpoints.begin()

    assert "checkpoints" not in {thread.name for thread in threading.enumerate()}
