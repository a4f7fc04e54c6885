"""A/B tests: start one, see how it goes, stop it."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.db.models import F, ForeignKey
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.dataclasses import UnfoldAction
from unfold.decorators import action
from unfold.enums import ActionVariant
from unfold.forms import BaseDialogForm
from unfold.views import ChangeList
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextareaWidget

from apps.endpoints import abtests, kept_reports
from apps.endpoints.abtests import ABTestError, ArmScore
from apps.endpoints.admin import report_page
from apps.endpoints.admin.history import HistoryAdmin, badge, dialog, done, link_to, share, table
from apps.endpoints.models import ABTest, MLAlgorithm, Status
from apps.endpoints.views import slide_of

PLAN = ("design", "policy", "weight", "minimum_labelled", "horizon_days", "horizon_labelled", "maturity_days")
RULES = ("alpha", "promote_to", "auto_apply")
GUARDRAILS = ("guardrail_error_rate", "guardrail_latency_p99_ms", "guardrail_label_shift")


class StartForm(forms.ModelForm):
    """Checking this form starts the test: only the domain can judge, and only while it holds the endpoint's lock."""

    asker = ""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if "policy" in self.fields:
            self.initial["policy"] = ABTest.Policy.EVIDENCE
            self.initial["maturity_days"] = None
            self.fields["maturity_days"].required = False
            self.fields["maturity_days"].help_text += " Empty: as long as the endpoint says."

    def _post_clean(self) -> None:
        # In place of the model's own checks, whose messages name constraints of the database.
        told = self.cleaned_data
        plan = {name: told[name] for name in (*PLAN, *RULES, *GUARDRAILS) if name in told}
        for name, value in plan.items():
            try:
                ABTest._meta.get_field(name).run_validators(value)
            except ValidationError as error:
                self.add_error(name, error)
        if self.errors:
            return
        if plan["maturity_days"] is None:
            del plan["maturity_days"]
        try:
            self.instance = abtests.start(
                *(told["title"], told["parent_mlalgorithm_1"], told["parent_mlalgorithm_2"]),
                by=self.asker,
                now=timezone.now(),
                **plan,
            )
        except ABTestError as error:
            self.add_error(None, str(error))


class StopForm(BaseDialogForm):
    """Left as it is, the test's policy decides."""

    promote = forms.ChoiceField(
        label="Who wins",
        required=False,
        choices=[
            ("", "whoever the test's policy says"),
            ("champion", "the champion, whatever the policy says"),
            ("challenger", "the challenger, whatever the policy says"),
        ],
        widget=UnfoldAdminSelectWidget,
    )
    reason = forms.CharField(
        required=False,
        max_length=2_000,
        help_text="Needed to overrule the policy, and recorded. A winner goes to production if one of the two held it, "
        "else where the plan says.",
        widget=UnfoldAdminTextareaWidget({"rows": 3}),
    )

    def clean(self) -> dict[str, Any]:
        told = super().clean()
        if told.get("promote") and not told.get("reason"):
            self.add_error("reason", "Overruling the policy takes a reason.")
        return told


class AlgorithmField(forms.ModelChoiceField):
    def label_from_instance(self, algorithm: MLAlgorithm) -> str:
        return f"{algorithm.parent_endpoint}: {algorithm} ({Status(algorithm.current_status).label})"


class ABTestChangeList(ChangeList):
    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.result_list = list(self.result_list)
        scores = abtests.scores_of(self.result_list)
        for test in self.result_list:
            test.scores = scores[test.pk]


@admin.register(ABTest)
class ABTestAdmin(HistoryAdmin):
    list_display = ("title", "state", "first", "second", "parent_endpoint", "created_by", "created_at")
    list_select_related = ("parent_mlalgorithm_1", "parent_mlalgorithm_2", "parent_endpoint")
    sortable_by = ()
    ordering = (F("ended_at").desc(nulls_first=True), "-id")
    actions_row = actions_detail = ("report", "stop")
    form = StartForm
    add_button = "Start the test"
    add_fieldsets = (
        (None, {"fields": ("title", "parent_mlalgorithm_1", "parent_mlalgorithm_2")}),
        ("Plan, fixed for the life of the test", {"fields": PLAN}),
        ("How sure, and what then", {"fields": RULES, "classes": ("collapse",)}),
        (
            "Guardrails: if one breaks, the champion stays, whatever else is found",
            {"fields": GUARDRAILS, "classes": ("collapse",)},
        ),
    )
    fieldsets = (
        (None, {"fields": ("state", "parent_endpoint", "created_by", "created_at", "ended_at", "summary")}),
        ("Requests with a known outcome", {"fields": ("results",)}),
        ("Plan", {"fields": (*PLAN, *RULES, *GUARDRAILS), "classes": ("collapse",)}),
    )
    readonly_fields = ("state", "parent_endpoint", "created_at", "ended_at", "summary", "results")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("endpoints.add_abtest")

    def has_stop_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return self.has_add_permission(request)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return ABTestChangeList

    def get_actions_detail(self, request: HttpRequest, object_id: str) -> list[UnfoldAction]:
        test = self.get_object(request, object_id)
        actions = super().get_actions_detail(request, object_id)
        return [one for one in actions if test and not (test.ended_at and one.dialog)]

    def get_form(self, request: HttpRequest, obj: ABTest | None = None, **kwargs: Any) -> type[forms.ModelForm]:
        form = super().get_form(request, obj, **kwargs)
        form.asker = request.user.get_username()
        return form

    def formfield_for_foreignkey(self, db_field: ForeignKey, request: HttpRequest, **kwargs: Any) -> forms.Field:
        served = MLAlgorithm.objects.with_current_status().exclude(current_status=Status.RETIRED)
        kwargs |= {
            "queryset": served.select_related("parent_endpoint").order_by("parent_endpoint__name", "-id"),
            "form_class": AlgorithmField,
        }
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def save_model(self, request: HttpRequest, obj: ABTest, form: forms.ModelForm, change: bool) -> None:
        """The form has done it."""

    def response_add(self, request: HttpRequest, obj: ABTest, post_url_continue: str | None = None) -> HttpResponse:
        asked = "Production requests are" if obj.champion else "Requests with status=ab_testing are"
        champion, challenger = obj.arms
        if obj.design == ABTest.Design.SHADOW:
            how = f"answered by {champion}, and scored by {challenger} unseen"
        else:
            how = f"shared by {champion} and {challenger}"
        messages.success(request, f"{obj.title} is running. {asked} {how}.")
        return HttpResponseRedirect(reverse("admin:endpoints_abtest_change", args=[obj.pk]))

    @action(description="Report", icon="insights", permissions=("view",), variant=ActionVariant.PRIMARY)
    def report(self, request: HttpRequest, object_id: str) -> HttpResponse:
        test = self.existing(request, object_id)
        now, fresh = timezone.now(), _asks_fresh(request)
        told = kept_reports.look(test, now=now, fresh=fresh)
        context = {
            **self.admin_site.each_context(request),
            "title": f"{test.title}: report",
            "opts": self.opts,
            "report": report_page.shown(test, told, now=now, fresh=fresh),
        }
        return TemplateResponse(request, "endpoints/admin/abtest_report.html", context)

    def get_urls(self) -> list[URLPattern]:
        slide = self.admin_site.admin_view(self.slide_view)
        return [path("<int:pk>/report.png", slide, name="endpoints_abtest_slide"), *super().get_urls()]

    def slide_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        return slide_of(self.existing(request, str(pk)), fresh=_asks_fresh(request))

    @action(
        description="Stop",
        permissions=("stop",),
        icon="stop_circle",
        variant=ActionVariant.DANGER,
        dialog=dialog(
            "Stop the test?",
            "By the policy accuracy the algorithm that was right more often, where the outcome is known, goes to "
            "production, the other to testing; by evidence only a challenger that is shown to be better does. Else "
            "production stays as it was.",
            "Stop the test",
            StopForm,
        ),
    )
    def stop(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        test = self.existing(request, object_id)
        promote, reason = form.cleaned_data["promote"], form.cleaned_data["reason"]
        test, ended_now = abtests.stop(
            test,
            by=request.user.get_username(),
            now=timezone.now(),
            force=bool(promote),
            reason=reason,
            promote=promote,
        )
        if ended_now:
            messages.success(request, f"{test.title} is stopped. {test.summary}")
        else:
            messages.info(request, f"{test.title} had been stopped before. {test.summary}")
        return done()

    @admin.display(description="State")
    def state(self, test: ABTest) -> SafeString:
        return badge("Ended") if test.ended_at else badge("Running", "primary")

    @admin.display(description="First algorithm")
    def first(self, test: ABTest) -> SafeString:
        return _in_a_cell(test.scores[0])

    @admin.display(description="Second algorithm")
    def second(self, test: ABTest) -> SafeString:
        return _in_a_cell(test.scores[1])

    @admin.display(description="Results")
    def results(self, test: ABTest) -> SafeString:
        return table(
            ["Algorithm", "Before the test", "Requests", "Right", "Accuracy"],
            [
                (
                    link_to(arm.algorithm),
                    "in production" if arm.algorithm.pk == test.champion_id else "",
                    f"{arm.labelled:,}",
                    f"{arm.correct:,}",
                    "" if arm.accuracy is None else f"{arm.accuracy:.1%}",
                )
                for arm in abtests.scores(test)
            ],
        )


def _asks_fresh(request: HttpRequest) -> bool:
    return request.GET.get("fresh") == "true"


def _in_a_cell(arm: ArmScore) -> SafeString:
    return format_html("{}: {}", arm.algorithm, share(arm.correct, arm.labelled))
