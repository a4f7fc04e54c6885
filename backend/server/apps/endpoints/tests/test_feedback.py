"""POST /api/v1/feedback: what became of many customers, all of it recorded or none."""

from __future__ import annotations

import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection, transaction
from django.db.models import CharField, Value
from django.db.models.functions import Cast, Concat
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rest_framework.test import APIClient

from apps.endpoints import feedback, lifecycle, purge
from apps.endpoints.models import ABTest, Decision, FeedbackChange, MLAlgorithm, MLRequest

FEEDBACK = "/api/v1/feedback"
DAY = datetime(2026, 3, 1, tzinfo=UTC)


def log(algorithm: MLAlgorithm, count: int = 1, **fields) -> list[int]:
    """The ids of requests that an algorithm has answered."""
    values = {"input_data": {}, "full_response": {}, "response": "1", "probability": 0.75, "latency_ms": 1.5, **fields}
    rows = [MLRequest(parent_mlalgorithm=algorithm, **values) for _ in range(count)]
    return [row.pk for row in MLRequest.objects.bulk_create(rows)]


def upload(api: APIClient, content: str | bytes, query: str = "", **fields):
    data = content.encode() if isinstance(content, str) else content
    return api.post(FEEDBACK + query, {"file": SimpleUploadedFile("outcomes.csv", data), **fields}, format="multipart")


def send_csv(api: APIClient, content: str | bytes, query: str = ""):
    return api.generic("POST", FEEDBACK + query, content, content_type="text/csv")


def counts(response) -> tuple[int, int, int, int]:
    """Lines, recorded, corrected, unchanged."""
    assert response.status_code == 200, response.content
    return tuple(response.json()[name] for name in ("lines", "recorded", "corrected", "unchanged"))


def refused(response, status: int = 400) -> dict:
    assert response.status_code == status, response.content
    assert not FeedbackChange.objects.exists()
    assert not MLRequest.objects.labelled().exists()
    return response.json()


def problem(response) -> str:
    """The only one."""
    (error,) = refused(response)["errors"]
    return error["message"]


def known(*ids: int) -> list[tuple[str | None, bool | None]]:
    rows = {pk: rest for pk, *rest in MLRequest.objects.values_list("pk", "feedback", "acted_on")}
    return [tuple(rows[pk]) for pk in ids]


@pytest.fixture
def forest(algorithms) -> MLAlgorithm:
    return algorithms["random_forest"]


@pytest.fixture
def winback(algorithms) -> MLAlgorithm:
    """An algorithm of another endpoint, whose table says "back" and "gone"."""
    target = {"name": "Back", "positive": "back", "negative": "gone"}
    return lifecycle.register(
        "winback", "logistic", "1", status="production", owner="sam", now=timezone.now(), target=target
    )


@pytest.fixture
def three(forest) -> list[int]:
    return log(forest, 3)


class TestOutcomesOfRequests:
    def test_come_as_a_list_in_json(self, api, three):
        first, second, third = three
        body = [
            {"request_id": first, "outcome": "1"},
            {"request_id": second, "outcome": 0, "acted_on": True},
            {"request_id": str(third), "feedback": 1.0, "acted_on": None},
        ]

        response = api.post(FEEDBACK, body)

        assert response.json() == {
            **{"lines": 3, "recorded": 3, "corrected": 0, "unchanged": 0},
            "message": "Recorded 3, corrected 0, known before 0.",
        }
        assert known(*three) == [("1", None), ("0", True), ("1", None)]

    @pytest.mark.parametrize("send", [upload, send_csv])
    @pytest.mark.parametrize(
        "written",
        [
            "request_id,outcome,acted_on\n{},1,yes\n{},0,no\n{},1,\n",
            "\ufeffrequest_id;feedback;acted_on\r\n{};1;TRUE\r\n{};0;FALSE\r\n{};1;\r\n",
            "acted_on\toutcome\trequest_id\n1\t1\t{}\n\n0\t0\t{}\nnan\t1\t{}",
            'acted_on,"outcome",request_id\nyes,"1","{}"\nno,0,{}\n,1,{}\n',
            "request_id,outcome,acted_on\n{}.0,1.0,1.0\n{}.0,0.0,0.0\n{}.0,1.0,\n",
        ],
    )
    def test_come_as_a_csv_as_people_write_it(self, api, three, send, written):
        assert counts(send(api, written.format(*three))) == (3, 3, 0, 0)
        assert known(*three) == [("1", True), ("0", False), ("1", None)]

    def test_come_as_a_csv_in_gzip(self, api, three):
        packed = gzip.compress("request_id,outcome\n{},1\n{},0\n{},1\n".format(*three).encode())

        assert counts(upload(api, packed)) == (3, 3, 0, 0)
        assert known(*three) == [("1", None), ("0", None), ("1", None)]

    def test_leave_a_trace_of_who_told_them_and_when(self, api, three):
        api.post(FEEDBACK, [{"request_id": pk, "outcome": "1"} for pk in three])

        for pk in three:
            change = FeedbackChange.objects.get(request=pk)
            assert (change.previous, change.feedback, change.created_by) == (None, "1", "anonymous")
            assert MLRequest.objects.get(pk=pk).labelled_at == change.created_at
            assert timezone.now() - change.created_at < timedelta(minutes=1)

    def test_may_be_sent_twice(self, api, three):
        body = "request_id,outcome,acted_on\n{},1,yes\n{},0,\n{},1,no\n".format(*three)
        upload(api, body)
        before = list(FeedbackChange.objects.values())

        response = upload(api, body)

        assert counts(response) == (3, 0, 0, 3)
        assert response.json()["message"] == "All of this was known; nothing has changed."
        assert list(FeedbackChange.objects.values()) == before

    def test_are_corrected_by_others_and_the_history_is_kept(self, api, three):
        first, second, third = three
        upload(api, f"request_id,outcome\n{first},1\n{second},1\n")
        told_at = MLRequest.objects.get(pk=first).labelled_at

        response = upload(api, f"request_id,outcome,acted_on\n{first},0,\n{second},1,yes\n{third},1,\n")

        assert counts(response) == (3, 1, 2, 0)
        assert response.json()["message"] == "Recorded 1, corrected 2, known before 0."
        history = FeedbackChange.objects.order_by("request", "id").values_list(
            "request", "previous", "feedback", "acted_on"
        )
        assert list(history) == [
            (first, None, "1", None),
            (first, "1", "0", None),
            (second, None, "1", None),
            (second, "1", "1", True),
            (third, None, "1", None),
        ]
        assert MLRequest.objects.get(pk=first).labelled_at == told_at

    def test_may_be_told_twice_in_one_file_if_they_agree(self, api, three):
        assert counts(upload(api, f"request_id,outcome\n{three[0]},1\n{three[0]},1\n")) == (2, 1, 0, 1)
        assert FeedbackChange.objects.count() == 1

    def test_are_spelled_as_in_the_training_table_of_whoever_answered(self, api, three, winback):
        (lost,) = log(winback)

        assert counts(upload(api, f"request_id,outcome\n{three[0]},1\n{lost},GONE\n")) == (2, 2, 0, 0)
        assert known(three[0], lost) == [("1", None), ("0", None)]

    def test_are_taken_from_files_with_other_columns_which_are_named(self, api, three):
        response = upload(api, f"Orders,request_id,label,outcome\n3,{three[0]},0,1\n")

        assert response.json()["message"] == (
            "Recorded 1, corrected 0, known before 0. Columns that were not looked at: Orders, label."
        )

    def test_cost_few_statements_however_many_they_are(self, api, forest):
        ids = log(forest, 1_500)
        with CaptureQueriesContext(connection) as queries:
            assert counts(api.post(FEEDBACK, [{"request_id": pk, "outcome": "1"} for pk in ids])) == (1500, 1500, 0, 0)

        assert len(queries) < 15


class TestOutcomesOfCustomers:
    @pytest.fixture
    def asked(self, forest) -> dict[str, int]:
        """The requests of Ada, by when she was asked about; another customer was, too."""
        moments = ["2025-11-20T10:00", "2026-02-01T10:00", "2026-02-28T23:59:59.999999", "2026-03-01T00:00"]
        log(forest, customer_key="Bob", created_at=DAY - timedelta(days=1))
        log(forest, customer_key="", created_at=DAY - timedelta(days=1))
        return {
            text: log(forest, customer_key="Ada", created_at=datetime.fromisoformat(text).replace(tzinfo=UTC))[0]
            for text in moments
        }

    @pytest.mark.parametrize(
        ("outcome_at", "window_days", "of"),
        [
            ("2026-03-01", 90, "2026-02-28T23:59:59.999999"),
            ("2026-03-01T00:00:00Z", "", "2026-02-28T23:59:59.999999"),
            ("2026-03-01 00:00:00.000001+00:00", 1, "2026-03-01T00:00"),
            ("2026-02-28T23:30:00-01:00", 90, "2026-03-01T00:00"),
            ("2026-02-28", 90, "2026-02-01T10:00"),
            ("2026-02-28", 27, "2026-02-01T10:00"),
            ("2026-02-01T10:00:00Z", 74, "2025-11-20T10:00"),
            ("2026-02-01T10:00:00Z", 73, "2025-11-20T10:00"),
            ("2027-03-01", 10_000, "2026-03-01T00:00"),
        ],
    )
    def test_are_of_the_latest_request_before_in_the_window(self, api, asked, outcome_at, window_days, of):
        body = f"customer_key,outcome_at,window_days,outcome\nAda,{outcome_at},{window_days},1\n"

        assert counts(upload(api, body)) == (1, 1, 0, 0)
        assert list(MLRequest.objects.labelled().values_list("pk", flat=True)) == [asked[of]]

    @pytest.mark.parametrize(
        ("key", "outcome_at", "window_days"),
        [("Ada", "2026-02-28", 26), ("Ada", "2025-11-20", 90), ("ada", "2026-03-01", 90), ("Nobody", "2026-03-01", 90)],
    )
    def test_that_have_no_such_request_are_refused(self, api, asked, key, outcome_at, window_days):
        body = [{"customer_key": key, "outcome_at": outcome_at, "window_days": window_days, "outcome": "1"}]

        assert f"There is no request of customer '{key}' from" in problem(api.post(FEEDBACK, body))

    def test_without_a_date_are_of_the_latest_request(self, api, forest):
        log(forest, customer_key="7", created_at=timezone.now() - timedelta(days=2))
        (latest,) = log(forest, customer_key="7", created_at=timezone.now() - timedelta(days=1))

        assert counts(api.post(FEEDBACK, [{"customer_key": 7, "outcome": "1"}])) == (1, 1, 0, 0)
        assert known(latest) == [("1", None)]

    def test_look_back_as_far_as_is_said_for_all(self, api, forest):
        log(forest, customer_key="Ada", created_at=DAY - timedelta(days=100))
        body = "customer_key,outcome_at,outcome\nAda,2026-03-01,1\n"

        refused(upload(api, body))
        refused(upload(api, body, window_days="99"))
        assert counts(upload(api, body, window_days="100")) == (1, 1, 0, 0)
        assert counts(upload(api, body, "?window_days=100")) == (1, 0, 0, 1)
        assert counts(send_csv(api, body, "?window_days=100")) == (1, 0, 0, 1)

    def test_are_dated_in_the_time_zone_of_the_server(self, api, forest, settings):
        settings.TIME_ZONE = "Europe/Berlin"
        (before, after) = (log(forest, customer_key="Ada", created_at=DAY - timedelta(hours=h))[0] for h in (2, 0.5))

        upload(api, "customer_key,outcome_at,outcome\nAda,2026-03-01,1\n")

        assert known(before, after) == [("1", None), (None, None)]

    def test_on_several_endpoints_need_one_that_is_named(self, api, forest, winback):
        of_forest, of_winback = (log(algorithm, customer_key="Ada")[0] for algorithm in (forest, winback))
        log(forest, customer_key="Bob")

        message = problem(upload(api, "customer_key,outcome\nBob,1\nAda,1\n"))
        assert "of several endpoints; name one: classifier, winback." in message

        assert counts(upload(api, "customer_key,outcome\nAda,back\n", endpoint="winback")) == (1, 1, 0, 0)
        assert known(of_forest, of_winback) == [(None, None), ("1", None)]

    def test_on_an_endpoint_that_does_not_exist_are_refused_with_those_there_are(self, api, forest):
        log(forest, customer_key="Ada")

        message = refused(api.post(f"{FEEDBACK}?endpoint=shop", [{"customer_key": "Ada", "outcome": "1"}]))["message"]
        assert message == "endpoint: There is no endpoint 'shop'; there are: classifier."

    def test_find_each_customer_by_an_index(self, api, forest):
        log(forest, customer_key="Ada")
        # Of so many requests no database reads all for one customer.
        others = log(forest, 3_000)
        MLRequest.objects.filter(pk__in=others).update(customer_key=Concat(Value("C"), Cast("pk", CharField())))
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE endpoints_mlrequest")
        with CaptureQueriesContext(connection) as queries:
            api.post(FEEDBACK, [{"customer_key": "Ada", "outcome": "1"}])

        (lookup,) = [query["sql"] for query in queries if query["sql"].strip().startswith("WITH told")]
        with connection.cursor() as cursor:
            cursor.execute(f"EXPLAIN {'QUERY PLAN ' * (connection.vendor == 'sqlite')}{lookup}")
            assert "request_by_customer" in str(cursor.fetchall())


class TestBadLines:
    def test_are_all_named_and_nothing_is_recorded(self, api, three):
        body = (
            "request_id,customer_key,outcome,acted_on,outcome_at,window_days\n"
            f"{three[0]},,1,,,\n"
            "999999,,1,,,\n"
            f"{three[1]},,2,,,\n"
            ",Ada,1,,2026-01-01,5\n"
            f"{three[1]},,1,perhaps,,\n"
            f"\n{three[1]},,,,,\n"
            ",,1,,,\n"
            f"{three[1]},Ada,1,,,\n"
            ",Ada,1,,31.01.2026,\n"
            ",Ada,1,,,0\n"
            "x,,1,,,\n"
            f"{three[2]},,1,,,\n"
            f"{three[2]},,0,,,\n"
            f"{three[2]},,1,no,,\n"
        )

        answer = refused(upload(api, body))

        assert [(error["line"], error["field"]) for error in answer["errors"]] == [
            *[(3, "request_id"), (4, "outcome"), (5, "customer_key"), (6, "acted_on"), (8, "outcome")],
            *[(9, "request_id"), (10, "request_id"), (11, "outcome_at"), (12, "window_days"), (13, "request_id")],
            *[(15, "outcome"), (16, "acted_on")],
        ]
        assert answer["message"] == "line 3: There is no request 999999, or it was purged. (and 11 more)"
        messages = {error["line"]: error["message"] for error in answer["errors"]}
        assert 'outcome must be "1" (the customer stayed, IsRetained = 1)' in messages[4]
        assert messages[5] == (
            "There is no request of customer 'Ada' from 2025-12-27 00:00 UTC until before 2026-01-01 00:00 UTC."
        )
        assert messages[15] == f"Another outcome of request {three[2]} was told before in what was sent."

    def test_of_a_list_are_named_by_their_row(self, api, three):
        body = [
            {"request_id": three[0], "outcome": "1"},
            {"request_id": three[1], "outcome": "maybe"},
            {"request_id": three[1], "outcome": "1", "window": 3},
            {"request_id": three[1], "outcome": "1", "feedback": "1"},
            {"outcome": "1"},
            *("text", None, 5, []),
        ]

        errors = refused(api.post(FEEDBACK, body))["errors"]

        assert [error["row"] for error in errors] == [2, 3, 4, 5, 6, 7, 8, 9]
        assert "'window' is no field of an outcome" in errors[1]["message"]

    def test_are_told_up_to_twenty_of_them(self, api, three):
        answer = refused(upload(api, "request_id,outcome\n" + "0,1\n" * 30))

        assert len(answer["errors"]) == 20
        assert answer["message"].endswith("(and 29 more)")

    def test_that_have_no_cell_for_each_column_are_named(self, api, three):
        assert problem(upload(api, f"request_id,outcome\n{three[0]},1\n{three[1]}\n")) == (
            "has 1 fields where the header has 2"
        )

    @pytest.mark.parametrize(
        "value", ["", " ", None, [], {}, True, -1, 1.5, "1e3", "9" * 30, 10**400, "\x00", "\ud800"]
    )
    @pytest.mark.parametrize("field", ["request_id", "customer_key", "outcome", "outcome_at", "window_days"])
    def test_with_a_value_that_cannot_be_meant_are_refused_in_json(self, api, three, field, value):
        named = {"customer_key": "Ada"} if field in ("outcome_at", "window_days", "customer_key") else {}
        body = [{"request_id": three[0], "outcome": "1"} | named | {field: value}]
        if named:
            del body[0]["request_id"]

        problem(api.generic("POST", FEEDBACK, json.dumps(body), content_type="application/json"))

    def test_of_a_request_that_was_purged_are_refused(self, api, forest):
        (gone,) = log(forest, customer_key="Ada")
        list(purge.purge(purge.selected(customer="Ada")))

        assert problem(api.post(FEEDBACK, [{"request_id": gone, "outcome": "1"}])) == (
            f"There is no request {gone}, or it was purged."
        )

    def test_of_a_request_that_is_purged_at_this_moment_are_refused(self, api, three, monkeypatch):
        write = feedback._write

        def purged_before(*args, **options):
            MLRequest.objects.filter(pk=three[1]).delete()
            return write(*args, **options)

        monkeypatch.setattr(feedback, "_write", purged_before)

        body = [{"request_id": pk, "outcome": "1"} for pk in three]
        assert problem(api.post(FEEDBACK, body)) == f"There is no request {three[1]}, or it was purged."


class TestFilesThatCannotBeRead:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("", "The file is empty"),
            ("request_id,outcome\n", "a header only"),
            ("request_id\n1\n", "no column outcome"),
            ("id,outcome\n1,1\n", "neither a column request_id nor customer_key"),
            ("request_id,outcome,feedback\n1,1,1\n", "mean the same"),
            ("request_id,outcome,request_id\n1,1,1\n", "The column request_id is there twice."),
            ('request_id,outcome\n"1,1\n', "no valid CSV"),
            (b"PK\x03\x04", "a workbook or an archive"),
            (b"request_id,outcome\n1,\xff\n", "not UTF-8"),
        ],
    )
    def test_are_refused_with_a_reason(self, api, forest, content, said):
        assert said in refused(upload(api, content))["message"]

    def test_are_those_with_too_many_lines(self, api, three, monkeypatch):
        monkeypatch.setattr(feedback, "MOST_OUTCOMES", 2)
        body = "request_id,outcome\n{},1\n{},1\n{},1\n".format(*three)

        for response in (upload(api, body), api.post(FEEDBACK, [{"request_id": pk, "outcome": "1"} for pk in three])):
            assert refused(response)["message"] == "These are more than 2 outcomes; send them in parts."

    def test_are_those_over_the_limit(self, api, three, settings):
        settings.BATCH_MAX_BYTES, settings.MAX_BODY_BYTES = 1000, 100
        body = f"request_id,outcome\n{three[0]},1\n"

        refused(send_csv(api, body + "\n" * 1000), 413)
        refused(api.post(FEEDBACK, [{"request_id": three[0], "outcome": "1" + " " * 100}]), 413)
        assert counts(send_csv(api, body + "\n" * 200)) == (1, 1, 0, 0)

    @pytest.mark.parametrize("body", ["{}", "[]", "5", "null", '"1"', '{"request_id": 1, "outcome": "1"}', "", "["])
    def test_is_json_that_is_no_list_of_outcomes(self, api, three, body):
        refused(api.generic("POST", FEEDBACK, body, content_type="application/json"))

    def test_is_an_empty_body(self, api, three):
        refused(send_csv(api, ""))
        refused(api.post(FEEDBACK, {"window_days": "5"}, format="multipart"))
        refused(api.generic("POST", FEEDBACK, "a=b", content_type="application/x-www-form-urlencoded"), 415)

    @pytest.mark.parametrize("window_days", ["0", "-1", "x", "1.5", "10001", "\x00"])
    def test_are_those_with_a_window_that_is_none(self, api, three, window_days):
        body = f"request_id,outcome\n{three[0]},1\n"

        assert refused(upload(api, body, window_days=window_days))["errors"][0]["field"] == "window_days"

    def test_is_a_csv_that_breaks_off_wherever_it_does(self, wsgi, three):
        body = f"request_id,outcome\n{three[0]},1\n".encode()
        for cut in range(len(body)):
            status, _ = wsgi(body[:cut], PATH_INFO=FEEDBACK, CONTENT_TYPE="text/csv", CONTENT_LENGTH=str(len(body)))
            assert status == 400
        assert known(three[0]) == [(None, None)]
        assert wsgi(body, PATH_INFO=FEEDBACK, CONTENT_TYPE="text/csv")[0] == 200


LINES = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from("10"), st.sampled_from([None, True, False]), st.booleans()),
    min_size=1,
    max_size=8,
    unique_by=lambda line: line[0],
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(LINES, min_size=1, max_size=4))
def test_many_at_once_mean_what_they_mean_one_by_one(forest, files):
    by_one = log(forest, 6)
    at_once = [log(forest, customer_key=f"{by_one[0]}-{number}")[0] for number in range(6)]
    for lines in files:
        for number, outcome, acted_on, _ in lines:
            feedback.record(by_one[number], outcome, acted_on=acted_on, by="sam", now=timezone.now())
        rows = [
            {
                **({"customer_key": f"{by_one[0]}-{number}"} if by_key else {"request_id": at_once[number]}),
                "outcome": outcome,
                "acted_on": acted_on,
            }
            for number, outcome, acted_on, by_key in lines
        ]
        feedback.record_rows(rows, by="sam", now=timezone.now())

    assert known(*by_one) == known(*at_once)
    for one, other in zip(by_one, at_once, strict=True):
        histories = [
            list(
                FeedbackChange.objects.filter(request=pk)
                .order_by("id")
                .values_list("previous", "feedback", "acted_on", "created_by")
            )
            for pk in (one, other)
        ]
        assert histories[0] == histories[1]


def decide_a_test(algorithms: dict[str, MLAlgorithm], moment: datetime) -> Decision:
    forest, trees = algorithms["random_forest"], algorithms["extra_trees"]
    test = ABTest.objects.create(
        title="T",
        created_by="sam",
        ended_at=moment,
        counted_until=moment,
        parent_mlalgorithm_1=forest,
        parent_mlalgorithm_2=trees,
        parent_endpoint_id=forest.parent_endpoint_id,
    )
    said = {"verdict": "KEEP", "sentence": "", "policy": "evidence", "evidence": {}, "decided_by": "sam"}
    return Decision.objects.create(abtest=test, decided_at=moment, **said)


class TestDecisions:
    @pytest.fixture
    def decided(self, algorithms) -> datetime:
        """When a test of the endpoint was decided, by a clock that is a minute ahead."""
        moment = timezone.now() + timedelta(minutes=1)
        decide_a_test(algorithms, moment)
        return moment

    @pytest.mark.parametrize("many", [True, False])
    def test_are_older_than_what_is_told_after_them(self, api, forest, decided, many):
        (pk,) = log(forest)

        if many:
            counts(api.post(FEEDBACK, [{"request_id": pk, "outcome": "1"}]))
        else:
            api.patch(f"/api/v1/mlrequests/{pk}", {"feedback": "1"})

        change = FeedbackChange.objects.get()
        assert change.created_at == decided + timedelta(microseconds=1)
        assert MLRequest.objects.get(pk=pk).labelled_at == change.created_at

    def test_of_other_endpoints_do_not_count(self, api, winback, decided):
        (pk,) = log(winback)

        counts(api.post(FEEDBACK, [{"request_id": pk, "outcome": "1"}]))

        assert FeedbackChange.objects.get().created_at < decided


@pytest.mark.django_db(transaction=True)
def test_outcomes_wait_for_a_decision_and_are_dated_after_it(api, algorithms):
    if not connection.features.has_select_for_update:
        pytest.skip("In SQLite one transaction writes at a time.")
    forest = algorithms["random_forest"]
    (pk,) = log(forest)
    holds, told = threading.Event(), threading.Event()

    def decide() -> datetime:
        with closing(connection), transaction.atomic():
            lifecycle.lock(forest.parent_endpoint_id)
            holds.set()
            assert not told.wait(1), "outcomes do not wait for the decision"
            return decide_a_test(algorithms, timezone.now()).decided_at

    def tell() -> None:
        with closing(connection):
            holds.wait(10)
            assert counts(APIClient().post(FEEDBACK, [{"request_id": pk, "outcome": "1"}])) == (1, 1, 0, 0)
            told.set()

    with ThreadPoolExecutor(2) as pool:
        decided, done = pool.submit(decide), pool.submit(tell)
        done.result()

    assert FeedbackChange.objects.get().created_at > decided.result()
