"""The commands of an administrator: create_admin, create_token, register_algorithms, rollback_production, ..."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase
from knox.models import AuthToken
from rest_framework.test import APIClient

from apps.endpoints import lifecycle, purge
from apps.endpoints.management.base import who
from apps.endpoints.models import Endpoint, FeedbackChange, MLAlgorithm, MLRequest
from conftest import status_of
from tests import processes

DAY = datetime(2026, 3, 10, 12, tzinfo=UTC)


def run(*arguments: str) -> str:
    """What a command writes to the standard output."""
    output = io.StringIO()
    call_command(*arguments, stdout=output, stderr=io.StringIO())
    return output.getvalue()


def refused(*arguments: str) -> str:
    with pytest.raises(CommandError) as error:
        run(*arguments)
    return str(error.value)


def on_a_terminal(*arguments: str, env: dict[str, str], answers: list[tuple[str, str]]) -> tuple[int, str]:
    """Run a command on a terminal of its own, typing each answer when its question appears."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(processes.BACKEND)
        os.execve(sys.executable, [sys.executable, "manage.py", *arguments], env)
    shown, seen = "", 0
    waiting = list(answers)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if waiting and waiting[0][0] in shown[seen:]:
            seen = len(shown)
            os.write(terminal, waiting.pop(0)[1].encode())
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 4096).decode()
            except OSError:  # the other side is closed
                break
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown


@pytest.fixture
def migrated(tmp_path: Path, trained: Path) -> dict[str, str]:
    """The environment of commands that run as processes of their own, on a fresh database."""
    env = processes.environment(f"sqlite:///{tmp_path / 'commands.sqlite3'}", trained, DEBUG="1")
    processes.manage("migrate", env=env)
    return env


# --- create_admin ---------------------------------------------------------------------------------------------------
def test_without_a_terminal_the_first_admin_gets_a_random_password_that_works(client, db):
    shown = run("create_admin")

    password = re.search(r"shown only now: (\S+)", shown)[1]
    admin = get_user_model().objects.get()
    assert admin.username == "admin" and admin.is_superuser and admin.is_staff
    assert len(password) >= 20
    assert client.login(username="admin", password=password)
    assert password not in admin.password


def test_a_second_admin_is_not_made_and_nothing_is_changed(db):
    run("create_admin", "--username", "ann", "--email", "ann@example.com")
    before = get_user_model().objects.values().get()

    shown = run("create_admin", "--username", "bob", "--random-password")

    assert "There is a superuser already: ann. Nothing was changed." in shown
    assert "changepassword ann" in shown
    assert get_user_model().objects.values().get() == before
    assert before["email"] == "ann@example.com"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--username", "taken"], "--username: A user with that username already exists."),
        (["--username", ""], "--username: This field cannot be blank."),
        (["--username", "a b"], "--username: Enter a valid username."),
        (["--email", "nowhere"], "--email: Enter a valid email address."),
    ],
)
def test_a_name_or_an_address_that_cannot_be_is_refused(db, arguments, words):
    get_user_model().objects.create_user("taken")

    assert words in refused("create_admin", *arguments)
    assert get_user_model().objects.count() == 1


@pytest.mark.whole
def test_on_a_terminal_the_password_is_asked_for_twice_and_never_shown(migrated):
    code, shown = on_a_terminal(
        "create_admin",
        env=migrated,
        answers=[
            ("Password for admin:", "12345\n"),
            ("Password for admin:", "correct horse\n"),
            ("The same again:", "battery staple\n"),
            ("Password for admin:", "correct horse\n"),
            ("The same again:", "correct horse\n"),
        ],
    )

    assert code == 0, shown
    assert "too short" in shown and "entirely numeric" in shown
    assert "The two passwords differ" in shown
    assert "The superuser admin is created" in shown
    assert "horse" not in shown and "battery" not in shown and "12345" not in shown


@pytest.mark.whole
def test_who_gives_up_while_asked_has_made_no_user(migrated):
    code, shown = on_a_terminal("create_admin", env=migrated, answers=[("Password for admin:", "\x03")])

    assert code == 1
    assert "No user was created." in shown and "Traceback" not in shown


@pytest.mark.whole
@pytest.mark.parametrize("arguments", [["create_admin"], ["register_algorithms"]])
def test_on_a_database_without_tables_a_command_says_what_to_do(tmp_path, trained, arguments):
    env = processes.environment(f"sqlite:///{tmp_path / 'empty.sqlite3'}", trained, DEBUG="1")

    done = processes.manage(*arguments, env=env, check=False)

    assert done.returncode == 1
    assert "prepare it with `python manage.py migrate`" in done.stderr and "Traceback" not in done.stderr


# --- create_token ---------------------------------------------------------------------------------------------------
def test_a_token_is_shown_once_alone_on_its_line_and_opens_the_api(db):
    get_user_model().objects.create_user("ann")

    shown = run("create_token", "ann")

    assert re.fullmatch(r"[0-9a-f]{64}\n", shown)
    response = APIClient(headers={"Authorization": f"Token {shown.strip()}"}).get("/api/v1/endpoints")
    assert response.status_code == 200


def test_a_token_is_stored_as_a_hash(db):
    secret = run("create_token", "ann", "--create-user").strip()

    stored = AuthToken.objects.values().get()
    assert secret not in str(stored)
    assert len(stored["digest"]) == 128


def test_a_token_lasts_until_it_is_deleted_unless_days_are_given(db):
    run("create_token", "ann", "--create-user")
    run("create_token", "ann", "--days", "30")

    endless, bounded = AuthToken.objects.order_by("created")
    assert endless.expiry is None
    assert abs(bounded.expiry - timezone.now() - timedelta(days=30)) < timedelta(minutes=1)


def test_a_token_for_an_unknown_user_makes_nobody_unless_told_to(db):
    assert "There is no user ann; --create-user makes one" in refused("create_token", "ann")
    assert not get_user_model().objects.exists()

    run("create_token", "ann", "--create-user")

    ann = get_user_model().objects.get()
    assert not ann.has_usable_password() and not ann.is_staff and not ann.is_superuser


def test_a_token_that_could_not_be_used_is_not_made(db):
    get_user_model().objects.create_user("gone", is_active=False)

    assert "The user gone is not active" in refused("create_token", "gone")
    assert "--days must be from 1" in refused("create_token", "gone", "--days", "0")
    assert "--days must be from 1" in refused("create_token", "gone", "--days", "9999999999")
    assert "Enter a valid username." in refused("create_token", "a b", "--create-user")
    assert not AuthToken.objects.exists()


# --- register_algorithms --------------------------------------------------------------------------------------------
@pytest.fixture
def second_run(artifacts_dir: Path, customers_csv: Path, settings) -> Path:
    """An artifacts folder with runs 1.0.0 and 1.1.0."""
    import train

    settings.ML_ARTIFACTS_DIR = artifacts_dir
    assert train.main(["--data", str(customers_csv), "--artifacts-dir", str(artifacts_dir)]) == 0
    return artifacts_dir


def test_registering_says_each_algorithms_status_and_what_was_there_already(db):
    first, again = run("register_algorithms"), run("register_algorithms")

    assert first.splitlines() == [
        "classifier: random forest 1.0.0 is new; its status is production",
        "classifier: extra trees 1.0.0 is new; its status is staging",
        "classifier: decision tree 1.0.0 is new; its status is testing",
    ]
    assert again == first.replace("is new", "was registered already")
    assert MLAlgorithm.objects.count() == 3


def test_a_later_run_enters_as_testing_and_displaces_nobody(algorithms, second_run):
    shown = run("register_algorithms")

    assert shown.count("1.1.0 is new; its status is testing") == 3
    assert status_of(algorithms["random_forest"]) == "production"


def test_a_run_is_registered_by_version_and_on_an_endpoint_of_its_own(db, second_run):
    run("register_algorithms", "--endpoint", "shop", "--version", "1.0.0")

    assert Endpoint.objects.get().name == "shop"
    assert set(MLAlgorithm.objects.values_list("version", flat=True)) == {"1.0.0"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version", "7.7.7"], "There is no training run in"),
        (["--version", "../1.0.0"], "cannot be a version"),
        (["--endpoint", "my shop"], "'my shop' is no name for an endpoint"),
        (["--endpoint", ""], "is no name for an endpoint"),
        (["--endpoint", "a/b"], "is no name for an endpoint"),
    ],
)
def test_a_run_or_an_endpoint_that_cannot_be_is_refused(db, arguments, words):
    assert words in refused("register_algorithms", *arguments)
    assert not Endpoint.objects.exists()


def test_without_a_run_the_command_says_how_to_train(db, settings, tmp_path):
    settings.ML_ARTIFACTS_DIR = tmp_path

    assert "python research/train.py" in refused("register_algorithms")


def test_an_algorithm_that_cannot_answer_is_said_so_when_it_is_registered(db, artifacts_dir, settings):
    settings.ML_ARTIFACTS_DIR = artifacts_dir
    (artifacts_dir / "1.0.0/extra_trees.joblib").write_bytes(b"damaged")

    forest, trees, _ = run("register_algorithms").splitlines()

    assert forest.endswith("its status is production")
    assert "but it cannot answer: extra_trees.joblib of training run 1.0.0 is not the file" in trees


@pytest.mark.whole
def test_a_running_server_answers_with_a_run_that_is_registered_meanwhile(
    tmp_path, artifacts_dir, customers_csv, customer
):
    import train

    env = processes.environment(f"sqlite:///{tmp_path / 'r.sqlite3'}", artifacts_dir, DEBUG="1")
    processes.manage("migrate", env=env)
    with processes.running(env, tmp_path / "log", wait_for="/readyz") as server:
        predict = "/api/v1/classifier/predict?algorithm=random_forest&version=1.1.0"
        assert server.post(predict, json=customer).status_code == 400
        assert train.main(["--data", str(customers_csv), "--artifacts-dir", str(artifacts_dir)]) == 0
        processes.manage("register_algorithms", env=env)

        answers = [server.post(predict, json=customer) for _ in range(8)]

        assert [answer.json().get("version") for answer in answers] == ["1.1.0"] * 8
        now_in_production = server.post("/api/v1/classifier/predict?status=production", json=customer).json()
        assert now_in_production["version"] == "1.0.0"


# --- rollback_production --------------------------------------------------------------------------------------------
def test_production_goes_back_by_a_command_that_records_who_and_why(algorithms):
    lifecycle.set_status(algorithms["decision_tree"], "production", by="ann", now=timezone.now())

    shown = run("rollback_production", "classifier", "--reason", "too coarse")

    assert shown == "classifier: random forest 1.0.0 is in production again; decision tree 1.0.0 moved to testing.\n"
    given_back = algorithms["random_forest"].statuses.get(active=True)
    assert (given_back.status, given_back.reason, given_back.is_rollback) == ("production", "too coarse", True)
    assert given_back.created_by == who()


def test_where_nothing_is_in_production_the_command_names_nobody_who_moved(algorithms):
    lifecycle.set_status(algorithms["random_forest"], "testing", by="ann", now=timezone.now())

    assert run("rollback_production", "classifier") == "classifier: random forest 1.0.0 is in production again.\n"


def test_a_rollback_that_is_refused_says_why(algorithms, artifacts_dir, settings):
    assert "has had no other production algorithm" in refused("rollback_production", "classifier")
    assert refused("rollback_production", "shop") == "There is no endpoint 'shop'; there are: classifier."

    lifecycle.set_status(algorithms["decision_tree"], "production", by="ann", now=timezone.now())
    settings.ML_ARTIFACTS_DIR = artifacts_dir
    (artifacts_dir / "1.0.0/random_forest.joblib").unlink()
    assert "random forest 1.0.0, which endpoint classifier would go back to, cannot answer" in refused(
        "rollback_production", "classifier"
    )
    assert status_of(algorithms["decision_tree"]) == "production"


# --- purge_requests -------------------------------------------------------------------------------------------------
@pytest.fixture
def history(api, algorithms, customer) -> dict[str, int]:
    """One request of each of three customers, a day apart; the first has an outcome that was corrected."""
    logged = {}
    for days, key in enumerate(["C1", "C2", "C3"]):
        answer = api.post("/api/v1/classifier/predict?status=production", {**customer, "CustomerId": key}).json()
        logged[key] = answer["request_id"]
        MLRequest.objects.filter(pk=answer["request_id"]).update(created_at=DAY + timedelta(days=days))
    for outcome in ("1", "0"):
        assert api.patch(f"/api/v1/mlrequests/{logged['C1']}", {"feedback": outcome}).status_code == 200
    return logged


def keys_left() -> set[str]:
    return set(MLRequest.objects.values_list("customer_key", flat=True))


def test_a_dry_run_counts_and_deletes_nothing(history):
    shown = run("purge_requests", "--before", "2026-03-12", "--dry-run")

    assert shown == ("2 requests before 2026-03-12T00:00:00+00:00, 1 of them with an outcome.\nNothing was deleted.\n")
    assert keys_left() == {"C1", "C2", "C3"}


def test_requests_before_a_day_go_with_their_outcomes_and_the_others_stay(history):
    assert FeedbackChange.objects.count() == 2

    shown = run("purge_requests", "--before", "2026-03-12", "--no-input")

    assert shown.endswith("2 requests were deleted.\n")
    assert keys_left() == {"C3"}
    assert not FeedbackChange.objects.exists()


def test_a_customers_requests_go_and_the_others_stay(history):
    run("purge_requests", "--customer", " C2 ", "--no-input")

    assert keys_left() == {"C1", "C3"}
    assert FeedbackChange.objects.count() == 2


def test_a_day_and_a_customer_together_take_what_fits_both(history):
    run("purge_requests", "--before", "2026-03-11", "--customer", "C2", "--no-input")
    assert keys_left() == {"C1", "C2", "C3"}

    run("purge_requests", "--before", "2026-03-11T12:00:01Z", "--customer", "C2", "--no-input")
    assert keys_left() == {"C1", "C3"}


def test_a_purge_has_an_end_that_is_not_part_of_it(history):
    run("purge_requests", "--before", "2026-03-11T12:00:00+00:00", "--no-input")

    assert keys_left() == {"C2", "C3"}


@pytest.mark.parametrize(
    ("zone", "left"), [("Pacific/Auckland", {"C1", "C2", "C3"}), ("America/Los_Angeles", {"C2", "C3"})]
)
def test_a_time_without_offset_is_meant_in_the_time_zone_of_the_settings(history, settings, zone, left):
    settings.TIME_ZONE = zone

    with timezone.override(zone):
        run("purge_requests", "--before", "2026-03-11T00:30", "--no-input")

    assert keys_left() == left


def test_a_day_to_come_is_now(history):
    shown = run("purge_requests", "--before", "9999-12-31", "--dry-run")

    assert shown.startswith("3 requests before 20")


@pytest.mark.parametrize("before", ["yesterday", "2026-02-30", "2026-13-01", "12.03.2026", "", "2026-03-12T25:00"])
def test_a_day_that_cannot_be_is_refused(history, before):
    assert "--before must be a date such as 2026-01-31" in refused("purge_requests", "--before", before)


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_customer_is_refused_and_not_taken_for_those_without_a_key(history, key):
    assert "--customer is empty" in refused("purge_requests", "--customer", key, "--no-input")


def test_a_purge_of_everything_must_be_said(history):
    assert "--before DATE, --customer KEY, or both" in refused("purge_requests", "--no-input")


def test_without_a_terminal_nothing_goes_unless_no_input_is_said(history):
    assert "say --no-input" in refused("purge_requests", "--customer", "C1")
    assert keys_left() == {"C1", "C2", "C3"}


def test_a_purge_by_date_waits_for_a_running_test_and_one_by_customer_does_not(api, algorithms, customer):
    arms = [algorithms["random_forest"].pk, algorithms["extra_trees"].pk]
    api.post("/api/v1/abtests", {"title": "autumn", "parent_mlalgorithm_1": arms[0], "parent_mlalgorithm_2": arms[1]})
    api.post("/api/v1/classifier/predict?status=production", {**customer, "CustomerId": "C1"})
    tomorrow = (timezone.now() + timedelta(days=1)).date().isoformat()

    assert "(autumn) is running and counts some of these requests. Stop it first" in refused(
        "purge_requests", "--before", tomorrow, "--no-input"
    )
    run("purge_requests", "--before", "2020-01-01", "--no-input")
    assert keys_left() == {"C1"}
    warnings = io.StringIO()
    call_command("purge_requests", "--customer", "C1", "--no-input", stdout=io.StringIO(), stderr=warnings)

    assert "it will decide without them" in warnings.getvalue()
    assert not MLRequest.objects.exists()


class APurgeRemovesWhatItSays(TestCase):
    @given(
        rows=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["", "C1", "C2"]), st.booleans()), max_size=12),
        before=st.none() | st.integers(-1, 10),
        customer=st.none() | st.sampled_from(["C1", "C3"]),
        chunk=st.integers(1, 5),
    )
    def test_exactly_the_selected_requests_go_whatever_the_chunks(self, rows, before, customer, chunk):
        endpoint = Endpoint.objects.create(name="shop", owner="ann")
        algorithm = MLAlgorithm.objects.create(parent_endpoint=endpoint, name="tree", version="1", owner="ann")
        for day, key, told in rows:
            logged = MLRequest.objects.create(
                parent_mlalgorithm=algorithm,
                customer_key=key,
                created_at=DAY + timedelta(days=day),
                input_data={},
                full_response={},
                probability=0.5,
                latency_ms=1,
                response="0",
            )
            if told:
                FeedbackChange.objects.create(request=logged, feedback="1", created_by="ann")
        moment = None if before is None else DAY + timedelta(days=before)

        def goes(day: int, key: str) -> bool:
            return (before is None or day < before) and customer in (None, key)

        if moment is None and customer is None:
            with pytest.raises(ValueError, match="would remove everything"):
                purge.selected(before=moment, customer=customer)
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(purge, "CHUNK", chunk)
            parts = list(purge.purge(purge.selected(before=moment, customer=customer)))

        assert sum(part.requests for part in parts) == sum(goes(day, key) for day, key, _ in rows)
        assert sum(part.feedback_changes for part in parts) == sum(told for day, key, told in rows if goes(day, key))
        assert all(part.requests <= chunk for part in parts)
        left = sorted(MLRequest.objects.values_list("created_at", "customer_key"))
        assert left == sorted((DAY + timedelta(days=day), key) for day, key, _ in rows if not goes(day, key))


def test_a_purge_reads_no_more_for_the_last_chunk_than_for_the_first(history, monkeypatch):
    monkeypatch.setattr(purge, "CHUNK", 1)

    with CaptureQueriesContext(connection) as queries:
        parts = list(purge.purge(purge.selected(before=DAY + timedelta(days=30))))

    assert len(parts) == 3
    per_chunk = 6  # savepoint, ids, changes, requests with what hangs on them, release
    assert len(queries) <= per_chunk * 4


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.service)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'busy.sqlite3'}"
    return f"{request.getfixturevalue('postgresql_url')}/postgres"


@pytest.mark.whole
def test_a_server_goes_on_answering_during_a_purge(tmp_path, trained, customer, database_url):
    """Outcomes that arrive meanwhile are recorded or find no request; predictions are answered, and stay."""
    env = processes.environment(database_url, trained, DEBUG="1")
    processes.manage("migrate", env=env)
    predict = "/api/v1/classifier/predict?status=production"
    with processes.running(env, tmp_path / "log", wait_for="/readyz") as server, ThreadPoolExecutor(4) as pool:
        ids = [row["request_id"] for row in server.post(predict, json=[customer] * 3000).json()]
        cutoff = datetime.now(UTC).isoformat()
        purging = pool.submit(processes.manage, "purge_requests", "--before", cutoff, "--no-input", env=env)

        def tell(some: list[int]) -> set[int]:
            told = set()
            for pk in some:
                told.add(
                    requests.patch(
                        f"{server.url}/api/v1/mlrequests/{pk}", json={"feedback": "1"}, timeout=30
                    ).status_code
                )
                if purging.done():
                    break
            return told

        telling = [pool.submit(tell, ids[start::2]) for start in (0, 1)]
        asked = [server.post(predict, json=customer)]
        while not purging.done():
            asked.append(server.post(predict, json=customer))

        assert "3,000 requests were deleted." in purging.result().stdout
        assert set().union(*(told.result() for told in telling)) <= {200, 404}
        assert {answer.status_code for answer in asked} == {200}
        for answer in asked:
            assert server.get(f"/api/v1/mlrequests/{answer.json()['request_id']}").status_code == 200
        assert server.get(f"/api/v1/mlrequests/{ids[0]}").status_code == 404


@pytest.mark.whole
def test_on_a_terminal_a_purge_asks_first_and_leaves_one_line_without_the_customer(migrated, trained):
    seeding = (
        "from apps.endpoints.models import Endpoint, MLAlgorithm, MLRequest\n"
        "shop = Endpoint.objects.create(name='shop', owner='ann')\n"
        "forest = MLAlgorithm.objects.create(parent_endpoint=shop, name='forest', version='1', owner='ann')\n"
        "for key in ['SECRET-KEY-1', 'SECRET-KEY-1', 'other']:\n"
        "    MLRequest.objects.create(parent_mlalgorithm=forest, customer_key=key, input_data={}, full_response={},\n"
        "        probability=0.5, latency_ms=1, response='0')\n"
    )
    subprocess.run(
        [sys.executable, "manage.py", "shell", "--no-imports", "-c", seeding],
        cwd=processes.BACKEND,
        env=migrated,
        check=True,
    )
    asked = "Type yes to go on:"
    command = ["purge_requests", "--customer", "SECRET-KEY-1"]
    env = {**migrated, "LOG_FORMAT": "json"}

    code, shown = on_a_terminal(*command, env=env, answers=[(asked, "y\n")])
    assert code == 0 and "2 requests of this customer" in shown and "Nothing was deleted." in shown

    code, shown = on_a_terminal(*command, env=env, answers=[(asked, "yes\n")])
    assert code == 0 and "2 requests were deleted." in shown
    (line,) = [line for line in shown.splitlines() if '"requests purged"' in line]
    assert '"requests":2' in line and '"of_one_customer":true' in line and '"by":' in line
    assert "SECRET-KEY-1" not in shown
