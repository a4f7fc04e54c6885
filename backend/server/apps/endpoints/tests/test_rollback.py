"""POST /api/v1/endpoints/{id}/rollback: production goes back to the algorithm that was promoted before."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from django.contrib.auth.models import Permission, User
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase
from knox.models import AuthToken
from rest_framework.test import APIClient

from apps.endpoints.models import Endpoint, MLAlgorithmStatus
from apps.ml.registry import registry
from conftest import status_of

STATUSES = "/api/v1/mlalgorithmstatuses"
PREDICT = "/api/v1/classifier/predict?status=production"
KEYS = ["random_forest", "extra_trees", "decision_tree"]


def move(api, algorithm, status: str, by: str = "Ada") -> None:
    body = {"status": status, "created_by": by, "parent_mlalgorithm": algorithm.pk}
    response = api.post(STATUSES, body)
    assert response.status_code == 201, response.content


def address(endpoint: Endpoint | None = None) -> str:
    endpoint = endpoint or Endpoint.objects.get()
    return f"/api/v1/endpoints/{endpoint.pk}/rollback"


def roll_back(api, **body: str) -> dict:
    response = api.post(address(), body)
    assert response.status_code == 201, response.content
    return response.json()


def refused(response, status: int = 409) -> str:
    assert response.status_code == status, response.content
    assert response.json()["status"] == "Error"
    return response.json()["message"]


def in_production(api) -> list[str]:
    return [algorithm["key"] for algorithm in api.get("/api/v1/mlalgorithms?status=production").json()]


def begin(api, first, second) -> int:
    body = {"title": "Spring", "parent_mlalgorithm_1": first.pk, "parent_mlalgorithm_2": second.pk}
    response = api.post("/api/v1/abtests", body)
    assert response.status_code == 201, response.content
    return response.json()["id"]


def stop(api, test: int) -> None:
    assert api.post(f"/api/v1/stop_ab_test/{test}").status_code == 200


@pytest.fixture
def promoted(api, algorithms):
    """The algorithms, by key, after the extra trees were promoted in place of the random forest."""
    move(api, algorithms["extra_trees"], "production")
    return algorithms


class TestGoingBack:
    def test_gives_production_to_the_former_algorithm_and_testing_to_the_present_one(self, api, promoted, customer):
        assert api.post(PREDICT, customer).json()["algorithm"] == "extra trees"

        given_back = roll_back(api, created_by="Grace", reason="It sends everybody a voucher")

        assert api.post(PREDICT, customer).json()["algorithm"] == "random forest"
        assert [status_of(promoted[key]) for key in KEYS] == ["production", "testing", "testing"]
        assert given_back == api.get(f"{STATUSES}/{given_back['id']}").json()
        assert given_back["parent_mlalgorithm"] == promoted["random_forest"].pk
        assert (given_back["status"], given_back["active"], given_back["is_rollback"]) == ("production", True, True)

    def test_is_recorded_with_who_and_why_on_both(self, api, promoted):
        roll_back(api, created_by="Grace", reason="It sends everybody a voucher")

        back, away = MLAlgorithmStatus.objects.order_by("-id")[:2]
        assert (back.parent_mlalgorithm, away.parent_mlalgorithm) == (
            promoted["random_forest"],
            promoted["extra_trees"],
        )
        for step in (back, away):
            assert (step.created_by, step.reason) == ("Grace", "It sends everybody a voucher")
        assert (back.is_rollback, away.is_rollback) == (True, False)
        assert MLAlgorithmStatus.objects.count() == 3 + 2 + 2

    def test_needs_no_body(self, api, promoted):
        response = api.post(address())

        assert response.status_code == 201
        assert (response.json()["created_by"], response.json()["reason"]) == ("anonymous", "")

    def test_a_second_time_goes_further_back_and_not_to_the_bad_one_again(self, api, promoted):
        move(api, promoted["decision_tree"], "production")

        roll_back(api)
        assert in_production(api) == ["extra_trees"]
        roll_back(api)
        assert in_production(api) == ["random_forest"]
        refused(api.post(address()))

    def test_after_a_new_promotion_goes_back_to_what_was_before_that(self, api, promoted):
        roll_back(api)
        move(api, promoted["decision_tree"], "production")

        roll_back(api)

        assert in_production(api) == ["random_forest"]

    def test_knows_that_the_same_algorithm_may_be_promoted_twice(self, api, promoted):
        move(api, promoted["random_forest"], "production")

        assert [(roll_back(api), in_production(api))[1] for _ in range(2)] == [["extra_trees"], ["random_forest"]]

    def test_a_status_that_production_had_already_is_no_promotion(self, api, promoted):
        move(api, promoted["extra_trees"], "production")

        roll_back(api)

        assert in_production(api) == ["random_forest"]

    def test_a_test_that_left_production_as_it_was_is_no_promotion(self, api, promoted):
        stop(api, begin(api, promoted["extra_trees"], promoted["decision_tree"]))
        assert in_production(api) == ["extra_trees"]

        roll_back(api)

        assert in_production(api) == ["random_forest"]

    def test_undoes_what_a_test_promoted(self, api, algorithms, customer):
        test = begin(api, algorithms["random_forest"], algorithms["decision_tree"])
        while True:
            answer = api.post(PREDICT, customer).json()
            if answer["algorithm"] == "decision tree":
                break
        api.patch(f"/api/v1/mlrequests/{answer['request_id']}", {"feedback": answer["label"]})
        answer = api.post(PREDICT, customer).json()
        while answer["algorithm"] != "random forest":
            answer = api.post(PREDICT, customer).json()
        wrong = "10"[int(answer["label"])]
        api.patch(f"/api/v1/mlrequests/{answer['request_id']}", {"feedback": wrong})
        stop(api, test)
        assert in_production(api) == ["decision_tree"]

        roll_back(api)

        assert in_production(api) == ["random_forest"]

    @pytest.mark.parametrize("status", ["testing", "staging"])
    def test_when_nothing_is_in_production_gives_it_to_the_last_that_was(self, api, promoted, status):
        move(api, promoted["extra_trees"], status)
        assert in_production(api) == []

        roll_back(api)

        assert in_production(api) == ["extra_trees"]
        roll_back(api)
        assert in_production(api) == ["random_forest"]

    def test_touches_no_other_endpoint(self, api, promoted):
        others = {algorithm.key: algorithm for algorithm in registry.register_run("loyalty")}
        move(api, others["decision_tree"], "production")

        refused(api.post("/api/v1/endpoints/999999/rollback"), 404)
        api.post(address(promoted["extra_trees"].parent_endpoint))

        assert status_of(promoted["random_forest"]) == "production"
        assert status_of(others["decision_tree"]) == "production"


class TestWhatIsRefused:
    @pytest.fixture(autouse=True)
    def _nothing_changes(self, request, api, algorithms):
        yield
        assert not MLAlgorithmStatus.objects.filter(is_rollback=True).exists()

    def test_when_there_was_no_other_production_algorithm(self, api, algorithms):
        assert refused(api.post(address())) == (
            "Endpoint classifier has had no other production algorithm: there is nothing to go back to. "
            "Promote an algorithm instead."
        )

    def test_while_a_test_runs(self, api, promoted):
        test = begin(api, promoted["extra_trees"], promoted["decision_tree"])

        message = refused(api.post(address()))

        assert f"A/B test {test} (Spring) is running" in message and f"/api/v1/stop_ab_test/{test}" in message

    def test_when_the_former_algorithm_is_retired(self, api, promoted):
        move(api, promoted["random_forest"], "retired")

        assert refused(api.post(address())) == (
            "random forest 1.0.0, which endpoint classifier would go back to, is retired: "
            "give it another status first, or promote another algorithm instead."
        )

    def test_when_the_last_production_algorithm_was_retired_and_nobody_promoted(self, api, promoted):
        move(api, promoted["extra_trees"], "retired")

        assert "extra trees 1.0.0, which endpoint classifier would go back to, is retired" in refused(
            api.post(address())
        )

    def test_when_its_artifact_is_damaged_even_if_this_process_has_it_in_memory(
        self, api, artifacts_dir, settings, customer, promoted
    ):
        api.post("/api/v1/classifier/predict?algorithm=random_forest", customer)
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        (artifacts_dir / "1.0.0/random_forest.joblib").write_bytes(b"damaged")

        message = refused(api.post(address()))

        assert message.startswith(
            "random forest 1.0.0, which endpoint classifier would go back to, cannot answer: random_forest.joblib"
        )
        assert api.post(PREDICT, customer).json()["algorithm"] == "extra trees"
        assert [status_of(promoted[key]) for key in KEYS] == ["staging", "production", "testing"]

    def test_when_its_training_run_is_gone_or_another_one(self, api, artifacts_dir, settings, promoted):
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        (artifacts_dir / "1.0.0").rename(artifacts_dir / "elsewhere")
        assert "cannot answer" in refused(api.post(address()))

        (artifacts_dir / "elsewhere").rename(artifacts_dir / "1.0.0")
        forest = promoted["random_forest"]
        forest.artifact_sha256 = "0" * 64
        forest.save()
        assert "is not the one that was registered" in refused(api.post(address()))

    @pytest.mark.parametrize("body", [{"reason": "x" * 2001}, {"created_by": ""}, {"reason": None}, [1], "text"])
    def test_a_body_that_cannot_be_understood(self, api, promoted, body):
        refused(api.post(address(), body), 400)

    @pytest.mark.parametrize("method", ["get", "put", "patch", "delete"])
    def test_other_methods(self, api, promoted, method):
        refused(getattr(api, method)(address()), 405)


def test_after_the_reason_for_a_refusal_is_gone_it_works(api, promoted, artifacts_dir, settings):
    settings.ML_ARTIFACTS_DIR = artifacts_dir
    artifact = artifacts_dir / "1.0.0/random_forest.joblib"
    whole = artifact.read_bytes()
    artifact.write_bytes(b"damaged")
    refused(api.post(address()))

    artifact.write_bytes(whole)

    roll_back(api)


def test_needs_the_permission_that_setting_a_status_needs(promoted):
    user = User.objects.create_user("ann")
    _, secret = AuthToken.objects.create(user)
    caller = APIClient(headers={"Authorization": f"Token {secret}"})

    assert "endpoints.add_mlalgorithmstatus" in refused(caller.post(address()), 403)

    user.user_permissions.add(Permission.objects.get(codename="add_mlalgorithmstatus"))
    assert roll_back(caller, created_by="the boss")["created_by"] == "ann"


class TestAnyHistory(TestCase):
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        steps=st.lists(
            st.sampled_from(KEYS).map(lambda key: ("promote", key))
            | st.just(("roll back", ""))
            | st.sampled_from(KEYS).map(lambda key: ("put aside", key))
            | st.just(("test", "")),
            max_size=12,
        )
    )
    def test_is_gone_back_as_one_undoes(self, steps):
        """Beside a list of who was promoted, as a person would keep it."""
        registry.clear()
        algorithms = {algorithm.key: algorithm for algorithm in registry.register_run()}
        with self.settings(DEBUG=True), patch.object(registry, "check"):  # loading each time takes most of the time
            api = APIClient()
            notes, empty = ["random_forest"], False
            for step, key in steps:
                if step == "promote":
                    move(api, algorithms[key], "production")
                    notes, empty = notes if notes[-1] == key else [*notes, key], False
                elif step == "put aside":
                    move(api, algorithms[key], "staging")
                    empty = empty or key == notes[-1]
                elif step == "test" and not empty:
                    other = next(key for key in KEYS if key != notes[-1])
                    stop(api, begin(api, algorithms[notes[-1]], algorithms[other]))
                elif step == "roll back":
                    response = api.post(address())
                    if empty:
                        empty = False
                    elif len(notes) == 1:
                        assert "nothing to go back to" in refused(response)
                        continue
                    else:
                        notes.pop()
                    assert response.status_code == 201
                assert in_production(api) == ([] if empty else notes[-1:])
