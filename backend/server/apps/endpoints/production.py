"""Production goes back to the algorithm that was promoted before, if that one can answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.db import transaction

from apps.endpoints import lifecycle
from apps.endpoints.lifecycle import NoWayBack
from apps.endpoints.models import Endpoint, MLAlgorithm, MLAlgorithmStatus, Status
from apps.ml.artifacts import ArtifactError
from apps.ml.registry import registry


@dataclass(frozen=True)
class Rollback:
    """What a rollback did: the status that it gave, and who held production until then."""

    step: MLAlgorithmStatus
    displaced: MLAlgorithm | None

    def __str__(self) -> str:
        said = f"{self.step.parent_mlalgorithm} is in production again"
        return f"{said}; {self.displaced} moved to {Status.TESTING.label.lower()}." if self.displaced else f"{said}."


def roll_back(endpoint: Endpoint, *, by: str, now: datetime, reason: str = "") -> Rollback:
    """Give production back to the algorithm that `lifecycle.former_production` names, and record why.

    Its artifact is loaded from the artifacts folder first, under the lock: what is promoted is what was checked.
    Raises TestRunning, and NoWayBack when there is no such algorithm or it could not answer; nothing has changed then.
    """
    with transaction.atomic():
        lifecycle.lock(endpoint.pk)
        former = lifecycle.former_production(endpoint)
        try:
            registry.check(former)
        except ArtifactError as error:
            raise NoWayBack(f"{former}, which endpoint {endpoint} would go back to, cannot answer: {error}") from error
        present = lifecycle.in_production(endpoint.pk)
        return Rollback(lifecycle.give_back(former, by=by, now=now, reason=reason), present)
