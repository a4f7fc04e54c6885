"""What drf-spectacular cannot see in the code: what a customer of the trained table looks like."""

from __future__ import annotations

from typing import Any

from django.conf import settings

from apps.ml.artifacts import ArtifactError, newest_run


def add_examples_of_the_trained_table(result: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Describe the predict body by the newest training run: its columns, and real customers as examples."""
    try:
        run = newest_run(settings.ML_ARTIFACTS_DIR)
    except ArtifactError:
        return result
    types = {"numeric": "number", "boolean": "boolean", "categorical": "string"}
    customer = {
        "type": "object",
        "properties": {
            column.name: {"type": [types[column.kind], "null"], "description": _described(column.mode)}
            for column in run.schema.columns
        },
    }
    result["components"]["schemas"]["Customer"] = customer
    reference = {"$ref": "#/components/schemas/Customer"}
    samples = [{k: v for k, v in s["row"].items() if v is not None} for s in run.manifest.get("samples", [])]
    for path, operations in result["paths"].items():
        if path.endswith("/predict") and samples:
            content = operations["post"]["requestBody"]["content"]["application/json"]
            content["schema"] = {"oneOf": [reference, {"type": "array", "items": reference, "minItems": 1}]}
            content["examples"] = {
                "one customer": {"value": samples[0]},
                "several customers": {"value": samples[:3]},
            }
    return result


def _described(mode: Any) -> str:
    return f"May be left out; then the training mode, {mode}, stands for it."
