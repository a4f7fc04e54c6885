"""Which rows of a list are asked for. A value that cannot be understood is refused, not passed over."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import django_filters
from django import forms
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django_filters.fields import IsoDateTimeField
from django_filters.rest_framework import DjangoFilterBackend
from drf_spectacular.utils import extend_schema_field
from rest_framework import exceptions
from rest_framework.pagination import Cursor, CursorPagination
from rest_framework.request import Request

from apps.endpoints.models import BatchJob, MLAlgorithm, MLAlgorithmStatus, MLRequest, RequestQuerySet, Status
from apps.endpoints.parameters import unknown

if TYPE_CHECKING:
    from rest_framework.viewsets import GenericViewSet

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
    default_error_messages = {"invalid": "Expected a date, or a date and time, as in 2026-11-28T12:30:00Z."}

    def to_python(self, value: Any) -> datetime | None:
        moment = super().to_python(value)
        try:
            return moment and moment.astimezone(UTC)
        except OverflowError:
            raise ValidationError(self.error_messages["invalid"]) from None


class MomentFilter(django_filters.IsoDateTimeFilter):
    field_class = MomentField


class Filters(django_filters.FilterSet):
    """Names the choices when it refuses another."""

    def get_form_class(self) -> type[forms.Form]:
        form = super().get_form_class()
        for field in form.base_fields.values():
            if isinstance(field, forms.ChoiceField):
                names = ", ".join(str(value) for value, _ in field.choices if value)
                field.error_messages["invalid_choice"] = f"Expected one of {names}."
        return form


class KnownFilters(DjangoFilterBackend):
    """Refuses what a list cannot be filtered by."""

    def filter_queryset(self, request: Request, queryset: QuerySet, view: GenericViewSet) -> QuerySet:
        if not view.detail:
            filters = self.get_filterset_class(view, queryset)
            pages = (getattr(view.paginator, f"{name}_query_param", None) for name in ("cursor", "page_size"))
            known = [*(filters.base_filters if filters else ()), *filter(None, pages)]
            if wrong := unknown(request.query_params, known):
                raise exceptions.ValidationError(wrong)
        return super().filter_queryset(request, queryset, view)


class AlgorithmFilter(Filters):
    endpoint = django_filters.CharFilter("parent_endpoint__name")
    status = django_filters.ChoiceFilter(choices=Status.choices, field_name="current_status")

    class Meta:
        model = MLAlgorithm
        fields = ["name", "version"]


class StatusFilter(Filters):
    parent_mlalgorithm = IdFilter("parent_mlalgorithm")
    active = TrueOrFalseFilter("active")

    class Meta:
        model = MLAlgorithmStatus
        fields = ["status"]


class RequestFilter(Filters):
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


class BatchJobFilter(Filters):
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
            raise exceptions.NotFound(self.invalid_cursor_message)
        return cursor
