"""One line per request, in one stream, for people or for machines, and no customer in any of them."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import structlog
from django.core.files.uploadedfile import SimpleUploadedFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rest_framework.test import APIClient

from server import logs
from tests import processes

# None of these spellings comes about by chance.
KEY = "KEYOFALICE77"
PLAN = "zebraplan"
VALUE = 987654.25
ALICE = {"CustomerId": KEY, "Plan": PLAN, "RecencyDays": VALUE}
PREDICT = "/api/v1/classifier/predict?status=production"
CSV = f"CustomerId,Plan,Orders,RecencyDays,MeanGapDays,Newsletter\n{KEY},{PLAN},3,{VALUE},,true\n"


@contextmanager
def logged_as(kind: str) -> Iterator[io.StringIO]:
    """What the process logs meanwhile."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter(kind))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    with logged_as("json") as stream:
        yield stream


def lines(log: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def request_lines(log: io.StringIO) -> list[dict[str, object]]:
    return [line for line in lines(log) if line["event"] == "request"]


# --- One line per request ---------------------------------------------------------------------------------------------
def test_a_request_is_one_line_that_says_what_where_how_and_how_long(api, algorithms, customer, log):
    api.post(PREDICT, customer)

    (line,) = request_lines(log)
    assert line["method"] == "POST"
    assert line["path"] == "/api/v1/classifier/predict"
    assert line["status"] == 200
    assert line["level"] == "info"
    assert 0 < line["ms"] < 60_000
    assert line["timestamp"].endswith("Z")
    assert set(line) == {"method", "path", "status", "ms", "event", "level", "logger", "timestamp"}


@pytest.mark.parametrize(
    ("method", "path", "status", "logged_path"),
    [
        ("get", "/api/v1/mlalgorithms", 200, "/api/v1/mlalgorithms"),
        ("get", "/livez", 200, "/livez"),
        ("get", "/", 302, "/"),
        ("get", "/api/v1/mlrequests/123456", 404, "/api/v1/mlrequests/<pk>"),
        ("get", "/api/v1/nowhere", 404, "(no such address)"),
        ("post", PREDICT.replace("classifier", "nowhere"), 404, "/api/v1/<endpoint_name>/predict"),
        ("put", "/api/v1/endpoints", 405, "/api/v1/endpoints"),
    ],
)
def test_every_request_is_logged_whatever_becomes_of_it(api, algorithms, log, method, path, status, logged_path):
    assert getattr(api, method)(path).status_code == status

    (line,) = request_lines(log)
    assert (line["status"], line["path"]) == (status, logged_path)


@pytest.mark.parametrize(
    ("path", "how", "status", "logged_path"),
    [
        ("/api/v1/mlrequests/123456", {"HTTP_HOST": "elsewhere.example.com"}, 400, "/api/v1/mlrequests/<pk>"),
        ("/api/v1/mlrequests/123456", {}, 301, "/api/v1/mlrequests/<pk>"),
        ("/api/v1/nowhere", {}, 301, "(no such address)"),
        ("/readyz", {}, 503, "/readyz"),
    ],
)
def test_what_is_answered_before_its_address_is_looked_at_is_logged_by_it_too(
    db, log, settings, path, how, status, logged_path
):
    settings.DEBUG = False
    settings.ALLOWED_HOSTS = ["testserver"]
    settings.SECURE_SSL_REDIRECT = True

    assert APIClient().get(path, **how, secure="HTTP_HOST" in how).status_code == status

    (line,) = request_lines(log)
    assert (line["status"], line["path"]) == (status, logged_path)


@pytest.mark.parametrize("debug", [True, False])
def test_a_failure_nobody_foresaw_leaves_its_traceback_once(api, algorithms, log, settings, monkeypatch, debug):
    monkeypatch.setattr("apps.endpoints.views.prediction.predict", lambda *args, **kwargs: 1 / 0)
    settings.DEBUG = debug
    client = APIClient(raise_request_exception=False)
    client.force_authenticate(object())

    assert client.post(PREDICT, ALICE).status_code == 500

    failure, request = lines(log)
    assert failure["level"] == "error" and "ZeroDivisionError" in failure["exception"]
    assert request["event"] == "request" and request["status"] == 500
    assert log.getvalue().count("Traceback") == 1


# --- No customer ------------------------------------------------------------------------------------------------------
def predict_json(api: APIClient) -> int:
    return api.post(PREDICT, ALICE).status_code


def predict_list(api: APIClient) -> int:
    return api.post(PREDICT, [ALICE, ALICE]).status_code


def predict_form(api: APIClient) -> int:
    return api.post(PREDICT, {**ALICE, "Orders": "3"}, format="multipart").status_code


def predict_file(api: APIClient) -> int:
    file = SimpleUploadedFile(f"{KEY}.csv", CSV.encode())
    return api.post("/api/v1/batch-predict", {"file": file}, format="multipart").status_code


def tell_outcome(api: APIClient) -> int:
    pk = api.post(PREDICT, ALICE).json()["request_id"]
    return api.patch(f"/api/v1/mlrequests/{pk}", {"feedback": "1"}).status_code


def search_customer(api: APIClient) -> int:
    return api.get(f"/api/v1/mlrequests?customer_key={KEY}").status_code


def wrong_type(api: APIClient) -> int:
    return api.post(PREDICT, {**ALICE, "Orders": f"{KEY}-{VALUE}"}).status_code


def unknown_column(api: APIClient) -> int:
    return api.post(PREDICT, {**ALICE, KEY: PLAN}).status_code


def unknown_outcome(api: APIClient) -> int:
    pk = api.post(PREDICT, ALICE).json()["request_id"]
    return api.patch(f"/api/v1/mlrequests/{pk}", {"feedback": KEY}).status_code


def broken_json(api: APIClient) -> int:
    return api.post(PREDICT, f'{{"CustomerId": "{KEY}", ', content_type="application/json").status_code


def broken_file(api: APIClient) -> int:
    file = SimpleUploadedFile("c.csv", CSV.replace(",3,", f",{PLAN},").encode())
    return api.post("/api/v1/batch-predict", {"file": file}, format="multipart").status_code


def query_that_cannot_be(api: APIClient) -> int:
    return api.get(f"/api/v1/mlrequests?algorithm={KEY}").status_code


def key_for_an_address(api: APIClient) -> int:
    return api.get(f"/api/v1/mlrequests/{KEY}").status_code


def key_for_an_endpoint(api: APIClient) -> int:
    return api.post(f"/api/v1/{KEY}/predict", ALICE).status_code


def key_for_a_static_file(api: APIClient) -> int:
    return api.get(f"/static/{KEY}.css").status_code


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (predict_json, 200),
        (predict_list, 200),
        (predict_form, 200),
        (predict_file, 201),
        (tell_outcome, 200),
        (search_customer, 200),
        (wrong_type, 400),
        (unknown_column, 400),
        (unknown_outcome, 400),
        (broken_json, 400),
        (broken_file, 400),
        (query_that_cannot_be, 400),
        (key_for_an_address, 404),
        (key_for_an_endpoint, 404),
        (key_for_a_static_file, 404),
    ],
)
@pytest.mark.parametrize("debug", [True, False])
def test_no_customer_is_in_the_log(
    algorithms, settings, log, call: Callable[[APIClient], int], status: int, debug: bool
):
    settings.DEBUG = debug
    caller = APIClient()
    caller.force_authenticate(type("User", (), {"get_username": lambda self: "ann", "is_active": True})())

    assert call(caller) == status

    assert request_lines(log)
    for secret in (KEY, PLAN, str(VALUE)):
        assert secret.lower() not in log.getvalue().lower()


@pytest.mark.parametrize("kind", logs.FORMATS)
def test_no_customer_is_in_the_traceback_of_a_failure(algorithms, api, monkeypatch, kind):
    monkeypatch.setattr("apps.endpoints.prediction.registry.get", lambda algorithm: 1 / 0)

    with logged_as(kind) as log:
        assert APIClient(raise_request_exception=False).post(PREDICT, ALICE).status_code == 500

    assert "ZeroDivisionError" in log.getvalue()
    for secret in (KEY, PLAN, str(VALUE)):
        assert secret not in log.getvalue()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="?#"), min_size=1))
def test_an_address_that_leads_nowhere_is_not_repeated(db, path):
    with logged_as("json") as log:
        status = APIClient(raise_request_exception=False).get(f"/{KEY}/{path}").status_code

    assert status == 404
    assert KEY not in log.getvalue()


@given(
    values=st.dictionaries(
        st.sampled_from("abc"),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
        | st.binary(),
    )
)
def test_whatever_a_line_says_is_one_line_of_json_in_ascii(values):
    with logged_as("json") as stream:
        structlog.get_logger("here").info("an event", **values)

    text = stream.getvalue()
    assert text.isascii() and len(text.splitlines()) == 1
    said = json.loads(text)
    assert {name: said[name] for name in values} == json.loads(json.dumps(values, default=repr))


# --- The stream of a real server --------------------------------------------------------------------------------------
@pytest.mark.whole
def test_a_real_servers_log_is_one_json_object_per_line_uvicorns_own_included(tmp_path, trained):
    env = processes.environment(
        f"sqlite:///{tmp_path / 'l.sqlite3'}",
        trained,
        DEBUG="1",
        LOG_FORMAT="json",
        LOG_LEVEL="DEBUG",
        WEB_CONCURRENCY="1",
    )
    processes.manage("migrate", env=env)
    path = tmp_path / "log"
    with processes.running(env, path, wait_for="/readyz") as server:
        assert server.post(PREDICT, json=ALICE).status_code == 200
        assert server.post(PREDICT, json={**ALICE, "Orders": KEY}).status_code == 400
        assert server.get(f"/api/v1/mlrequests?customer_key={KEY}").status_code == 200
        for request in (f"GET /api/v1/mlrequests?customer_key=Miss {KEY} HTTP/1.1", f"POST / {KEY}"):
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
                client.sendall(f"{request}\r\nHost: localhost\r\n\r\n".encode())
                assert b"400" in client.recv(100)
        os.kill(server.workers()[0], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while "has ended" not in path.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)

    text = path.read_text()
    parsed = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    prose = [line for line in text.splitlines() if not line.startswith("{")]
    # In development the addresses to open are told besides.
    assert all(line == "" or line.startswith(("Serving on", "  ")) for line in prose), prose
    assert {line["logger"] for line in parsed} >= {"requests", "server"}
    assert all({"event", "level", "timestamp"} <= set(line) for line in parsed)
    assert KEY not in text and PLAN not in text and str(VALUE) not in text


@pytest.mark.whole
def test_the_level_and_the_format_are_settings(tmp_path, trained):
    env = processes.environment(f"sqlite:///{tmp_path / 'q.sqlite3'}", trained, DEBUG="1")
    stamp = "from structlog import get_logger; get_logger('here').info('an event', rows=3)"

    def said(**settings: str) -> str:
        return processes.manage("shell", "--no-imports", "-c", stamp, env={**env, **settings}).stderr

    assert "[info     ] an event" in said() and "rows=3" in said()
    assert said(LOG_LEVEL="WARNING") == ""
