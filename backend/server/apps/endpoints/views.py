"""Translate HTTP: parse, make one call into the domain, serialise."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

from django.conf import settings
from django.core.files.uploadhandler import MemoryFileUploadHandler
from django.http import Http404, HttpRequest, HttpResponse, QueryDict, StreamingHttpResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.http import content_disposition_header
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    OpenApiResponse,
    PolymorphicProxySerializer,
    extend_schema,
    extend_schema_view,
)
from rest_framework import mixins, viewsets
from rest_framework.decorators import action
from rest_framework.exceptions import NotFound, ParseError, PermissionDenied, UnsupportedMediaType, ValidationError
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from apps.endpoints import (
    abtests,
    batch,
    batch_jobs,
    charts,
    feedback,
    json_text,
    kept_reports,
    lifecycle,
    planning,
    prediction,
    production,
    replay,
)
from apps.endpoints.exceptions import LengthRequired, PayloadTooLarge
from apps.endpoints.filters import AlgorithmFilter, BatchJobFilter, NewestFirst, RequestFilter, StatusFilter
from apps.endpoints.models import ABTest, BatchJob, Endpoint, MLAlgorithm, MLAlgorithmStatus, MLRequest
from apps.endpoints.parsers import CsvBody, JSONBody, MultipartBody, UploadOnDisk
from apps.endpoints.permissions import (
    TokenAuthentication,
    TokenUnlessDebug,
    WritesNeedABTestPermission,
    WritesNeedStatusPermission,
    known_token,
)
from apps.endpoints.prediction import KnownCall, Wanted
from apps.endpoints.serializers import (
    ANONYMOUS,
    ABTestSerializer,
    AnswerSerializer,
    BatchAnswerSerializer,
    BatchErrorsSerializer,
    BatchJobSerializer,
    BatchSerializer,
    EndpointSerializer,
    ErrorSerializer,
    FeedbackSerializer,
    HowOutcomesSerializer,
    MLAlgorithmSerializer,
    MLAlgorithmStatusSerializer,
    MLRequestSerializer,
    OutcomeSerializer,
    OutcomesFileSerializer,
    PlanQuerySerializer,
    PlanSerializer,
    RecordedSerializer,
    ReplayedSerializer,
    ReplaySerializer,
    ReportQuerySerializer,
    ReportSerializer,
    RollbackSerializer,
    StoppedABTestSerializer,
    StopSerializer,
    WantedSerializer,
)
from apps.ml.registry import DEFAULT_ENDPOINT

ID = "[0-9]{1,18}"
MOST_ERRORS = 1_000
# Where the environment of a request says how the short way failed.
FAILURE = "retention.failure"
BAD_REQUEST = OpenApiResponse(ErrorSerializer, description="What is wrong, and what to do.")
UNAVAILABLE = OpenApiResponse(ErrorSerializer, description="The model cannot answer now, and why.")


def _asker(request: Request) -> str:
    return request.user.get_username() if request.user else ANONYMOUS


def _is_form(data: Any) -> bool:
    return isinstance(data, QueryDict)


def _customer_of_form(request: Request) -> dict[str, str]:
    if request.FILES:
        raise ParseError("A customer's values are no files; send a file of customers to /api/v1/batch-predict.")
    customer = request.POST.dict()
    first = next(iter(customer), "").strip()
    if first.startswith(("{", "[")) and '"' in first:
        raise UnsupportedMediaType(
            request.content_type, "This form looks like JSON; send it with the header Content-Type: application/json."
        )
    return customer


@lru_cache(maxsize=1024)
def _wanted(query_string: str) -> Wanted:
    """What a query, as WSGI gives it, asks for; clients ask for few things, again and again."""
    return WantedSerializer(data=QueryDict(query_string.encode("latin-1"))).wanted()


def _json_object(text: bytes) -> dict[str, Any] | None:
    """None if it is anything else, or no JSON."""
    if text.startswith(b"{"):
        with suppress(ValueError, RecursionError):
            return json_text.loads(text)
    return None


def _a_token_decides(view: APIView | type[APIView]) -> bool:
    """Whether nothing but a token decides who may call a view, and how often."""
    return (
        view.authentication_classes == [TokenAuthentication]
        and view.permission_classes == [TokenUnlessDebug]
        and not view.throttle_classes
    )


def _known_caller(view: type[APIView], environ: Mapping[str, Any]) -> str | None:
    """The hash of a caller's token if it is known, and decides."""
    return known_token(environ.get("HTTP_AUTHORIZATION", "")) if _a_token_decides(view) else None


def _text(answer: prediction.Answer) -> bytes:
    return json_text.dumps(answer.as_json()).encode()


def _json(body: Any) -> HttpResponse:
    return HttpResponse(json_text.dumps(body).encode(), content_type="application/json")


def _announced_bytes(request: HttpRequest | Request) -> int:
    try:
        return int(request.META.get("CONTENT_LENGTH") or 0)
    except ValueError:
        raise ParseError("The header Content-Length is no number.") from None


def _told_key(environ: Mapping[str, Any]) -> str:
    """The customer's key in the header, which WSGI gives as Latin-1 whatever it is."""
    key = environ.get("HTTP_X_CUSTOMER_KEY", "")
    return key if key.isascii() else key.encode("latin-1", "replace").decode("utf-8", "replace")


class Api:
    """What all views share: a body of known and bounded size, and JSON whatever the Accept header says."""

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        if "HTTP_TRANSFER_ENCODING" in request.META:
            raise LengthRequired
        announced, limit = _announced_bytes(request), self.max_bytes()
        if announced > limit:
            raise PayloadTooLarge(f"The body has {announced:,} bytes; the limit is {limit:,}. Send it in parts.")

    def max_bytes(self) -> int:
        return settings.MAX_BODY_BYTES

    def get_object(self) -> Any:
        try:
            return super().get_object()
        except Http404:
            what = self.queryset.model._meta.verbose_name
            raise NotFound(f"There is no {what} {self.kwargs['pk']}.") from None

    def perform_content_negotiation(self, request: Request, force: bool = False) -> Any:
        renderer = self.get_renderers()[0]
        return renderer, renderer.media_type


class AddOnly(Api, mixins.CreateModelMixin, mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet):
    """What is history: it can be read and added to."""

    lookup_value_regex = ID


class EndpointViewSet(Api, viewsets.ReadOnlyModelViewSet):
    """What can be asked: each endpoint answers at /{name}/predict."""

    lookup_value_regex = ID
    queryset = Endpoint.objects.order_by("id")
    serializer_class = EndpointSerializer

    @extend_schema(
        request=RollbackSerializer,
        responses={
            201: MLAlgorithmStatusSerializer,
            400: BAD_REQUEST,
            404: ErrorSerializer,
            409: OpenApiResponse(ErrorSerializer, description="There is no way back, and why."),
        },
    )
    @action(detail=True, methods=["post"], permission_classes=[TokenUnlessDebug, WritesNeedStatusPermission])
    def rollback(self, request: Request, pk: str) -> Response:
        """Give production back to the algorithm that was promoted before; the present one goes to testing."""
        serializer = RollbackSerializer(data=request.data, context=self.get_serializer_context())
        serializer.is_valid(raise_exception=True)
        told = serializer.validated_data
        done = production.roll_back(self.get_object(), by=told["created_by"], now=timezone.now(), reason=told["reason"])
        return Response(MLAlgorithmStatusSerializer(done.step).data, status=201)


class MLAlgorithmViewSet(Api, viewsets.ReadOnlyModelViewSet):
    """Every registered model, with its present status and its scores on held-out customers."""

    lookup_value_regex = ID
    queryset = MLAlgorithm.objects.with_current_status().order_by("id")
    serializer_class = MLAlgorithmSerializer
    filterset_class = AlgorithmFilter


@extend_schema_view(
    create=extend_schema(
        responses={
            201: MLAlgorithmStatusSerializer,
            400: BAD_REQUEST,
            409: OpenApiResponse(ErrorSerializer, description="A running A/B test forbids it."),
        }
    )
)
class MLAlgorithmStatusViewSet(AddOnly):
    """The history of statuses. Posting one makes it the algorithm's only active status."""

    queryset = MLAlgorithmStatus.objects.order_by("id")
    serializer_class = MLAlgorithmStatusSerializer
    permission_classes = [TokenUnlessDebug, WritesNeedStatusPermission]
    filterset_class = StatusFilter

    def perform_create(self, serializer: MLAlgorithmStatusSerializer) -> None:
        data = serializer.validated_data
        serializer.instance = lifecycle.set_status(
            data["parent_mlalgorithm"],
            data["status"],
            by=data["created_by"],
            now=timezone.now(),
            reason=data["reason"],
        )


class MLRequestViewSet(Api, viewsets.ReadOnlyModelViewSet):
    """Every answered request. Its `feedback`, the true outcome, is written when it is known."""

    lookup_value_regex = ID
    queryset = MLRequest.objects.all()
    serializer_class = MLRequestSerializer
    pagination_class = NewestFirst
    filterset_class = RequestFilter

    @extend_schema(request=FeedbackSerializer, responses={200: MLRequestSerializer, 400: BAD_REQUEST})
    def update(self, request: Request, pk: str) -> Response:
        logged = self.get_object()
        serializer = FeedbackSerializer(
            data=request.data,
            context={"current": MLRequestSerializer(logged).data, "is_form": _is_form(request.data)},
        )
        serializer.is_valid(raise_exception=True)
        try:
            logged = feedback.record(
                logged.pk,
                serializer.validated_data["feedback"],
                acted_on=serializer.validated_data["acted_on"],
                by=_asker(request),
                now=timezone.now(),
            )
        except MLRequest.DoesNotExist:
            raise Http404("This request was purged just now.") from None
        return Response(MLRequestSerializer(logged).data)

    @extend_schema(request=FeedbackSerializer, responses={200: MLRequestSerializer, 400: BAD_REQUEST})
    def partial_update(self, request: Request, pk: str) -> Response:
        return self.update(request, pk)


class PredictView(Api, APIView):
    """Will this customer stay? One object in, one answer out; a list in, a list out, in its order."""

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        if failure := request.META.get(FAILURE):
            raise failure

    @classmethod
    def answer_again(
        cls, endpoint_name: str, wanted: Wanted, environ: dict[str, Any], read: Callable[[], bytes]
    ) -> bytes | None:
        """The short way: the answer to one customer of a caller who is known, or None in any doubt.

        For a call that is like one that this view answered. What is asked most goes without the objects that Django and
        DRF make for each request; after None, it comes by Django. read: gives the body, for which nobody waits who is
        not known.
        """
        try:
            token_digest = _known_caller(cls, environ)
            customer = token_digest and _json_object(read())
            if not customer:
                return None
            answer = prediction.predict_from_memory(
                KnownCall(endpoint_name, customer, wanted, token_digest, timezone.now(), _told_key(environ))
            )
        except Exception as error:  # told as any other, and not tried again: the answer may have been recorded
            environ[FAILURE] = error
            return None
        return answer and _text(answer)

    @classmethod
    async def answer_on_loop(
        cls, endpoint_name: str, wanted: Wanted, environ: dict[str, Any], read: Callable[[], Awaitable[bytes]]
    ) -> bytes | None:
        """`answer_again` on an event loop. Raises prediction.NeedsThread, after which `answer_again` may be tried."""
        try:
            token_digest = _known_caller(cls, environ)
            customer = token_digest and _json_object(await read())
            if not customer:
                return None
            answer = await prediction.predict_on_loop(
                KnownCall(endpoint_name, customer, wanted, token_digest, timezone.now(), _told_key(environ))
            )
        except prediction.NeedsThread:
            raise
        except Exception as error:
            environ[FAILURE] = error
            return None
        return answer and _text(answer)

    @extend_schema(
        parameters=[
            OpenApiParameter(
                "endpoint_name", str, "path", examples=[OpenApiExample(DEFAULT_ENDPOINT, value=DEFAULT_ENDPOINT)]
            ),
            OpenApiParameter(
                prediction.KEY_HEADER,
                str,
                "header",
                description="Who the customer is, unless the body says so; in an A/B test one arm answers a customer.",
            ),
            WantedSerializer,
        ],
        request={parser.media_type: {"type": "object"} for parser in APIView.parser_classes},
        responses={
            200: PolymorphicProxySerializer(
                "AnswerOrList",
                [AnswerSerializer, AnswerSerializer(many=True)],
                resource_type_field_name=None,
                many=False,
            ),
            400: BAD_REQUEST,
            404: OpenApiResponse(ErrorSerializer, description="There is no such endpoint."),
            503: UNAVAILABLE,
        },
    )
    def post(self, request: Request, endpoint_name: str) -> HttpResponse:
        wanted = _wanted(request.META.get("QUERY_STRING", ""))
        data = request.data
        is_form, is_list = _is_form(data), isinstance(data, list)
        rows = [_customer_of_form(request)] if is_form else data if is_list else [data]
        if not rows:
            raise ParseError("The list is empty; send at least one customer.")
        answers = prediction.predict(
            endpoint_name, rows, wanted, now=timezone.now(), as_text=is_form, customer_key=_told_key(request.META)
        )
        if is_list:
            return _json([answer.as_json() for answer in answers])
        response = _json(answers[0].as_json())
        if request.META.get("CONTENT_TYPE") == "application/json" and _a_token_decides(self):
            # For the server's handler.
            response.answer_again = partial(self.answer_again, endpoint_name, wanted)
            response.answer_on_loop = partial(self.answer_on_loop, endpoint_name, wanted)
        return response


class FilesApi(Api):
    """Files of up to BATCH_MAX_BYTES, which are streamed to disk if they are large."""

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        plain = request._request
        plain.upload_handlers = [MemoryFileUploadHandler(plain), UploadOnDisk(plain)]

    def max_bytes(self) -> int:
        return settings.BATCH_MAX_BYTES


class BatchPredictView(FilesApi, APIView):
    """Score a file of customers: one answer per line, in the file's order.

    A CSV of no more than BATCH_SYNC_ROWS rows is answered at once, or refused if any line is wrong. What is larger, or
    compressed, or Parquet, or comes with `mode=async`, `format=parquet`, `Prefer: respond-async`, an `Idempotency-Key`,
    `on_error=skip` or `log=none`, becomes a batch job.
    """

    parser_classes = [MultipartBody]

    @extend_schema(
        parameters=[
            OpenApiParameter("Idempotency-Key", str, "header", description="Sent again, it means the same job."),
            OpenApiParameter("Prefer", str, "header", description="respond-async asks for a job."),
        ],
        request={"multipart/form-data": BatchSerializer},
        responses={
            (201, "application/json"): BatchAnswerSerializer(many=True),
            (201, "text/csv"): str,
            202: OpenApiResponse(BatchJobSerializer, description="A job; the header Location says where to look."),
            400: BAD_REQUEST,
            404: OpenApiResponse(ErrorSerializer, description="There is no such endpoint."),
            413: OpenApiResponse(ErrorSerializer, description="The file is too large."),
            422: OpenApiResponse(ErrorSerializer, description="The Idempotency-Key was used for something else."),
            503: UNAVAILABLE,
        },
    )
    def post(self, request: Request) -> HttpResponse:
        sent = request.query_params.copy()
        sent.update(request.data)
        serializer = BatchSerializer(data=sent, context={"headers": request.headers})
        wanted = serializer.wanted()
        asked = serializer.validated_data
        if not asked["as_job"]:
            with suppress(batch.TooManyRows):
                scored = batch.predict_file(
                    asked["file"], asked["endpoint"], wanted, now=timezone.now(), most_rows=settings.BATCH_SYNC_ROWS
                )
                return self._scored(scored, asked["format"])
        job, _ = batch_jobs.submit(
            [batch_jobs.uploaded(asked["file"])],
            asked["endpoint"],
            wanted,
            by=_asker(request),
            now=timezone.now(),
            on_error=asked["on_error"],
            log=asked["log"],
            result_format=asked["format"] if asked["format"] in BatchJob.Format.values else "",
            idempotency_key=asked["idempotency_key"],
        )
        headers = {"Location": reverse("batchjob-detail", args=[job.pk])}
        if asked["prefers_job"]:
            headers["Preference-Applied"] = "respond-async"
        return Response(BatchJobSerializer(job).data, status=202, headers=headers)

    def _scored(self, scored: batch.Batch, form: str) -> HttpResponse:
        if form != "csv":
            return Response([answer.as_batch_json() for answer in scored.answers], status=201)
        return HttpResponse(
            scored.as_csv(),
            status=201,
            content_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": 'attachment; filename="predictions.csv"'},
        )


class FeedbackView(FilesApi, APIView):
    """What became of many customers: all that is told is recorded, or nothing if any line is wrong.

    A line names a request, or a customer, whose latest request before `outcome_at` it is, but no more than
    `window_days` before. Whatever is told again changes nothing; another outcome than before is a correction.
    """

    parser_classes = [JSONBody, CsvBody, MultipartBody]

    def max_bytes(self) -> int:
        is_json = self.request.content_type.startswith(JSONBody.media_type)
        return settings.MAX_BODY_BYTES if is_json else super().max_bytes()

    @extend_schema(
        parameters=[HowOutcomesSerializer],
        request={
            "application/json": OutcomeSerializer(many=True),
            "text/csv": OpenApiTypes.BINARY,
            "multipart/form-data": OutcomesFileSerializer,
        },
        responses={
            200: RecordedSerializer,
            400: BAD_REQUEST,
            413: OpenApiResponse(ErrorSerializer, description="The file is too large."),
        },
    )
    def post(self, request: Request) -> Response:
        who = {"by": _asker(request), "now": timezone.now()}
        if _is_form(request.data):
            sent = request.query_params.copy()
            sent.update(request.data)
            serializer = OutcomesFileSerializer(data=sent)
            how = serializer.how()
            with serializer.validated_data["file"] as file:
                recorded = feedback.record_file(batch_jobs.uploaded(file), **how, **who)
        elif isinstance(request.data, list) and request.data:
            how = HowOutcomesSerializer(data=request.query_params).how()
            recorded = feedback.record_rows(request.data, **how, **who)
        else:
            raise ParseError("Send a list of outcomes, with at least one, or a CSV.")
        return Response(RecordedSerializer(recorded).data)


def download(contents: tuple[int | None, Iterator[bytes]], file_name: str) -> StreamingHttpResponse:
    size, blocks = contents
    is_parquet = file_name.endswith(BatchJob.Format.PARQUET)
    response = StreamingHttpResponse(blocks, content_type=PARQUET_TYPE if is_parquet else "text/csv; charset=utf-8")
    if size is not None:
        response.headers["Content-Length"] = str(size)
    response.headers["Content-Disposition"] = content_disposition_header(as_attachment=True, filename=file_name)
    return response


def slide_of(test: ABTest, *, fresh: bool = False) -> HttpResponse:
    drawn = charts.slide(kept_reports.look(test, now=timezone.now(), fresh=fresh))
    response = HttpResponse(drawn, content_type="image/png")
    name = f"abtest-{test.pk}.png"
    response.headers["Content-Disposition"] = content_disposition_header(as_attachment=False, filename=name)
    return response


_CANCELS_ANY = "endpoints.change_batchjob"
PARQUET_TYPE = "application/vnd.apache.parquet"
NO_FILE = {404: ErrorSerializer, 409: ErrorSerializer, 410: ErrorSerializer}


class BatchJobViewSet(Api, viewsets.ReadOnlyModelViewSet):
    """Files of customers that are scored by workers: how far each is, and what came of it."""

    lookup_value_regex = ID
    queryset = BatchJob.objects.select_related("parent_mlalgorithm")
    serializer_class = BatchJobSerializer
    pagination_class = NewestFirst
    filterset_class = BatchJobFilter

    @extend_schema(
        responses={200: BatchJobSerializer, 403: ErrorSerializer, 404: ErrorSerializer, 409: ErrorSerializer}
    )
    def destroy(self, request: Request, pk: str) -> Response:
        """Cancel a job. Requests that it has logged by then stay. Of others' jobs it needs a permission."""
        job = self.get_object()
        if request.user and job.created_by != _asker(request) and not request.user.has_perm(_CANCELS_ANY):
            raise PermissionDenied(
                f"{job.created_by} asked for this job; to cancel it you need the permission {_CANCELS_ANY}."
            )
        job = batch_jobs.cancel(job, now=timezone.now())
        return Response(BatchJobSerializer(job).data)

    @extend_schema(
        parameters=[OpenApiParameter("format", str, enum=BatchJob.Format.values, description="by default the job's")],
        responses={(200, "text/csv"): str, (200, PARQUET_TYPE): bytes, 400: BAD_REQUEST, **NO_FILE},
    )
    @action(detail=True)
    def result(self, request: Request, pk: str) -> StreamingHttpResponse:
        """The file with request_id, probability and label added, without the rows that were refused."""
        job = self.get_object()
        form = request.query_params.get("format") or job.result_format
        if form not in BatchJob.Format.values:
            raise ValidationError({"format": "Use csv or parquet."})
        return download(batch_jobs.result(job, form), job.download_name("scored", form))

    @extend_schema(
        parameters=[OpenApiParameter("format", str, enum=["json", "csv"], description="csv for all of them")],
        responses={(200, "application/json"): BatchErrorsSerializer, (200, "text/csv"): str, **NO_FILE},
    )
    @action(detail=True)
    def errors(self, request: Request, pk: str) -> HttpResponse:
        """What is wrong with the file: line, column, value and reason. As JSON the first thousand of them."""
        job = self.get_object()
        form = request.query_params.get("format", "json")
        if form == "csv":
            return download(batch_jobs.errors(job), job.download_name("errors"))
        if form != "json":
            raise ValidationError({"format": "Use json or csv."})
        first = batch_jobs.first_errors(job, most=MOST_ERRORS)
        return Response({"rows_refused": job.rows_refused, "errors": first})


@extend_schema_view(create=extend_schema(responses={201: ABTestSerializer, 400: BAD_REQUEST}))
class ABTestViewSet(AddOnly):
    """Two algorithms of one endpoint share its traffic. Posting a test starts it."""

    queryset = ABTest.objects.select_related("parent_mlalgorithm_1", "parent_mlalgorithm_2", "decision").order_by("id")
    serializer_class = ABTestSerializer
    permission_classes = [TokenUnlessDebug, WritesNeedABTestPermission]

    def perform_create(self, serializer: ABTestSerializer) -> None:
        asked = {**serializer.validated_data}
        serializer.instance = abtests.start(
            asked.pop("title"),
            asked.pop("parent_mlalgorithm_1"),
            asked.pop("parent_mlalgorithm_2"),
            by=asked.pop("created_by"),
            now=timezone.now(),
            **asked,
        )

    @extend_schema(
        parameters=[ReportQuerySerializer], responses={200: ReportSerializer, 400: BAD_REQUEST, 404: ErrorSerializer}
    )
    @action(detail=True)
    def report(self, request: Request, pk: str) -> Response:
        """How a test stands, or how it ended: both arms, whether they can be compared, the decision, day by day."""
        told = kept_reports.look(self.get_object(), now=timezone.now(), fresh=self._asks_fresh(request))
        return Response(ReportSerializer(told).data)

    @extend_schema(
        parameters=[ReportQuerySerializer],
        responses={(200, "image/png"): bytes, 400: BAD_REQUEST, 404: ErrorSerializer},
    )
    @action(detail=True, url_path=r"report\.png")
    def slide(self, request: Request, pk: str) -> HttpResponse:
        """The decision and its plots as a picture of 1920 by 1080 pixels, for slides."""
        return slide_of(self.get_object(), fresh=self._asks_fresh(request))

    def _asks_fresh(self, request: Request) -> bool:
        query = ReportQuerySerializer(data=request.query_params)
        query.is_valid(raise_exception=True)
        return query.validated_data["fresh"]

    @extend_schema(parameters=[PlanQuerySerializer], responses={200: PlanSerializer, 400: BAD_REQUEST}, filters=False)
    @action(detail=False, pagination_class=None)
    def plan(self, request: Request) -> Response:
        """How many labelled customers, and days, each design needs to show that a challenger is better."""
        query = PlanQuerySerializer(data=request.query_params)
        query.is_valid(raise_exception=True)
        return Response(PlanSerializer(planning.plan(**query.validated_data)).data)


class ReplayView(Api, APIView):
    """Compare a challenger with the champion on logged requests whose outcome is known, before any traffic moves.

    The challenger scores what the champion has answered; nothing is recorded. Each customer counts once, and those
    whom the challenger was trained on are left out.
    """

    permission_classes = [TokenUnlessDebug, WritesNeedABTestPermission]

    @extend_schema(request=ReplaySerializer, responses={200: ReplayedSerializer, 400: BAD_REQUEST, 503: UNAVAILABLE})
    def post(self, request: Request) -> Response:
        asked = ReplaySerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        challenger, champion = (asked.validated_data.pop(name, None) for name in ("challenger", "champion"))
        replayed = replay.replay(challenger, champion, now=timezone.now(), **asked.validated_data)
        return Response(ReplayedSerializer(replayed.as_json()).data)


class StopABTestView(Api, APIView):
    """End a test by its policy, and record the decision.

    Under `accuracy` the more accurate algorithm on labelled requests goes to production; under `evidence` only a
    challenger that is shown to be better.
    """

    permission_classes = [TokenUnlessDebug, WritesNeedABTestPermission]

    @extend_schema(
        request=StopSerializer, responses={200: StoppedABTestSerializer, 400: BAD_REQUEST, 404: ErrorSerializer}
    )
    def post(self, request: Request, pk: int) -> Response:
        test = ABTest.objects.filter(pk=pk).first()
        if test is None:
            raise Http404(f"There is no A/B test {pk}.")
        asked = StopSerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        test, ended_now = abtests.stop(test, by=_asker(request), now=timezone.now(), **asked.validated_data)
        message = (
            "The test is stopped." if ended_now else f"The test had been stopped at {test.ended_at:%Y-%m-%d %H:%M} UTC."
        )
        return Response({**ABTestSerializer(test).data, "message": f"{message} {test.summary}"})
