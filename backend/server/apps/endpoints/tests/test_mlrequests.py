"""GET, PUT and PATCH /api/v1/mlrequests: what was answered, and what became of the customer."""

from __future__ import annotations

from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from io import StringIO
from unittest.mock import ANY

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import FieldError
from django.core.management import call_command
from django.db import DatabaseError, IntegrityError, connection, connections, transaction
from django.db.models import JSONField
from django.db.models.functions import Cast
from django.utils import timezone
from knox.models import AuthToken

from apps.endpoints.journal import Entry, NewRequest, journal, prepared, settle
from apps.endpoints.models import ABTest, FeedbackChange, MLAlgorithm, MLRequest
from apps.endpoints.premise import Premise
from apps.ml.registry import registry
from conftest import make_customers

REQUESTS = "/api/v1/mlrequests"
PRODUCTION = "/api/v1/classifier/predict?status=production"


def refused(response, status=400) -> str:
    assert response.status_code == status, response.content
    assert response.json()["status"] == "Error"
    return response.json()["message"]


@pytest.fixture
def answered(api, algorithms, customer) -> str:
    """The address of a request that was answered and whose outcome is not known yet."""
    return f"{REQUESTS}/{api.post(PRODUCTION, customer).json()['request_id']}"


@pytest.fixture
def twelve(api, algorithms, customer) -> list[int]:
    """The ids of twelve requests: customers C0 to C11, an hour between two, the first four with an outcome."""
    rows = [{**customer, "CustomerId": f"C{number}"} for number in range(12)]
    ids = [answer["request_id"] for answer in api.post(PRODUCTION, rows).json()]
    for number, pk in enumerate(ids):
        moment = datetime(2026, 1, 1, 12, tzinfo=UTC) + timedelta(hours=number)
        MLRequest.objects.filter(pk=pk).update(created_at=moment)
    for pk in ids[:4]:
        assert api.patch(f"{REQUESTS}/{pk}", {"feedback": "1"}).status_code == 200
    return ids


class TestReading:
    def test_a_request_tells_the_question_the_answer_and_the_outcome(self, api, answered, algorithms, customer):
        told = api.get(answered).json()

        assert told["input_data"] == customer
        assert told["full_response"] == {"probability": told["probability"], "label": told["response"], "status": "OK"}
        assert told["parent_mlalgorithm"] == algorithms["random_forest"].pk
        assert (told["feedback"], told["abtest"], told["customer_key"]) == (None, None, "")
        assert set(told) == {
            *("id", "input_data", "full_response", "response", "probability", "feedback", "customer_key"),
            *("labelled_at", "acted_on", "latency_ms", "created_at", "parent_mlalgorithm", "abtest"),
        }

    def test_the_list_is_paged_newest_first(self, api, twelve):
        page = api.get(f"{REQUESTS}?page_size=5").json()
        found = [row["id"] for row in page["results"]]
        assert page["previous"] is None
        while page["next"]:
            page = api.get(page["next"]).json()
            found += [row["id"] for row in page["results"]]

        assert found == twelve[::-1]

    def test_a_page_is_read_by_one_query_that_counts_nothing(self, api, twelve, django_assert_num_queries):
        with django_assert_num_queries(1) as queries:
            assert len(api.get(REQUESTS).json()["results"]) == 12

        assert "COUNT(" not in queries.captured_queries[0]["sql"].upper()

    def test_requests_that_come_in_between_do_not_shift_the_pages(self, api, twelve, customer):
        first = api.get(f"{REQUESTS}?page_size=5").json()
        api.post(PRODUCTION, [customer] * 3)
        second = api.get(first["next"]).json()

        assert [row["id"] for row in second["results"]] == twelve[::-1][5:10]

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("labelled=true", range(4)),
            ("labelled=false", range(4, 12)),
            ("customer_key=C7", [7]),
            ("customer_key=nobody", []),
            ("created_after=2026-01-01T20:00:00Z", range(8, 12)),
            ("created_after=2026-01-01T22:00:00%2B02:00", range(8, 12)),
            ("created_after=2026-01-02", []),
            ("created_before=2026-01-01T13:00:00Z", [0]),
            ("created_after=2026-01-01T14:00:00Z&created_before=2026-01-01T17:00:00Z&labelled=true", [2, 3]),
            ("abtest=1", []),
            ("algorithm=", range(12)),
            ("labelled=", range(12)),
        ],
    )
    def test_filters_narrow_the_list(self, api, twelve, query, expected):
        found = [row["id"] for row in api.get(f"{REQUESTS}?{query}").json()["results"]]

        assert found == [twelve[number] for number in expected][::-1]

    def test_the_list_can_be_narrowed_to_one_algorithm(self, api, twelve, algorithms, customer):
        api.post("/api/v1/classifier/predict?status=staging", customer)

        for key, count in [("random_forest", 12), ("extra_trees", 1), ("decision_tree", 0)]:
            page = api.get(f"{REQUESTS}?algorithm={algorithms[key].pk}").json()
            assert len(page["results"]) == count

    @pytest.mark.parametrize(
        "query",
        [
            *("algorithm=forest", "algorithm=0", "algorithm=-1", "algorithm=1.5", "algorithm=1e3", "algorithm=NaN"),
            *("algorithm=99999999999999999999999", "algorithm=%00", "abtest=first"),
            *("labelled=perhaps", "labelled=1", "labelled=%00", "customer_key=%00"),
            *("created_after=yesterday", "created_after=2026-13-01", "created_before=%00", "created_before=12:00"),
            *("created_after=0001-01-01T00:00:00%2B12:00", "created_before=9999-12-31T23:59:59-12:00"),
        ],
    )
    def test_a_filter_that_cannot_be_understood_is_refused_by_name(self, api, twelve, query):
        response = api.get(f"{REQUESTS}?{query}")

        refused(response)
        assert response.json()["errors"][0]["field"] == query.split("=")[0]

    def test_an_algorithm_that_does_not_exist_has_no_requests(self, api, twelve):
        for pk in (999_999, 2**63 - 1):
            assert api.get(f"{REQUESTS}?algorithm={pk}").json()["results"] == []

    @pytest.mark.parametrize("position", ["abc", "%00", "-1", "1.5", "9" * 30, "9" * 2500, "\ud800"])
    def test_a_cursor_that_the_server_did_not_give_is_refused(self, api, twelve, position):
        forged = b64encode(f"p={position}".encode("utf-8", "surrogatepass")).decode()

        for cursor in (forged, "x", "%FF"):
            assert "Invalid cursor" in refused(api.get(f"{REQUESTS}?cursor={cursor}"), 404)

    @pytest.mark.parametrize("size", ["0", "-1", "x", "1e9", "99999999999999999999"])
    def test_a_page_is_never_larger_than_the_largest(self, api, twelve, size):
        assert len(api.get(f"{REQUESTS}?page_size={size}").json()["results"]) == 12

    @pytest.mark.parametrize(
        "pk", ["0", "999999", "999999999999999999", "9999999999999999999", "1" * 5000, "-1", "x", "1.0"]
    )
    def test_an_unknown_request_is_404(self, api, algorithms, pk):
        refused(api.get(f"{REQUESTS}/{pk}"), 404)
        refused(api.patch(f"{REQUESTS}/{pk}", {"feedback": "1"}), 404)
        refused(api.put(f"{REQUESTS}/{pk}", {"feedback": "1"}), 404)


class TestFeedback:
    @pytest.mark.parametrize("method", ["put", "patch"])
    @pytest.mark.parametrize(
        ("outcome", "label"), [("1", "1"), (1, "1"), ("0", "0"), (0, "0"), (1.0, "1"), (" 1 ", "1")]
    )
    def test_is_a_label_as_text_or_as_a_number(self, api, answered, method, outcome, label):
        response = getattr(api, method)(answered, {"feedback": outcome})

        assert response.status_code == 200
        assert response.json()["feedback"] == label
        assert api.get(answered).json()["feedback"] == label

    @pytest.mark.parametrize("encoding", ["multipart", "form"])
    @pytest.mark.parametrize("method", ["put", "patch"])
    def test_may_come_as_a_form(self, api, answered, method, encoding):
        if encoding == "form":
            response = getattr(api, method)(answered, "feedback=0", content_type="application/x-www-form-urlencoded")
        else:
            response = getattr(api, method)(answered, {"feedback": "0"}, format="multipart")

        assert response.json()["feedback"] == "0"

    @pytest.mark.parametrize(
        "outcome",
        ["2", 2, -1, 0.5, "stayed", "", " ", None, True, [], ["1"], {}, {"feedback": "1"}, "\x00", "é" * 500, 10**400],
    )
    def test_that_is_no_known_label_is_refused_with_those_there_are(self, api, answered, outcome):
        message = refused(api.patch(answered, {"feedback": outcome}))

        assert "feedback" in message
        if isinstance(outcome, str | int | float) and outcome is not True and outcome not in ("\x00",):
            assert '"1" (the customer stayed, IsRetained = 1) or "0" (the customer left, IsRetained = 0)' in message
        assert api.get(answered).json()["feedback"] is None
        assert not FeedbackChange.objects.exists()

    @pytest.mark.parametrize(
        "body", ["", "{}", "[]", "5", "null", '"1"', '[{"feedback": "1"}]', '{"feedback": 1e999}', '{"feedback": NaN}']
    )
    def test_that_is_missing_or_no_value_is_refused(self, api, answered, body):
        refused(api.generic("PATCH", answered, body, content_type="application/json"))
        refused(api.generic("PUT", answered, body, content_type="application/json"))

    @pytest.mark.parametrize("name", [r"\ud800", r"\u0000", "input_data", "response", "probability", "id", "nonsense"])
    def test_is_all_that_can_be_written(self, api, answered, name):
        before = api.get(answered).json()

        response = api.generic(
            "PATCH", answered, f'{{"feedback": "1", "{name}": {{"a": 9}}}}', content_type="application/json"
        )

        assert "Only feedback and acted_on can be written" in refused(response)
        assert api.get(answered).json() == before

    def test_may_be_put_into_the_request_as_it_was_read(self, api, answered):
        told = api.get(answered).json()

        assert api.put(answered, {**told, "feedback": "1"}).json() == {**told, "feedback": "1", "labelled_at": ANY}

    def test_a_request_cannot_be_deleted_or_posted(self, api, answered):
        for response in (api.delete(answered), api.post(answered, {"feedback": "1"}), api.post(REQUESTS, {})):
            refused(response, 405)
            assert "GET" in response["Allow"]

    def test_a_correction_is_kept_in_the_history(self, api, answered):
        for outcome in ("1", 0, "1"):
            api.patch(answered, {"feedback": outcome})

        changes = FeedbackChange.objects.order_by("id")
        assert [(change.previous, change.feedback) for change in changes] == [(None, "1"), ("1", "0"), ("0", "1")]
        assert {change.created_by for change in changes} == {"anonymous"}
        assert all(timezone.now() - change.created_at < timedelta(minutes=1) for change in changes)

    def test_the_same_outcome_again_adds_nothing_to_the_history(self, api, answered):
        for outcome in ("1", 1, " 1"):
            assert api.patch(answered, {"feedback": outcome}).status_code == 200

        assert FeedbackChange.objects.count() == 1

    def test_is_dated_when_it_is_told_first(self, api, answered):
        first = api.patch(answered, {"feedback": "1"}).json()["labelled_at"]
        corrected = api.patch(answered, {"feedback": "0"}).json()

        assert timezone.now() - datetime.fromisoformat(first) < timedelta(minutes=1)
        assert (corrected["feedback"], corrected["labelled_at"]) == ("0", first)


class TestActedOn:
    @pytest.mark.parametrize(
        ("told", "known"),
        [(True, True), ("yes", True), ("TRUE", True), (1, True), ("0", False), ("No", False), (False, False)],
    )
    def test_may_come_with_an_outcome(self, api, answered, told, known):
        assert api.patch(answered, {"feedback": "1", "acted_on": told}).json()["acted_on"] is known

    def test_a_misspelt_name_in_a_form_is_refused(self, api, answered):
        response = api.patch(answered, {"feedback": "1", "acted_om": "yes"}, format="multipart")

        assert "acted_om" in refused(response)
        assert api.get(answered).json()["feedback"] is None

    @pytest.mark.parametrize("nothing", [{}, {"acted_on": None}, {"acted_on": " "}])
    def test_is_left_when_nothing_is_said(self, api, answered, nothing):
        api.patch(answered, {"feedback": "1", "acted_on": "yes"})

        assert api.patch(answered, {"feedback": "0", **nothing}).json()["acted_on"] is True
        assert [change.acted_on for change in FeedbackChange.objects.order_by("id")] == [True, True]

    def test_is_corrected_with_a_row_of_history_of_its_own(self, api, answered):
        for acted_on in (None, "yes", "no", "no"):
            api.patch(answered, {"feedback": "1", "acted_on": acted_on})

        changes = FeedbackChange.objects.order_by("id").values_list("previous", "feedback", "acted_on")
        assert list(changes) == [(None, "1", None), ("1", "1", True), ("1", "1", False)]

    @pytest.mark.parametrize("told", ["perhaps", 2, [], {}, "\x00", 10**400])
    def test_that_is_neither_yes_nor_no_is_refused(self, api, answered, told):
        assert "acted_on" in refused(api.patch(answered, {"feedback": "1", "acted_on": told}))
        assert api.get(answered).json()["feedback"] is None

    def test_says_nothing_without_an_outcome(self, api, answered):
        assert "feedback" in refused(api.patch(answered, {"acted_on": True}))


class TestOtherSpellings:
    """Feedback in the words of the training table."""

    @pytest.fixture
    def train_with(self, db, tmp_path, settings):
        import train

        def train_and_register(target: dict[int, object], *options: str) -> None:
            table = (
                make_customers().assign(Churn=lambda frame: frame["IsRetained"].map(target)).drop(columns="IsRetained")
            )
            table.to_csv(tmp_path / "table.csv", index=False)
            arguments = ["--data", str(tmp_path / "table.csv"), "--artifacts-dir", str(tmp_path / "artifacts")]
            assert train.main([*arguments, "--target", "Churn", *options]) == 0
            settings.ML_ARTIFACTS_DIR = tmp_path / "artifacts"
            registry.register_run()

        return train_and_register

    @pytest.mark.parametrize(
        ("target", "options", "told"),
        [
            ({1: "yes", 0: "no"}, [], {"yes": "1", "no": "0", "YES": "1", " No ": "0", "1": "1", 0: "0"}),
            ({1: "no", 0: "yes"}, ["--positive", "no"], {"no": "1", "yes": "0", "1": "1", 0: "0"}),
            ({1: "stayed", 0: "left"}, ["--positive", "stayed"], {"stayed": "1", "Left": "0", 1: "1"}),
            ({1: True, 0: False}, [], {True: "1", False: "0", "true": "1", "False": "0", "0": "0"}),
            # "1" and "0" are always the labels, also where the table's own 1 means that the customer left.
            ({1: 0, 0: 1}, ["--positive", "0"], {1: "1", "1": "1", 0: "0", "0": "0"}),
        ],
    )
    def test_an_outcome_may_be_spelled_as_in_the_training_table(self, api, train_with, customer, target, options, told):
        train_with(target, *options)

        for outcome, label in told.items():
            pk = api.post(PRODUCTION, customer).json()["request_id"]
            assert api.patch(f"{REQUESTS}/{pk}", {"feedback": outcome}).json()["feedback"] == label

    def test_the_refusal_names_these_spellings(self, api, train_with, customer):
        train_with({1: "stayed", 0: "left"}, "--positive", "stayed")
        pk = api.post(PRODUCTION, customer).json()["request_id"]

        message = refused(api.patch(f"{REQUESTS}/{pk}", {"feedback": "maybe"}))

        assert message == (
            'feedback must be "1" (the customer stayed, Churn = stayed) or "0" (the customer left, Churn = left), '
            "not 'maybe'."
        )


@pytest.mark.django_db(transaction=True)
def test_what_a_database_kept_as_json_reads_the_same_when_it_is_kept_as_text(api, answered):
    told = api.get(answered).json()

    def overwrite(text: str) -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("UPDATE endpoints_mlrequest SET input_data = %s", [text])

    call_command("migrate", "endpoints", "0008", verbosity=0)
    try:
        with pytest.raises(DatabaseError):
            overwrite("{")
    finally:
        call_command("migrate", verbosity=0)

    assert api.get(answered).json() == told
    overwrite('{"Age":  41}')
    assert api.get(answered).json()["input_data"] == {"Age": 41}
    with connection.cursor() as cursor:
        cursor.execute("SELECT input_data FROM endpoints_mlrequest")
        assert cursor.fetchall() == [('{"Age":  41}',)]


@pytest.mark.django_db(transaction=True)
def test_printing_a_migration_changes_nothing(api, answered):
    def overwrite() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("UPDATE endpoints_mlrequest SET input_data = '{'")

    call_command("sqlmigrate", "endpoints", "0009", backwards=True, stdout=StringIO())
    overwrite()
    MLRequest.objects.update(input_data={})
    call_command("migrate", "endpoints", "0008", verbosity=0)
    try:
        call_command("sqlmigrate", "endpoints", "0009", stdout=StringIO())
        with pytest.raises(DatabaseError):
            overwrite()
    finally:
        call_command("migrate", verbosity=0)
    overwrite()


def take_away(algorithm: MLAlgorithm, statement: str = "DELETE FROM endpoints_mlalgorithm WHERE id = %s") -> None:
    """By hand, with the steps of its life."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("DELETE FROM endpoints_mlalgorithmstatus WHERE parent_mlalgorithm_id = %s", [algorithm.pk])
        cursor.execute(statement, [algorithm.pk])


@pytest.mark.django_db(transaction=True)
def test_no_algorithm_can_be_taken_away_from_its_requests(answered, algorithms):
    asked = algorithms["random_forest"]
    for statement in (
        "DELETE FROM endpoints_mlalgorithm WHERE id = %s",
        "UPDATE endpoints_mlalgorithm SET id = id + 100 WHERE id = %s",
    ):
        with pytest.raises(IntegrityError):
            take_away(asked, statement)
    MLRequest.objects.all().delete()
    take_away(asked)
    assert not MLAlgorithm.objects.filter(pk=asked.pk).exists()


@pytest.mark.django_db(transaction=True)
def test_no_test_can_be_taken_away_from_its_requests(answered, algorithms):
    forest, trees = algorithms["random_forest"], algorithms["extra_trees"]
    test = ABTest.objects.create(
        title="a",
        created_by="b",
        created_at=timezone.now(),
        parent_mlalgorithm_1=forest,
        parent_mlalgorithm_2=trees,
        parent_endpoint=forest.parent_endpoint,
        champion=forest,
    )
    MLRequest.objects.update(abtest=test)
    delete = "DELETE FROM endpoints_abtest WHERE id = %s"

    with pytest.raises(IntegrityError), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(delete, [test.pk])
    MLRequest.objects.update(abtest=None)
    with connection.cursor() as cursor:
        cursor.execute(delete, [test.pk])
    assert not ABTest.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_no_algorithm_can_be_taken_away_from_requests_that_are_being_recorded(algorithms):
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has one writer")
    algorithm = algorithms["random_forest"]
    row = NewRequest({}, {}, "1", 0.5, timezone.now(), 1.0, "", algorithm.pk, None)

    with ThreadPoolExecutor(1) as beside:
        with transaction.atomic():
            journal.record([row])
            taking_away = beside.submit(take_away, algorithm)
            with pytest.raises(TimeoutError):
                taking_away.result(timeout=1)
        with pytest.raises(IntegrityError):
            taking_away.result(timeout=30)
        beside.submit(connections.close_all).result()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("broken", ["a\0b", "\ud800", "a" * 201, None])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("within", [nullcontext, transaction.atomic], ids=["alone", "in a transaction"])
def test_of_rows_that_are_recorded_together_none_is_if_one_cannot_be(algorithms, broken, place, within):
    keys = ["a", "b", "c"]
    keys[place] = broken
    algorithm = algorithms["random_forest"].pk
    rows = [NewRequest({}, {}, "1", 0.5, timezone.now(), 1.0, key, algorithm, None) for key in keys]

    written = 0
    with within():
        with suppress(DatabaseError, ValueError):
            written = len(journal.record(rows))
        assert MLRequest.objects.count() == written  # a caller's transaction goes on
    assert written == (3 if connection.vendor == "sqlite" and broken in ("a\0b", "a" * 201) else 0)
    assert MLRequest.objects.count() == written
    assert journal.record([row._replace(customer_key="d") for row in rows])


@pytest.fixture
def holds(algorithms) -> Premise:
    """Of a token that expires in an hour."""
    registry.served("classifier")
    known = registry.known("classifier")
    token, _ = AuthToken.objects.create(User.objects.create_user("ann"), expiry=timedelta(hours=1))
    return Premise(token.digest, known.endpoint_id, "classifier", known.newest_step)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("others", [1, 60, 150])
@pytest.mark.parametrize("conditional", [1, 150])
def test_a_request_whose_premise_fails_is_not_recorded_whoever_waits_beside_it(algorithms, holds, others, conditional):
    algorithm = algorithms["random_forest"].pk

    def rows(key: str, count: int) -> list[NewRequest]:
        return prepared([NewRequest({}, {}, "1", 0.5, timezone.now(), 1.0, key, algorithm, None)] * count)

    fails = holds._replace(newest_step=holds.newest_step - 1)
    entries = [Entry(rows("first", others)), Entry(rows("second", others)), Entry(rows("holds", 1), holds)]
    entries += [Entry(rows("fails", 1), fails) for _ in range(conditional)]

    settle(entries)

    told = [pk for entry in entries[:3] for pk in entry.ids]
    keys = [*["first"] * others, *["second"] * others, "holds"]
    assert dict(zip(told, keys, strict=True)) == dict(MLRequest.objects.values_list("pk", "customer_key"))
    assert {tuple(entry.ids) for entry in entries[3:]} == {(None,)}


@pytest.mark.django_db(transaction=True)
def test_of_requests_around_the_end_of_a_token_none_is_recorded_without_being_told(algorithms, holds):
    algorithm, now = algorithms["random_forest"].pk, timezone.now()
    moments = [now] * 120 + [now + timedelta(hours=2)] * 30
    rows = prepared([NewRequest({}, {}, "1", 0.5, moment, 1.0, "", algorithm, None) for moment in moments])
    entries = [Entry([row], holds) for row in rows]

    settle(entries)

    assert {tuple(entry.ids) for entry in entries} == {(None,)}
    assert not MLRequest.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_to_record_nothing_is_no_error(algorithms):
    assert journal.record([]) == []


def test_what_was_asked_is_no_place_to_search_in_unless_it_is_cast(answered, customer):
    orders = customer["Orders"]
    for search in ({"__Orders": orders}, {"__has_key": "Orders"}, {"__contains": {"Orders": orders}}, {"": customer}):
        search = {f"input_data{how}": value for how, value in search.items()}
        with pytest.raises(FieldError):
            MLRequest.objects.filter(**search).count()

    assert not MLRequest.objects.filter(input_data__isnull=True).exists()
    as_json = MLRequest.objects.annotate(asked=Cast("input_data", JSONField()))
    assert as_json.filter(asked__Orders=customer["Orders"]).count() == 1
