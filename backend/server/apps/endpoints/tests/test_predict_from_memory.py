"""A caller who is known, of an endpoint that is known, is answered by one statement, which checks both."""

from __future__ import annotations

import asyncio
import io
import json
import time
from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.core.handlers.wsgi import WSGIHandler
from django.db import InterfaceError, OperationalError, connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from knox.models import AuthToken
from rest_framework.permissions import BasePermission
from rest_framework.test import APIClient, APIRequestFactory
from rest_framework.throttling import UserRateThrottle

from apps.endpoints import abtests, journal, lifecycle, permissions, prediction
from apps.endpoints.models import ABTest, Endpoint, MLRequest, ShadowAnswer
from apps.endpoints.views import PredictView
from apps.ml.registry import registry
from conftest import AsServed, make_application
from server.handler import Handler

PREDICT = "/api/v1/classifier/predict?status=production"


@pytest.fixture
def user(db):
    return User.objects.create_user("ann")


@pytest.fixture
def caller(user, application):
    _, token = AuthToken.objects.create(user)
    client = APIClient(raise_request_exception=False)
    client.handler = AsServed(application)
    client.credentials(HTTP_AUTHORIZATION=f"Token {token}")
    return client


@pytest.fixture
def known(caller, algorithms, customer):
    """The caller after a first answer, which taught the process the token and what is served."""
    assert caller.post(PREDICT, customer).status_code == 200
    MLRequest.objects.all().delete()
    return caller


def set_status(algorithm, status):
    lifecycle.set_status(algorithm, status, by="ann", now=timezone.now())


def statements(client, *args, **kwargs):
    with CaptureQueriesContext(connection) as queries:
        response = client.post(*args, **kwargs)
    return response, [query["sql"] for query in queries]


def test_one_statement_checks_and_records(known, customer):
    response, (statement,) = statements(known, PREDICT, customer)

    assert response.status_code == 200
    assert statement.startswith("INSERT")
    assert MLRequest.objects.get().pk == response.json()["request_id"]


def test_the_answer_its_headers_and_its_row_are_those_of_a_first_call(caller, algorithms, customer):
    first, second = (caller.post(PREDICT, {**customer, "CustomerId": "C7"}) for _ in range(2))

    def shown(response):
        return {**response.json(), "request_id": None}, dict(response.items()) | {"Content-Length": None}

    assert shown(first) == shown(second)
    one, other = (
        MLRequest.objects.filter(pk=response.json()["request_id"])
        .values(
            "input_data", "full_response", "response", "probability", "customer_key", "parent_mlalgorithm", "abtest"
        )
        .get()
        for response in (first, second)
    )
    assert one == other


# --- What changed meanwhile -------------------------------------------------------------------------------------------
def test_a_new_status_governs_the_next_answer(known, customer, algorithms):
    set_status(algorithms["decision_tree"], "production")

    assert known.post(PREDICT, customer).json()["algorithm"] == "decision tree"
    assert statements(known, PREDICT, customer)[0].json()["algorithm"] == "decision tree"
    assert MLRequest.objects.filter(parent_mlalgorithm=algorithms["decision_tree"]).count() == 2
    assert MLRequest.objects.count() == 2


def test_what_was_learnt_anew_is_one_statement_again(known, customer, algorithms):
    set_status(algorithms["decision_tree"], "production")
    known.post(PREDICT, customer)

    assert len(statements(known, PREDICT, customer)[1]) == 1


def test_a_retired_algorithm_answers_no_more(known, customer, algorithms):
    by_name = "/api/v1/classifier/predict?algorithm=random_forest"
    assert known.post(by_name, customer).status_code == 200
    set_status(algorithms["random_forest"], "retired")

    assert known.post(by_name, customer).status_code == 400
    assert MLRequest.objects.count() == 1


def test_a_test_that_starts_and_stops_gets_the_requests_between(known, customer, algorithms):
    test = abtests.start("a test", algorithms["random_forest"], algorithms["extra_trees"], by="ann", now=timezone.now())
    during = [known.post(PREDICT, customer).json()["request_id"] for _ in range(40)]
    abtests.stop(ABTest.objects.get(), by="ann", now=timezone.now())
    after = known.post(PREDICT, customer).json()["request_id"]

    assert set(MLRequest.objects.filter(abtest=test).values_list("pk", flat=True)) == set(during)
    assert MLRequest.objects.filter(pk__in=during).values("parent_mlalgorithm").distinct().count() == 2
    assert MLRequest.objects.get(pk=after).abtest is None


def test_a_challenger_that_fails_is_asked_once_and_each_failure_counts(known, algorithms, customer, monkeypatch):
    champion, challenger = algorithms["random_forest"], algorithms["decision_tree"]
    test = abtests.start("a test", champion, challenger, by="ann", now=timezone.now())
    known.post(PREDICT, customer)  # learns what is served now
    before = MLRequest.objects.filter(abtest=test).count()
    asked = 0

    def fail(row):
        nonlocal asked
        asked += 1
        raise RuntimeError("no such leaf")

    monkeypatch.setattr(registry.get(challenger), "compute_prediction", fail)
    for _ in range(60):
        response, queries = statements(known, PREDICT, customer)
        assert response.json()["algorithm"] == "random forest"
        assert "INSERT" in queries[0]  # nothing was looked up

    assert 5 < asked < 55  # as often as not
    assert ShadowAnswer.objects.filter(abtest=test, response=None).count() == asked
    assert MLRequest.objects.filter(abtest=test).count() == before + 60 - asked


def test_an_endpoint_that_was_renamed_is_not_known_by_its_old_name(known, customer):
    Endpoint.objects.update(name="other")

    assert known.post(PREDICT, customer).status_code == 404
    assert known.post("/api/v1/other/predict?status=production", customer).status_code == 200


def forget_token(user):
    AuthToken.objects.all().delete()


def expire_token(user):
    AuthToken.objects.update(expiry=timezone.now() - timedelta(seconds=1))


def put_out_user(user):
    User.objects.update(is_active=False)


def delete_user(user):
    user.delete()


@pytest.mark.parametrize("change", [forget_token, expire_token, put_out_user, delete_user])
def test_who_may_not_call_any_more_is_refused_and_nothing_is_recorded(known, customer, user, change):
    change(user)

    assert known.post(PREDICT, customer).status_code == 401
    assert known.post(PREDICT, {"Orders": "many"}).status_code == 401  # and learns nothing of what is wrong
    assert not MLRequest.objects.exists()

    response, (statement,) = statements(known, PREDICT, customer)
    assert (response.status_code, statement.split()[0]) == (401, "SELECT")  # it is a stranger's token again


def test_a_token_that_expires_later_still_counts(known, customer):
    AuthToken.objects.update(expiry=timezone.now() + timedelta(minutes=1))

    assert len(statements(known, PREDICT, customer)[1]) == 1


def test_a_stranger_is_looked_up_before_anything_is_scored(known, customer, monkeypatch):
    monkeypatch.setattr(prediction, "predict_from_memory", lambda *args, **kwargs: pytest.fail("it was scored"))

    assert APIClient(headers={"Authorization": "Token " + "0" * 64}).post(PREDICT, customer).status_code == 401
    assert APIClient().post(PREDICT, customer).status_code == 401


# --- What is not plain goes the long way ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "null", '"a"', '{"Orders": "many"}', '{"Orders": 1, "Colour": 2}', '{"Orders": NaN}', "{}", "5"],
)
def test_what_is_wrong_is_told_as_to_one_who_calls_first(known, algorithms, user, body):
    _, token = AuthToken.objects.create(user)
    stranger = APIClient(headers={"Authorization": f"Token {token}"})

    told, told_stranger = (
        client.post(PREDICT, body.encode(), content_type="application/json") for client in (known, stranger)
    )

    assert told.status_code == 400
    assert (told.json(), dict(told.items())) == (told_stranger.json(), dict(told_stranger.items()))
    assert not MLRequest.objects.exists()


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["Plan", "Orders", "RecencyDays", "MeanGapDays", "Newsletter", "CustomerId", "Other"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=1),
    )
)
def test_whatever_is_sent_is_answered_alike(known, customer):
    body = json.dumps(customer)
    plain, with_charset = (
        known.post(PREDICT, body, content_type=kind)
        for kind in ("application/json", "application/json; charset=utf-8")  # the second goes the long way
    )

    def shown(response):
        return response.status_code, {**response.json(), "request_id": None}

    assert shown(plain) == shown(with_charset)


def test_a_body_that_broke_off_is_refused_though_it_reads_as_json(known, wsgi, customer):
    body = json.dumps(customer).encode()
    authorization = known._credentials["HTTP_AUTHORIZATION"]

    status, answer = wsgi(body, CONTENT_LENGTH=str(len(body) + 1), HTTP_AUTHORIZATION=authorization)

    assert (status, "broke off" in answer["message"]) == (400, True)
    assert wsgi(body, HTTP_AUTHORIZATION=authorization)[0] == 200


def test_a_throttle_counts_every_call(known, customer, monkeypatch):
    class TwoAMinute(UserRateThrottle):
        rate = "2/min"

    monkeypatch.setattr(PredictView, "throttle_classes", [TwoAMinute])

    assert [known.post(PREDICT, customer).status_code for _ in range(3)] == [200, 200, 429]


def test_a_permission_that_is_added_is_asked(known, customer, monkeypatch):
    class Nobody(BasePermission):
        def has_permission(self, request, view):
            return False

    monkeypatch.setattr(PredictView, "permission_classes", [*PredictView.permission_classes, Nobody])

    assert known.post(PREDICT, customer).status_code == 403


@pytest.mark.parametrize("error", [OperationalError, InterfaceError])
def test_an_answer_whose_commit_is_in_doubt_is_not_recorded_twice(known, customer, monkeypatch, error):
    record_if = journal.Journal.record_if

    def lost(*args):
        record_if(*args)
        raise error("the connection broke before it said so")

    monkeypatch.setattr(journal.Journal, "record_if", lost)
    response = known.post(PREDICT, customer)

    assert response.status_code == 503
    assert response.json()["message"] == "The database does not answer; try again."
    assert MLRequest.objects.count() == 1


def test_a_call_that_failed_is_answered_to_whom_it_may_be(known, customer, user, monkeypatch):
    def lost(*args):
        forget_token(user)
        raise OperationalError("the connection broke")

    monkeypatch.setattr(journal.Journal, "record_if", lost)

    assert known.post(PREDICT, customer).status_code == 401


def test_too_many_fields_of_a_query_are_told_after_the_token_was_looked_at(known, customer, user):
    _, token = AuthToken.objects.create(user)
    stranger = APIClient(headers={"Authorization": f"Token {token}"})
    path = f"{PREDICT}&" + "&".join(f"f{number}=1" for number in range(1001))

    told, told_stranger = (client.post(path, customer) for client in (known, stranger))
    forget_token(user)

    assert told.status_code == 400
    assert (told.json(), dict(told.items())) == (told_stranger.json(), dict(told_stranger.items()))
    assert known.post(path, customer).status_code == 401


def test_what_this_process_remembers_of_tokens_is_bounded(monkeypatch):
    known = permissions._Known()
    monkeypatch.setattr(known, "MOST", 3)

    for number in range(10):
        known.add(str(number))
        assert str(number) in known

    assert "0" not in known


# --- What Django decided about one call holds for those like it -------------------------------------------------------
def test_a_call_like_one_before_comes_to_no_middleware_and_no_view(known, customer, monkeypatch):
    monkeypatch.setattr(WSGIHandler, "__call__", lambda *args: pytest.fail("it came to Django"))

    assert known.post(PREDICT, customer).status_code == 200


@pytest.fixture
def behind_proxy(caller, algorithms, customer, settings):
    """Send a call as a proxy that ends TLS hands it on; gives the status, the headers and the body."""
    settings.SECURE_SSL_REDIRECT = True
    settings.SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    settings.SECURE_HSTS_SECONDS = 3600
    body = json.dumps(customer).encode()
    plain = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/api/v1/classifier/predict",
        "QUERY_STRING": "status=production",
        "CONTENT_TYPE": "application/json",
        "HTTP_X_FORWARDED_PROTO": "https",
        "HTTP_AUTHORIZATION": caller._credentials["HTTP_AUTHORIZATION"],
    }

    def send(**said):
        heads = []
        asked = {**plain, "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body), **said}
        pieces = send.application(caller._base_environ(**asked), lambda *head: heads.append(head))
        return *heads[0], b"".join(pieces)

    def start():
        send.application = make_application()

    send.start = start
    start()
    return send


@pytest.mark.parametrize(
    ("other", "status"),
    [
        ({"HTTP_HOST": "elsewhere.example"}, "400"),
        ({"HTTP_X_FORWARDED_PROTO": "http"}, "301"),
        ({"HTTP_TRANSFER_ENCODING": "chunked"}, "411"),
        ({"CONTENT_TYPE": "text/plain"}, "415"),
        ({"REQUEST_METHOD": "PUT"}, "405"),
        ({"QUERY_STRING": "status=retired"}, "400"),
        ({"PATH_INFO": "/api/v1/other/predict"}, "404"),
        ({"PATH_INFO": "/api/v1/classifier/predict/"}, "404"),
        ({"HTTP_AUTHORIZATION": "Token " + "0" * 64}, "401"),
    ],
)
def test_what_else_a_call_says_is_looked_at_each_time(behind_proxy, other, status):
    assert [behind_proxy()[0] for _ in range(2)] == ["200 OK", "200 OK"]
    assert behind_proxy(**other)[0].startswith(status)
    assert behind_proxy()[0] == "200 OK"
    assert MLRequest.objects.count() == 3


def test_tls_and_the_name_a_proxy_was_asked_by_are_looked_at_each_time(behind_proxy, settings):
    settings.SECURE_PROXY_SSL_HEADER, settings.USE_X_FORWARDED_HOST = None, True
    behind_proxy.start()

    plain, asked = {"wsgi.url_scheme": "http"}, {"wsgi.url_scheme": "https", "HTTP_X_FORWARDED_HOST": "testserver"}
    assert [behind_proxy(**asked)[0] for _ in range(2)] == ["200 OK", "200 OK"]
    assert behind_proxy(**{**asked, **plain})[0].startswith("301")
    assert behind_proxy(**{**asked, "HTTP_X_FORWARDED_HOST": "elsewhere.example"})[0].startswith("400")


def test_the_headers_are_those_of_a_first_call_each_once(behind_proxy):
    first, second = (behind_proxy() for _ in range(2))

    names = [name for name, _ in second[1]]
    assert (second[0], sorted(second[1])) == (first[0], sorted(first[1]))
    assert len(names) == len(set(names))
    assert {"Strict-Transport-Security", "X-Frame-Options", "Content-Length", "Allow"} <= set(names)
    assert dict(second[1])["Content-Length"] == str(len(second[2]))


def test_in_development_the_address_and_the_site_are_looked_at_each_time(known, algorithms, customer, settings):
    settings.DEBUG = True
    known.handler = AsServed(make_application())
    here = {"REMOTE_ADDR": "127.0.0.1"}

    assert [known.post(PREDICT, customer, **here).status_code for _ in range(2)] == [200, 200]
    for elsewhere in (
        {"REMOTE_ADDR": "192.0.2.1"},
        {"HTTP_X_FORWARDED_FOR": "192.0.2.1"},
        {"HTTP_X_REAL_IP": "192.0.2.1"},
        {"HTTP_FORWARDED": "for=192.0.2.1"},
        {"HTTP_ORIGIN": "https://elsewhere.example"},
        {"HTTP_SEC_FETCH_SITE": "cross-site"},
    ):
        assert known.post(PREDICT, customer, **{**here, **elsewhere}).status_code == 403


def test_a_body_that_is_too_large_is_refused_as_before(known, customer, settings):
    settings.MAX_BODY_BYTES = 10

    assert known.post(PREDICT, customer).status_code == 413


def test_each_answer_is_a_line_of_the_log(known, customer, caplog):
    with caplog.at_level("INFO", logger="requests"):
        known.post(PREDICT, customer)

    (line,) = [record.msg for record in caplog.records if record.name == "requests"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/api/v1/classifier/predict", 200)
    assert line["ms"] > 0


def test_what_the_handler_remembers_of_calls_is_bounded(known, customer, settings, monkeypatch):
    settings.ALLOWED_HOSTS = ["localhost"]
    monkeypatch.setattr(Handler, "MOST_PASSED", 3)
    known.handler = AsServed(make_application(handler := Handler()))

    for number in range(10):
        assert known.post(PREDICT, customer, HTTP_HOST=f"localhost:{8000 + number}").status_code == 200
        assert 1 <= len(handler._passed) <= 3


def test_a_call_that_says_much_is_not_remembered(known, customer, settings):
    settings.ALLOWED_HOSTS = ["*"]
    known.handler = AsServed(make_application(handler := Handler()))

    assert known.post(PREDICT, customer, HTTP_HOST="a" * 2001).status_code == 200
    assert not handler._passed


def test_a_view_that_is_guarded_otherwise_where_it_is_routed_answers_no_call_again(known, algorithms, customer):
    class Anybody(BasePermission):
        pass

    request = APIRequestFactory(headers={"Authorization": known._credentials["HTTP_AUTHORIZATION"]})
    plain, guarded = (
        PredictView.as_view(**initial)(request.post(PREDICT, customer), endpoint_name="classifier")
        for initial in ({}, {"permission_classes": [*PredictView.permission_classes, Anybody]})
    )

    assert (plain.status_code, guarded.status_code) == (200, 200)
    assert (hasattr(plain, "answer_again"), hasattr(guarded, "answer_again")) == (True, False)


@pytest.mark.django_db(transaction=True)
def test_a_connection_that_is_to_serve_one_request_is_closed_after_it(user, algorithms, customer, monkeypatch):
    _, token = AuthToken.objects.create(user)
    client = APIClient(headers={"Authorization": f"Token {token}"})
    client.handler = AsServed(make_application())
    for _ in range(2):
        assert client.post(PREDICT, customer).status_code == 200
    monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", 0)
    connection.close()

    assert client.post(PREDICT, customer).status_code == 200

    # SQLite's, which holds a database in memory, Django keeps.
    assert (connection.connection is None) == (connection.vendor == "postgresql")


@pytest.mark.django_db(transaction=True)
def test_a_connection_that_has_served_its_time_is_replaced(user, algorithms, customer):
    _, token = AuthToken.objects.create(user)
    client = APIClient(headers={"Authorization": f"Token {token}"})
    client.handler = AsServed(Handler())
    for _ in range(2):
        assert client.post(PREDICT, customer).status_code == 200
    before, connection.close_at = connection.connection, time.monotonic() - 1

    assert client.post(PREDICT, customer).status_code == 200

    # SQLite's, which holds a database in memory, Django keeps.
    assert (connection.connection is before) == (connection.vendor == "sqlite")
    assert MLRequest.objects.count() == 3


def test_where_nothing_is_served_any_more_that_is_said(known, algorithms, customer):
    for algorithm in algorithms.values():
        set_status(algorithm, "retired")

    for _ in range(2):
        response = known.post(PREDICT, customer)
        assert response.status_code == 400
        assert "serves no algorithm" in response.json()["message"]


# --- On an event loop
PRODUCTION = prediction.Wanted(status="production")


def on_loop(client, customer, key=""):
    digest = permissions.known_token(client._credentials["HTTP_AUTHORIZATION"])
    call = prediction.KnownCall("classifier", customer, PRODUCTION, digest, timezone.now(), key)
    return asyncio.run(prediction.predict_on_loop(call))


@pytest.mark.parametrize("lacks", ["is_compiled", "loaded"])
def test_a_model_that_is_slow_or_not_loaded_needs_a_thread(known, algorithms, customer, monkeypatch, lacks):
    served = algorithms["random_forest"]
    if lacks == "loaded":
        monkeypatch.delitem(registry.endpoints, served.pk)
    else:
        monkeypatch.setattr(registry.endpoints[served.pk], lacks, False)

    with pytest.raises(prediction.NeedsThread):
        on_loop(known, customer)
    assert MLRequest.objects.count() == 0


def test_a_challenger_that_fails_needs_a_thread_which_records_the_failure(known, algorithms, customer, monkeypatch):
    abtests.start("a test", algorithms["random_forest"], algorithms["decision_tree"], by="ann", now=timezone.now())
    known.post(PREDICT, customer)  # learns what is served now
    before = MLRequest.objects.count()
    traffic = prediction.choose("classifier", PRODUCTION).traffic
    key = next(key for key in map(str, range(100)) if traffic.asks_challenger(key))
    monkeypatch.setattr(registry.get(algorithms["decision_tree"]), "compute_prediction", lambda rows: 1 / 0)
    customer.pop("CustomerId", None)

    with pytest.raises(prediction.NeedsThread):
        on_loop(known, customer, key)
    assert MLRequest.objects.count() == before
