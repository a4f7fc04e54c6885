"""Stops of A/B tests that are held, or end by kill -9, each in a process of its own, and what they leave behind.

So are requests, which are held before they are recorded.

`serve` answers calls, a line of JSON each. This process has no connection to the database while it forks.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from django.db import connection, connections, transaction
from rest_framework.test import APIClient

from apps.endpoints import lifecycle
from apps.endpoints.models import ABTest, Decision, Endpoint, MLAlgorithmStatus, MLRequest


def serve() -> None:
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        sys.stdout.write(json.dumps(CALLS[name](*arguments), default=str) + "\n")
        sys.stdout.flush()
    for child in _held:
        os.kill(child, signal.SIGKILL)


def prepare(test_id: int) -> None:
    """Import here what a stop needs, so that no child has to."""
    assert _client().get(f"/api/v1/abtests/{test_id}/report").status_code == 200
    connections.close_all()
    gc.freeze()


def state() -> dict[str, list[dict[str, Any]]]:
    """All that a stop changes, when whoever was killed holds nothing any more."""
    with transaction.atomic():
        for endpoint_id in Endpoint.objects.values_list("pk", flat=True):
            lifecycle.lock(endpoint_id)
        rows = {
            "tests": list(ABTest.objects.order_by("pk").values()),
            "decisions": list(Decision.objects.order_by("pk").values()),
            "statuses": list(MLAlgorithmStatus.objects.order_by("pk").values()),
        }
    connections.close_all()
    return rows


def stop(test_id: int, kill_before: int | None = None) -> tuple[list[str], str | None]:
    """The statements that a stop comes to, COMMIT among them, and its message if it lives to give it.

    kill_before: which statement is not run any more, from 1; without, it is killed when it has its answer.
    """
    child, told = _fork(lambda told: _stop_and_die(test_id, told, kill_before))
    with told:
        lines = [json.loads(line) for line in told]
    os.waitpid(child, 0)
    return [line["sql"] for line in lines if "sql" in line], lines[-1].get("answer", {}).get("message")


def stop_for(test_id: int, seconds: float) -> None:
    """Kill a stop from outside, some time after it was begun."""
    child, told = _fork(lambda told: _stop_and_die(test_id, told))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told.close()


def hold(test_id: int, before: str) -> int:
    """The process of a stop that waits before a statement that begins so."""
    return _held_process(lambda told: _stop_and_die(test_id, told, hold_before=before))


def hold_request(path: str, customer: dict[str, Any]) -> int:
    """The process of a request that waits before it is recorded."""
    recording = f"INSERT INTO {connection.ops.quote_name(MLRequest._meta.db_table)}"
    return _held_process(lambda told: _post_and_die(path, customer, told, hold_before=recording))


def _held_process(do: Callable[[TextIO], None]) -> int:
    child, told = _fork(do)
    _held[child] = told
    os.waitpid(child, os.WUNTRACED)
    return child


def go_on(child: int) -> dict[str, Any]:
    """The answer to what was held."""
    os.kill(child, signal.SIGCONT)
    with _held.pop(child) as told:
        *_, last = told
    os.waitpid(child, 0)
    return json.loads(last)["answer"]


CALLS = {call.__name__: call for call in (prepare, state, stop, stop_for, hold, hold_request, go_on)}
_held: dict[int, TextIO] = {}


def _client() -> APIClient:
    return APIClient(SERVER_NAME="localhost")


def _fork(do: Callable[[TextIO], None]) -> tuple[int, TextIO]:
    """A process that does something and ends, and what it writes."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, os.fdopen(read)
    try:
        os.close(read)
        with os.fdopen(write, "w", buffering=1) as told:
            do(told)
    finally:
        os._exit(0)


def _stop_and_die(test_id: int, told: TextIO, kill_before: int | None = None, hold_before: str | None = None) -> None:
    _post_and_die(f"/api/v1/stop_ab_test/{test_id}", {}, told, kill_before, hold_before)


def _post_and_die(
    path: str,
    body: dict[str, Any],
    told: TextIO,
    kill_before: int | None = None,
    hold_before: str | None = None,
) -> None:
    count = 0
    commit = connection.commit

    def come_to(sql: str) -> None:
        nonlocal count
        count += 1
        told.write(json.dumps({"sql": sql[:80]}) + "\n")
        if count == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        if hold_before and sql.startswith(hold_before):
            os.kill(os.getpid(), signal.SIGSTOP)

    def execute(run: Callable[..., Any], sql: str, *details: Any) -> Any:
        come_to(sql)
        return run(sql, *details)

    def say_and_commit() -> None:
        come_to("COMMIT")
        commit()

    connection.commit = say_and_commit  # no statement to Django
    with connection.execute_wrapper(execute):
        response = _client().post(path, body, format="json")
    told.write(json.dumps({"answer": response.json()}) + "\n")
    os.kill(os.getpid(), signal.SIGKILL)
