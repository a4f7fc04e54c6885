"""How the server starts, what it survives, and how it ends; and what HTTP makes of a request on its way in."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

import joblib
import numpy as np
import pytest
import requests
from sklearn.ensemble import HistGradientBoostingClassifier

from tests import processes
from tests.postgresql import free_port
from tests.processes import BACKEND, Server

pytestmark = pytest.mark.whole

PREDICT = "/api/v1/classifier/predict?status=production"
BODY = b'{"Orders": 3}'


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> dict[str, str]:
    file = tmp_path_factory.mktemp("serve") / "server.sqlite3"
    env = processes.environment(f"sqlite:///{file}", trained, DEBUG="1", WEB_CONCURRENCY="2")
    processes.manage("migrate", env=env)
    return env


@pytest.fixture
def started(env: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    """A server of a test's own, to be killed or stopped."""
    with processes.running(env, tmp_path / "log", wait_for="/readyz") as server:
        yield server


@pytest.fixture(scope="module")
def server(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that only ask. What its shell has would be headers, were it taken for such."""
    shell = {"HTTP_X_FORWARDED_FOR": "203.0.113.9", "HTTP_ORIGIN": "https://evil.example", "CONTENT_LENGTH": "7"}
    shell |= {"CONTENT_TYPE": "nonsense", "HTTP_TRANSFER_ENCODING": "chunked", "SCRIPT_URL": "/elsewhere"}
    with processes.running({**env, **shell}, tmp_path_factory.mktemp("shared") / "log", wait_for="/readyz") as running:
        yield running


def port_of(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


def token_of(server: Server) -> dict[str, str]:
    """The header of a caller who has a token of a server that runs."""
    environ = Path(f"/proc/{server.process.pid}/environ").read_text().split("\0")
    return processes.token_header(dict(each.split("=", 1) for each in environ if each))


def serve(env: dict[str, str], *arguments: str, cwd: Path = BACKEND) -> subprocess.CompletedProcess:
    """A server that is expected to end by itself."""
    command = [sys.executable, str(BACKEND / "serve.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=60)


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def upload(server: Server) -> Iterator[socket.socket]:
    """A client that has sent half of its request."""
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as client:
        client.sendall(f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY[:5])
        time.sleep(0.3)  # it is being read
        yield client


def listens(pid: int) -> bool:
    """Whether it has a socket that waits for connections."""
    sockets = processes.open_files(pid)
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(
        state == "0A" and f"socket:[{inode}]" in sockets for _, _, _, state, *_, inode in (r[:10] for r in table)
    )


def wait_until_all_answer(server: Server, workers: Sequence[int]) -> None:
    """One may listen before it has loaded; a connection that it gets waits until then."""
    wait_for(lambda: all(map(listens, workers)))
    assert {server.get("/livez").status_code for _ in range(40)} == {200}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- Start ----------------------------------------------------------------------------------------------------------
def test_a_port_is_refused_in_one_sentence_from_when_another_server_loads_until_it_ends(env, tmp_path):
    port = free_port()
    sentence = f"Port {port} is in use by another program. Choose another, such as PORT=8080.\n"
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(
            [sys.executable, "serve.py"], cwd=BACKEND, env={**env, "PORT": str(port)}, stdout=log, stderr=log
        )
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        while_loading = serve({**env, "PORT": str(port)})
        processes.wait_until_answered(f"http://127.0.0.1:{port}/readyz", first, tmp_path / "log")
        while_serving = serve({**env, "PORT": str(port)})
        # The server's end of this connection is the first to close, and so goes on to exist for a minute.
        kept = HTTPConnection("127.0.0.1", port)
        kept.request("GET", "/livez")
        kept.getresponse().read()
    finally:
        first.terminate()
        first.wait(30)
    with processes.running(env, tmp_path / "log", port=port):
        pass

    assert (while_loading.returncode, while_loading.stdout, while_loading.stderr) == (1, "", sentence)
    assert (while_serving.returncode, while_serving.stdout, while_serving.stderr) == (1, "", sentence)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"PORT": "no port"}, "PORT must be a whole number of 1 or more, not 'no port'.\n"),
        ({"PORT": "65536"}, "PORT must be a whole number from 1 to 65535, not '65536'.\n"),
        (
            {"BIND_ADDRESS": "192.0.2.1"},
            "BIND_ADDRESS must be an IPv4 address of this machine, or 0.0.0.0 for all, not '192.0.2.1'.\n",
        ),
        (
            {"BIND_ADDRESS": "no such host"},
            "BIND_ADDRESS must be an IPv4 address of this machine, or 0.0.0.0 for all, not 'no such host'.\n",
        ),
        ({"WEB_THREADS": "0"}, "WEB_THREADS must be a whole number of 1 or more, not '0'.\n"),
        ({"DEBUG": "maybe"}, "DEBUG must be 1 or 0, not 'maybe'.\n"),
    ],
)
def test_a_setting_that_cannot_be_read_is_refused_in_one_sentence_from_any_folder(tmp_path, setting, sentence):
    refused = serve({"PATH": "/usr/bin:/bin", **setting}, cwd=tmp_path)

    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", sentence)


def test_it_listens_at_the_address_that_it_is_told(env, tmp_path):
    with processes.running({**env, "BIND_ADDRESS": "0.0.0.0"}, tmp_path / "log") as everywhere:
        elsewhere = f"http://127.0.0.2:{port_of(everywhere)}/livez"
        answer = requests.get(elsewhere, headers={"Host": "localhost"}, timeout=30)
    with processes.running(env, tmp_path / "log") as here, pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.2:{port_of(here)}/livez", timeout=30)

    assert answer.status_code == 200


def test_an_application_that_cannot_be_imported_stops_the_server_with_the_reason(env):
    refused = serve({**env, "PORT": str(free_port())}, "no.such.application")

    assert refused.returncode == 1
    assert "ModuleNotFoundError: No module named 'no'" in refused.stderr
    assert refused.stdout == ""


def test_in_production_one_line_says_where_it_serves(env, tmp_path):
    production = {"DEBUG": "0", "SECRET_KEY": "a-long-and-random-key-of-67-characters-0123456789-abcdefghijklmnopq"}
    with processes.running({**env, **production}, tmp_path / "log") as server:
        wait_for(lambda: "Serving" in server.log.read_text())

    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    said = [line for line in lines if line["event"] != "request"]
    assert [(line["event"], line["level"]) for line in said] == [(f"Serving on {server.url[7:]}", "info")]


def test_gunicorn_serves_too_by_its_own_file(env, tmp_path):
    gunicorn = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "server.wsgi"]
    with processes.running(env, tmp_path / "log", wait_for="/readyz", command=gunicorn) as server:
        assert server.post(PREDICT, data=BODY, headers={"Content-Type": "application/json"}).status_code == 200
        assert server.get("/static/endpoints/favicon.svg").text.startswith("<svg")
        wait_for(lambda: f"Serving on {server.url}" in server.log.read_text())

    refused = subprocess.run(
        gunicorn, cwd=BACKEND, env={"PATH": "/usr/bin:/bin", "PORT": "no"}, capture_output=True, text=True, check=False
    )
    assert refused.stderr == "PORT must be a whole number of 1 or more, not 'no'.\n"


# --- Deaths ---------------------------------------------------------------------------------------------------------
def test_who_is_killed_again_and_again_is_replaced_each_time_and_a_client_at_most_waits(started):
    for _ in range(3):
        before = started.workers()
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda before=before: len(set(started.workers()) - set(before)) == 1)
        processes.wait_until_answered(f"{started.url}/readyz", started.process, started.log)

    new = started.workers()
    assert len(new) == 2
    wait_until_all_answer(started, new)
    assert started.log.read_text().count("Serving on") == 1


def test_processes_whose_parent_was_killed_finish_what_they_do_and_end(started):
    workers = started.workers()
    with upload(started) as client:
        started.process.kill()
        started.process.wait()
        client.sendall(BODY[5:])
        answer = client.makefile("rb").read()

    assert answer.startswith(b"HTTP/1.1 200") and b'"probability"' in answer
    wait_for(lambda: not any(map(is_running, workers)), seconds=5)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port_of(started)))


# --- End ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGHUP, False)],
    ids=["Ctrl-C", "Ctrl-C for the first process", "closed terminal"],
)
def test_ctrl_c_does_not_wait_for_a_client_that_is_slow_to_send_or_to_read(started, number, to_all):
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", port_of(started)))
    with reader, upload(started):
        reader.sendall(b"GET /static/drf_spectacular_sidecar/swagger-ui-dist/swagger-ui-bundle.js HTTP/1.1\r\n")
        reader.sendall(b"Host: localhost\r\n\r\n")
        time.sleep(0.2)
        began = time.monotonic()
        os.killpg(started.process.pid, number) if to_all else started.process.send_signal(number)
        started.process.wait(10)

    assert time.monotonic() - began < 3
    with pytest.raises(ProcessLookupError):
        os.killpg(started.process.pid, 0)
    log = started.log.read_text()
    assert "Traceback" not in log and "error" not in log


def test_ctrl_c_ends_at_once_who_still_waits_for_a_slow_client(started):
    with upload(started):
        started.process.terminate()
        time.sleep(1)
        assert started.process.poll() is None
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(5) == 0


@pytest.mark.parametrize("processes_", ["1", "2"])
def test_a_hangup_in_production_replaces_all_processes_and_refuses_nobody(env, tmp_path, processes_):
    production = {"DEBUG": "0", "SECRET_KEY": "a-long-and-random-key-of-67-characters-0123456789-abcdefghijklmnopq"}
    production["WEB_CONCURRENCY"] = processes_
    refused, stopped = 0, threading.Event()

    def ask() -> None:
        nonlocal refused
        while not stopped.is_set():
            try:
                socket.create_connection(("127.0.0.1", port_of(server)), timeout=30).close()
            except ConnectionError:
                refused += 1
            time.sleep(0.001)

    with processes.running({**env, **production}, tmp_path / "log", wait_for="/readyz") as server:
        wait_for(lambda: len(server.workers()) == int(processes_) and all(map(listens, server.workers())))
        before = set(server.workers())
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask)
            try:
                server.process.send_signal(signal.SIGHUP)
                wait_for(lambda: len(server.workers()) == int(processes_) and not before & set(server.workers()))
            finally:
                stopped.set()
            asking.result()
        wait_until_all_answer(server, server.workers())

    assert refused == 0


def test_sigterm_is_not_kept_waiting_by_a_process_that_is_to_take_anothers_place(env, tmp_path):
    production = {"DEBUG": "0", "SECRET_KEY": "a-long-and-random-key-of-67-characters-0123456789-abcdefghijklmnopq"}
    with processes.running({**env, **production}, tmp_path / "log", wait_for="/readyz") as server:
        wait_for(lambda: len(server.workers()) == 2)
        before = set(server.workers())
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: set(server.workers()) - before)
        (new,) = set(server.workers()) - before
        os.kill(new, signal.SIGSTOP)  # it will never serve
        server.process.terminate()
        assert server.process.wait(10) == 0

    assert not is_running(new)


def test_sigterm_for_all_processes_answers_every_request_that_was_accepted_also_a_slow_one(started):
    unanswered: list[bytes] = []
    answered = 0
    stopped = threading.Event()

    def ask(_: int) -> None:
        """By a new connection each time: one that is accepted must end in a good and whole answer."""
        nonlocal answered
        while not stopped.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port_of(started)), timeout=30) as client:
                    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    client.sendall(f"{head}Connection: close\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
                    answer = client.makefile("rb").read()
            except OSError:  # refused, or reset before it was accepted
                return
            if not answer.startswith(b"HTTP/1.1 200") or not answer.endswith(b"}"):
                unanswered.append(answer)
            answered += 1

    # One that has not loaded has accepted nothing, and its clients are refused.
    wait_until_all_answer(started, started.workers())
    with upload(started) as slow, ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask, number) for number in range(8)]
        wait_for(lambda: answered > 100)
        os.killpg(started.process.pid, signal.SIGTERM)  # as systemd does it
        time.sleep(1)
        stopped.set()
        assert started.process.poll() is None, "it waits for the slow one"
        slow.sendall(BODY[5:])
        answer = slow.makefile("rb").read()
        for client in clients:
            client.result()
        assert started.process.wait(10) == 0

    assert answer.startswith(b"HTTP/1.1 200") and b'"probability"' in answer
    assert unanswered == []
    assert "error" not in started.log.read_text()


# --- On the way in --------------------------------------------------------------------------------------------------
def raw(server: Server, request: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to what is sent as it is."""
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as client:
        client.sendall(request)
        head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_the_environment_of_the_server_is_not_taken_for_headers(server):
    assert server.get("/api/v1/endpoints").status_code == 200
    assert server.post(PREDICT, data=BODY, headers={"Content-Type": "application/json"}).status_code == 200
    no_body = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    assert raw(server, no_body)[0] == 400  # at once: it does not wait for a body of 7 bytes


def test_addresses_may_hold_any_character(server):
    missing = server.get("/caf%C3%A9")
    assert missing.status_code == 404 and "/caf\u00e9" in missing.json()["message"]

    found = server.get("/api/v1/mlalgorithms?name=%C3%A9")
    assert (found.status_code, found.json()) == (200, [])


def test_a_body_in_chunks_is_answered_with_what_to_do(server):
    answer = server.post(PREDICT, data=iter([BODY]), headers={"Content-Type": "application/json"})

    assert answer.status_code == 411 and "Content-Length" in answer.json()["message"]


def test_what_comes_after_a_body_in_chunks_is_no_header(server):
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"

    status, body = raw(server, f"{head}2\r\n{{}}\r\n0\r\nX-Forwarded-For: 203.0.113.9\r\n\r\n".encode())
    assert (status, b"Content-Length" in body) == (411, True)  # and not 403, as for a stranger


def test_a_connection_ends_after_a_body_in_chunks(server):
    chunked = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"

    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=10) as client:
        client.sendall(chunked.encode() * 2)
        answers = client.makefile("rb").read()
    assert answers.startswith(b"HTTP/1.1 411") and answers.lower().count(b"connection: close") == 1
    assert answers.count(b"HTTP/1.1") == 1


def test_curl_that_waits_to_be_told_to_go_on_sends_a_large_body(server, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"Orders": 3, "RecencyDays": 20}] * 60_000))
    assert rows.stat().st_size > 2_000_000
    command = ["curl", "--silent", "--verbose", "--expect100-timeout", "20", "-H", "Content-Type: application/json"]
    command += ["-H", "Expect: 100-continue", "--data-binary", f"@{rows}", "-o", os.devnull, "-w", "%{http_code}"]
    began = time.monotonic()

    done = subprocess.run([*command, server.url + PREDICT], capture_output=True, text=True, timeout=60, check=True)

    assert "< HTTP/1.1 100 Continue" in done.stderr and time.monotonic() - began < 20
    assert done.stdout == "200"


def test_curl_that_waits_to_be_told_to_go_on_is_refused_before_it_sends(server, tmp_path):
    (tmp_path / "rows.json").write_bytes(bytes(2_000_000))
    command = ["curl", "--silent", "--verbose", "--expect100-timeout", "20", "-H", "Expect: 100-continue"]
    command += ["--data-binary", f"@{tmp_path / 'rows.json'}", "-o", os.devnull, "-w", "%{http_code}"]

    done = subprocess.run(
        [*command, f"{server.url}/api/v1/nowhere"], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout == "404"
    assert "100 Continue" not in done.stderr


@pytest.mark.parametrize("path", ["/api/v1/nowhere", "/api/v1/classifier/predict"])
def test_refused_clients_that_announce_much_and_send_nothing_keep_nobody_out(server, path):
    host, kind = f"127.0.0.1:{port_of(server)}", "Content-Type: application/json\r\nAuthorization: Token wrong"
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{kind}\r\nContent-Length: 1000000\r\n\r\n".encode()
    if path.endswith("predict"):  # where those who are known are answered
        assert {server.post(path, json={"Orders": 3}).status_code for _ in range(20)} == {200}
    silent = [socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) for _ in range(24)]
    try:
        for client in silent:
            client.sendall(head)
        time.sleep(0.5)
        assert all(server.get("/livez").status_code == 200 for _ in range(20))
    finally:
        for client in silent:
            client.close()


def test_head_has_the_length_and_no_body_and_the_connection_stays(server):
    connection = HTTPConnection("127.0.0.1", port_of(server), timeout=30)
    lengths = set()
    for method in ("HEAD", "GET"):
        connection.request(method, "/api/v1/endpoints")
        answer = connection.getresponse()
        lengths.add(answer.headers["Content-Length"])
        assert (answer.status, bool(answer.read())) == (200, method == "GET")
    assert len(lengths) == 1


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000, 431),
        (b"GET /" + b"x" * 100_000, 414),
    ],
    ids=[
        *("no HTTP", "no length", "too many headers", "too long an address"),
        *("a header without an end", "an address without an end"),
    ],
)
def test_what_is_no_request_is_refused_and_the_next_one_answered(server, request_, status):
    assert raw(server, request_)[0] == status
    assert server.get("/livez").status_code == 200


def test_clients_that_go_away_in_the_middle_cost_no_one_else_an_answer(server):
    for _ in range(20):
        with upload(server):
            pass
    assert {server.get("/livez").status_code for _ in range(20)} == {200}


@pytest.mark.parametrize(
    ("how", "stays"), [("HTTP/1.1", True), ("HTTP/1.0", False), ("HTTP/1.1\r\nConnection: close", False)]
)
def test_a_call_like_one_before_gets_the_answer_that_django_gave_but_for_id_and_date(server, how, stays):
    def answer(content_type):
        """Without what differs between any two; and whether the connection ended."""
        headers = {**token_of(server), "Host": "localhost", "Content-Type": content_type, "Content-Length": len(BODY)}
        lines = [f"POST {PREDICT} {how}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as client:
            client.sendall("\r\n".join(lines).encode() + BODY)
            text = b""
            while not text.endswith(b"}"):
                piece = client.recv(65_536)
                assert piece, text
                text += piece
            client.settimeout(0.2)
            try:
                ended = client.recv(1) == b""
            except TimeoutError:
                ended = False
        return re.sub(rb'(date: \w+, |length: |"request_id":)[^\r,]*', rb"\1", text), ended

    by_django = answer("application/json; charset=utf-8")
    assert (b"connection: close" in by_django[0]) == by_django[1] == (not stays)
    for _ in range(6):
        assert answer("application/json") == by_django


def test_requests_that_come_before_the_answer_to_the_first_are_answered_in_their_order(server):
    headers = "".join(f"{name}: {value}\r\n" for name, value in token_of(server).items())
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    predict = f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    look = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
    last = look + b"Connection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as client:
        client.sendall((predict + look + b"\r\n") * 20 + last)
        text = client.makefile("rb").read()

    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as client:
        large = BODY + b" " * 70_000
        client.sendall(f"{head}Content-Length: {len(large)}\r\n\r\n".encode() + large + last[:8])
        time.sleep(0.3)
        client.sendall(last[8:])
        assert client.makefile("rb").read().count(b"HTTP/1.1 200 OK") == 2

    kinds = [b"probability" in answer for answer in text.split(b"HTTP/1.1 200 OK")[1:]]
    assert kinds == [True, False] * 20 + [False]
    ids = [int(number) for number in re.findall(rb'"request_id":(\d+)', text)]
    assert ids == sorted(set(ids)) and len(ids) == 20


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize("pause", [0, 0.3])
def test_an_offer_to_speak_another_protocol_is_passed_over(server, pause):
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode() + H2C
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close, Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as client:
        for piece in (head + b"Content-Length: %d\r\n\r\n" % len(BODY), BODY, head, b"Content-Length: 0\r\n\r\n", last):
            client.sendall(piece)
            time.sleep(pause)
        text = client.makefile("rb").read()

    assert re.findall(rb"HTTP/1.1 (\d+)", text) == [b"200", b"400", b"200"]
    assert text.count(b'"request_id":') == 1 and b'"status": "alive"' in text


@pytest.mark.parametrize("pause", [0, 0.3])
def test_a_body_is_no_request_whatever_its_head_offers(server, pause):
    body = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /api/v1/endpoints HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as client:
        client.sendall(b"POST /api/v1/nowhere HTTP/1.1\r\nHost: localhost\r\n" + H2C)
        client.sendall(b"Content-Length: %d\r\n\r\n" % len(body))
        time.sleep(pause)
        client.sendall(body + last)
        text = client.makefile("rb").read()

    assert re.findall(rb"HTTP/1.1 (\d+)", text) == [b"404", b"200"]


def test_a_client_that_asks_faster_than_it_is_answered_is_read_no_faster(started):
    def memory() -> int:
        """Of the processes, in KiB."""
        return sum(
            int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) for pid in started.workers()
        )

    before, until = memory(), time.monotonic() + 4
    with socket.create_connection(("127.0.0.1", port_of(started)), timeout=0.1) as client:
        reading = threading.Thread(target=lambda: [None for _ in iter(lambda: _received(client), b"")], daemon=True)
        reading.start()
        while time.monotonic() < until:
            with suppress(TimeoutError):
                client.sendall(b"GET /livez HTTP/1.1\r\n\r\n" * 5_000)
        growth = memory() - before
        # The quickest, as others use this machine, too.
        assert min(started.get("/livez").elapsed.total_seconds() for _ in range(10)) < 0.2
    assert growth < 100_000


def _received(client: socket.socket) -> bytes:
    """Some bytes, or nothing at the end."""
    while True:
        try:
            return client.recv(2**20)
        except TimeoutError:
            continue
        except OSError:
            return b""


def test_a_head_without_end_is_given_up_also_while_an_answer_is_made_which_comes_first(server):
    many = json.dumps([json.loads(BODY)] * 20_000).encode()
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as client:
        client.sendall(f"{head}Content-Length: {len(many)}\r\n\r\n".encode() + many)
        with suppress(ConnectionError):
            client.sendall(b"GET /livez HTTP/1.1\r\nX: ")
            for _ in range(20):
                client.sendall(b"x" * 20_000)
        text = b""
        with suppress(ConnectionError):  # of what was sent a part may not have been read
            while piece := client.recv(2**20):
                text += piece

    assert re.findall(rb"HTTP/1.1 (\d+)", text) == [b"200"]


def test_a_byte_too_many_costs_nobody_an_answer(server):
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as client:
        client.sendall(f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY + b"}")
        text = client.makefile("rb").read()

    assert re.findall(rb"HTTP/1.1 (\d+)", text) == [b"200"]


def test_a_model_that_takes_long_is_answered_in_a_thread_and_recorded_once(env, tmp_path, trained):
    artifacts = shutil.copytree(trained, tmp_path / "artifacts") / "1.0.0"
    columns = joblib.load(artifacts / "decision_tree.joblib").n_features_in_
    rows = np.random.default_rng(1).random((200, columns))
    joblib.dump(HistGradientBoostingClassifier().fit(rows, rows[:, 0] > 0.5), artifacts / "decision_tree.joblib")
    manifest = json.loads((artifacts / "manifest.json").read_text())
    digest = hashlib.sha256((artifacts / "decision_tree.joblib").read_bytes()).hexdigest()
    manifest["files"]["decision_tree.joblib"]["sha256"] = digest
    (artifacts / "manifest.json").write_text(json.dumps(manifest))
    own = processes.environment(f"sqlite:///{tmp_path / 'own.sqlite3'}", artifacts.parent, DEBUG="1")
    processes.manage("migrate", env=own)
    with processes.running(own, tmp_path / "log", wait_for="/readyz") as server:
        server.headers = processes.token_header(own)
        path = "/api/v1/classifier/predict?algorithm=decision_tree"
        answers = [server.post(path, json={"Orders": 3}).json() for _ in range(10)]
        logged = server.get("/api/v1/mlrequests").json()

    assert {answer["algorithm"] for answer in answers} == {"decision tree"}
    assert sorted(answer["request_id"] for answer in answers) == sorted(row["id"] for row in logged["results"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "drop"),
    [(b"", b""), (b"GET /livez HTTP/1.1\r\nX: ", b"x"), (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\r\n")],
    ids=["nothing", "drop by drop", "empty lines after an answer"],
)
def test_who_does_not_ask_to_the_end_is_given_up(server, first, drop):
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=5) as client:
        began = time.monotonic()
        client.sendall(first)
        with suppress(ConnectionError):
            while time.monotonic() - began < 100:
                try:
                    if client.recv(4096) == b"":
                        break
                except TimeoutError:
                    client.sendall(drop)

    assert 60 < time.monotonic() - began < 90


@pytest.mark.slow
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("before", [0, 2])
def test_who_announces_a_body_and_does_not_send_it_is_given_up(server, is_known, before):
    headers = token_of(server) if is_known else {"Authorization": "Token wrong"}
    server.post(PREDICT, data=BODY, headers=headers | {"Content-Type": "application/json"})
    headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=100) as client:
        began = time.monotonic()
        first = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * before
        client.sendall(first + f"{head}Content-Length: 12\r\n\r\n".encode() + BODY[:1] * is_known)
        text = client.makefile("rb").read()

    assert re.findall(rb"HTTP/1.1 (\d+)", text) == [b"200"] * before + [b"400" if is_known else b"401"]
    assert 60 < time.monotonic() - began < 90


@pytest.mark.slow
def test_an_idle_connection_outlives_the_ones_that_nginx_keeps(server):
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=90) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.recv(4096)
        began = time.monotonic()
        assert client.recv(4096) == b""
        assert 60 < time.monotonic() - began < 90
