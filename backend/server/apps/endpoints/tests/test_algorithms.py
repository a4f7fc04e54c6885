"""GET /api/v1/endpoints and /api/v1/mlalgorithms: what can be asked, and what answers."""

from __future__ import annotations

import pytest

from apps.endpoints.models import MLAlgorithmStatus
from apps.ml.registry import registry

ENDPOINTS = "/api/v1/endpoints"
ALGORITHMS = "/api/v1/mlalgorithms"


def refused(response, status=400) -> str:
    assert response.status_code == status, response.content
    assert response.json()["status"] == "Error"
    return response.json()["message"]


class TestEndpoints:
    def test_are_listed_as_a_plain_array(self, api, algorithms):
        registry.register_run("loyalty", owner="loyalty team")

        first, second = api.get(ENDPOINTS).json()

        assert set(first) == {"id", "name", "owner", "created_at"}
        assert (first["name"], first["owner"]) == ("classifier", "retention team")
        assert (second["name"], second["owner"]) == ("loyalty", "loyalty team")
        assert api.get(f"{ENDPOINTS}/{second['id']}").json() == second

    def test_before_any_training_there_are_none(self, api, db):
        assert api.get(ENDPOINTS).json() == []
        assert api.get(ALGORITHMS).json() == []


class TestAlgorithms:
    def test_tell_who_they_are_how_good_and_what_they_do_now(self, api, algorithms, trained):
        forest = algorithms["random_forest"]

        told = api.get(f"{ALGORITHMS}/{forest.pk}").json()

        assert set(told) == {
            *("id", "name", "key", "description", "code", "version", "owner", "created_at", "parent_endpoint"),
            *("current_status", "artifact", "artifact_sha256", "metrics"),
        }
        assert (told["name"], told["key"], told["version"]) == ("random forest", "random_forest", "1.0.0")
        assert told["owner"] == "retention team"
        assert told["parent_endpoint"] == forest.parent_endpoint_id
        assert told["current_status"] == "production"
        assert "class RandomForestClassifier(RetentionClassifier):" in told["code"]
        assert told["description"] == "A forest of trees, each grown on a resample of the customers."
        assert (trained / told["artifact"]).is_file()
        assert len(told["artifact_sha256"]) == 64
        assert 0.5 < told["metrics"]["roc_auc"]["value"] <= 1
        assert told["metrics"]["baseline"]["roc_auc"]["value"] == 0.5

    def test_are_listed_as_a_plain_array_by_one_query(self, api, algorithms, django_assert_num_queries):
        registry.register_run("loyalty")

        with django_assert_num_queries(1):
            listed = api.get(ALGORITHMS).json()

        assert [row["current_status"] for row in listed] == ["production", "staging", "testing"] * 2
        assert api.get(f"{ALGORITHMS}/{listed[1]['id']}").json() == listed[1]

    def test_their_current_status_is_the_one_posted_last(self, api, algorithms):
        for status in ("staging", "retired", "production"):
            body = {"status": status, "parent_mlalgorithm": algorithms["decision_tree"].pk}
            api.post("/api/v1/mlalgorithmstatuses", body)

        listed = {row["key"]: row["current_status"] for row in api.get(ALGORITHMS).json()}

        assert listed == {"random_forest": "staging", "extra_trees": "staging", "decision_tree": "production"}

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("endpoint=loyalty", ["loyalty random_forest", "loyalty extra_trees", "loyalty decision_tree"]),
            ("endpoint=nowhere", []),
            ("status=production", ["classifier random_forest", "loyalty random_forest"]),
            ("status=retired", []),
            ("name=extra+trees", ["classifier extra_trees", "loyalty extra_trees"]),
            ("name=extra", []),
            ("version=9.9.9", []),
            ("version=1.0.0&endpoint=loyalty&status=testing", ["loyalty decision_tree"]),
            (
                "endpoint=&status=&version=1.0.0&name=decision+tree",
                ["classifier decision_tree", "loyalty decision_tree"],
            ),
        ],
    )
    def test_can_be_narrowed_by_endpoint_status_name_and_version(self, api, algorithms, query, expected):
        loyalty = registry.register_run("loyalty")[0].parent_endpoint_id

        listed = api.get(f"{ALGORITHMS}?{query}").json()

        names = [f"{'loyalty' if row['parent_endpoint'] == loyalty else 'classifier'} {row['key']}" for row in listed]
        assert names == expected

    @pytest.mark.parametrize("query", ["status=live", "status=%00", "name=%00", "endpoint=%00", "version=%00"])
    def test_a_filter_that_cannot_be_understood_is_refused_by_name(self, api, algorithms, query):
        response = api.get(f"{ALGORITHMS}?{query}")

        refused(response)
        assert response.json()["errors"][0]["field"] == query.split("=")[0]


@pytest.mark.parametrize("address", [ENDPOINTS, ALGORITHMS])
class TestBoth:
    def test_can_only_be_read(self, api, algorithms, address):
        for method in ("post", "put", "patch", "delete"):
            for place in (address, f"{address}/{algorithms['random_forest'].pk}"):
                response = getattr(api, method)(place, {"name": "mine"})

                refused(response, 405)
                assert "GET" in response["Allow"]
        assert MLAlgorithmStatus.objects.count() == 3

    @pytest.mark.parametrize("pk", ["0", "999999", "9" * 18, "9" * 19, "9" * 5000, "-1", "x", "1.0", "%00"])
    def test_one_that_does_not_exist_is_404(self, api, algorithms, address, pk):
        refused(api.get(f"{address}/{pk}"), 404)
