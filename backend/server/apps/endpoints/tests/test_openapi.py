"""/api/schema and /api/docs: the API as it describes itself, and whether it keeps to it."""

from __future__ import annotations

import json
import re

import pytest
import schemathesis
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import call_command
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import train
from apps.endpoints.models import MLRequest
from conftest import make_customers

PREDICT = "/api/v1/{endpoint_name}/predict"


@pytest.fixture
def described(api, algorithms) -> dict:
    response = api.get("/api/schema?format=json")
    assert response.status_code == 200
    return json.loads(response.content)


class TestTheDescription:
    def test_is_generated_without_a_warning(self, algorithms, tmp_path):
        call_command("spectacular", "--validate", "--fail-on-warn", file=str(tmp_path / "schema.yaml"))

        assert "openapi: 3" in (tmp_path / "schema.yaml").read_text()

    def test_is_generated_before_any_training_too(self, db, tmp_path, settings):
        settings.ML_ARTIFACTS_DIR = tmp_path

        call_command("spectacular", "--validate", "--fail-on-warn", file=str(tmp_path / "schema.yaml"))

        assert PREDICT in (tmp_path / "schema.yaml").read_text()

    def test_lists_every_call(self, described):
        calls = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}

        assert calls == {
            ("GET", "/api/v1/endpoints"),
            ("GET", "/api/v1/endpoints/{id}"),
            ("POST", "/api/v1/endpoints/{id}/rollback"),
            ("GET", "/api/v1/mlalgorithms"),
            ("GET", "/api/v1/mlalgorithms/{id}"),
            ("GET", "/api/v1/mlalgorithmstatuses"),
            ("POST", "/api/v1/mlalgorithmstatuses"),
            ("GET", "/api/v1/mlalgorithmstatuses/{id}"),
            ("GET", "/api/v1/batch-jobs"),
            ("GET", "/api/v1/batch-jobs/{id}"),
            ("DELETE", "/api/v1/batch-jobs/{id}"),
            ("GET", "/api/v1/batch-jobs/{id}/result"),
            ("GET", "/api/v1/batch-jobs/{id}/errors"),
            ("GET", "/api/v1/mlrequests"),
            ("GET", "/api/v1/mlrequests/{id}"),
            ("PUT", "/api/v1/mlrequests/{id}"),
            ("PATCH", "/api/v1/mlrequests/{id}"),
            ("POST", PREDICT),
            ("POST", "/api/v1/feedback"),
            ("POST", "/api/v1/batch-predict"),
            ("GET", "/api/v1/abtests"),
            ("POST", "/api/v1/abtests"),
            ("GET", "/api/v1/abtests/{id}"),
            ("GET", "/api/v1/abtests/{id}/report"),
            ("GET", "/api/v1/abtests/{id}/report.png"),
            ("POST", "/api/v1/abtests/replay"),
            ("GET", "/api/v1/abtests/plan"),
            ("POST", "/api/v1/stop_ab_test/{id}"),
        }

    def test_every_call_names_the_shape_of_its_errors(self, described):
        for methods in described["paths"].values():
            for operation in methods.values():
                for code, response in operation["responses"].items():
                    if code == "default" or int(code) >= 400:
                        reference = response["content"]["application/json"]["schema"]["$ref"]
                        assert reference == "#/components/schemas/Error"
                assert "default" in operation["responses"]

    def test_customers_have_the_columns_of_the_trained_table(self, described):
        customer = described["components"]["schemas"]["Customer"]

        assert {name: column.get("type") for name, column in customer["properties"].items()} == {
            "Plan": "string",
            "Orders": "number",
            "RecencyDays": "number",
            "MeanGapDays": "number",
            "Newsletter": "boolean",
            "CustomerId": None,
            "IsRetained": None,
        }

    def test_the_example_stays_that_of_production_when_another_table_is_trained_on(
        self, api, algorithms, artifacts_dir, settings, tmp_path
    ):
        settings.ML_ARTIFACTS_DIR = artifacts_dir
        make_customers(60).rename(columns={"Orders": "Visits"}).to_csv(tmp_path / "shop.csv", index=False)
        assert train.main(["--data", str(tmp_path / "shop.csv"), "--artifacts-dir", str(artifacts_dir)]) == 0

        columns = api.get("/api/schema").json()["components"]["schemas"]["Customer"]["properties"]

        assert "Orders" in columns and "Visits" not in columns

    def test_the_example_of_the_predict_body_is_a_customer_of_that_table_and_is_answered(self, api, described):
        body = described["paths"][PREDICT]["post"]["requestBody"]["content"]

        for example in body["application/json"]["examples"].values():
            response = api.post("/api/v1/classifier/predict?status=production", example["value"])
            assert response.status_code == 200
        customer = body["application/json"]["examples"]["one customer"]["value"]
        assert set(customer) <= set(described["components"]["schemas"]["Customer"]["properties"])
        assert "Plan" in customer
        assert MLRequest.objects.first().input_data == customer


class TestThePages:
    def test_are_served_without_any_other_site(self, api, algorithms):
        page = api.get("/api/docs")
        addresses = re.findall(r"""(?:src|href|url)\s*[=:(]\s*["']?([^"'\s>)]+)""", page.content.decode())

        assert page.status_code == 200
        assert any(address.startswith("/static/drf_spectacular_sidecar/") for address in addresses)
        assert not [address for address in addresses if "//" in address]
        for address in addresses:
            if address.startswith("/static/"):
                assert api.get(address).status_code == 200

    def test_the_first_address_leads_to_them(self, api, algorithms):
        response = api.get("/")

        assert (response.status_code, response["Location"]) == (302, "/api/docs")


TWENTY_EXAMPLES = GenerationConfig(max_examples=20, deterministic=True)


@pytest.fixture
def existing(api, algorithms, customer) -> dict[str, int | str]:
    """What the addresses of the description can name, by their pattern."""
    answer = api.post("/api/v1/classifier/predict?status=production", customer).json()
    forest, tree = algorithms["random_forest"], algorithms["decision_tree"]
    body = {"title": "T", "parent_mlalgorithm_1": forest.pk, "parent_mlalgorithm_2": tree.pk}
    test = api.post("/api/v1/abtests", body).json()["id"]
    file = SimpleUploadedFile("customers.csv", make_customers(3).to_csv(index=False).encode())
    job = api.post("/api/v1/batch-predict", {"file": file, "mode": "async"}, format="multipart").json()["id"]
    call_command("batch_worker", once=True)
    return {
        PREDICT: "classifier",
        "/api/v1/batch-jobs/{id}": job,
        "/api/v1/batch-jobs/{id}/result": job,
        "/api/v1/batch-jobs/{id}/errors": job,
        "/api/v1/endpoints/{id}": forest.parent_endpoint_id,
        "/api/v1/endpoints/{id}/rollback": forest.parent_endpoint_id,
        "/api/v1/mlalgorithms/{id}": forest.pk,
        "/api/v1/mlalgorithmstatuses/{id}": forest.statuses.get(active=True).pk,
        "/api/v1/mlrequests/{id}": answer["request_id"],
        "/api/v1/abtests/{id}": test,
        "/api/v1/abtests/{id}/report": test,
        "/api/v1/abtests/{id}/report.png": test,
        "/api/v1/stop_ab_test/{id}": test,
    }


@pytest.fixture
def api_schema(api, algorithms, application, settings):
    settings.ALLOWED_HOSTS = ["localhost", "testserver"]
    settings.PREDICT_DEFAULT_STATUS = "production"
    return schemathesis.openapi.from_wsgi(
        "/api/schema?format=json",
        lambda environ, start_response: application({**environ, "REMOTE_ADDR": "127.0.0.1"}, start_response),
        config=SchemathesisConfig(projects=ProjectsConfig(default=ProjectConfig(generation=TWENTY_EXAMPLES))),
    )


@schemathesis.pytest.from_fixture("api_schema").parametrize()
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_generated_from_the_description_is_answered_as_it_says(case, existing):
    for name in case.path_parameters:
        case.path_parameters[name] = existing[case.operation.path]
    for name in {"algorithm", "version"} & set(case.query or ()):
        del case.query[name]  # whatever is generated names none

    case.call_and_validate(
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_headers_conformance,
            response_schema_conformance,
        ]
    )
