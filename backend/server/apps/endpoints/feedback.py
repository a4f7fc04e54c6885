"""Outcomes: what became of a customer after the answer, and every correction of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db import transaction

from apps.endpoints.models import FeedbackChange, MLRequest


class UnknownOutcome(ValueError):
    """An outcome that is neither a label nor a value of the training table's target."""


def record(request_id: int, outcome: Any, *, by: str, now: datetime) -> MLRequest:
    """Store the true outcome of a logged request; telling it again changes nothing.

    Raises UnknownOutcome, MLRequest.DoesNotExist.
    """
    with transaction.atomic():
        request = (
            MLRequest.objects.select_for_update(of=("self",)).select_related("parent_mlalgorithm").get(pk=request_id)
        )
        label = request.parent_mlalgorithm.outcome_label(outcome)
        if label is None:
            target = request.parent_mlalgorithm.target
            raise UnknownOutcome(
                f'feedback must be "1" (the customer stayed, {target["name"]} = {target["positive"]}) '
                f'or "0" (the customer left, {target["name"]} = {target["negative"]}), not {str(outcome)[:60]!r}.'
            )
        if label != request.feedback:
            FeedbackChange.objects.create(
                request=request, previous=request.feedback, feedback=label, created_by=by, created_at=now
            )
            request.feedback = label
            request.labelled_at = request.labelled_at or now
            request.save(update_fields=["feedback", "labelled_at"])
    return request
