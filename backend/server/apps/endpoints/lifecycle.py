"""The life of an algorithm: registered, moved between statuses, rolled back, retired. Locked and recorded.

Every change locks the endpoint's row first, so two changes on one endpoint happen one after the other.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from django.db import connection, transaction

from apps.endpoints.models import ABTest, Endpoint, MLAlgorithm, MLAlgorithmStatus, Status

# What a person may set. A/B tests put algorithms into `ab_testing` themselves.
SETTABLE = (Status.TESTING, Status.STAGING, Status.PRODUCTION, Status.RETIRED)


class LifecycleError(Exception):
    """A change of status that is refused; the message says why and what to do."""


class TestRunning(LifecycleError):
    """The change would reach into a running A/B test."""


class NoWayBack(LifecycleError):
    """Production cannot go back to what it was."""


def lock(endpoint_id: int) -> Endpoint:
    """The endpoint, locked until the surrounding transaction ends."""
    return Endpoint.objects.select_for_update().get(pk=endpoint_id)


def lock_shared(endpoint_ids: Collection[int]) -> None:
    """Let nobody lock these endpoints until the surrounding transaction ends; several may do this at once.

    Where rows cannot be locked (SQLite) a transaction that writes is alone anyway.
    """
    if endpoint_ids and connection.features.has_select_for_update:
        table, column = map(connection.ops.quote_name, (Endpoint._meta.db_table, Endpoint._meta.pk.column))
        places = ", ".join(["%s"] * len(endpoint_ids))
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT {column} FROM {table} WHERE {column} IN ({places}) ORDER BY {column} FOR SHARE",
                sorted(endpoint_ids),
            )


def register(
    endpoint_name: str, name: str, version: str, *, status: str, owner: str, now: datetime, **details: Any
) -> MLAlgorithm:
    """The algorithm of that endpoint, name and version; created with its first status if it is new.

    Only the algorithms of an endpoint's first training run start with `status`. A later version starts in
    `testing`, so that registering it never changes who answers. details: the other fields of MLAlgorithm.
    Raises LifecycleError for a status that cannot be set.
    """
    _check_settable(status)
    with transaction.atomic():
        endpoint, _ = Endpoint.objects.get_or_create(name=endpoint_name, defaults={"owner": owner, "created_at": now})
        lock(endpoint.pk)
        algorithm, created = MLAlgorithm.objects.get_or_create(
            parent_endpoint=endpoint,
            name=name,
            version=version,
            defaults={"owner": owner, "created_at": now, **details},
        )
        if created:
            first_run = not endpoint.algorithms.exclude(version=version).exists()
            displaces = status == Status.PRODUCTION and in_production(endpoint.pk) is not None
            move(algorithm, status if first_run and not displaces else Status.TESTING, by=owner, now=now)
    return algorithm


def set_status(algorithm: MLAlgorithm, status: str, *, by: str, now: datetime, reason: str = "") -> MLAlgorithmStatus:
    """Give an algorithm a status; promoting moves the former production algorithm to staging.

    Raises LifecycleError for a status that cannot be set, TestRunning while an A/B test forbids it.
    """
    _check_settable(status)
    with transaction.atomic():
        lock(algorithm.parent_endpoint_id)
        test = _running_test(algorithm.parent_endpoint_id)
        if test and (algorithm.pk in test.arm_ids or status == Status.PRODUCTION):
            raise TestRunning(_stop_it_first(test))
        return (
            promote(algorithm, by=by, now=now, reason=reason)
            if status == Status.PRODUCTION
            else move(algorithm, status, by=by, now=now, reason=reason)
        )


def promote(algorithm: MLAlgorithm, *, by: str, now: datetime, reason: str = "") -> MLAlgorithmStatus:
    """Put an algorithm in production, and the former one in staging. The caller holds the lock."""
    former = in_production(algorithm.parent_endpoint_id)
    if former and former.pk != algorithm.pk:
        move(former, Status.STAGING, by=by, now=now)
    return move(algorithm, Status.PRODUCTION, by=by, now=now, reason=reason)


def former_production(endpoint: Endpoint) -> MLAlgorithm:
    """The algorithm that a rollback gives production to: the one that was promoted before the present one.

    If none is in production now, that is the one that was last. Raises TestRunning and NoWayBack.
    """
    test = _running_test(endpoint.pk)
    if test:
        raise TestRunning(_stop_it_first(test))
    promoted = _promoted(endpoint.pk)
    if in_production(endpoint.pk):
        promoted.pop()
    if not promoted:
        raise NoWayBack(
            f"Endpoint {endpoint} has had no other production algorithm: there is nothing to go back to. "
            "Promote an algorithm instead."
        )
    former = MLAlgorithm.objects.with_current_status().get(pk=promoted[-1])
    if former.current_status == Status.RETIRED:
        raise NoWayBack(
            f"{former}, which endpoint {endpoint} would go back to, is retired: give it another status first, "
            "or promote another algorithm instead."
        )
    return former


def give_back(former: MLAlgorithm, *, by: str, now: datetime, reason: str) -> MLAlgorithmStatus:
    """Put a former production algorithm back in production, and the present one in testing.

    The caller holds the lock, under which `former_production` named it.
    """
    present = in_production(former.parent_endpoint_id)
    if present:
        move(present, Status.TESTING, by=by, now=now, reason=reason)
    return move(former, Status.PRODUCTION, by=by, now=now, reason=reason, is_rollback=True)


def move(
    algorithm: MLAlgorithm, status: str, *, by: str, now: datetime, reason: str = "", is_rollback: bool = False
) -> MLAlgorithmStatus:
    """Add a status and make it the only active one. The caller holds the lock."""
    algorithm.statuses.active().update(active=False)
    return algorithm.statuses.create(
        status=status,
        created_by=by,
        created_at=now,
        reason=reason,
        is_rollback=is_rollback,
        parent_endpoint_id=algorithm.parent_endpoint_id,
    )


def in_production(endpoint_id: int) -> MLAlgorithm | None:
    """The algorithm that holds an endpoint's production status, if one does."""
    return MLAlgorithm.objects.filter(
        parent_endpoint_id=endpoint_id, statuses__active=True, statuses__status=Status.PRODUCTION
    ).first()


def _check_settable(status: str) -> None:
    if status not in SETTABLE:
        raise LifecycleError(f"status must be one of {', '.join(SETTABLE)}, not {status!r}.")


def _promoted(endpoint_id: int) -> list[int]:
    """The ids of an endpoint's production algorithms, each promoted after the one before it, but for undone promotions.

    A status of the algorithm that held production already is no promotion: an A/B test may give one back.
    """
    promoted: list[int] = []
    steps = MLAlgorithmStatus.objects.filter(parent_endpoint_id=endpoint_id, status=Status.PRODUCTION).order_by("id")
    for algorithm_id, is_rollback in steps.values_list("parent_mlalgorithm_id", "is_rollback"):
        if is_rollback:
            while promoted[-1] != algorithm_id:
                promoted.pop()
        elif promoted[-1:] != [algorithm_id]:
            promoted.append(algorithm_id)
    return promoted


def _running_test(endpoint_id: int) -> ABTest | None:
    return ABTest.objects.running().filter(parent_endpoint_id=endpoint_id).first()


def _stop_it_first(test: ABTest) -> str:
    return (
        f"A/B test {test.pk} ({test.title}) is running on this endpoint: "
        f"stop it first with POST /api/v1/stop_ab_test/{test.pk}."
    )
