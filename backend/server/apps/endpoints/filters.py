"""Which rows of a list are asked for. A value that cannot be understood is refused, not passed over."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import django_filters
from django import forms
from django.core.exceptions import ValidationError
from django_filters.fields import IsoDateTimeField
from drf_spectacular.utils import extend_schema_field
from rest_framework.exceptions import NotFound
from rest_framework.pagination import Cursor, CursorPagination
from rest_framework.request import Request

from apps.endpoints.models import BatchJob, MLAlgorithm, MLAlgorithmStatus, MLRequest, RequestQuerySet, Status

LARGEST_ID = 2**63 - 1


@extend_schema_field({"type": "integer", "minimum": 1, "maximum": LARGEST_ID})
class IdFilter(django_filters.NumberFilter):
    field_class = forms.IntegerField

    def __init__(self, field_name: str):
        super().__init__(field_name, min_value=1, max_value=LARGEST_ID)


@extend_schema_field({"type": "boolean"})
class TrueOrFalseFilter(django_filters.TypedChoiceFilter):
    def __init__(self, field_name: str, **kwargs: Any):
        choices = [("true", "true"), ("false", "false")]
        super().__init__(field_name, choices=choices, coerce=lambda text: text == "true", **kwargs)


class MomentField(IsoDateTimeField):
    def to_python(self, value: Any) -> datetime | None:
        moment = super().to_python(value)
        try:
            return moment and moment.astimezone(UTC)
        except OverflowError:
            raise ValidationError(self.error_messages["invalid"]) from None


class MomentFilter(django_filters.IsoDateTimeFilter):
    field_class = MomentField


class AlgorithmFilter(django_filters.FilterSet):
    endpoint = django_filters.CharFilter("parent_endpoint__name")
    status = django_filters.ChoiceFilter(choices=Status.choices, field_name="current_status")

    class Meta:
        model = MLAlgorithm
        fields = ["name", "version"]


class StatusFilter(django_filters.FilterSet):
    parent_mlalgorithm = IdFilter("parent_mlalgorithm")
    active = TrueOrFalseFilter("active")

    class Meta:
        model = MLAlgorithmStatus
        fields = ["status"]


class RequestFilter(django_filters.FilterSet):
    algorithm = IdFilter("parent_mlalgorithm")
    abtest = IdFilter("abtest")
    customer_key = django_filters.CharFilter(method="of_customer")
    created_after = MomentFilter("created_at", lookup_expr="gte")
    created_before = MomentFilter("created_at", lookup_expr="lt")
    labelled = TrueOrFalseFilter("feedback", method="by_outcome")

    class Meta:
        model = MLRequest
        fields: list[str] = []

    def of_customer(self, requests: RequestQuerySet, name: str, key: str) -> RequestQuerySet:
        return requests.of_customer(key)

    def by_outcome(self, requests: RequestQuerySet, name: str, known: bool) -> RequestQuerySet:
        return requests.labelled() if known else requests.filter(feedback=None)


class BatchJobFilter(django_filters.FilterSet):
    algorithm = IdFilter("parent_mlalgorithm")

    class Meta:
        model = BatchJob
        fields = ["state", "created_by"]


class NewestFirst(CursorPagination):
    """Pages by key: as fast on the last page as on the first, and nothing is counted."""

    ordering = "-id"
    page_size = 50
    page_size_query_param = "page_size"
    max_page_size = 1000

    def decode_cursor(self, request: Request) -> Cursor | None:
        cursor = super().decode_cursor(request)
        if cursor and not re.fullmatch("[0-9]{1,18}", cursor.position or "0"):
            raise NotFound(self.invalid_cursor_message)
        return cursor
