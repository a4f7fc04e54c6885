"""The one way in which history goes: requests of one customer, or from before a moment, with their outcomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from django.db import transaction

from apps.endpoints.models import ABTest, FeedbackChange, MLRequest, RequestQuerySet

CHUNK = 500


@dataclass(frozen=True)
class Purged:
    """How many rows a chunk of a purge removed."""

    requests: int
    feedback_changes: int


def selected(*, before: datetime | None = None, customer: str | None = None) -> RequestQuerySet:
    """The requests that a purge by time, by customer, or by both removes."""
    if before is None and not customer:
        raise ValueError("A purge needs a time or a customer; without either it would remove everything.")
    requests = MLRequest.objects.of_customer(customer) if customer else MLRequest.objects.all()
    return requests if before is None else requests.filter(created_at__lt=before)


def running_tests_of(requests: RequestQuerySet) -> list[ABTest]:
    """The running A/B tests whose decision counts some of these requests."""
    return [
        test
        for test in ABTest.objects.running().order_by("pk")
        if requests.filter(abtest=test).exists() or requests.filter(shadow__abtest=test).exists()
    ]


def purge(requests: RequestQuerySet) -> Iterator[Purged]:
    """Remove requests in short transactions, so that a server goes on answering meanwhile; yields after each."""
    last = 0
    while True:
        with transaction.atomic():
            # Locked as `feedback.record` locks them: an outcome that arrives now waits, and finds no request.
            chunk = requests.filter(pk__gt=last).order_by("pk").select_for_update()[:CHUNK]
            ids = list(chunk.values_list("pk", flat=True))
            if not ids:
                return
            _, removed = MLRequest.objects.filter(pk__in=ids).delete()
        last = ids[-1]
        yield Purged(len(ids), removed.get(FeedbackChange._meta.label, 0))
