"""POST /api/v1/{endpoint}/predict."""

from __future__ import annotations

from apps.endpoints.models import MLRequest


def test_a_customer_is_answered_by_the_production_algorithm_and_logged(api, algorithms, customer):
    response = api.post("/api/v1/classifier/predict?status=production", customer)

    assert response.status_code == 200
    answer = response.json()
    assert answer["algorithm"] == "random forest"
    assert answer["version"] == "1.0.0"
    assert answer["label"] == ("1" if answer["probability"] > 0.5 else "0")
    logged = MLRequest.objects.get(pk=answer["request_id"])
    assert logged.probability == answer["probability"]
    assert logged.input_data == customer
    assert logged.parent_mlalgorithm == algorithms["random_forest"]


def test_without_a_status_the_testing_algorithm_answers(api, algorithms, customer):
    answer = api.post("/api/v1/classifier/predict", customer).json()

    assert answer["algorithm"] == "decision tree"
