"""Endpoints, their algorithms, and the statuses these went through."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.db.models import Count, F, Prefetch, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.contrib.filters.admin import ChoicesDropdownFilter, DropdownFilter, RelatedDropdownFilter
from unfold.decorators import action
from unfold.enums import ActionVariant
from unfold.forms import BaseDialogForm
from unfold.views import ChangeList
from unfold.widgets import UnfoldAdminTextareaWidget

from apps.endpoints import lifecycle, production
from apps.endpoints.admin.history import (
    DayFilter,
    HistoryAdmin,
    HistoryInline,
    badge,
    dialog,
    done,
    link_to,
    share,
    table,
)
from apps.endpoints.lifecycle import LifecycleError
from apps.endpoints.models import ABTest, Endpoint, MLAlgorithm, MLAlgorithmStatus, MLRequest, Status

WEEK = timedelta(days=7)
COLOURS = {
    Status.PRODUCTION: "success",
    Status.STAGING: "info",
    Status.TESTING: "warning",
    Status.AB_TESTING: "primary",
}


@dataclass(frozen=True)
class Traffic:
    """How often an algorithm was asked, and how often it was right where the outcome is known."""

    requests: int = 0
    labelled: int = 0
    correct: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests + other.requests, self.labelled + other.labelled, self.correct + other.correct)

    @property
    def accuracy(self) -> str:
        return share(self.correct, self.labelled)


def with_last_week(algorithms: Iterable[MLAlgorithm]) -> list[MLAlgorithm]:
    """The same algorithms, each with `week`, its traffic of the last seven days: one query, on an index alone."""
    found = {algorithm.pk: algorithm for algorithm in algorithms}
    counted = (
        MLRequest.objects.since(timezone.now() - WEEK)
        .filter(parent_mlalgorithm__in=found)
        .values_list("parent_mlalgorithm")
        .annotate(
            asked=Count("*"), labelled=Count("feedback"), correct=Count("feedback", filter=Q(response=F("feedback")))
        )
    )
    weeks = {pk: Traffic(*counts) for pk, *counts in counted}
    for pk, algorithm in found.items():
        algorithm.week = weeks.get(pk, Traffic())
    return list(found.values())


def status_badge(status: str | None) -> SafeString | None:
    return badge(Status(status).label, COLOURS.get(status, "")) if status else None


def score(scores: dict[str, Any], name: str) -> str:
    return f"{scores[name]['value']:.3f}" if name in scores else ""


def why(step: MLAlgorithmStatus) -> str:
    return ": ".join(filter(None, ["Rollback" if step.is_rollback else "", step.reason]))


def breakable(text: str) -> SafeString:
    """Long text without spaces, made to fit a narrow screen."""
    return format_html('<span style="overflow-wrap: anywhere">{}</span>', text)


def with_production(endpoints: QuerySet) -> QuerySet:
    """Endpoints, prepared for `production_of`."""
    production = MLAlgorithm.objects.filter(statuses__active=True, statuses__status=Status.PRODUCTION)
    running = ABTest.objects.running().exclude(champion=None).select_related("champion")
    return endpoints.prefetch_related(
        Prefetch("algorithms", production, to_attr="in_production"), Prefetch("abtests", running, to_attr="in_test")
    )


def production_of(endpoint: Endpoint) -> SafeString | str:
    """Who answers production requests: one algorithm, or a running test and its champion."""
    for test in endpoint.in_test:
        return format_html("{} in A/B test {}", link_to(test.champion), link_to(test))
    for algorithm in endpoint.in_production:
        return link_to(algorithm)
    return "none"


def overview(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """What the first page shows: each endpoint's production and week, and the latest changes of status."""
    if not request.user.has_perm("endpoints.view_mlalgorithm"):
        return context
    weeks: dict[int, Traffic] = defaultdict(Traffic)
    for algorithm in with_last_week(MLAlgorithm.objects.only("parent_endpoint")):
        weeks[algorithm.parent_endpoint_id] += algorithm.week
    endpoints = with_production(Endpoint.objects.order_by("name"))
    latest = MLAlgorithmStatus.objects.select_related("parent_mlalgorithm", "parent_endpoint").order_by("-id")[:10]
    return {
        **context,
        "endpoints": [
            {
                "name": endpoint.name,
                "production": production_of(endpoint),
                "requests": f"{weeks[endpoint.pk].requests:,}",
                "accuracy": weeks[endpoint.pk].accuracy,
            }
            for endpoint in endpoints
        ],
        "latest_changes": {
            "headers": ["Algorithm", "Status", "Endpoint", "By", "At"],
            "rows": [
                [
                    link_to(step.parent_mlalgorithm),
                    status_badge(step.status),
                    step.parent_endpoint,
                    step.created_by,
                    timezone.localtime(step.created_at).strftime("%Y-%m-%d %H:%M:%S"),
                ]
                for step in latest
            ],
        },
    }


def way_back(endpoint: Endpoint) -> str:
    """Who would answer production requests after a rollback, or why nobody else would."""
    try:
        return str(lifecycle.former_production(endpoint))
    except LifecycleError as error:
        return str(error)


class CurrentStatusFilter(DropdownFilter):
    title = "current status"
    parameter_name = "current_status"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin) -> list[tuple[str, str]]:
        return Status.choices

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        return queryset.filter(current_status=self.value()) if self.value() in Status.values else queryset


class StatusInline(HistoryInline):
    model = MLAlgorithmStatus
    verbose_name_plural = "Status history"
    fields = readonly_fields = ("state", "created_by", "created_at", "why")

    @admin.display(description="Status")
    def state(self, step: MLAlgorithmStatus) -> SafeString:
        return status_badge(step.status)

    @admin.display(description="Why")
    def why(self, step: MLAlgorithmStatus) -> str:
        return why(step)


class AlgorithmChangeList(ChangeList):
    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.result_list = with_last_week(self.result_list)


class RollbackForm(BaseDialogForm):
    reason = forms.CharField(required=False, max_length=2_000, widget=UnfoldAdminTextareaWidget({"rows": 3}))

    def render_before_template(self) -> str:
        with suppress(ValueError):  # the address may hold anything
            for endpoint in Endpoint.objects.filter(pk=self.object_id):
                return format_html('<p class="mb-4">Back to: {}</p>', way_back(endpoint))
        return ""


@admin.register(Endpoint)
class EndpointAdmin(HistoryAdmin):
    list_display = ("name", "production", "owner", "created_at")
    ordering = ("name",)
    actions_row = actions_detail = ("roll_back",)
    fields = readonly_fields = ("name", "production", "before", "owner", "created_at")

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        return with_production(super().get_queryset(request))

    @admin.display(description="Production algorithm")
    def production(self, endpoint: Endpoint) -> SafeString | str:
        return production_of(endpoint)

    @admin.display(description="A rollback goes back to")
    def before(self, endpoint: Endpoint) -> str:
        return way_back(endpoint)

    def has_set_status_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return request.user.has_perm("endpoints.add_mlalgorithmstatus")

    @action(
        description="Roll back production",
        permissions=("set_status",),
        icon="undo",
        variant=ActionVariant.DANGER,
        dialog=dialog(
            "Roll back production?",
            "From now on the algorithm that was promoted before answers the endpoint's production requests, if it can "
            "be loaded. The one that answers them now moves to testing.",
            "Roll back",
            RollbackForm,
        ),
    )
    def roll_back(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        endpoint = self.existing(request, object_id)
        by, reason = request.user.get_username(), form.cleaned_data["reason"]
        try:
            rolled_back = production.roll_back(endpoint, by=by, now=timezone.now(), reason=reason)
        except LifecycleError as error:
            messages.error(request, str(error))
        else:
            messages.success(request, str(rolled_back))
        return done()


@admin.register(MLAlgorithm)
class MLAlgorithmAdmin(HistoryAdmin):
    list_display = ("name", "version", "parent_endpoint", "status", "auc", "requests", "accuracy", "created_at")
    list_filter = (("parent_endpoint", RelatedDropdownFilter), CurrentStatusFilter)
    list_select_related = ("parent_endpoint",)
    search_fields = ("name", "version")
    actions_row = actions_detail = ("promote", "move_to_staging", "back_to_testing", "retire")
    inlines = (StatusInline,)
    fieldsets = (
        (None, {"fields": ("description", "parent_endpoint", "status", "requests", "accuracy", "owner", "created_at")}),
        ("Customers held out of training", {"fields": ("scores",)}),
        ("Artifact", {"fields": ("artifact", "artifact_sha256", "schema_sha256", "labels")}),
        ("Code", {"fields": ("source",), "classes": ("collapse",)}),
    )
    readonly_fields = ("status", "requests", "accuracy", "scores", "labels", "source")
    readonly_preprocess_fields = dict.fromkeys(("artifact_sha256", "schema_sha256"), breakable)

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        return super().get_queryset(request).with_current_status()

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return AlgorithmChangeList

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> MLAlgorithm | None:
        found = super().get_object(request, object_id, from_field)
        return with_last_week([found])[0] if found else None

    @admin.display(description="Status", ordering="current_status")
    def status(self, algorithm: MLAlgorithm) -> SafeString | None:
        return status_badge(algorithm.current_status)

    @admin.display(description="AUC")
    def auc(self, algorithm: MLAlgorithm) -> str:
        return score(algorithm.metrics, "roc_auc")

    @admin.display(description="Requests, 7 days")
    def requests(self, algorithm: MLAlgorithm) -> SafeString:
        url = reverse("admin:endpoints_mlrequest_changelist")
        return format_html(
            '<a class="text-link" href="{}?parent_mlalgorithm__id__exact={}">{}</a>',
            *(url, algorithm.pk, f"{algorithm.week.requests:,}"),
        )

    @admin.display(description="Accuracy, 7 days")
    def accuracy(self, algorithm: MLAlgorithm) -> str:
        return algorithm.week.accuracy

    @admin.display(description="Scores")
    def scores(self, algorithm: MLAlgorithm) -> SafeString:
        own = {name: value for name, value in algorithm.metrics.items() if name != "baseline"}
        baseline = algorithm.metrics.get("baseline", {})
        return table(
            ["Score", "This algorithm", "95% interval", "Baseline"],
            [
                (
                    name.replace("_", " "),
                    score(own, name),
                    "{low:.3f} to {high:.3f}".format(**value),
                    score(baseline, name),
                )
                for name, value in own.items()
            ],
        )

    @admin.display(description="Labels")
    def labels(self, algorithm: MLAlgorithm) -> str:
        return "{name} = {positive} is label 1 (stays), {name} = {negative} is label 0 (leaves)".format(
            **algorithm.target
        )

    @admin.display(description="Code")
    def source(self, algorithm: MLAlgorithm) -> SafeString:
        return format_html('<pre style="white-space: pre-wrap">{}</pre>', algorithm.code)

    def has_set_status_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return request.user.has_perm("endpoints.add_mlalgorithmstatus")

    @action(
        description="Promote",
        permissions=("set_status",),
        icon="rocket_launch",
        variant=ActionVariant.PRIMARY,
        dialog=dialog(
            "Promote to production?",
            "From now on it answers the endpoint's production requests. "
            "The algorithm that answers them now moves to staging.",
            "Promote",
        ),
    )
    def promote(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self.set_status(request, object_id, Status.PRODUCTION)

    @action(
        description="Move to staging",
        permissions=("set_status",),
        icon="inventory_2",
        dialog=dialog("Move to staging?", "From now on it answers requests with status=staging.", "Move"),
    )
    def move_to_staging(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self.set_status(request, object_id, Status.STAGING)

    @action(
        description="Back to testing",
        permissions=("set_status",),
        icon="science",
        dialog=dialog("Back to testing?", "From now on it answers requests with status=testing.", "Move"),
    )
    def back_to_testing(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self.set_status(request, object_id, Status.TESTING)

    @action(
        description="Retire",
        permissions=("set_status",),
        icon="archive",
        dialog=dialog(
            "Retire?", "It answers no more and is kept for its history. Another status brings it back.", "Retire"
        ),
    )
    def retire(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        return self.set_status(request, object_id, Status.RETIRED)

    def set_status(self, request: HttpRequest, object_id: str, status: Status) -> HttpResponse:
        algorithm = self.existing(request, object_id)
        if algorithm.current_status == status:
            messages.info(request, f"{algorithm} has the status {status.label} already.")
            return done()
        now = timezone.now()
        try:
            step = lifecycle.set_status(algorithm, status, by=request.user.get_username(), now=now)
        except LifecycleError as error:
            messages.error(request, str(error))
            return done()
        messages.success(request, f"{algorithm} has the status {status.label} now.")
        steps = MLAlgorithmStatus.objects.filter(parent_endpoint=step.parent_endpoint, created_at=now)
        for other in steps.exclude(pk=step.pk).select_related("parent_mlalgorithm"):
            messages.info(request, f"{other.parent_mlalgorithm} moved from Production to {other.get_status_display()}.")
        if algorithm.current_status == Status.PRODUCTION != status:
            messages.warning(
                request,
                f"Endpoint {step.parent_endpoint} has no production algorithm now: its production requests are "
                "refused until you promote one.",
            )
        return done()


@admin.register(MLAlgorithmStatus)
class MLAlgorithmStatusAdmin(HistoryAdmin):
    list_display = ("state", "parent_mlalgorithm", "endpoint", "holds", "created_by", "created_at", "why")
    list_display_links = None
    list_filter = (
        ("status", ChoicesDropdownFilter),
        ("parent_mlalgorithm", RelatedDropdownFilter),
        ("created_at", DayFilter),
    )
    list_select_related = ("parent_mlalgorithm", "parent_endpoint")

    @admin.display(description="Status", ordering="status")
    def state(self, step: MLAlgorithmStatus) -> SafeString:
        return status_badge(step.status)

    @admin.display(description="Endpoint", ordering="parent_endpoint__name")
    def endpoint(self, step: MLAlgorithmStatus) -> Endpoint:
        return step.parent_endpoint

    @admin.display(description="Why")
    def why(self, step: MLAlgorithmStatus) -> str:
        return why(step)

    @admin.display(description="Holds now", ordering="active")
    def holds(self, step: MLAlgorithmStatus) -> str | None:
        return "yes" if step.active else None
