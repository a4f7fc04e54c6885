"""Requests that were answered, and their outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django import forms
from django.contrib import admin
from django.core.exceptions import ValidationError
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.contrib.filters.admin import RadioFilter, RelatedDropdownFilter
from unfold.paginator import InfinitePaginator
from unfold.views import ChangeList
from unfold.widgets import UnfoldAdminSelectWidget

from apps.endpoints import feedback, outcomes
from apps.endpoints.admin.history import DayFilter, HistoryAdmin, HistoryInline, badge, table
from apps.endpoints.models import FEEDBACK_LABELS, HAS_CUSTOMER_KEY, FeedbackChange, MLRequest


class LabelFilter(RadioFilter):
    title = "label"
    parameter_name = "label"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin) -> list[tuple[str, str]]:
        return [("1", "1 (stays)"), ("0", "0 (leaves)")]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        return queryset.filter(response=self.value()) if self.value() in FEEDBACK_LABELS else queryset


class OutcomeFilter(RadioFilter):
    title = "outcome"
    parameter_name = "outcome"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin) -> list[tuple[str, str]]:
        return [("known", "Known"), ("unknown", "Not known yet")]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        if self.value() == "known":
            return queryset.labelled()
        return queryset.filter(feedback=None) if self.value() == "unknown" else queryset


class OutcomeForm(forms.ModelForm):
    """What may be written to a logged request."""

    # The model's field is not for forms, which would write it without history.
    was_acted_on = forms.TypedChoiceField(
        label="Acted on",
        choices=[("", "not known"), ("yes", "yes"), ("no", "no")],
        coerce=outcomes.read_acted_on,
        empty_value=None,
        required=False,
        widget=UnfoldAdminSelectWidget,
        help_text="Whether something was done for the customer because of the answer.",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.initial["was_acted_on"] = {True: "yes", False: "no", None: ""}[self.instance.acted_on]
        if "feedback" in self.fields:
            target = self.instance.parent_mlalgorithm.target
            self.fields["feedback"].choices = [
                ("", "not known yet"),
                ("1", f"1: the customer stayed ({target['name']} = {target['positive']})"),
                ("0", f"0: the customer left ({target['name']} = {target['negative']})"),
            ]

    def clean_feedback(self) -> str | None:
        outcome = self.cleaned_data["feedback"]
        if self.instance.feedback and not outcome:
            raise ValidationError("An outcome can be corrected, but not taken back.")
        return outcome

    def clean_was_acted_on(self) -> bool | None:
        acted_on = self.cleaned_data["was_acted_on"]
        if acted_on is None and self.instance.acted_on is not None:
            raise ValidationError("This can be corrected, but not taken back.")
        if acted_on is not None and not self.cleaned_data.get("feedback", self.instance.feedback):
            raise ValidationError("Say the outcome, too.")
        return acted_on


class FeedbackInline(HistoryInline):
    model = FeedbackChange
    verbose_name_plural = "Feedback history"
    fields = ("previous", "feedback", "acted_on", "created_by", "created_at")


class RequestChangeList(ChangeList):
    def get_queryset(self, request: HttpRequest, exclude_parameters: list[str] | None = None) -> QuerySet:
        return super().get_queryset(request, exclude_parameters).defer("input_data", "full_response")


@admin.register(MLRequest)
class MLRequestAdmin(HistoryAdmin):
    """Made for millions of rows: nothing is counted, and an index gives each order and filter."""

    list_display = (
        *("id", "created_at", "parent_mlalgorithm", "customer_key", "chance", "response", "outcome", "latency"),
    )
    list_filter = (
        ("created_at", DayFilter),
        ("parent_mlalgorithm", RelatedDropdownFilter),
        LabelFilter,
        OutcomeFilter,
    )
    list_select_related = ("parent_mlalgorithm",)
    list_per_page = 50
    paginator = InfinitePaginator
    show_full_result_count = False
    sortable_by = ()
    search_fields = ("id", "customer_key")
    search_help_text = "A request's id, or a customer's key"
    form = OutcomeForm
    inlines = (FeedbackInline,)
    fieldsets = (
        (None, {"fields": ("created_at", "parent_mlalgorithm", "abtest", "customer_key", "latency")}),
        ("Answer", {"fields": ("chance", "response", "warnings")}),
        ("Outcome", {"fields": ("feedback", "was_acted_on")}),
        ("Customer", {"fields": ("features",)}),
    )
    readonly_fields = (
        *("created_at", "parent_mlalgorithm", "abtest", "customer_key", "latency"),
        *("chance", "response", "warnings", "features"),
    )

    def has_change_permission(self, request: HttpRequest, obj: MLRequest | None = None) -> bool:
        return request.user.has_perm("endpoints.change_mlrequest")

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return RequestChangeList

    def get_ordering(self, request: HttpRequest) -> Sequence[str]:
        # Newest first, either way. In the order of time a day of long ago is one stretch of an index; in the order
        # of ids PostgreSQL would walk there through all that came since.
        by_day = request.GET.get("created_at_from") or request.GET.get("created_at_to")
        return ("-created_at", "-id") if by_day else ("-id",)

    def get_search_results(self, request: HttpRequest, queryset: QuerySet, search_term: str) -> tuple[QuerySet, bool]:
        term = search_term.strip()
        if not term:
            return queryset, False
        fits = Q(HAS_CUSTOMER_KEY, customer_key=term)
        if term.isdecimal() and len(term) <= 18:
            fits |= Q(pk=int(term))
        return queryset.filter(fits), False

    def save_model(self, request: HttpRequest, obj: MLRequest, form: forms.ModelForm, change: bool) -> None:
        if {"feedback", "was_acted_on"} & {*form.changed_data}:
            feedback.record(
                obj.pk,
                obj.feedback,
                acted_on=form.cleaned_data["was_acted_on"],
                by=request.user.get_username(),
                now=timezone.now(),
            )

    @admin.display(description="Acted on", boolean=True)
    def was_acted_on(self, request: MLRequest) -> bool | None:
        """For those who may only look."""
        return request.acted_on

    @admin.display(description="Probability")
    def chance(self, request: MLRequest) -> str:
        return f"{request.probability:.4f}"

    @admin.display(description="Latency")
    def latency(self, request: MLRequest) -> str:
        return f"{request.latency_ms:.1f} ms"

    @admin.display(description="Outcome")
    def outcome(self, request: MLRequest) -> SafeString | None:
        if request.feedback is None:
            return None
        return badge(request.feedback, "success" if request.feedback == request.response else "danger")

    @admin.display(description="Warnings")
    def warnings(self, request: MLRequest) -> str:
        return "\n".join(request.full_response.get("warnings", ())) or "none"

    @admin.display(description="Features")
    def features(self, request: MLRequest) -> SafeString:
        return table(
            ["Feature", "Value"],
            [(name, "missing" if value is None else value) for name, value in request.input_data.items()],
        )
