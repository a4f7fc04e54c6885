"""Is the process alive, and can it answer? For load balancers and people."""

from __future__ import annotations

import logging

from django.db import Error, connection
from django.db.migrations.executor import MigrationExecutor
from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_safe

from apps.endpoints import prediction
from apps.endpoints.models import MLAlgorithm
from apps.endpoints.sql import leave
from apps.ml.artifacts import HOW_TO_TRAIN

logger = logging.getLogger(__name__)


@require_safe
def livez(request: HttpRequest) -> JsonResponse:
    """200 as long as the process answers at all."""
    return JsonResponse({"status": "alive"})


@require_safe
def readyz(request: HttpRequest) -> JsonResponse:
    """200 when a production algorithm can answer, 503 when none can; `degraded` lists what is amiss besides."""
    try:
        if _is_read_only():
            leave()
            return _not_ready("The database takes no writes, and so no answer can be recorded.")
        executor = MigrationExecutor(connection)
        pending = executor.migration_plan(executor.loader.graph.leaf_nodes())
        if pending:
            return _not_ready(f"{len(pending)} migrations are pending. Apply them with `python manage.py migrate`.")
        algorithms = prediction.availability()
        if not algorithms:
            registered = MLAlgorithm.objects.exists()
            return _not_ready(
                "Every algorithm is retired; promote one."
                if registered
                else f"No model has been trained yet. {HOW_TO_TRAIN}"
            )
    except Error as error:
        # Whoever may probe need not learn the database's address; the log tells it.
        logger.error("The database does not answer: %s", str(error).strip())
        return _not_ready("The database does not answer; the log says why.")
    degraded = [f"{a.endpoint}: {a.reason}" for a in algorithms if a.reason]
    endpoints = {a.endpoint for a in algorithms}
    producing = {a.endpoint for a in algorithms if a.in_production and not a.reason}
    degraded += [f"{name}: no production algorithm can answer." for name in sorted(endpoints - producing)]
    if not producing:
        return _not_ready(*degraded)
    return JsonResponse({"status": "degraded", "degraded": degraded} if degraded else {"status": "ready"})


def _is_read_only() -> bool:
    """Whether PostgreSQL is a standby, or was told to take no writes."""
    if connection.vendor != "postgresql":
        return False
    with connection.cursor() as cursor:
        cursor.execute("SHOW transaction_read_only")
        return cursor.fetchone() == ("on",)


def _not_ready(*reasons: str) -> JsonResponse:
    return JsonResponse({"status": "Error", "message": " ".join(reasons)}, status=503)


CHECKS = {"/livez": livez, "/readyz": readyz}
