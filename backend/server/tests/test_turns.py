"""Processes that write into one SQLite file take turns, and what one of them leaves behind stops nobody."""

from __future__ import annotations

import json

import pytest
from django.db import connection

from apps.endpoints.turns import turn_to_write
from tests import processes

SCRIPT = """
import json, os, signal, sys, time
from apps.endpoints.turns import turn_to_write

def child(seconds, end):
    pid = os.fork()
    if pid:
        return pid
    with turn_to_write():
        moments.write(f"{time.monotonic()} ")
        moments.flush()
        time.sleep(seconds)
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        moments.write(f"{time.monotonic()}\\n")
        moments.flush()
    os._exit(0)

with turn_to_write():  # so that each child is forked with a lock of its parent's
    pass
path = PATH
moments = open(path, "a")
first = child(0.3, FIRST)
time.sleep(0.1)
second = child(0.1, "over")
for pid in (first, second):
    os.waitpid(pid, 0)
sys.stdout.write(json.dumps(open(path).read().split()))
"""


@pytest.mark.whole
@pytest.mark.parametrize("end", ["over", "killed"])
def test_the_next_process_writes_when_the_one_before_is_done_or_dead(tmp_path, trained, end):
    env = processes.environment(f"sqlite:///{tmp_path / 'd.sqlite3'}", trained)
    processes.manage("migrate", env=env)
    script = SCRIPT.replace("PATH", repr(str(tmp_path / "moments"))).replace("FIRST", repr(end))

    moments = [
        float(word) for word in json.loads(processes.manage("shell", "--no-imports", "-c", script, env=env).stdout)
    ]

    assert len(moments) == (4 if end == "over" else 3)
    assert 0.25 < moments[-2] - moments[0] < 5
    assert moments == sorted(moments)


def test_without_a_file_there_is_nothing_to_wait_for(db):
    if connection.vendor == "sqlite":
        assert "memory" in str(connection.settings_dict["NAME"])

    with turn_to_write(), turn_to_write():
        pass
