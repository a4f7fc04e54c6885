"""Stops of A/B tests that end by kill -9, each in a process of its own, and what they leave behind.

For `manage.py shell`. This process has no connection to the database while it forks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import requests
from django.db import connection, connections, transaction
from rest_framework.test import APIClient

from apps.endpoints import lifecycle
from apps.endpoints.models import ABTest, Decision, Endpoint, MLAlgorithmStatus


def after_each_statement(test_id: int) -> None:
    """Kill a stop after its first statement, the next one after its second, until one is killed when it has answered.

    Says what there was before, and of each stop the statements that it came to, its answer, and what there was then.
    """
    _prepare(test_id)
    told, before = [], _state()
    while not told or told[-1]["answer"] is None:
        statements, answer = _stop(test_id, kill_after=len(told) + 1)
        told.append({"statements": statements, "answer": answer, "after": _state()})
    again = _stop(test_id)
    _say({"before": before, "stops": told, "again": again[1], "at_last": _state()})


def at_many_moments(moments: int, address: str, test: dict[str, Any]) -> None:
    """Start a test by asking a server, and kill its stop: at once, and ever later up to when it would have ended.

    Says of each what there was before, when it was killed, and after another stop, with that one's answer.
    """
    lasts, told = None, []
    for number in range(moments + 1):
        started = requests.post(address, json=test, timeout=30)
        started.raise_for_status()
        test_id = started.json()["id"]
        if lasts is None:
            _prepare(test_id)
        before, began = _state(), time.monotonic()
        if lasts is None:
            _stop(test_id)
            lasts = time.monotonic() - began
            continue
        child, _ = _fork(lambda told, test_id=test_id: _stop_and_die(test_id, told))
        time.sleep(lasts * 1.2 * (number - 1) / moments)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after, (_, answer) = _state(), _stop(test_id)
        told.append({"before": before, "after": after, "answer": answer, "at_last": _state()})
    _say(told)


def _prepare(test_id: int) -> None:
    """Import here what a stop needs, so that no child has to."""
    assert _client().get(f"/api/v1/abtests/{test_id}/report").status_code == 200
    connections.close_all()


def _client() -> APIClient:
    return APIClient(SERVER_NAME="localhost")


def _say(what: Any) -> None:
    sys.stdout.write(json.dumps(what))


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


def _told_by(do: Callable[[TextIO], None]) -> list[Any]:
    child, told = _fork(do)
    with told:
        lines = [json.loads(line) for line in told]
    os.waitpid(child, 0)
    return lines


def _stop(test_id: int, kill_after: int | None = None) -> tuple[list[str], str | None]:
    """The statements that a stop came to, and its message if it lived to give it."""
    lines = _told_by(lambda told: _stop_and_die(test_id, told, kill_after))
    return [line["sql"] for line in lines if "sql" in line], next(
        (line["answer"] for line in lines[-1:] if "answer" in line), None
    )


def _stop_and_die(test_id: int, told: TextIO, kill_after: int | None = None) -> None:
    count = 0

    def watch(execute: Callable[..., Any], sql: str, *details: Any) -> Any:
        nonlocal count
        result = execute(sql, *details)
        count += 1
        told.write(json.dumps({"sql": sql[:80]}) + "\n")
        if count == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    with connection.execute_wrapper(watch):
        response = _client().post(f"/api/v1/stop_ab_test/{test_id}")
    told.write(json.dumps({"answer": response.json()["message"]}) + "\n")
    os.kill(os.getpid(), signal.SIGKILL)


def _state() -> dict[str, list[dict[str, Any]]]:
    """All that a stop changes, as another process reads it when whoever was killed holds nothing any more."""

    def read(told: TextIO) -> None:
        with transaction.atomic():
            for endpoint_id in Endpoint.objects.values_list("pk", flat=True):
                lifecycle.lock(endpoint_id)
            rows = {
                "tests": list(ABTest.objects.order_by("pk").values()),
                "decisions": list(Decision.objects.order_by("pk").values()),
                "statuses": list(MLAlgorithmStatus.objects.order_by("pk").values()),
            }
        told.write(json.dumps(rows, default=str) + "\n")

    (state,) = _told_by(read)
    return state
