"""Files of customers: score one, see how far it is, fetch what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from functools import wraps
from typing import Any

from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.db.models import ForeignKey
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.template.defaultfilters import filesizeformat, truncatechars
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.text import capfirst
from django.views.decorators.csrf import csrf_exempt
from unfold.contrib.filters.admin import ChoicesDropdownFilter
from unfold.dataclasses import UnfoldAction
from unfold.decorators import action
from unfold.enums import ActionVariant
from unfold.paginator import InfinitePaginator

from apps.endpoints import batch_jobs, prediction
from apps.endpoints.admin.experiments import AlgorithmField
from apps.endpoints.admin.history import HistoryAdmin, badge, dialog, done, link_to
from apps.endpoints.batch_jobs import BINS, Ended, Gone, JobError, NotFinished, Pace
from apps.endpoints.csv_file import BadRows, BatchError
from apps.endpoints.models import BatchJob, Endpoint, MLAlgorithm, Status
from apps.endpoints.parsers import UploadOnDisk
from apps.endpoints.prediction import PredictionError, Wanted
from apps.endpoints.views import download
from apps.ml.registry import DEFAULT_ENDPOINT

State = BatchJob.State
COLOURS = {State.SUCCEEDED: "success", State.FAILED: "danger", State.CHECKING: "info", State.SCORING: "primary"}
FORMATS = {BatchJob.Format.CSV: "CSV", BatchJob.Format.PARQUET: "Parquet"}
ERRORS_SHOWN = 20
LONGEST_VALUE = 100
DECILES = 10


class DropZone(forms.FileInput):
    """Where a file is dropped or chosen; without JavaScript a plain field for a file."""

    template_name = "endpoints/admin/drop_zone.html"

    def get_context(self, name: str, value: Any, attrs: dict[str, Any] | None) -> dict[str, Any]:
        context = super().get_context(name, value, attrs)
        context["zone"] = {
            "beginning": batch_jobs.BEGINNING,
            "longest_footer": batch_jobs.LONGEST_FOOTER,
            "most_bytes": settings.BATCH_MAX_BYTES,
            "too_large": _too_large(),
            "columns_url": reverse("admin:endpoints_batchjob_columns"),
        }
        return context


class SubmitForm(forms.ModelForm):
    """Checking this form submits the job: whether the file fits is known when it has been looked into."""

    asker = ""
    file = forms.FileField(
        widget=DropZone,
        allow_empty_file=True,
        help_text="A CSV in UTF-8 with a header line, or one in gzip; or Parquet. "
        "Commas, semicolons and tabs are understood.",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if "on_error" in self.fields:
            self.fields["on_error"].choices = [
                (BatchJob.OnError.FAIL, "Score nobody, so that the file can be mended"),
                (BatchJob.OnError.SKIP, "Score the other rows"),
            ]
            self.fields["log"].choices = [
                (BatchJob.Log.ALL, "Yes, so that outcomes can be told later"),
                (BatchJob.Log.NONE, "No, only write the result"),
            ]

    def _post_clean(self) -> None:
        # In place of the model's own checks, as most of its fields are set by the domain.
        if self.errors:
            return
        told = self.cleaned_data
        algorithm: MLAlgorithm = told["parent_mlalgorithm"]
        try:
            self.instance, _ = batch_jobs.submit(
                [batch_jobs.uploaded(told["file"])],
                algorithm.parent_endpoint.name,
                Wanted(version=algorithm.version, algorithm=algorithm.name),
                by=self.asker,
                now=timezone.now(),
                on_error=told["on_error"],
                log=told["log"],
            )
        except (BatchError, PredictionError) as error:
            self.add_error("file", _sentence(error))
        except OSError as error:
            self.add_error("file", f"The server could not keep the file: {error.strerror or error}.")


@admin.register(BatchJob)
class BatchJobAdmin(HistoryAdmin):
    """Whoever may add jobs may cancel their own, and who may change jobs may cancel any."""

    list_display = ("number", "status", "file_name", "parent_mlalgorithm", "created_by", "created_at")
    list_display += ("scored", "refused", "progress")
    list_display_links = ("number", "file_name")
    list_filter = (("state", ChoicesDropdownFilter),)
    list_select_related = ("parent_mlalgorithm",)
    list_per_page = 50
    paginator = InfinitePaginator
    show_full_result_count = False
    sortable_by = ()
    actions_detail = ("cancel",)
    form = SubmitForm
    add_button = "Score the file"
    add_form_template = "endpoints/admin/score_file.html"
    change_form_template = "endpoints/admin/batch_job.html"
    add_fieldsets = ((None, {"fields": ("file", "parent_mlalgorithm", "on_error", "log")}),)
    fields = ("state",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("endpoints.add_batchjob")

    def has_cancel_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        if request.user.has_perm("endpoints.change_batchjob"):
            return True
        job = self.get_object(request, object_id) if object_id else None
        return self.has_add_permission(request) and job is not None and job.created_by == request.user.get_username()

    def get_actions_detail(self, request: HttpRequest, object_id: str) -> list[UnfoldAction]:
        job = self.get_object(request, object_id)
        return [] if job is None or job.is_finished else super().get_actions_detail(request, object_id)

    def get_urls(self) -> list[URLPattern]:
        site = self.admin_site
        ours = [
            path("add/", self._streamed(site.admin_view(self.add_view)), name="endpoints_batchjob_add"),
            path("columns/", site.admin_view(self.columns_view), name="endpoints_batchjob_columns"),
        ]
        for name in ("progress", "result", "errors"):
            view = site.admin_view(getattr(self, f"{name}_view"))
            ours.append(path(f"<int:pk>/{name}/", view, name=f"endpoints_batchjob_{name}"))
        return ours + super().get_urls()

    # --- Submitting ---------------------------------------------------------------------------------------

    def _streamed(self, view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
        """The view, with the file on the disk of the jobs, and nothing read of a file that is not welcome.

        The check of the CSRF token, which reads the form, comes after this: `admin_view` makes it.
        """

        @csrf_exempt
        @wraps(view)
        def streamed(request: HttpRequest) -> HttpResponse:
            if request.method == "POST":
                if not self.admin_site.has_permission(request):
                    return redirect_to_login(request.get_full_path(), reverse("admin:login"))
                if not self.has_add_permission(request):
                    raise PermissionDenied
                if int(request.META.get("CONTENT_LENGTH") or 0) > settings.BATCH_MAX_BYTES:
                    if _is_script(request):
                        return JsonResponse({"problems": [_too_large()]}, status=413)
                    messages.error(request, _too_large())
                    return HttpResponseRedirect(request.path)
                request.upload_handlers = [UploadOnDisk(request)]
            return view(request)

        return streamed

    def get_form(self, request: HttpRequest, obj: BatchJob | None = None, **kwargs: Any) -> type[forms.ModelForm]:
        form = super().get_form(request, obj, **kwargs)
        form.asker = request.user.get_username()
        return form

    def formfield_for_foreignkey(self, db_field: ForeignKey, request: HttpRequest, **kwargs: Any) -> forms.Field:
        kwargs |= {
            "queryset": _served().order_by("parent_endpoint__name", "-id"),
            "form_class": AlgorithmField,
            "empty_label": None,
            "initial": _default_algorithm(),
            "help_text": "The one in production is chosen unless you say otherwise.",
        }
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def formfield_for_choice_field(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> forms.Field:
        kwargs["label"] = {"on_error": "If rows are wrong", "log": "Log each answer"}[db_field.name]
        return super().formfield_for_choice_field(db_field, request, **kwargs)

    def save_model(self, request: HttpRequest, obj: BatchJob, form: forms.ModelForm, change: bool) -> None:
        """The form has done it."""

    def response_add(self, request: HttpRequest, obj: BatchJob, post_url_continue: str | None = None) -> HttpResponse:
        url = reverse("admin:endpoints_batchjob_change", args=[obj.pk])
        if not self.has_view_permission(request, obj):
            messages.success(request, f"{capfirst(str(obj))} will score {obj.file_name}.")
            url = reverse("admin:index")
        return JsonResponse({"url": url}) if _is_script(request) else HttpResponseRedirect(url)

    def render_change_form(self, request: HttpRequest, context: dict[str, Any], **kwargs: Any) -> HttpResponse:
        problems = [problem for several in context["errors"] for problem in several]
        if problems and _is_script(request):
            return JsonResponse({"problems": problems}, status=400)
        return super().render_change_form(request, context, **kwargs)

    def columns_view(self, request: HttpRequest) -> HttpResponse:
        """What the algorithm would read of a file, whose first bytes are the body; the last of a Parquet file."""
        if request.method != "POST" or not self.has_add_permission(request):
            raise PermissionDenied
        algorithm = _served().filter(pk=_number(request.GET.get("algorithm", ""))).first()
        if algorithm is None:
            return JsonResponse({"problem": "This algorithm is not served any more; choose another one."})
        try:
            if "parquet" in request.GET:
                columns = batch_jobs.preview_parquet(request.body[-batch_jobs.LONGEST_FOOTER :], algorithm)
            else:
                columns = batch_jobs.preview(request.body[: batch_jobs.BEGINNING], algorithm)
        except (BatchError, PredictionError) as error:
            return JsonResponse({"problem": _sentence(error)})
        return JsonResponse({**asdict(columns), "problem": columns.problem} if columns else {})

    # --- A job --------------------------------------------------------------------------------------------

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        job = self.get_object(request, object_id)
        context = {"report": _report(job, timezone.now())} if job and self.has_view_permission(request, job) else {}
        return super().change_view(request, object_id, form_url, {**context, **(extra_context or {})})

    def progress_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        return JsonResponse(_progress(self._job(request, pk), timezone.now()))

    def result_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        job = self._job(request, pk)
        asked = request.GET.get("format")
        form = asked if asked in BatchJob.Format.values else job.result_format
        return self._download(request, job, lambda: batch_jobs.result(job, form), job.download_name("scored", form))

    def errors_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        job = self._job(request, pk)
        return self._download(request, job, lambda: batch_jobs.errors(job), job.download_name("errors"))

    def _job(self, request: HttpRequest, pk: int) -> BatchJob:
        if not self.has_view_permission(request):
            raise PermissionDenied
        return self.existing(request, str(pk))

    def _download(
        self,
        request: HttpRequest,
        job: BatchJob,
        contents: Callable[[], tuple[int | None, Iterator[bytes]]],
        name: str,
    ) -> HttpResponse:
        try:
            return download(contents(), name)
        except (JobError, BatchError) as error:
            messages.error(request, str(error))
            return HttpResponseRedirect(reverse("admin:endpoints_batchjob_change", args=[job.pk]))

    @action(
        description="Cancel",
        permissions=("cancel",),
        icon="cancel",
        variant=ActionVariant.DANGER,
        dialog=dialog(
            "Cancel the job?", "There will be no result. Requests that it has logged by now stay.", "Cancel the job"
        ),
    )
    def cancel(self, request: HttpRequest, form: forms.Form, object_id: str) -> HttpResponse:
        job = self.existing(request, object_id)
        try:
            batch_jobs.cancel(job, now=timezone.now())
        except Ended as error:
            messages.info(request, str(error))
        else:
            messages.success(request, f"{capfirst(str(job))} is cancelled.")
        return done()

    # --- Cells of the list --------------------------------------------------------------------------------

    @admin.display(description="Job")
    def number(self, job: BatchJob) -> int:
        return job.pk

    @admin.display(description="State")
    def status(self, job: BatchJob) -> SafeString:
        return _badge(job)

    @admin.display(description="Scored")
    def scored(self, job: BatchJob) -> str:
        return f"{job.rows_scored:,}"

    @admin.display(description="Refused")
    def refused(self, job: BatchJob) -> str:
        return f"{job.rows_refused:,}"

    @admin.display(description="Progress")
    def progress(self, job: BatchJob) -> str:
        return "" if job.is_finished or job.state == State.QUEUED else f"{_percent(job):.0f}%"


def _served() -> Any:
    served = MLAlgorithm.objects.with_current_status().exclude(current_status=None)
    return served.exclude(current_status=Status.RETIRED).select_related("parent_endpoint")


def _default_algorithm() -> MLAlgorithm | None:
    """Who answers production requests: of the first endpoint, or of any other one that has somebody."""
    names = Endpoint.objects.order_by("name").values_list("name", flat=True)
    for name in sorted(names, key=lambda name: name != DEFAULT_ENDPOINT):
        with suppress(PredictionError):
            return prediction.choose(name, Wanted(status=Status.PRODUCTION), in_test=False).algorithms[0]
    return None


def _is_script(request: HttpRequest) -> bool:
    return request.headers.get("X-Requested-With") == "XMLHttpRequest"


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def _too_large() -> str:
    return f"The file is too large: it may have {filesizeformat(settings.BATCH_MAX_BYTES)}. Send it in parts."


def _sentence(error: Exception) -> str:
    if isinstance(error, BadRows):
        first = error.problems[0]
        return f"Line {first.line}: {first.message}."
    return str(error)


def _badge(job: BatchJob) -> SafeString:
    return badge(State(job.state).label, COLOURS.get(job.state, ""))


def _percent(job: BatchJob) -> float:
    """Of the step that an unfinished job is in, or of the rows that one got to before it ended."""
    if job.checked_at:
        return 100 * job.rows_read / job.rows_total if job.rows_total else 100.0
    return min(100.0, 100 * job.bytes_read / max(1, job.file_bytes))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(1, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    for count, unit, smaller, part in ((hours, "h", minutes, "min"), (minutes, "min", rest, "s")):
        if count:
            return f"{count} {unit} {smaller} {part}" if smaller else f"{count} {unit}"
    return f"{rest} s"


def _progress(job: BatchJob, now: datetime) -> dict[str, Any]:
    """What changes on the page of a job while it is not finished."""
    return {
        "state": State(job.state).label,
        "is_finished": job.is_finished,
        "percent": round(_percent(job), 1),
        "sentence": _how_far(job, batch_jobs.pace(job, now)),
    }


def _how_far(job: BatchJob, pace: Pace) -> str:
    if job.state == State.QUEUED:
        before = BatchJob.objects.unfinished().filter(pk__lt=job.pk).count()
        waiting = {0: "none is before it", 1: "one job is before it"}.get(before, f"{before:,} jobs are before it")
        parts = [f"Waiting for a worker; {waiting}"]
    elif job.checked_at is None:
        parts = ["Checking every row before any is scored"]
        if job.is_finished:
            seen = "Not every row" if job.rows_total is None else "Every row"
            parts = [f"{seen} had been looked at when it ended"]
    else:
        parts = [f"{job.rows_read:,} of {job.rows_total:,} rows"]
        if pace.rows_per_second:
            parts.append(f"{pace.rows_per_second:,.0f} rows per second")
    if job.rows_refused:
        parts.append(f"{job.rows_refused:,} refused")
    if pace.seconds_left is not None:
        parts.append(f"about {_duration(pace.seconds_left)} left")
    sentence = ", ".join(parts) + "."
    return sentence if job.is_finished or not job.problem else f"{sentence} {job.problem}"


def _report(job: BatchJob, now: datetime) -> dict[str, Any]:
    """All that the page of a job shows, as plain data."""
    expires_at = batch_jobs.expires_at(job)
    has_result = job.state == State.SUCCEEDED
    files = ""
    if job.is_finished and not job.folder:
        files = f"The files of this job are gone: they are kept for {settings.BATCH_KEEP_DAYS} days."
    elif expires_at and job.state != State.CANCELLED:
        files = f"The files of this job are kept until {_moment(expires_at)}."
    errors, has_errors = _first_errors(job)
    (other_format,) = {*FORMATS} - {job.result_format}
    return {
        "job": job,
        "badge": _badge(job),
        "progress": _progress(job, now),
        "problem": job.problem if job.state == State.FAILED else "",
        "files": files,
        "result_url": _url("result", job) if has_result and job.folder else "",
        "other_url": f"{_url('result', job)}?format={other_format}",
        "other_format": FORMATS[other_format],
        "errors_url": _url("errors", job) if has_errors and job.rows_refused + len(errors) else "",
        "progress_url": _url("progress", job),
        "figures": [
            ("Customers scored", f"{job.rows_scored:,}"),
            ("Rows refused", f"{job.rows_refused:,}"),
            ("Rows in the file", "not known yet" if job.rows_total is None else f"{job.rows_total:,}"),
            ("Took", _duration((job.finished_at - job.started_at).total_seconds()) if job.started_at else "-"),
        ]
        if job.is_finished
        else [],
        "facts": [
            ("File", f"{job.file_name} ({filesizeformat(job.file_bytes)})"),
            ("Algorithm", link_to(job.parent_mlalgorithm)),
            ("If rows are wrong", "score the other rows" if job.on_error == BatchJob.OnError.SKIP else "score nobody"),
            ("Answers are logged", "yes" if job.log == BatchJob.Log.ALL else "no"),
            ("Asked by", job.created_by),
            ("Asked at", _moment(job.created_at)),
            ("Started at", _moment(job.started_at)),
            ("Ended at", _moment(job.finished_at)),
        ],
        "bars": _bars(job.histogram),
        "deciles": {"headers": ["Probability", "Customers", "Share", "Up to here"], "rows": _deciles(job.histogram)},
        "errors": {
            "headers": ["Line", "Column", "Value", "Reason"],
            "rows": [
                (error["line"], error["column"], truncatechars(error["value"], LONGEST_VALUE), error["reason"])
                for error in errors
            ],
        },
        "errors_shown": ERRORS_SHOWN,
    }


def _url(name: str, job: BatchJob) -> str:
    return reverse(f"admin:endpoints_batchjob_{name}", args=[job.pk])


def _moment(moment: datetime | None) -> str:
    return timezone.localtime(moment).strftime("%Y-%m-%d %H:%M:%S") if moment else "-"


def _first_errors(job: BatchJob) -> tuple[list[dict[str, Any]], bool]:
    """The first errors, and whether there is a file of them."""
    try:
        return batch_jobs.first_errors(job, most=ERRORS_SHOWN), True
    except (NotFinished, Gone):
        return [], False


def _bars(histogram: list[int]) -> list[dict[str, Any]]:
    """One bar for each bin, with its height in percent of the highest."""
    highest = max(histogram, default=0)
    return [
        {
            "title": f"{index / BINS:.2f} to {(index + 1) / BINS:.2f}: {count:,} customers",
            "height": round(100 * count / highest, 1),
        }
        for index, count in enumerate(histogram)
        if highest
    ]


def _deciles(histogram: list[int]) -> list[tuple[str, str, str, str]]:
    total = sum(histogram)
    width = BINS // DECILES
    rows = []
    reached = 0
    for start in range(0, BINS if total else 0, width):
        count = sum(histogram[start : start + width])
        reached += count
        bounds = f"{start / BINS:.1f} to {(start + width) / BINS:.1f}"
        rows.append((bounds, f"{count:,}", f"{count / total:.1%}", f"{reached:,} ({reached / total:.1%})"))
    return rows
