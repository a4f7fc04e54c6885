"""GET and POST /api/v1/mlalgorithmstatuses: the life of an algorithm, as a client moves it."""

from __future__ import annotations

import json

import pytest

from apps.endpoints.models import MLAlgorithmStatus, MLRequest
from apps.ml.registry import registry
from conftest import status_of

STATUSES = "/api/v1/mlalgorithmstatuses"
PREDICT = "/api/v1/classifier/predict"


def move(api, algorithm, status, by="Ada"):
    return api.post(STATUSES, {"status": status, "created_by": by, "parent_mlalgorithm": algorithm.pk})


def refused(response, status=400) -> str:
    assert response.status_code == status, response.content
    assert response.json()["status"] == "Error"
    return response.json()["message"]


def statuses(algorithms) -> dict[str, str]:
    return {key: status_of(algorithm) for key, algorithm in algorithms.items()}


@pytest.fixture
def running_test(api, algorithms) -> int:
    """The id of a running test of the extra trees against the tree; the forest stays in production."""
    response = api.post(
        "/api/v1/abtests",
        {
            "title": "Two against one",
            "created_by": "Ada",
            "parent_mlalgorithm_1": algorithms["extra_trees"].pk,
            "parent_mlalgorithm_2": algorithms["decision_tree"].pk,
        },
    )
    assert response.status_code == 201
    return response.json()["id"]


class TestMoving:
    def test_out_of_the_box_each_algorithm_has_a_status_of_its_own(self, algorithms):
        assert statuses(algorithms) == {
            "random_forest": "production",
            "extra_trees": "staging",
            "decision_tree": "testing",
        }

    @pytest.mark.parametrize("status", ["testing", "staging", "retired"])
    def test_a_posted_status_is_the_only_active_one(self, api, algorithms, status):
        response = move(api, algorithms["decision_tree"], status)

        assert response.status_code == 201
        posted = response.json()
        assert set(posted) == {
            *("id", "status", "active", "created_by", "created_at", "reason", "is_rollback", "parent_mlalgorithm"),
        }
        assert (posted["reason"], posted["is_rollback"]) == ("", False)
        assert (posted["status"], posted["active"], posted["created_by"]) == (status, True, "Ada")
        active = algorithms["decision_tree"].statuses.filter(active=True)
        assert [entry.pk for entry in active] == [posted["id"]]
        assert statuses(algorithms) == {
            "random_forest": "production",
            "extra_trees": "staging",
            "decision_tree": status,
        }

    def test_promoting_moves_the_former_production_algorithm_to_staging(self, api, algorithms, customer):
        assert move(api, algorithms["decision_tree"], "production", by="Grace").status_code == 201

        assert statuses(algorithms) == {
            "random_forest": "staging",
            "extra_trees": "staging",
            "decision_tree": "production",
        }
        assert MLAlgorithmStatus.objects.get(active=True, status="production").created_by == "Grace"
        assert algorithms["random_forest"].statuses.get(active=True).created_by == "Grace"
        answer = api.post(f"{PREDICT}?status=production", customer).json()
        assert answer["algorithm"] == "decision tree"

    def test_promoting_on_one_endpoint_leaves_the_others(self, api, algorithms):
        others = {algorithm.key: algorithm for algorithm in registry.register_run("loyalty")}

        move(api, algorithms["decision_tree"], "production")

        assert statuses(others)["random_forest"] == "production"

    def test_production_may_be_left_empty(self, api, algorithms, customer):
        move(api, algorithms["random_forest"], "testing")

        message = refused(api.post(f"{PREDICT}?status=production", customer))
        assert "No algorithm fits status=production; name one of: status=testing&algorithm=random_forest" in message

    def test_the_same_status_again_is_one_more_entry(self, api, algorithms):
        for _ in range(2):
            assert move(api, algorithms["random_forest"], "production").status_code == 201

        assert algorithms["random_forest"].statuses.count() == 3
        assert statuses(algorithms)["random_forest"] == "production"
        assert statuses(algorithms)["extra_trees"] == "staging"

    def test_a_form_is_as_good_as_json(self, api, algorithms):
        body = f"status=staging&created_by=Ada&parent_mlalgorithm={algorithms['decision_tree'].pk}"

        response = api.post(STATUSES, body, content_type="application/x-www-form-urlencoded")

        assert response.status_code == 201
        assert statuses(algorithms)["decision_tree"] == "staging"

    def test_without_a_name_the_author_is_anonymous(self, api, algorithms):
        response = api.post(STATUSES, {"status": "staging", "parent_mlalgorithm": algorithms["decision_tree"].pk})

        assert response.json()["created_by"] == "anonymous"

    @pytest.mark.parametrize("status", ["staging", "production"])
    def test_a_reason_is_kept_with_the_status(self, api, algorithms, status):
        body = {"status": status, "reason": "Ada asked for it", "parent_mlalgorithm": algorithms["decision_tree"].pk}

        posted = api.post(STATUSES, body).json()

        assert posted["reason"] == "Ada asked for it"
        assert api.get(f"{STATUSES}/{posted['id']}").json() == posted
        assert MLAlgorithmStatus.objects.exclude(reason="").count() == 1

    def test_what_comes_back_to_production_by_a_promotion_is_no_rollback(self, api, algorithms):
        body = {"status": "production", "is_rollback": True, "parent_mlalgorithm": algorithms["decision_tree"].pk}

        assert api.post(STATUSES, body).json()["is_rollback"] is False


class TestRetiring:
    def test_a_retired_algorithm_is_not_served_and_its_requests_stay(self, api, algorithms, customer):
        answered = api.post(f"{PREDICT}?status=staging", customer).json()["request_id"]

        move(api, algorithms["extra_trees"], "retired")

        refused(api.post(f"{PREDICT}?algorithm=extra_trees", customer))
        assert MLRequest.objects.get(pk=answered).parent_mlalgorithm == algorithms["extra_trees"]
        assert api.get(f"/api/v1/mlalgorithms/{algorithms['extra_trees'].pk}").json()["current_status"] == "retired"
        assert api.patch(f"/api/v1/mlrequests/{answered}", {"feedback": "1"}).status_code == 200

    def test_a_retired_algorithm_is_unloaded_at_the_next_request(self, api, algorithms, customer):
        move(api, algorithms["extra_trees"], "retired")
        api.post(PREDICT, customer)

        assert set(registry.endpoints) == {algorithms["random_forest"].pk, algorithms["decision_tree"].pk}

    def test_the_last_one_too(self, api, algorithms, customer):
        for algorithm in algorithms.values():
            move(api, algorithm, "retired")
        api.post(PREDICT, customer)

        assert not registry.endpoints

    def test_those_of_another_endpoint_stay_loaded(self, api, algorithms, customer):
        others = registry.register_run("loyalty")
        move(api, algorithms["extra_trees"], "retired")
        api.post(PREDICT, customer)

        assert {algorithm.pk for algorithm in others} < set(registry.endpoints)

    def test_a_retired_algorithm_may_come_back(self, api, algorithms, customer):
        move(api, algorithms["extra_trees"], "retired")
        api.post(PREDICT, customer)

        move(api, algorithms["extra_trees"], "production")

        assert api.post(f"{PREDICT}?status=production", customer).json()["algorithm"] == "extra trees"


class TestHistory:
    def test_every_step_is_kept_with_its_author_and_time(self, api, algorithms):
        tree = algorithms["decision_tree"]
        for status, author in [("staging", "Ada"), ("production", "Grace"), ("retired", "Linus")]:
            move(api, tree, status, by=author)

        history = api.get(f"{STATUSES}?parent_mlalgorithm={tree.pk}").json()

        assert [(entry["status"], entry["created_by"], entry["active"]) for entry in history] == [
            ("testing", "retention team", False),
            ("staging", "Ada", False),
            ("production", "Grace", False),
            ("retired", "Linus", True),
        ]
        moments = [entry["created_at"] for entry in history]
        assert moments == sorted(moments)
        assert api.get(f"{STATUSES}/{history[1]['id']}").json() == history[1]

    def test_the_list_is_a_plain_array_that_can_be_narrowed(self, api, algorithms):
        move(api, algorithms["decision_tree"], "production")

        assert len(api.get(STATUSES).json()) == 5
        assert len(api.get(f"{STATUSES}?active=true").json()) == 3
        assert len(api.get(f"{STATUSES}?status=production").json()) == 2
        (held,) = api.get(f"{STATUSES}?status=production&active=true").json()
        assert held["parent_mlalgorithm"] == algorithms["decision_tree"].pk
        assert api.get(f"{STATUSES}?parent_mlalgorithm=999999").json() == []

    @pytest.mark.parametrize("query", ["active=perhaps", "status=live", "parent_mlalgorithm=forest", "status=%00"])
    def test_a_filter_that_cannot_be_understood_is_refused(self, api, algorithms, query):
        refused(api.get(f"{STATUSES}?{query}"))

    def test_no_step_can_be_changed_or_deleted(self, api, algorithms):
        entry = api.get(STATUSES).json()[0]
        for method in ("put", "patch", "delete"):
            refused(getattr(api, method)(f"{STATUSES}/{entry['id']}", {"status": "staging"}), 405)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "status", ["ab_testing", "live", "Production", "", " ", None, 5, True, [], {}, "x" * 500, "\x00", "\ud800"]
    )
    def test_a_status_that_cannot_be_set(self, api, algorithms, status):
        before = MLAlgorithmStatus.objects.count()

        response = api.generic(
            "POST",
            STATUSES,
            json.dumps({"status": status, "parent_mlalgorithm": algorithms["decision_tree"].pk}),
            content_type="application/json",
        )

        refused(response)
        assert MLAlgorithmStatus.objects.count() == before

    def test_the_statuses_that_can_be_set_are_named(self, api, algorithms):
        message = refused(move(api, algorithms["decision_tree"], "live"))

        assert message == "status must be one of testing, staging, production, retired, not 'live'."

    @pytest.mark.parametrize(
        "algorithm", [0, -1, 999_999, 2**63, 10**30, 1.5, 1e308, True, None, "", "forest", [], [1], {}, "9" * 5000]
    )
    def test_an_algorithm_that_does_not_exist(self, api, algorithms, algorithm):
        response = api.post(STATUSES, {"status": "staging", "parent_mlalgorithm": algorithm})

        refused(response)
        assert response.json()["errors"][0]["field"] == "parent_mlalgorithm"

    @pytest.mark.parametrize("algorithm", ["1e999", "-1e999", "NaN", "Infinity"])
    def test_a_number_that_is_none(self, api, algorithms, algorithm):
        body = f'{{"status": "staging", "parent_mlalgorithm": {algorithm}}}'

        refused(api.generic("POST", STATUSES, body, content_type="application/json"))

    @pytest.mark.parametrize("body", ["", "{}", "[]", "5", "null", '"production"', '[{"status": "staging"}]'])
    def test_what_is_no_object(self, api, algorithms, body):
        refused(api.generic("POST", STATUSES, body, content_type="application/json"))

    @pytest.mark.parametrize("author", ["", "x" * 151, "\x00", None, [], {}])
    def test_an_author_that_can_be_none(self, api, algorithms, author):
        response = api.post(
            STATUSES,
            {"status": "staging", "created_by": author, "parent_mlalgorithm": algorithms["decision_tree"].pk},
        )

        refused(response)
        assert response.json()["errors"][0]["field"] == "created_by"

    @pytest.mark.parametrize("reason", ["x" * 2001, "\x00", None, [], {}])
    def test_a_reason_that_can_be_none(self, api, algorithms, reason):
        response = api.post(
            STATUSES,
            {"status": "staging", "reason": reason, "parent_mlalgorithm": algorithms["decision_tree"].pk},
        )

        refused(response)
        assert response.json()["errors"][0]["field"] == "reason"


class TestDuringATest:
    @pytest.mark.parametrize("status", ["testing", "staging", "production", "retired"])
    def test_the_tested_algorithms_cannot_be_moved(self, api, algorithms, running_test, status):
        for key in ("extra_trees", "decision_tree"):
            message = refused(move(api, algorithms[key], status), 409)

            assert f"stop it first with POST /api/v1/stop_ab_test/{running_test}" in message
            assert "Two against one" in message
            assert status_of(algorithms[key]) == "ab_testing"

    def test_nobody_can_be_promoted_on_that_endpoint(self, api, algorithms, running_test):
        refused(move(api, algorithms["random_forest"], "production"), 409)

    def test_others_can_be_moved_out_of_the_way(self, api, algorithms, running_test):
        assert move(api, algorithms["random_forest"], "retired").status_code == 201

    def test_other_endpoints_are_free(self, api, algorithms, running_test):
        others = {algorithm.key: algorithm for algorithm in registry.register_run("loyalty")}

        assert move(api, others["decision_tree"], "production").status_code == 201

    def test_once_it_is_stopped_they_can_be_moved_again(self, api, algorithms, running_test):
        assert api.post(f"/api/v1/stop_ab_test/{running_test}").status_code == 200

        assert move(api, algorithms["extra_trees"], "production").status_code == 201
