"""The admin pages: what they show, what they change through the domain, and what they cost."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from html import unescape

import pytest
from django.contrib.auth.models import Permission, User
from django.contrib.messages import get_messages
from django.db import connection
from django.db.models import CharField, Value
from django.db.models.functions import Cast, Concat
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from knox.models import AuthToken
from rest_framework.test import APIClient

from apps.endpoints import abtests, lifecycle
from apps.endpoints.models import ABTest, BatchJob, Endpoint, MLAlgorithm, MLAlgorithmStatus, MLRequest
from conftest import status_of

PAGES = ("endpoint", "mlalgorithm", "mlalgorithmstatus", "mlrequest", "batchjob", "abtest")
ANY_TEXT = st.text(max_size=30) | st.integers().map(str) | st.dates().map(str)


@pytest.fixture
def staff(db):
    """Makes a client that is logged in as a member of staff with some permissions."""

    def with_permissions(*codenames: str) -> Client:
        user = User.objects.create_user("sam", password="sam's secret", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
        client = Client()
        client.force_login(user)
        return client

    return with_permissions


def page(model: str, row: object = None, action: str = "change") -> str:
    return f"/admin/endpoints/{model}/" + (f"{row.pk}/{action}/" if row else "")


def text_of(response) -> str:
    assert response.status_code == 200, response
    return _text(response.content.decode())


def _text(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def rows_of(response) -> list[dict[str, str]]:
    """The rows of a list page, each as text by column."""
    assert response.status_code == 200, response
    rows = response.content.decode().split('<tr class="data-row')[1:]
    cell = re.compile(r'<t[hd]\s+class="field-(\w+)[^>]*>(.*?)</t[hd]>', re.DOTALL)
    return [{name: _text(html) for name, html in cell.findall(row)} for row in rows]


def said_by(response) -> list[str]:
    return [str(message) for message in get_messages(response.wsgi_request)]


def confirm(client: Client, model: str, row: object, action: str, **told: str):
    """Press a button and confirm its dialog."""
    asked = client.get(page(model, row, action))
    assert asked.status_code == 200
    return client.post(page(model, row, action), {"_form_submitted": "True", **told})


def log(algorithm: MLAlgorithm, count: int = 1, **fields) -> list[MLRequest]:
    values = {
        "input_data": {"Orders": 3, "MeanGapDays": None},
        "full_response": {"probability": 0.75, "label": "1", "status": "OK", "warnings": ["Plan is unknown"]},
        "response": "1",
        "probability": 0.75,
        "latency_ms": 1.5,
        **fields,
    }
    return MLRequest.objects.bulk_create([MLRequest(parent_mlalgorithm=algorithm, **values) for _ in range(count)])


def tell(client: Client, logged: MLRequest, outcome: str, **more: str):
    """Save a request's page, as a browser sends it."""
    known = str(logged.feedback_changes.count())
    history = {"feedback_changes-TOTAL_FORMS": known, "feedback_changes-INITIAL_FORMS": known}
    return client.post(page("mlrequest", logged), {"feedback": outcome, **history, **more})


def queries_of(client: Client, url: str) -> list[str]:
    with CaptureQueriesContext(
        connection,
    ) as captured:
        assert client.get(url).status_code == 200
    return [query["sql"] for query in captured]


# --- Algorithms -------------------------------------------------------------------------------------------
def test_the_list_of_algorithms_shows_status_score_and_the_last_week(admin_client, algorithms):
    forest = algorithms["random_forest"]
    log(forest, 3, feedback="1")
    log(forest, 1, feedback="0")
    log(forest, 5)
    log(forest, 7, feedback="0", created_at=timezone.now() - timedelta(days=8))

    rows = {row["name"]: row for row in rows_of(admin_client.get(page("mlalgorithm")))}

    assert set(rows) == {"random forest", "extra trees", "decision tree"}
    assert rows["random forest"]["status"] == "Production"
    assert rows["random forest"]["auc"] == f"{forest.metrics['roc_auc']['value']:.3f}"
    assert rows["random forest"]["requests"] == "9"
    assert rows["random forest"]["accuracy"] == "75.0% of 4"
    assert rows["extra trees"]["requests"] == "0"
    assert rows["extra trees"]["accuracy"] == "no labels yet"


def test_algorithms_are_filtered_by_endpoint_and_status(admin_client, algorithms):
    other = lifecycle.register("winback", "logistic", "1", status="production", owner="sam", now=timezone.now())
    url = page("mlalgorithm")

    of_endpoint = rows_of(admin_client.get(url, {"parent_endpoint__id__exact": other.parent_endpoint_id}))
    in_staging = rows_of(admin_client.get(url, {"current_status": "staging"}))

    assert [row["name"] for row in of_endpoint] == ["logistic"]
    assert [row["name"] for row in in_staging] == ["extra trees"]


def test_promoting_moves_the_former_algorithm_to_staging_and_records_who_did_it(admin_client, algorithms):
    response = confirm(admin_client, "mlalgorithm", algorithms["decision_tree"], "promote")

    assert said_by(response) == [
        "decision tree 1.0.0 has the status Production now.",
        "random forest 1.0.0 moved from Production to Staging.",
    ]
    assert status_of(algorithms["decision_tree"]) == "production"
    assert status_of(algorithms["random_forest"]) == "staging"
    assert set(MLAlgorithmStatus.objects.order_by("-id").values_list("created_by", flat=True)[:2]) == {"admin"}


@pytest.mark.parametrize(
    ("action", "status"), [("move_to_staging", "staging"), ("back_to_testing", "testing"), ("retire", "retired")]
)
def test_other_actions_give_their_status(admin_client, algorithms, action, status):
    tree = lifecycle.register("classifier", "tree", "2", status="testing", owner="sam", now=timezone.now())
    lifecycle.set_status(tree, "retired" if status == "testing" else "testing", by="sam", now=timezone.now())

    confirm(admin_client, "mlalgorithm", tree, action)

    assert status_of(tree) == status


def test_taking_production_away_warns_that_nobody_answers(admin_client, algorithms):
    response = confirm(admin_client, "mlalgorithm", algorithms["random_forest"], "retire")

    assert said_by(response)[-1] == (
        "Endpoint classifier has no production algorithm now: its production requests are refused until you "
        "promote one."
    )


def test_a_status_that_holds_already_is_not_given_again(admin_client, algorithms):
    response = confirm(admin_client, "mlalgorithm", algorithms["random_forest"], "promote")

    assert said_by(response) == ["random forest 1.0.0 has the status Production already."]
    assert algorithms["random_forest"].statuses.count() == 1


def test_a_refused_change_says_why(admin_client, algorithms):
    test = abtests.start("Spring", algorithms["extra_trees"], algorithms["decision_tree"], by="sam", now=timezone.now())

    response = confirm(admin_client, "mlalgorithm", algorithms["extra_trees"], "promote")

    assert f"A/B test {test.pk} (Spring) is running" in said_by(response)[0]
    assert status_of(algorithms["extra_trees"]) == "ab_testing"


def test_asking_and_cancelling_changes_nothing(admin_client, algorithms):
    response = admin_client.get(page("mlalgorithm", algorithms["decision_tree"], "promote"))

    assert "The algorithm that answers them now moves to staging" in text_of(response)
    assert status_of(algorithms["decision_tree"]) == "testing"


def test_changing_a_status_needs_the_permission_that_the_api_asks_for(staff, algorithms):
    client = staff("view_mlalgorithm")
    tree = algorithms["decision_tree"]

    assert "Promote" not in text_of(client.get(page("mlalgorithm")))
    assert client.post(page("mlalgorithm", tree, "promote"), {"_form_submitted": "True"}).status_code == 403
    assert status_of(tree) == "testing"

    user = User.objects.get(username="sam")
    user.user_permissions.add(Permission.objects.get(codename="add_mlalgorithmstatus"))
    assert "Promote" in text_of(client.get(page("mlalgorithm")))
    confirm(client, "mlalgorithm", tree, "promote")
    assert status_of(tree) == "production"
    assert tree.statuses.latest("id").created_by == "sam"


def test_an_algorithm_that_does_not_exist_is_not_found(admin_client, db):
    for key in ("7", "x", "9" * 30):
        assert (
            admin_client.post(f"/admin/endpoints/mlalgorithm/{key}/promote/", {"_form_submitted": 1}).status_code == 404
        )


def test_the_page_of_an_algorithm_shows_scores_beside_the_baseline_and_its_history(admin_client, algorithms):
    forest = algorithms["random_forest"]
    lifecycle.set_status(forest, "staging", by="sam", now=timezone.now())

    text = text_of(admin_client.get(page("mlalgorithm", forest)))

    auc = forest.metrics["roc_auc"]
    assert f"roc auc {auc['value']:.3f} {auc['low']:.3f} to {auc['high']:.3f} 0.500" in text
    assert forest.artifact_sha256 in text
    assert "class RandomForestClassifier" in text
    assert "IsRetained = 1 is label 1 (stays), IsRetained = 0 is label 0 (leaves)" in text
    history = text[text.index("Status history", text.index("Artifact sha256")) :]
    assert history.index("Staging sam") < history.index("Production retention team")


def test_status_history_is_filtered_by_status_algorithm_and_day(admin_client, algorithms):
    long_ago = datetime(2025, 3, 1, 12, tzinfo=UTC)
    lifecycle.set_status(algorithms["extra_trees"], "testing", by="sam", now=long_ago)
    url = page("mlalgorithmstatus")

    by_status = rows_of(admin_client.get(url, {"status__exact": "production"}))
    by_algorithm = rows_of(admin_client.get(url, {"parent_mlalgorithm__id__exact": algorithms["extra_trees"].pk}))
    by_day = rows_of(admin_client.get(url, {"created_at_from": "2025-03-01", "created_at_to": "2025-03-01"}))

    assert [row["parent_mlalgorithm"] for row in by_status] == ["random forest 1.0.0"]
    assert [row["state"] for row in by_algorithm] == ["Testing", "Staging"]
    assert [(row["created_by"], row["created_at"], row["holds"]) for row in by_day] == [
        ("sam", "2025-03-01 12:00:00", "yes")
    ]


# --- Going back -------------------------------------------------------------------------------------------
@pytest.fixture
def promoted(algorithms):
    """The algorithms, by key, after the extra trees were promoted in place of the random forest."""
    lifecycle.set_status(algorithms["extra_trees"], "production", by="sam", now=timezone.now())
    return algorithms


def test_the_page_of_an_endpoint_and_the_dialog_show_what_production_would_go_back_to(admin_client, promoted):
    endpoint = promoted["extra_trees"].parent_endpoint

    text = text_of(admin_client.get(page("endpoint", endpoint)))
    asked = text_of(admin_client.get(page("endpoint", endpoint, "roll_back")))

    assert "Production algorithm extra trees 1.0.0 A rollback goes back to random forest 1.0.0" in text
    assert "The one that answers them now moves to testing. Back to: random forest 1.0.0" in asked
    assert status_of(promoted["extra_trees"]) == "production"


def test_production_goes_back_and_the_histories_say_who_and_why(admin_client, promoted):
    endpoint = promoted["extra_trees"].parent_endpoint

    response = confirm(admin_client, "endpoint", endpoint, "roll_back", reason="Too many vouchers")

    assert said_by(response) == ["random forest 1.0.0 is in production again; extra trees 1.0.0 moved to testing."]
    assert (status_of(promoted["random_forest"]), status_of(promoted["extra_trees"])) == ("production", "testing")
    back, away, *_ = rows_of(admin_client.get(page("mlalgorithmstatus")))
    assert (back["parent_mlalgorithm"], back["created_by"], back["why"]) == (
        *("random forest 1.0.0", "admin", "Rollback: Too many vouchers"),
    )
    assert (away["parent_mlalgorithm"], away["state"], away["why"]) == (
        *("extra trees 1.0.0", "Testing", "Too many vouchers"),
    )
    assert "Rollback: Too many vouchers" in text_of(admin_client.get(page("mlalgorithm", promoted["random_forest"])))


def test_where_there_is_no_way_back_the_page_and_the_button_say_why(admin_client, algorithms):
    endpoint = algorithms["extra_trees"].parent_endpoint
    why = "Endpoint classifier has had no other production algorithm: there is nothing to go back to."

    assert why in text_of(admin_client.get(page("endpoint", endpoint)))
    assert why in said_by(confirm(admin_client, "endpoint", endpoint, "roll_back"))[0]
    assert status_of(algorithms["random_forest"]) == "production"


def test_going_back_needs_the_permission_that_the_api_asks_for(staff, promoted):
    client = staff("view_endpoint")
    endpoint = promoted["extra_trees"].parent_endpoint

    assert "Roll back" not in text_of(client.get(page("endpoint", endpoint)))
    assert client.post(page("endpoint", endpoint, "roll_back"), {"_form_submitted": "True"}).status_code == 403
    assert status_of(promoted["extra_trees"]) == "production"

    user = User.objects.get(username="sam")
    user.user_permissions.add(Permission.objects.get(codename="add_mlalgorithmstatus"))
    assert "Roll back" in text_of(client.get(page("endpoint", endpoint)))
    confirm(client, "endpoint", endpoint, "roll_back")
    assert promoted["random_forest"].statuses.latest("id").created_by == "sam"


def test_an_endpoint_that_does_not_exist_cannot_go_back(admin_client, db):
    for key in ("7", "x", "9" * 30):
        url = f"/admin/endpoints/endpoint/{key}/roll_back/"
        assert "Back to" not in text_of(admin_client.get(url))
        assert admin_client.post(url, {"_form_submitted": 1}).status_code == 404


# --- Requests ---------------------------------------------------------------------------------------------
def found(client: Client, **query: object) -> list[int]:
    return [int(row["id"]) for row in rows_of(client.get(page("mlrequest"), query))]


def test_requests_are_found_by_exact_id_or_exact_customer_key(admin_client, algorithms):
    first, second = log(algorithms["random_forest"], 2)
    (by_number,) = log(algorithms["random_forest"], customer_key=str(first.pk))
    (by_name,) = log(algorithms["random_forest"], customer_key="Ada-1")

    assert found(admin_client, q=second.pk) == [second.pk]
    assert found(admin_client, q=first.pk) == [by_number.pk, first.pk]
    assert found(admin_client, q=" Ada-1 ") == [by_name.pk]
    assert found(admin_client, q="Ada") == []


def test_requests_are_filtered_by_day_algorithm_label_and_outcome(admin_client, algorithms):
    forest, trees = algorithms["random_forest"], algorithms["extra_trees"]
    (late,) = log(forest, created_at=datetime(2025, 3, 2, 23, 59, 59, tzinfo=UTC), feedback="0")
    (next_day,) = log(forest, created_at=datetime(2025, 3, 3, tzinfo=UTC))
    (early,) = log(trees, created_at=datetime(2025, 3, 2, tzinfo=UTC), response="0")
    (before,) = log(forest, created_at=datetime(2025, 3, 1, 23, 59, 59, tzinfo=UTC))

    assert found(admin_client, created_at_from="2025-03-02", created_at_to="2025-03-02") == [late.pk, early.pk]
    assert found(admin_client, created_at_from="2025-03-03") == [next_day.pk]
    assert found(admin_client, created_at_to="2025-03-01") == [before.pk]
    assert found(admin_client, parent_mlalgorithm__id__exact=trees.pk) == [early.pk]
    assert found(admin_client, label="0") == [early.pk]
    assert found(admin_client, outcome="known") == [late.pk]
    assert found(admin_client, outcome="unknown") == [before.pk, early.pk, next_day.pk]


def test_a_day_that_is_none_finds_nothing_and_says_how_to_write_one(admin_client, algorithms):
    log(algorithms["random_forest"])

    text = text_of(admin_client.get(page("mlrequest"), {"created_at_from": "yesterday"}))

    assert "yesterday is no day; write it like 2026-01-31." in text
    assert "No results found" in text


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    query=st.dictionaries(
        st.sampled_from(
            [
                *("q", "created_at_from", "created_at_to", "label", "outcome", "parent_mlalgorithm__id__exact"),
                *("p", "o", "_facets", "current_status"),
            ]
        ),
        ANY_TEXT,
    )
)
def test_no_query_breaks_the_list_of_requests(admin_client, query):
    assert admin_client.get(page("mlrequest"), query, follow=True).status_code == 200
    assert admin_client.get(page("mlalgorithm"), query, follow=True).status_code == 200


def test_an_outcome_is_recorded_and_corrected_with_the_users_name(admin_client, algorithms):
    (logged,) = log(algorithms["random_forest"], customer_key="Ada-1")

    for outcome in ("1", "0"):
        assert tell(admin_client, logged, outcome).status_code == 302

    logged.refresh_from_db()
    assert logged.feedback == "0"
    changes = logged.feedback_changes.order_by("id").values_list("previous", "feedback", "created_by")
    assert list(changes) == [(None, "1", "admin"), ("1", "0", "admin")]
    text = text_of(admin_client.get(page("mlrequest", logged)))
    assert "0: the customer left (IsRetained = 0)" in text
    assert "Plan is unknown" in text
    assert "MeanGapDays missing" in text
    history = text[text.index("Feedback history") :]
    assert history.index("1 0 question_mark admin") < history.index("- 1 question_mark admin")


def test_whether_the_answer_was_acted_on_is_told_with_the_outcome(admin_client, algorithms):
    (logged,) = log(algorithms["random_forest"])
    assert "Say the outcome, too." in text_of(tell(admin_client, logged, "", was_acted_on="yes"))

    for outcome, acted_on in [("1", ""), ("1", "yes"), ("0", "yes"), ("0", "no")]:
        assert tell(admin_client, logged, outcome, was_acted_on=acted_on).status_code == 302
    assert tell(admin_client, logged, "0", was_acted_on="no").status_code == 302
    refusal = tell(admin_client, logged, "0", was_acted_on="")

    assert "This can be corrected, but not taken back." in text_of(refusal)
    logged.refresh_from_db()
    assert (logged.feedback, logged.acted_on) == ("0", False)
    changes = logged.feedback_changes.order_by("id").values_list("previous", "feedback", "acted_on")
    assert list(changes) == [(None, "1", None), ("1", "1", True), ("1", "0", True), ("0", "0", False)]


def test_nothing_but_the_outcome_of_a_request_can_be_written(admin_client, algorithms):
    (logged,) = log(algorithms["random_forest"])

    tell(admin_client, logged, "1", probability="0.1", response="0")

    logged.refresh_from_db()
    assert (logged.feedback, logged.probability, logged.response) == ("1", 0.75, "1")


@pytest.mark.parametrize(
    ("outcome", "refusal"),
    [("", "An outcome can be corrected, but not taken back."), ("2", "Select a valid choice. 2 is not one")],
)
def test_an_outcome_is_not_taken_back_or_made_up(admin_client, algorithms, outcome, refusal):
    (logged,) = log(algorithms["random_forest"], feedback="1")

    response = tell(admin_client, logged, outcome)

    assert refusal in text_of(response)
    logged.refresh_from_db()
    assert logged.feedback == "1"
    assert not logged.feedback_changes.exists()


def test_saving_without_a_change_records_nothing(admin_client, algorithms):
    (logged,) = log(algorithms["random_forest"], feedback="1")

    assert tell(admin_client, logged, "1").status_code == 302

    assert not logged.feedback_changes.exists()


def test_who_may_only_view_requests_writes_no_outcome(staff, algorithms):
    (logged,) = log(algorithms["random_forest"])
    client = staff("view_mlrequest")

    assert client.get(page("mlrequest", logged)).status_code == 200
    assert tell(client, logged, "1").status_code == 403
    logged.refresh_from_db()
    assert logged.feedback is None


# --- A/B tests --------------------------------------------------------------------------------------------
def start_test(client: Client, first: MLAlgorithm, second: MLAlgorithm, **plan: object):
    """Send the form as it comes, but for the plan that is named."""
    shown = client.get(page("abtest") + "add/").context["adminform"].form
    asked = {field.html_name: field.value() for field in shown}
    asked |= {"title": "Spring", "parent_mlalgorithm_1": first.pk, "parent_mlalgorithm_2": second.pk, **plan}
    told = {name: value for name, value in asked.items() if value not in (None, False)}
    return client.post(page("abtest") + "add/", told)


def test_a_test_is_started_by_its_form(admin_client, algorithms):
    response = start_test(admin_client, algorithms["random_forest"], algorithms["extra_trees"])

    test = ABTest.objects.get()
    assert response.url == page("abtest", test)
    assert said_by(response) == [
        "Spring is running. Production requests are shared by random forest 1.0.0 and extra trees 1.0.0."
    ]
    assert test.created_by == "admin"
    assert status_of(algorithms["random_forest"]) == status_of(algorithms["extra_trees"]) == "ab_testing"


def test_the_form_preselects_evidence_and_leaves_the_maturity_to_the_endpoint(admin_client, algorithms):
    Endpoint.objects.update(maturity_days=14)
    start_test(admin_client, algorithms["random_forest"], algorithms["extra_trees"])

    test = ABTest.objects.get()
    assert (test.policy, test.design, test.weight, test.maturity_days) == ("evidence", "split", 0.5, 14)
    assert (test.guardrail_error_rate, test.guardrail_label_shift) == (0.05, None)


def test_the_form_takes_the_whole_plan(admin_client, algorithms):
    plan = {
        **{"design": "shadow", "policy": "accuracy", "weight": 0.2, "alpha": 0.01, "minimum_labelled": 500},
        **{"horizon_days": 30, "horizon_labelled": 4000, "maturity_days": 7, "promote_to": "production"},
        **{"auto_apply": True, "guardrail_latency_p99_ms": 20.0, "guardrail_label_shift": 0.1},
    }
    response = start_test(
        admin_client, algorithms["random_forest"], algorithms["extra_trees"], **plan, guardrail_error_rate=""
    )

    test = ABTest.objects.get()
    assert {name: getattr(test, name) for name in plan} == plan
    assert test.guardrail_error_rate is None
    assert said_by(response)[-1].endswith("answered by random forest 1.0.0, and scored by extra trees 1.0.0 unseen.")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight", "1", "less than or equal to 0.999"),
        ("weight", "", "This field is required."),
        ("weight", "nan", "Enter a number."),
        ("alpha", "0.9", "less than or equal to 0.5"),
        ("minimum_labelled", "0", "greater than or equal to 1"),
        ("horizon_days", "-3", "greater than or equal to"),
        ("guardrail_error_rate", "2", "less than or equal to 1"),
        ("policy", "luck", "not one of the available choices"),
    ],
)
def test_a_plan_out_of_bounds_is_refused_beside_its_field(admin_client, algorithms, field, value, message):
    response = start_test(admin_client, algorithms["random_forest"], algorithms["extra_trees"], **{field: value})

    (problem,) = response.context["adminform"].form.errors[field]
    assert message in problem
    assert not ABTest.objects.exists()


def test_a_test_that_is_refused_is_explained_in_the_form(admin_client, algorithms):
    same = text_of(start_test(admin_client, algorithms["random_forest"], algorithms["random_forest"]))
    start_test(admin_client, algorithms["random_forest"], algorithms["extra_trees"])
    second = text_of(start_test(admin_client, algorithms["random_forest"], algorithms["decision_tree"]))

    assert "An A/B test compares two different algorithms; these are the same." in same
    assert "Constraint" not in same
    assert "(Spring) is already running on endpoint classifier" in second
    assert ABTest.objects.count() == 1
    assert status_of(algorithms["decision_tree"]) == "testing"


def test_the_form_offers_no_retired_algorithm(admin_client, algorithms):
    lifecycle.set_status(algorithms["decision_tree"], "retired", by="sam", now=timezone.now())

    text = text_of(admin_client.get(page("abtest") + "add/"))

    assert "classifier: random forest 1.0.0 (Production)" in text
    assert "decision tree" not in text


def test_a_running_test_shows_how_it_goes_and_is_stopped(admin_client, algorithms):
    start_test(admin_client, algorithms["random_forest"], algorithms["extra_trees"], policy="accuracy")
    test = ABTest.objects.get()
    log(algorithms["random_forest"], 1, feedback="1", abtest=test)
    log(algorithms["random_forest"], 1, feedback="0", abtest=test)
    log(algorithms["extra_trees"], 3, feedback="1", abtest=test)
    log(algorithms["extra_trees"], 4, abtest=test)

    (row,) = rows_of(admin_client.get(page("abtest")))
    text = text_of(admin_client.get(page("abtest", test)))
    response = confirm(admin_client, "abtest", test, "stop")

    assert row["state"] == "Running"
    assert row["first"] == "random forest 1.0.0: 50.0% of 2"
    assert row["second"] == "extra trees 1.0.0: 100.0% of 3"
    assert "random forest 1.0.0 in production 2 1 50.0% extra trees 1.0.0 3 3 100.0%" in text
    test.refresh_from_db()
    assert said_by(response) == [f"Spring is stopped. {test.summary}"]
    assert "Stopped by admin" in test.summary
    assert status_of(algorithms["extra_trees"]) == "production"
    ended = admin_client.get(page("abtest", test))
    assert "Ended" in text_of(ended)
    assert page("abtest", test, "stop") not in ended.content.decode()


def test_stopping_may_overrule_the_policy_for_a_reason(admin_client, algorithms):
    start_test(admin_client, algorithms["random_forest"], algorithms["extra_trees"])
    test = ABTest.objects.get()

    refused = confirm(admin_client, "abtest", test, "stop", promote="challenger")
    assert "Overruling the policy takes a reason." in text_of(refused)
    test.refresh_from_db()
    assert test.ended_at is None

    said = said_by(confirm(admin_client, "abtest", test, "stop", promote="challenger", reason="A new law."))[-1]
    assert "Overruled by admin in favour of extra trees 1.0.0: A new law." in said
    assert status_of(algorithms["extra_trees"]) == "production"
    assert (test.decision.forced, test.decision.reason) == (True, "A new law.")


def test_stopping_twice_says_so(admin_client, algorithms):
    start_test(admin_client, algorithms["random_forest"], algorithms["extra_trees"])
    test = ABTest.objects.get()
    confirm(admin_client, "abtest", test, "stop")

    assert said_by(confirm(admin_client, "abtest", test, "stop"))[-1].startswith("Spring had been stopped before.")


def test_the_report_of_a_test_is_a_page_with_its_plots_and_a_slide(admin_client, algorithms):
    test = abtests.start("Spring", algorithms["random_forest"], algorithms["extra_trees"], by="ada", now=timezone.now())
    known = {"abtest": test, "labelled_at": timezone.now()}
    log(algorithms["random_forest"], 4, feedback="1", **known)
    log(algorithms["extra_trees"], 4, feedback="0", **known)

    shown = admin_client.get(page("abtest", test, "report"))
    slide = admin_client.get(shown.context["report"]["slide_url"])

    text = text_of(shown)
    assert "Too early to say" in text
    assert "Wait: there are 4 of the 100 labelled customers that each arm needs." in text
    assert "Right: random forest 1.0.0 100.0%" in text
    assert "Champion: random forest 1.0.0 Challenger: extra trees 1.0.0" in text
    assert "Customers with a known outcome 4 (100.0%) 4 (100.0%) Right, of these 100.0%" in text
    assert "Customers by arm, planned 50% and 50% 4 and 4 as expected" in text
    assert shown.content.count(b'src="data:image/svg+xml;base64,') == 3
    assert slide["Content-Type"] == "image/png"


def test_the_report_of_a_test_that_ended_says_how(admin_client, algorithms):
    test = abtests.start(
        *("Spring", algorithms["random_forest"], algorithms["extra_trees"]),
        **{"by": "ada", "now": timezone.now(), "design": "shadow"},
    )
    test, _ = abtests.stop(test, by="ada", now=timezone.now())

    text = text_of(admin_client.get(page("abtest", test, "report")))

    assert f"How it ended: {test.summary}" in text
    assert "The same customers, by who was right Challenger right Challenger wrong Champion right 0 0" in text
    assert "Can the two be compared?" not in text


def test_who_may_not_view_tests_sees_no_report(staff, algorithms):
    test = abtests.start("Spring", algorithms["random_forest"], algorithms["extra_trees"], by="ada", now=timezone.now())
    addresses = [reverse(f"admin:endpoints_abtest_{name}", args=[test.pk]) for name in ("report", "slide")]

    client = staff("view_abtest")
    for address in addresses:
        assert client.get(address).status_code == 200
        assert client.get(address.replace(str(test.pk), "999")).status_code == 404
    client.force_login(User.objects.create_user("eve", is_staff=True))
    for address in addresses:
        assert client.get(address).status_code == 403


def test_starting_and_stopping_need_a_permission(staff, algorithms):
    test = abtests.start("Spring", algorithms["random_forest"], algorithms["extra_trees"], by="ada", now=timezone.now())
    client = staff("view_abtest", "change_abtest")

    assert client.get(page("abtest", test)).status_code == 200
    assert client.post(page("abtest", test, "stop"), {"_form_submitted": "True"}).status_code == 403
    assert client.get(page("abtest") + "add/").status_code == 403
    test.refresh_from_db()
    assert test.ended_at is None


# --- Read-only, and for whom ------------------------------------------------------------------------------
def test_history_cannot_be_added_edited_or_deleted_even_by_a_superuser(admin_client, algorithms):
    test = abtests.start("Spring", algorithms["random_forest"], algorithms["extra_trees"], by="ada", now=timezone.now())
    forest = algorithms["random_forest"]
    rows = {
        "endpoint": forest.parent_endpoint,
        "mlalgorithm": forest,
        "mlalgorithmstatus": forest.statuses.first(),
        "mlrequest": log(forest)[0],
        "batchjob": BatchJob.objects.create(parent_mlalgorithm=forest, file_bytes=1),
        "abtest": test,
    }
    assert set(rows) == set(PAGES)
    for model, row in rows.items():
        assert admin_client.post(page(model, row, "delete"), {"post": "yes"}).status_code == 403
        assert type(row).objects.filter(pk=row.pk).exists()
        if model not in {"abtest", "batchjob"}:
            assert admin_client.get(page(model) + "add/").status_code == 403
        if model != "mlrequest":
            assert admin_client.post(page(model, row), {"title": "Autumn", "name": "x"}).status_code == 403
        response = admin_client.post(
            page(model), {"action": "delete_selected", "_selected_action": row.pk, "post": "1"}
        )
        assert response.status_code in {200, 302}
        assert type(row).objects.filter(pk=row.pk).exists()


def test_staff_see_only_what_they_may_view(staff, algorithms):
    client = staff("view_mlrequest")

    text = text_of(client.get("/admin/"))

    assert "Requests" in text
    assert "Algorithms" not in text
    assert "API tokens" not in text
    assert "random forest" not in text
    for model in set(PAGES) - {"mlrequest"}:
        assert client.get(page(model)).status_code == 403


def test_a_stranger_is_sent_to_the_login(client, db):
    response = client.get(page("mlrequest"))

    assert response.url.startswith("/admin/login/")


def test_after_the_login_comes_the_overview(client, admin_user):
    response = client.post("/admin/login/", {"username": "admin", "password": "password"})

    assert response.url == "/admin/"


def test_the_overview_says_who_answers_and_how_well(admin_client, algorithms):
    log(algorithms["random_forest"], 3, feedback="1")
    log(algorithms["extra_trees"], 1, feedback="0")

    text = text_of(admin_client.get("/admin/"))

    assert "Production algorithm random forest 1.0.0" in text
    assert "Requests, 7 days 4" in text
    assert "Accuracy, 7 days 75.0% of 4" in text

    start_test(admin_client, algorithms["random_forest"], algorithms["extra_trees"])
    text = text_of(admin_client.get("/admin/"))
    assert "Production algorithm random forest 1.0.0 in A/B test Spring" in text
    assert "random forest 1.0.0 A/B testing classifier admin" in text
    (row,) = rows_of(admin_client.get(page("endpoint")))
    assert row["production"] == "random forest 1.0.0 in A/B test Spring"


def test_without_any_model_the_overview_says_how_to_train_one(admin_client, db):
    assert "Train one with python research/train.py" in text_of(admin_client.get("/admin/"))


# --- Access -----------------------------------------------------------------------------------------------
def test_a_token_is_shown_once_and_lets_its_user_in(admin_client, algorithms, settings):
    settings.DEBUG = False
    sam = User.objects.create_user("sam")
    url = "/admin/knox/authtoken/"

    response = admin_client.post(url + "add/", {"user": sam.pk})
    (shown,) = said_by(response)
    token = re.search("[0-9a-f]{64}", shown)[0]
    once = admin_client.get(url)
    again = admin_client.get(url)

    assert shown.startswith("The token of sam, shown only this once:")
    assert token in once.content.decode()
    assert token not in again.content.decode()
    (row,) = rows_of(again)
    assert (row["user"], row["key_prefix"]) == ("sam", f"{token[:8]}…")
    assert token not in AuthToken.objects.get().digest
    assert APIClient().get("/api/v1/endpoints").status_code == 401
    assert APIClient().get("/api/v1/endpoints", headers={"Authorization": f"Token {token}"}).status_code == 200


def test_a_deleted_token_lets_nobody_in(admin_client, algorithms, settings):
    settings.DEBUG = False
    stored, token = AuthToken.objects.create(User.objects.create_user("sam"))
    selected = {"action": "delete_selected", "_selected_action": stored.pk}

    asked = admin_client.post("/admin/knox/authtoken/", selected)
    admin_client.post("/admin/knox/authtoken/", {**selected, "post": "yes"})

    assert f"{token[:8]}… of sam" in text_of(asked)
    assert APIClient().get("/api/v1/endpoints", headers={"Authorization": f"Token {token}"}).status_code == 401


def test_a_token_does_not_end_in_the_past(admin_client, admin_user):
    response = admin_client.post(
        "/admin/knox/authtoken/add/", {"user": admin_user.pk, "expiry_0": "2020-01-01", "expiry_1": "00:00:00"}
    )

    assert "This is past; choose a later time" in text_of(response)
    assert not AuthToken.objects.exists()


def test_only_a_superuser_makes_tokens(staff):
    client = staff("add_authtoken", "view_authtoken", "change_authtoken", "delete_authtoken")

    assert client.get("/admin/knox/authtoken/").status_code == 403
    assert client.post("/admin/knox/authtoken/add/", {"user": User.objects.get().pk}).status_code == 403
    assert not AuthToken.objects.exists()


def test_a_user_is_created_and_granted_a_permission(admin_client):
    admin_client.post(
        "/admin/auth/user/add/",
        {"username": "sam", "usable_password": "true", "password1": "a long secret", "password2": "a long secret"},
    )
    sam = User.objects.get(username="sam")
    granted = Permission.objects.get(codename="add_mlalgorithmstatus")
    joined = {"date_joined_0": "2026-01-01", "date_joined_1": "00:00:00"}

    admin_client.post(
        f"/admin/auth/user/{sam.pk}/change/",
        {"username": "sam", "is_active": "on", "is_staff": "on", "user_permissions": [granted.pk], **joined},
    )

    assert User.objects.get(username="sam").has_perm("endpoints.add_mlalgorithmstatus")
    assert admin_client.get("/admin/auth/group/add/").status_code == 200


# --- What a page costs ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "query", ["", "?q=Ada-1", "?outcome=known", "?label=1", "?created_at_from=2025-01-01", "?p=2", "?_facets=1"]
)
def test_the_list_of_requests_counts_nothing_and_reads_one_page(admin_client, algorithms, query):
    log(algorithms["random_forest"], 300, customer_key="Ada-1", feedback="1")

    queries = queries_of(admin_client, page("mlrequest") + query)

    reading = [sql for sql in queries if 'FROM "endpoints_mlrequest"' in sql]
    assert len(reading) == 1
    assert " LIMIT 50" in reading[0]
    assert "input_data" not in reading[0]
    assert not [sql for sql in queries if "COUNT(" in sql]


@pytest.mark.parametrize("url", [*map(page, PAGES), "/admin/", "/admin/knox/authtoken/"])
def test_a_page_asks_the_database_no_more_often_for_more_rows(admin_client, algorithms, url):
    def grow(number: int) -> None:
        first, second = (
            lifecycle.register(
                f"endpoint{number}",
                name,
                "1",
                status="production",
                owner="sam",
                now=timezone.now(),
                **{"key": "random_forest", "target": algorithms["random_forest"].target},
            )
            for name in ("one", "two")
        )
        test = ABTest.objects.create(
            title="Spring",
            created_by="sam",
            parent_mlalgorithm_1=first,
            parent_mlalgorithm_2=second,
            parent_endpoint=first.parent_endpoint,
            champion=first,
        )
        log(first, 3, feedback="1", abtest=test)
        BatchJob.objects.create(parent_mlalgorithm=first, file_bytes=1)
        AuthToken.objects.create(User.objects.create_user(f"user{number}"))

    grow(0)
    few = queries_of(admin_client, url)
    for number in range(1, 8):
        grow(number)
    many = queries_of(admin_client, url)

    assert len(many) == len(few) <= 12


def test_the_page_of_an_algorithm_reads_a_page_of_its_history(admin_client, algorithms):
    forest = algorithms["random_forest"]
    for number in range(50):
        lifecycle.set_status(forest, ("staging", "testing")[number % 2], by="sam", now=timezone.now())

    queries = queries_of(admin_client, page("mlalgorithm", forest))

    assert len(queries) <= 12
    assert text_of(admin_client.get(page("mlalgorithm", forest))).count(" sam ") == 20


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("?q=Ada-1", "request_by_customer"),
        ("?outcome=known", "request_labelled"),
        ("?parent_mlalgorithm__id__exact={trees}", "request_newest_by_algorithm"),
        ("?created_at_from=2025-01-01&created_at_to=2025-01-02", "request_by_time"),
    ],
)
def test_an_index_answers(admin_client, algorithms, query, index):
    trees = algorithms["extra_trees"]
    # PostgreSQL avoids an index that is mostly what other tests have left behind.
    log(algorithms["random_forest"], 3000)
    log(algorithms["random_forest"], 1000, feedback="0")
    MLRequest.objects.update(customer_key=Concat(Value("C"), Cast("pk", CharField())))
    log(trees, 3, customer_key="Ada-1", feedback="1", created_at=datetime(2025, 1, 1, 12, tzinfo=UTC))
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")

    queries = queries_of(admin_client, page("mlrequest") + query.format(trees=trees.pk))

    (reading,) = [sql for sql in queries if 'FROM "endpoints_mlrequest"' in sql]
    with connection.cursor() as cursor:
        cursor.execute(("EXPLAIN QUERY PLAN " if connection.vendor == "sqlite" else "EXPLAIN ") + reading)
        plan = "\n".join(" ".join(map(str, row)) for row in cursor.fetchall())
    assert index in plan
