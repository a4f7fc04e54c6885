"""What the pages of rows that are never edited have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import Any

from django.contrib import admin, messages
from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin, TabularInline
from unfold.contrib.filters.admin import RangeDateFilter
from unfold.dataclasses import ActionDialog
from unfold.forms import BaseDialogForm
from unfold.utils import parse_date_str


class HistoryAdmin(ModelAdmin):
    """Rows are looked at here; what may change goes through a function of the domain, as in the API."""

    actions = None
    ordering = ("-id",)
    list_filter_submit = True
    show_facets = admin.ShowFacets.NEVER  # they count the whole table, once for each choice of each filter
    add_form_template = "endpoints/admin/add_form.html"
    add_button = "Add"
    list_fullwidth = True

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        context = {
            # Who did what is on the page itself, whether it was done here, in the API or by a command.
            "show_history": False,
            "show_save_and_continue": False,
            "show_save_and_add_another": False,
            **(extra_context or {}),
        }
        return super().changeform_view(request, object_id, form_url, context)

    def existing(self, request: HttpRequest, object_id: str) -> Any:
        found = self.get_object(request, object_id)
        if found is None:
            raise Http404(f"There is no {self.opts.verbose_name} {object_id}.")
        return found


class HistoryInline(TabularInline):
    """Who did what when, newest first."""

    extra = 0
    per_page = 20
    ordering = ("-id",)
    hide_title = True
    can_delete = False

    def has_add_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class DayFilter(RangeDateFilter):
    """From one day to another, both included, in the server's time zone."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.title = "day"

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        for end, lookup in (("from", "gte"), ("to", "lt")):
            text = self.used_parameters.get(f"{self.parameter_name}_{end}")
            if not text:
                continue
            try:
                midnight = datetime.combine(parse_date_str(text), time.min)
                moment = timezone.make_aware(midnight + timedelta(days=1) if end == "to" else midnight)
                queryset = queryset.filter(**{f"{self.parameter_name}__{lookup}": moment.astimezone(UTC)})
            except (TypeError, OverflowError):
                messages.warning(request, f"{text[:20]} is no day; write it like 2026-01-31.")
                return queryset.none()
        return queryset


def dialog(title: str, description: str, submit: str, form_class: type[BaseDialogForm] | None = None) -> ActionDialog:
    """What is asked before something is done."""
    return ActionDialog(title=title, description=description, form_class=form_class, form_submit_text=submit)


def done() -> HttpResponse:
    """The answer to a confirmed dialog: the page below it is read again, with its new messages."""
    return HttpResponse(headers={"HX-Refresh": "true"})


def badge(text: object, colour: str = "") -> SafeString:
    return render_to_string("unfold/helpers/label.html", {"text": text, "type": colour})


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> SafeString:
    return render_to_string("unfold/components/table.html", {"table": {"headers": headers, "rows": list(rows)}})


def link_to(row: Model) -> SafeString:
    url = reverse(f"admin:{row._meta.app_label}_{row._meta.model_name}_change", args=[row.pk])
    return format_html('<a class="text-link" href="{}">{}</a>', url, row)


def share(correct: int, labelled: int) -> str:
    """An accuracy and on how many requests it rests."""
    return f"{correct / labelled:.1%} of {labelled:,}" if labelled else "no labels yet"
