"""A/B tests as two processes serve them, start them and stop them; and what is left of a stop that was killed.

On SQLite and PostgreSQL.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import requests
from scipy.stats import chisquare

from apps.endpoints.statistics import sample_ratio_p
from conftest import make_customers
from tests import postgresql, processes

pytestmark = pytest.mark.whole

PREDICT = "/api/v1/classifier/predict?status=production"
CUSTOMER = {"Plan": "basic", "Orders": 4, "RecencyDays": 20, "MeanGapDays": 31.5, "Newsletter": True}
OUT_OF_THE_BOX = {"random forest": "production", "extra trees": "staging", "decision tree": "testing"}
CHAMPION, CHALLENGER = "random forest", "decision tree"
OTHER_LABEL = {"1": "0", "0": "1"}
# Salts are random: so rarely does a split that is as planned look as if it were not.
ONE_IN_A_MILLION = 1e-6
ROUNDS = 25
# At which a stop is killed, evenly over the time that it takes.
MOMENTS = 20
# Of an arm in a report.
COUNTED = "customers", "labelled", "accuracy"


@dataclass
class Shop:
    """A server that may be replaced by another one on the same database."""

    env: dict[str, str]
    folder: Path
    token: dict[str, str] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)

    def start(self) -> None:
        self.server = processes.start(self.env, self.folder / "server.log", wait_for="/readyz")

    def get(self, path: str) -> Any:
        response = self.server.get(f"/api/v1/{path}")
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, **body: Any) -> requests.Response:
        return self.server.post(f"/api/v1/{path}", json=body)

    def begin(self, first: str = CHAMPION, second: str = CHALLENGER, **plan: Any) -> requests.Response:
        return self.post("abtests", **self.planned(first, second, **plan))

    def planned(self, first: str = CHAMPION, second: str = CHALLENGER, **plan: Any) -> dict[str, Any]:
        arms = {"parent_mlalgorithm_1": self.ids[first], "parent_mlalgorithm_2": self.ids[second]}
        return {"title": "T", "created_by": "Ada", **arms, **plan}

    def stop(self, test_id: int) -> requests.Response:
        return self.post(f"stop_ab_test/{test_id}")

    def move(self, name: str, status: str, by: str = "Ada") -> requests.Response:
        return self.post("mlalgorithmstatuses", status=status, created_by=by, parent_mlalgorithm=self.ids[name])

    def running(self) -> list[int]:
        return [test["id"] for test in self.get("abtests") if test["ended_at"] is None]

    def statuses(self) -> dict[str, str]:
        return {row["name"]: row["current_status"] for row in self.get("mlalgorithms")}

    def ask(self, customers: Sequence[dict]) -> list[dict]:
        response = self.server.post(PREDICT, json=customers)
        assert response.status_code == 200, response.text
        return response.json()

    def arms_of(self, customers: Sequence[dict]) -> dict[str, str]:
        """Which algorithm answers each customer, by the key; asked by several clients, five hundred at a time."""
        parts = [customers[start : start + 500] for start in range(0, len(customers), 500)]
        with ThreadPoolExecutor(4) as pool:
            answers = [answer["algorithm"] for part in pool.map(self.ask, parts) for answer in part]
        return dict(zip([customer["CustomerId"] for customer in customers], answers, strict=True))

    def tell(self, outcomes: Sequence[dict]) -> None:
        response = self.server.post("/api/v1/feedback", json=outcomes)
        assert response.status_code == 200, response.text


def on(database: str) -> Any:
    """One server for all tests on a kind of database, however many processes run them."""
    return pytest.param(database, marks=pytest.mark.xdist_group(f"A/B tests on {database}"))


@pytest.fixture(scope="module", params=[on("sqlite"), on("postgresql")])
def a_shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    url = f"sqlite:///{folder / 'server.sqlite3'}"
    if request.param == "postgresql":
        url = postgresql.new_database(request.getfixturevalue("postgresql_url"))
    env = processes.environment(url, trained, DEBUG="1", LOG_LEVEL="WARNING", WEB_CONCURRENCY="2")
    processes.manage("migrate", env=env)
    shop = Shop(env, folder)
    with ThreadPoolExecutor(1) as pool:
        token = pool.submit(processes.token_header, env)
        shop.start()
    try:
        shop.token = token.result()
        shop.ids = {row["name"]: row["id"] for row in shop.get("mlalgorithms")}
        yield shop
    finally:
        shop.server.stop()


@pytest.fixture
def shop(a_shop: Shop) -> Shop:
    for test_id in a_shop.running():
        a_shop.stop(test_id)
    for name, status in OUT_OF_THE_BOX.items():
        assert a_shop.move(name, status).status_code == 201
    return a_shop


@pytest.fixture(scope="module")
def customers() -> list[dict]:
    return json.loads(make_customers(10_000, seed=3).drop(columns="IsRetained").to_json(orient="records"))


# --- Who is in which arm ----------------------------------------------------------------------------------------------
def asked_alone(server: processes.Server, body: dict, headers: dict[str, str]) -> tuple[str, int]:
    """Which algorithm answers a customer over a new connection, and in which process."""
    port = int(server.url.rpartition(":")[2])
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", PREDICT, json.dumps(body), {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer["algorithm"], holder_of(port, connection.sock.getsockname()[1], server.workers())
    finally:
        connection.close()


def holder_of(port: int, client: int, workers: Sequence[int]) -> int:
    """Which process has the server's end of a connection between two ports. Linux only."""
    ends = f" 0100007F:{port:04X} 0100007F:{client:04X} "
    inodes: set[str] = set()
    for _ in range(100):
        # Others change the table while it is read, piece by piece: a row may come twice, or not at all.
        inodes |= {row.split()[9] for row in Path("/proc/net/tcp").read_text().splitlines() if ends in row}
        if inodes:
            break
    (inode,) = inodes
    (holder,) = [pid for pid in workers if f"socket:[{inode}]" in processes.open_files(pid)]
    return holder


def test_a_customer_has_one_arm_in_every_process_however_named_and_after_a_restart(shop, customers):
    assert shop.begin().status_code == 201
    arms = shop.arms_of(customers[:1000])
    assert set(arms.values()) == {CHAMPION, CHALLENGER}

    def assert_every_process_agrees() -> None:
        workers = shop.server.workers()
        assert len(workers) == 2
        for customer in customers[:8]:
            key, nameless = customer["CustomerId"], {**customer, "CustomerId": None}
            for body, headers in [(customer, {}), (nameless, {"X-Customer-Key": key})]:
                for caller in ({}, shop.token):
                    answered: set[int] = set()
                    for _ in range(60):  # each goes to either process, by chance
                        algorithm, worker = asked_alone(shop.server, body, {**headers, **caller})
                        assert algorithm == arms[key]
                        answered.add(worker)
                        if len(answered) == 2:
                            break
                    assert answered == set(workers)

    assert_every_process_agrees()
    shop.server.stop()
    shop.start()
    assert_every_process_agrees()
    assert shop.arms_of(customers[:1000]) == arms


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_ten_thousand_customers_are_split_as_planned_and_the_report_says_so(shop, customers, weight):
    test_id = shop.begin(weight=weight).json()["id"]
    first = shop.arms_of(customers)
    again = shop.arms_of(random.sample(customers, len(customers)))
    report = shop.get(f"abtests/{test_id}/report")

    assert again == first
    counts = Counter(first.values())
    split = [counts[CHAMPION], counts[CHALLENGER]]
    assert sum(split) == 10_000
    p = chisquare(split, [10_000 * (1 - weight), 10_000 * weight]).pvalue
    assert p > ONE_IN_A_MILLION
    assert [report[arm]["customers"] for arm in ("champion", "challenger")] == split
    assert [report[arm]["requests"] for arm in ("champion", "challenger")] == [2 * count for count in split]
    check = report["checks"]["sample_ratio"]
    assert (check["customers"], check["planned"]) == (split, [1 - weight, weight])
    assert check["single_look_p"] == pytest.approx(p)
    assert check["p"] >= sample_ratio_p(*([count] for count in split), 1 - weight) * (1 - 1e-9) > ONE_IN_A_MILLION
    assert report["decision"]["verdict"] != "INVALID"


# --- Many change it at once -------------------------------------------------------------------------------------------
def all_at_once(*calls: Callable[[], requests.Response]) -> list[requests.Response]:
    together = threading.Barrier(len(calls))

    def call(one: Callable[[], requests.Response]) -> requests.Response:
        together.wait()
        return one()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def assert_one_answers(statuses: Sequence[str], champion_is_tested: bool) -> None:
    """Of all algorithms of an endpoint: two are in a test or none; one is in production, or is the test's champion."""
    count = Counter(statuses)
    assert count["ab_testing"] in (0, 2), statuses
    assert count["production"] + champion_is_tested == 1, statuses


def assert_every_step_was_whole(shop: Shop) -> None:
    """By the history, in the order of the commits: after each change one algorithm answers for production."""
    statuses: dict[int, str] = {}
    tests_begun = tests_ended = 0
    champion = None
    history = shop.get("mlalgorithmstatuses")
    for _, steps in groupby(history, key=lambda step: step["created_at"]):
        holder = next((pk for pk, status in statuses.items() if status == "production"), None)
        was_tested = "ab_testing" in statuses.values()
        statuses |= {step["parent_mlalgorithm"]: step["status"] for step in steps}
        is_tested = "ab_testing" in statuses.values()
        if is_tested and not was_tested:
            champion = holder
            tests_begun += 1
        tests_ended += was_tested and not is_tested
        assert_one_answers([*statuses.values()], statuses.get(champion) == "ab_testing")

    assert {step["parent_mlalgorithm"]: step["status"] for step in history if step["active"]} == statuses
    assert {shop.ids[name]: status for name, status in shop.statuses().items()} == statuses
    tests = shop.get("abtests")
    ended = [test for test in tests if test["ended_at"]]
    assert (len(tests), len(ended)) == (tests_begun, tests_ended)
    assert tests_begun - tests_ended in (0, 1)
    assert all(test["summary"] and test["decision"] for test in ended)
    assert all(not (test["summary"] or test["decision"]) for test in tests if test not in ended)


def test_starting_stopping_and_promoting_at_once_leaves_one_to_answer_and_each_request_answered(shop):
    names = [*OUT_OF_THE_BOX]
    better = CHAMPION
    done = threading.Event()
    told = threading.Semaphore(0)

    def predict_and_tell() -> Counter:
        """Each answer's outcome is told at once, so that stops move production."""
        answered: Counter = Counter()
        while not done.is_set():
            response = shop.server.post(PREDICT, json=CUSTOMER)
            answered[response.status_code] += 1
            answer = response.json()
            if response.status_code == 200:
                label = answer["label"] if answer["algorithm"] == better else OTHER_LABEL[answer["label"]]
                shop.tell([{"request_id": answer["request_id"], "outcome": label}])
                told.release()
        return answered

    def wait_until_both_arms_have_outcomes() -> None:
        """By chance: of eight told from now on, three may be of answers given before the test."""
        while told.acquire(blocking=False):
            pass
        for _ in range(8):
            assert told.acquire(timeout=30)

    def look() -> int:
        looks = 0
        while not done.is_set():
            statuses = shop.statuses().values()
            assert_one_answers([*statuses], "ab_testing" in statuses and "production" not in statuses)
            looks += 1
        return looks

    codes: dict[str, Counter] = defaultdict(Counter)
    ended: Counter = Counter()
    with ThreadPoolExecutor(4) as pool:
        predicting = [pool.submit(predict_and_tell) for _ in range(3)]
        looking = pool.submit(look)
        try:
            test_id = shop.begin().json()["id"]
            for number in range(ROUNDS):
                wait_until_both_arms_have_outcomes()
                pair = random.sample(names, 2)
                started, stopped, promoted = all_at_once(
                    lambda pair=pair: shop.begin(*pair),
                    lambda test_id=test_id: shop.stop(test_id),
                    lambda number=number: shop.move(random.choice(names), "production", by=f"promoter {number}"),
                )
                for what, response in [("started", started), ("stopped", stopped), ("promoted", promoted)]:
                    codes[what][response.status_code] += 1
                ended[test_id] += stopped.json()["message"].startswith("The test is stopped.")

                running = shop.running()
                if started.status_code == 201:
                    test_id = started.json()["id"]
                    better = random.choice(pair)
                assert running in ([], [test_id])
                statuses = shop.statuses()
                is_champion = bool(running) and "production" not in statuses.values()
                assert_one_answers([*statuses.values()], is_champion)
        finally:
            done.set()
        answered = sum((future.result() for future in predicting), Counter())
        assert looking.result() > 10

    assert set(answered) == {200} and answered[200] > ROUNDS
    assert set(codes["stopped"]) == {200}
    assert set(codes["started"]) == {201, 400}
    assert set(codes["promoted"]) == {201, 409}
    assert set(ended.values()) <= {0, 1}
    tests = shop.get("abtests")
    assert sum(ended.values()) == len([test for test in tests if test["ended_at"] and test["id"] in ended])
    assert any("is the more accurate and goes to production" in test["summary"] for test in tests)
    promotions = [step for step in shop.get("mlalgorithmstatuses") if step["created_by"].startswith("promoter")]
    assert len([step for step in promotions if step["status"] == "production"]) == codes["promoted"][201]
    assert_every_step_was_whole(shop)
    assert "Traceback" not in shop.server.log.read_text()


# --- Reports of large tests -------------------------------------------------------------------------------------------
DOUBLE = """
from django.db import connection
from apps.endpoints.models import MLRequest
columns = ", ".join(field.column for field in MLRequest._meta.concrete_fields if not field.primary_key)
with connection.cursor() as cursor:
    for _ in range({times}):
        cursor.execute(
            f"INSERT INTO endpoints_mlrequest ({{columns}}) SELECT {{columns}} FROM endpoints_mlrequest "
            "WHERE abtest_id = {test_id}"
        )
"""


def test_of_workers_at_once_one_counts_the_report_of_a_large_test_and_every_process_shows_it(shop, customers):
    test_id = shop.begin().json()["id"]
    shop.tell(outcomes(shop.ask(customers[:200]), right=True))
    processes.manage("shell", "--no-imports", "-c", DOUBLE.format(times=9, test_id=test_id), env=shop.env)

    logs = shop.folder / "first worker", shop.folder / "second worker"
    said = "which is large, was counted"
    env = {**shop.env, "LOG_LEVEL": "INFO"}
    with processes.worker(env, logs[0]) as first, processes.worker(env, logs[1]) as second:
        within = time.monotonic() + 60
        while not any(said in log.read_text() for log in logs):
            assert time.monotonic() < within
            time.sleep(0.1)
        time.sleep(3)  # in which the other one, which began a moment later, would count too
        for worker in (first, second):
            worker.terminate()
            assert worker.wait(10) == 0
    counted = datetime.now(UTC)
    shop.ask(customers[:10])

    assert sum(log.read_text().count(said) for log in logs) == 1
    told = [shop.get(f"abtests/{test_id}/report") for _ in range(20)]
    assert told[1:] == told[:-1]
    assert datetime.fromisoformat(told[0]["as_of"]) < counted
    assert sum(told[0][arm]["requests"] for arm in ("champion", "challenger")) == 200 * 2**9
    shop.stop(test_id)
    assert shop.get(f"abtests/{test_id}/report")["ended_at"]


# --- Stops that take long, or are killed ------------------------------------------------------------------------------
class Killer:
    """A process that stops tests in others, which it kills or holds: see killed_stops."""

    def __init__(self, env: dict[str, str]):
        script = "from tests import killed_stops; killed_stops.serve()"
        command = [sys.executable, "manage.py", "shell", "--no-imports", "-c", script]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=processes.BACKEND, env=env, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, *call: Any) -> Any:
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture(scope="module", autouse=True)  # so that it loads meanwhile
def killer(a_shop: Shop) -> Iterator[Killer]:
    killer = Killer(a_shop.env)
    yield killer
    killer.end()


def left_by(before: dict, after: dict) -> str:
    """Whether a stop has changed nothing, or all that it has to; anything else fails.

    Until when it counts, it notes beforehand.
    """
    *tests, test = after["tests"]
    before = {**before, "tests": [*tests, {**before["tests"][-1], "counted_until": test["counted_until"]}]}
    if after == before:
        return "old"
    assert test["ended_at"] == test["counted_until"]
    assert test["summary"]
    assert {**test, "ended_at": None, "summary": ""} == before["tests"][-1]

    *decisions, decision = after["decisions"]
    assert decisions == before["decisions"]
    assert (decision["abtest_id"], decision["decided_at"]) == (test["id"], test["ended_at"])

    arms = {test["parent_mlalgorithm_1_id"], test["parent_mlalgorithm_2_id"]}
    steps = len(before["statuses"])
    ended = {step["id"] for step in before["statuses"] if step["active"] and step["parent_mlalgorithm_id"] in arms}
    assert after["statuses"][:steps] == [
        {**step, "active": step["active"] and step["id"] not in ended} for step in before["statuses"]
    ]
    added = after["statuses"][steps:]
    assert sorted(step["parent_mlalgorithm_id"] for step in added) == sorted(arms)
    assert all(step["active"] and step["created_at"] == test["ended_at"] for step in added)
    assert_one_answers([step["status"] for step in after["statuses"] if step["active"]], False)
    return "new"


def outcomes(answers: Sequence[dict], *, right: bool) -> list[dict]:
    return [
        {"request_id": answer["request_id"], "outcome": answer["label"] if right else OTHER_LABEL[answer["label"]]}
        for answer in answers
    ]


def test_while_a_stop_counts_others_go_on_and_what_they_tell_is_dated_after_it(shop, customers, killer):
    test_id = shop.begin().json()["id"]
    answers = shop.ask(customers[:300])
    shop.tell(outcomes(answers[:200], right=True))
    killer("prepare", test_id)
    before = shop.get(f"abtests/{test_id}/report")

    held = killer("hold", test_id, "CREATE TEMPORARY TABLE evidence_asked")
    shop.tell(outcomes(answers[200:], right=True))
    shop.tell(outcomes(answers[:50], right=False))
    shop.ask(customers[300:400])
    meanwhile = shop.get(f"abtests/{test_id}/report")
    assert killer("go_on", held)["message"].startswith("The test is stopped.")

    ended = shop.get(f"abtests/{test_id}/report")
    arms = "champion", "challenger"
    assert [meanwhile[arm]["accuracy"] < 1 for arm in arms] == [True, True]
    for arm in arms:
        assert {name: ended[arm][name] for name in COUNTED} == {name: before[arm][name] for name in COUNTED}
    by_accuracy = re.findall(r"(\d+) of (\d+) labelled requests right", ended["summary"])
    assert sum(int(right) for right, _ in by_accuracy) == sum(int(labelled) for _, labelled in by_accuracy) == 200
    again = processes.manage("recompute_decision", str(test_id), env=shop.env)
    assert again.stdout.startswith("The same as recorded")


def test_a_stop_counts_who_was_answered_before_it_and_recorded_a_moment_later(shop, customers, killer):
    test_id = shop.begin().json()["id"]
    shop.ask(customers[:50])
    killer("prepare", test_id)

    held = killer("hold_request", PREDICT, customers[50])
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(shop.stop, test_id)
        time.sleep(0.3)  # of the second that it waits
        assert killer("go_on", held)["algorithm"] in (CHAMPION, CHALLENGER)
        assert stopping.result().json()["message"].startswith("The test is stopped.")

    decided = killer("state")["decisions"][-1]
    assert sum(arm["requests"] for arm in decided["evidence"]["arms"]) == 51
    again = processes.manage("recompute_decision", str(test_id), env=shop.env)
    assert again.stdout.startswith("The same as recorded")


def test_a_stop_that_counts_while_another_ends_the_test_says_so(shop, customers, killer):
    test_id = shop.begin().json()["id"]
    shop.tell(outcomes(shop.ask(customers[:100]), right=True))
    killer("prepare", test_id)

    held = killer("hold", test_id, "CREATE TEMPORARY TABLE evidence_asked")
    assert shop.stop(test_id).json()["message"].startswith("The test is stopped.")
    after = killer("state")

    assert killer("go_on", held)["message"].startswith("The test had been stopped at")
    assert killer("state") == after


@pytest.mark.parametrize("policy", ["accuracy", "evidence"])
def test_a_stop_that_is_killed_before_any_statement_has_done_nothing_or_all(shop, customers, killer, policy):
    test_id = shop.begin(policy=policy).json()["id"]
    answers = shop.ask(customers[:600])
    is_right = [answer["algorithm"] == CHALLENGER or number % 2 for number, answer in enumerate(answers)]
    for right in (True, False):
        told = [answer for answer, is_so in zip(answers, is_right, strict=True) if bool(is_so) == right]
        shop.tell(outcomes(told, right=right))
    killer("prepare", test_id)
    before = killer("state")

    # One is killed before its first statement, the next one before its second, until one is killed with its answer.
    stops, left, answer = [], [], None
    while answer is None:
        statements, answer = killer("stop", test_id, len(stops) + 1)
        stops.append(statements)
        left.append(left_by(before, killer("state")))

    done = left.index("new")
    assert left == ["old"] * done + ["new"] * (len(left) - done)
    # Each found the test as it was and came one statement further; the last of those had written all.
    assert stops[done - 1][-1] == "COMMIT"
    assert stops[:done] == [stops[done][:count] for count in range(1, done + 1)]
    for written in (
        'UPDATE "endpoints_mlalgorithmstatus"',
        'INSERT INTO "endpoints_mlalgorithmstatus"',
        'UPDATE "endpoints_abtest"',
        'INSERT INTO "endpoints_decision"',
    ):
        assert any(statement.startswith(written) for statement in stops[done - 1])
    after = killer("state")
    _, again = killer("stop", test_id)
    assert again.startswith("The test had been stopped at")
    assert killer("state") == after
    next_of_champion = {"accuracy": "testing", "evidence": "staging"}[policy]
    assert shop.statuses() == {CHALLENGER: "production", CHAMPION: next_of_champion, "extra trees": "staging"}
    assert {shop.ask([CUSTOMER])[0]["algorithm"] for _ in range(6)} == {CHALLENGER}


def test_a_stop_that_is_killed_at_any_moment_has_done_nothing_or_all_and_the_next_one_does_it(shop, killer):
    test_id = shop.begin().json()["id"]
    killer("prepare", test_id)
    began = time.monotonic()
    killer("stop", test_id)
    lasts = time.monotonic() - began

    for moment in range(MOMENTS):
        test_id = shop.begin().json()["id"]
        before = killer("state")

        killer("stop_for", test_id, lasts * moment / MOMENTS)

        after = killer("state")
        was_left = left_by(before, after)
        _, answer = killer("stop", test_id)
        assert answer.startswith("The test is stopped." if was_left == "old" else "The test had been stopped at")
        at_last = killer("state")
        assert left_by(before, at_last) == "new"
        assert was_left == "old" or at_last == after


def test_a_server_that_is_killed_while_tests_start_and_stop_comes_back_with_all_that_it_acknowledged(shop):
    known = len(shop.get("abtests"))
    started: set[int] = set()
    stopped: dict[int, str] = {}
    promoted: set[str] = set()
    acknowledged = threading.Semaphore(0)

    def change(client: int) -> None:
        """Whatever fits, until the server is gone."""
        for number in range(100_000):
            by = f"client {client}, {number}"
            try:
                start = shop.begin()
                if start.status_code == 201:
                    started.add(start.json()["id"])
                for test_id in started - stopped.keys():
                    stopped[test_id] = shop.stop(test_id).json()["ended_at"]
                    acknowledged.release()
                if shop.move(CHAMPION, "production", by=by).status_code == 201:
                    promoted.add(by)
            except requests.RequestException:
                return

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(change, client) for client in range(3)]
        for _ in range(15):
            assert acknowledged.acquire(timeout=30)
        time.sleep(random.random() / 10)
        shop.server.kill()
        for client in clients:
            client.result()
    shop.start()

    assert_every_step_was_whole(shop)
    tests = {test["id"]: test for test in shop.get("abtests")[known:]}
    assert started <= tests.keys() and len(tests) - len(started) <= 1
    assert {pk: tests[pk]["ended_at"] for pk in stopped} == stopped
    assert promoted <= {step["created_by"] for step in shop.get("mlalgorithmstatuses")}
    for test_id in shop.running():
        assert shop.stop(test_id).json()["message"].startswith("The test is stopped.")
    assert_every_step_was_whole(shop)
    assert shop.statuses() == {CHAMPION: "production", CHALLENGER: "testing", "extra trees": "staging"}
    assert shop.ask([CUSTOMER])[0]["algorithm"] == CHAMPION
