"""Without DEBUG every call of the API needs a token, and some writes a permission besides."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import AbstractUser, Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from hypothesis import example, given
from hypothesis import strategies as st
from knox.models import AuthToken
from rest_framework.test import APIClient

from apps.endpoints.models import ABTest, FeedbackChange, MLAlgorithmStatus, MLRequest
from conftest import status_of

PREDICT = "/api/v1/classifier/predict?status=production"
STATUS_PERMISSION = "add_mlalgorithmstatus"
ABTEST_PERMISSION = "add_abtest"


def with_token(user: AbstractUser, **options: Any) -> APIClient:
    _, secret = AuthToken.objects.create(user, **options)
    return APIClient(headers={"Authorization": f"Token {secret}"})


@pytest.fixture
def user(db) -> AbstractUser:
    return User.objects.create_user("ann")


@pytest.fixture
def caller(user) -> APIClient:
    """A client with a token, whose user has no permission."""
    return with_token(user)


@pytest.fixture
def nobody(db) -> APIClient:
    return APIClient(raise_request_exception=False)


def permit(user: AbstractUser, *codenames: str) -> None:
    user.user_permissions.add(*Permission.objects.filter(codename__in=codenames))


def operations(api: APIClient) -> list[tuple[str, str]]:
    """Every method and address that the API's description lists, with numbers and names filled in."""
    described = api.get("/api/schema").json()
    return [
        (method, path.replace("{endpoint_name}", "classifier").replace("{id}", "1"))
        for path, methods in described["paths"].items()
        for method in methods
        if method in {"get", "post", "put", "patch", "delete"}
    ]


# --- No token, or a wrong one -----------------------------------------------------------------------------------------
def test_without_a_token_no_operation_of_the_api_answers(api, algorithms, nobody, settings):
    found = operations(api)
    assert len(found) > 12
    settings.DEBUG = False

    for method, path in [*found, ("get", "/api/schema"), ("options", PREDICT), ("delete", "/api/v1/endpoints")]:
        response = getattr(nobody, method)(path)

        assert response.status_code == 401, (method, path)
        assert response["WWW-Authenticate"] == "Token"
        assert response.json() == {
            "status": "Error",
            "message": "A token is needed: send the header `Authorization: Token ...`.",
        }
    assert not MLRequest.objects.exists()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("Token 0123456789abcdef", "This token is not known."),
        ("Token", "No credentials provided"),
        ("Token two words", "should not contain spaces"),
        ("Token é", "This token is not known."),
        ("Bearer 0123456789abcdef", "A token is needed"),
        ("Basic YW5uOmFubg==", "A token is needed"),
        ("nonsense", "A token is needed"),
    ],
)
def test_a_wrong_token_is_refused(nobody, customer, header, words):
    response = nobody.post(PREDICT, customer, headers={"Authorization": header})

    assert response.status_code == 401
    assert response["WWW-Authenticate"] == "Token"
    assert response.json()["status"] == "Error" and words in response.json()["message"]


@pytest.mark.django_db
@given(secret=st.text(st.characters(min_codepoint=33, max_codepoint=255), min_size=1))
@example("\xff\xfe")
@example("\x7f")
def test_no_made_up_token_is_let_in_or_breaks_the_server(secret):
    client = APIClient(raise_request_exception=False, headers={"Authorization": f"Token {secret}"})

    assert client.get("/api/v1/endpoints").status_code == 401


def test_a_token_that_differs_in_its_end_is_refused(user):
    _, secret = AuthToken.objects.create(user)
    forged = secret[:-1] + ("0" if secret[-1] != "0" else "1")

    assert APIClient(headers={"Authorization": f"Token {secret}"}).get("/api/v1/endpoints").status_code == 200
    assert APIClient(headers={"Authorization": f"Token {forged}"}).get("/api/v1/endpoints").status_code == 401


def test_an_expired_token_is_refused(user):
    response = with_token(user, expiry=timedelta(seconds=-1)).get("/api/v1/endpoints")

    assert response.status_code == 401
    assert response.json()["message"] == "This token has expired."


def test_the_token_of_an_inactive_user_is_refused(user, caller):
    user.is_active = False
    user.save()

    assert caller.get("/api/v1/endpoints").status_code == 401


def test_a_deleted_token_is_refused_from_the_next_call_on(user, caller):
    assert caller.get("/api/v1/endpoints").status_code == 200

    AuthToken.objects.all().delete()

    assert caller.get("/api/v1/endpoints").status_code == 401


def test_the_admins_session_opens_no_operation_of_the_api(client, algorithms, customer):
    client.force_login(User.objects.create_superuser("root"))

    assert client.post(PREDICT, customer, content_type="application/json").status_code == 401


# --- Any token --------------------------------------------------------------------------------------------------------
def test_a_token_is_enough_to_predict_to_tell_outcomes_and_to_read(caller, algorithms, customer):
    answer = caller.post(PREDICT, customer)
    assert answer.status_code == 200
    told = caller.patch(f"/api/v1/mlrequests/{answer.json()['request_id']}", {"feedback": "1"})
    assert told.status_code == 200
    more = [{"request_id": answer.json()["request_id"], "outcome": "0"}]
    assert caller.post("/api/v1/feedback", more).status_code == 200

    for path in ("endpoints", "mlalgorithms", "mlalgorithmstatuses", "mlrequests", "abtests"):
        assert caller.get(f"/api/v1/{path}").status_code == 200
    assert {change.created_by for change in FeedbackChange.objects.all()} == {"ann"}


def test_authentication_costs_one_query_and_no_write(user, caller):
    for days in (-1, 1, None):
        AuthToken.objects.create(user, expiry=timedelta(days=days) if days else None)

    with CaptureQueriesContext(connection) as queries:
        assert caller.get("/api/v1/endpoints").status_code == 200

    token_queries = [query["sql"] for query in queries if "knox" in query["sql"] or "auth" in query["sql"]]
    assert len(token_queries) == 1 and token_queries[0].startswith("SELECT")
    assert len(queries) == 2
    assert AuthToken.objects.count() == 4


def test_a_user_may_have_many_tokens(user):
    clients = [with_token(user) for _ in range(25)]

    assert {client.get("/api/v1/endpoints").status_code for client in clients} == {200}


# --- Permissions ------------------------------------------------------------------------------------------------------
def test_writing_a_status_needs_its_permission(user, caller, algorithms):
    change = {"status": "production", "parent_mlalgorithm": algorithms["extra_trees"].pk}

    response = caller.post("/api/v1/mlalgorithmstatuses", change)

    assert response.status_code == 403
    assert response.json() == {
        "status": "Error",
        "message": "Your user lacks the permission endpoints.add_mlalgorithmstatus; an administrator can grant it.",
    }
    assert status_of(algorithms["extra_trees"]) == "staging"

    permit(user, STATUS_PERMISSION)
    assert caller.post("/api/v1/mlalgorithmstatuses", change).status_code == 201
    assert status_of(algorithms["extra_trees"]) == "production"


def test_starting_and_stopping_a_test_need_its_permission(user, caller, algorithms):
    test = {
        "title": "autumn",
        "parent_mlalgorithm_1": algorithms["random_forest"].pk,
        "parent_mlalgorithm_2": algorithms["extra_trees"].pk,
    }
    permit(user, STATUS_PERMISSION)
    for response in (caller.post("/api/v1/abtests", test), caller.post("/api/v1/stop_ab_test/1")):
        assert response.status_code == 403
        assert "endpoints.add_abtest" in response.json()["message"]
    assert not ABTest.objects.exists()

    permit(user, ABTEST_PERMISSION)
    started = caller.post("/api/v1/abtests", test)
    assert started.status_code == 201
    stopped = caller.post(f"/api/v1/stop_ab_test/{started.json()['id']}")
    assert stopped.status_code == 200
    assert "Stopped by ann." in stopped.json()["summary"]


def test_a_superuser_needs_no_permission(db, algorithms):
    root = with_token(User.objects.create_superuser("root"))
    change = {"status": "retired", "parent_mlalgorithm": algorithms["decision_tree"].pk}

    assert root.post("/api/v1/mlalgorithmstatuses", change).status_code == 201


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize("encoding", ["json", "multipart"])
def test_what_is_written_is_signed_by_the_tokens_user_whatever_the_body_says(
    user, caller, algorithms, settings, debug, encoding
):
    settings.DEBUG = debug
    permit(user, STATUS_PERMISSION, ABTEST_PERMISSION)
    forest, trees = algorithms["random_forest"].pk, algorithms["extra_trees"].pk

    status = caller.post(
        "/api/v1/mlalgorithmstatuses",
        {"status": "staging", "parent_mlalgorithm": forest, "created_by": "the boss"},
        format=encoding,
    )
    test = caller.post(
        "/api/v1/abtests",
        {"title": "t", "parent_mlalgorithm_1": forest, "parent_mlalgorithm_2": trees, "created_by": "the boss"},
        format=encoding,
    )

    assert status.json()["created_by"] == test.json()["created_by"] == "ann"
    assert not MLAlgorithmStatus.objects.filter(created_by="the boss").exists()


def test_in_development_a_token_is_not_needed_but_counts_when_there_is_one(api, user, caller, algorithms):
    change = {"status": "staging", "parent_mlalgorithm": algorithms["decision_tree"].pk, "created_by": "bob"}

    assert api.post("/api/v1/mlalgorithmstatuses", change).json()["created_by"] == "bob"
    assert caller.post("/api/v1/mlalgorithmstatuses", change).status_code == 403
    assert api.get("/api/v1/endpoints", headers={"Authorization": "Token wrong"}).status_code == 401


# --- The description of the API ---------------------------------------------------------------------------------------
def test_the_description_needs_a_token_or_an_admins_session(nobody, caller, client, algorithms):
    assert nobody.get("/api/schema").status_code == 401
    assert caller.get("/api/schema").status_code == 200

    client.force_login(User.objects.create_superuser("root"))
    assert client.get("/api/schema").status_code == 200
    assert client.get("/api/docs").status_code == 200


def test_the_page_that_shows_it_sends_a_visitor_to_the_login(client, db):
    response = client.get("/api/docs")

    assert response.status_code == 302
    assert response["Location"] == "/admin/login/?next=/api/docs"


def test_the_description_names_the_token(api, caller, settings):
    described = api.get("/api/schema").json()
    assert described["components"]["securitySchemes"]["token"]["name"] == "Authorization"
    predict = described["paths"]["/api/v1/{endpoint_name}/predict"]["post"]
    assert predict["security"] == [{"token": []}, {}]

    settings.DEBUG = False
    described = caller.get("/api/schema").json()
    security = {str(o["security"]) for path in described["paths"].values() for o in path.values()}
    assert security == {"[{'token': []}]"}


# --- Errors outside the API's views -----------------------------------------------------------------------------------
@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize(
    "path", ["/api/nowhere", "/api/v1/nowhere", "/api/v1/endpoints/", "/nowhere", "/static/nowhere"]
)
def test_an_unknown_address_is_json_in_both_modes(client, settings, debug, path):
    settings.DEBUG = debug

    response = client.get(path)

    assert response.status_code == 404
    assert response.json()["status"] == "Error"
    assert path in response.json()["message"] and "/api/docs" in response.json()["message"]
    assert ("no trailing slash" in response.json()["message"]) == path.endswith("/")


@pytest.mark.parametrize("debug", [True, False])
def test_a_failure_nobody_foresaw_is_json_in_both_modes(api, algorithms, customer, settings, debug, monkeypatch):
    settings.DEBUG = debug
    monkeypatch.setattr("apps.endpoints.views.prediction.predict", lambda *args, **kwargs: 1 / 0)
    client = APIClient(raise_request_exception=False)
    client.force_authenticate(User(username="ann"))

    response = client.post(PREDICT, customer)

    assert response.status_code == 500
    assert response.json() == {"status": "Error", "message": "The server failed; its log says why."}


def test_a_foreign_host_name_is_json_and_names_the_setting(nobody, settings):
    settings.ALLOWED_HOSTS = ["retention.example.com"]

    response = nobody.get("/api/v1/endpoints", headers={"Host": "other.example"})

    assert response.status_code == 400
    assert "ALLOWED_HOSTS" in response.json()["message"]


def test_the_admin_keeps_its_own_pages(client, db):
    client.force_login(User.objects.create_superuser("root"))

    response = client.get("/admin/nowhere/")

    assert response.status_code == 404
    assert response["Content-Type"].startswith("text/html")


@pytest.mark.parametrize("debug", [True, False])
def test_the_short_addresses_lead_on(client, db, settings, debug):
    settings.DEBUG = debug

    assert client.get("/")["Location"] == "/api/docs"
    assert client.get("/admin")["Location"] == "/admin/"
    assert Client(raise_request_exception=False).post("/admin").status_code == 302


# --- Batch jobs -------------------------------------------------------------------------------------------------------
def test_a_job_is_cancelled_by_whoever_asked_for_it_or_may_cancel_any(caller, algorithms, customers_csv):
    with customers_csv.open("rb") as file:
        submitted = caller.post("/api/v1/batch-predict", {"file": file, "mode": "async"}, format="multipart")
    address = submitted["Location"]
    another = User.objects.create_user("bob")
    caller_of_another = with_token(another)

    refused = caller_of_another.delete(address)

    assert (refused.status_code, refused.json()["message"]) == (
        403,
        "ann asked for this job; to cancel it you need the permission endpoints.change_batchjob.",
    )
    assert caller.get(address).json()["state"] == "queued"
    permit(another, "change_batchjob")
    assert caller_of_another.delete(address).json()["state"] == "cancelled"
    assert caller.delete(address).json()["state"] == "cancelled"
