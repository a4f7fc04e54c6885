"""What drf-spectacular cannot see in the code: what a customer of the trained table looks like."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from django.conf import settings
from django.db import DatabaseError

from apps.endpoints import prediction
from apps.endpoints.models import Status
from apps.endpoints.prediction import PredictionError, Wanted
from apps.ml.artifacts import ArtifactError, TrainingRun, newest_run
from apps.ml.registry import DEFAULT_ENDPOINT
from apps.ml.schema import BOOLEAN, CATEGORICAL, MAX_KEY_LENGTH, NUMERIC, Column, Schema

_TYPES = {NUMERIC: "number", BOOLEAN: "boolean", CATEGORICAL: "string"}


def describe_errors(result: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Whatever goes wrong, wherever: the same shape."""
    error = {
        "description": "Any other error has this shape, too.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for operations in result["paths"].values():
        for operation in operations.values():
            operation["responses"]["default"] = error
    return result


def describe_customers(result: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """The predict body by the table that production was trained on: its columns, and real customers as examples."""
    try:
        run = _described_run()
    except ArtifactError:
        return result
    result["components"]["schemas"]["Customer"] = _customer(run.schema)
    customer = {"$ref": "#/components/schemas/Customer"}
    samples = [
        {name: value for name, value in sample["row"].items() if value is not None}
        for sample in run.manifest.get("samples", [])
    ]
    for path, operations in result["paths"].items():
        if not path.endswith("/predict"):
            continue
        for parameter in operations["post"]["parameters"]:
            if parameter["name"] == "status":
                parameter["example"] = Status.PRODUCTION.value
        for content_type, content in operations["post"]["requestBody"]["content"].items():
            content["schema"] = customer
            if samples:
                content["examples"] = {"one customer": {"value": samples[0]}}
            if content_type == "application/json":
                content["schema"] = {"oneOf": [customer, {"type": "array", "items": customer, "minItems": 1}]}
                if samples:
                    content["examples"]["several customers"] = {"value": samples[:3]}
    return result


def _described_run() -> TrainingRun:
    """That of the default endpoint's production algorithm, else the newest. Raises ArtifactError."""
    with suppress(DatabaseError, PredictionError):
        choice = prediction.choose(DEFAULT_ENDPOINT, Wanted(Status.PRODUCTION), in_test=False)
        return prediction.classifier_of(choice.algorithms[0]).run
    return newest_run(settings.ML_ARTIFACTS_DIR)


def _customer(schema: Schema) -> dict[str, Any]:
    properties = {column.name: _described(column) for column in schema.columns}
    properties |= {name: {"description": "Not looked at."} for name in sorted(schema.ignored)}
    if schema.identifier:
        properties[schema.identifier] = {
            "oneOf": [{"type": "string", "maxLength": MAX_KEY_LENGTH}, {"type": "number"}],
            "nullable": True,
            "description": "Kept with the request, so that it is found again.",
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _described(column: Column) -> dict[str, Any]:
    filled = f"May be left out; then the training mode, {column.mode}, stands for it."
    return {"type": _TYPES[column.kind], "nullable": True, "description": filled}
