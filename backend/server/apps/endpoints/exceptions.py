"""One table from the domain's errors to HTTP, and one shape for all of them.

    {"status": "Error", "message": "a sentence", "errors": [{"field": ..., "row": ..., "message": ...}]}

`errors` is there when single fields, rows or lines are to blame.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from typing import Any

from django.core.exceptions import RequestDataTooBig, SuspiciousOperation
from django.http import UnreadablePostError
from rest_framework import exceptions, status
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.views import exception_handler as drf_exception_handler

from apps.endpoints import batch_jobs, prediction
from apps.endpoints.abtests import ABTestError
from apps.endpoints.csv_file import BadRows, BatchError
from apps.endpoints.feedback import UnknownOutcome
from apps.endpoints.lifecycle import LifecycleError, NoWayBack, TestRunning
from apps.endpoints.planning import PlanError
from apps.endpoints.replay import ReplayError
from apps.endpoints.sql import is_trouble, leave, takes_no_writes
from apps.ml.schema import InputError

logger = logging.getLogger(__name__)

MAX_ERRORS = 20

# The first class that fits decides.
HTTP_STATUS: list[tuple[type[Exception], int]] = [
    (prediction.UnknownEndpoint, status.HTTP_404_NOT_FOUND),
    (prediction.Unavailable, status.HTTP_503_SERVICE_UNAVAILABLE),
    (prediction.PredictionError, status.HTTP_400_BAD_REQUEST),
    (BatchError, status.HTTP_400_BAD_REQUEST),
    (batch_jobs.KeyReused, status.HTTP_422_UNPROCESSABLE_ENTITY),
    (batch_jobs.Gone, status.HTTP_410_GONE),
    (batch_jobs.JobError, status.HTTP_409_CONFLICT),
    (TestRunning, status.HTTP_409_CONFLICT),
    (NoWayBack, status.HTTP_409_CONFLICT),
    (LifecycleError, status.HTTP_400_BAD_REQUEST),
    (ABTestError, status.HTTP_400_BAD_REQUEST),
    (ReplayError, status.HTTP_400_BAD_REQUEST),
    (UnknownOutcome, status.HTTP_400_BAD_REQUEST),
    (RequestDataTooBig, status.HTTP_413_REQUEST_ENTITY_TOO_LARGE),
    (SuspiciousOperation, status.HTTP_400_BAD_REQUEST),
]


class PayloadTooLarge(exceptions.APIException):
    status_code = status.HTTP_413_REQUEST_ENTITY_TOO_LARGE


class LengthRequired(exceptions.APIException):
    status_code = status.HTTP_411_LENGTH_REQUIRED
    default_detail = "Send the body whole, with its size in the header Content-Length, not in chunks."


def exception_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    """The answer to an error that a view raised; None (a logged 500) for one that nobody foresaw."""
    if isinstance(error, InputError):
        problems = [{"field": p.field, "row": p.row + 1, "message": p.message} for p in error.problems]
        return _answer(status.HTTP_400_BAD_REQUEST, *_summary(problems))
    if isinstance(error, BadRows):
        problems = [{"line": p.line, "field": p.field, "message": p.message} for p in error.problems]
        return _answer(status.HTTP_400_BAD_REQUEST, *_summary(problems))
    if isinstance(error, PlanError):
        return _answer(status.HTTP_400_BAD_REQUEST, *_summary(_flatten({error.field: str(error)})))
    for kind, code in HTTP_STATUS:
        if isinstance(error, kind):
            return _answer(code, str(error))
    if takes_no_writes(error):
        leave()
        logger.error("The database takes no writes: %s", str(error).strip())
        return _answer(status.HTTP_503_SERVICE_UNAVAILABLE, "The database takes no writes now; try again.")
    if is_trouble(error):
        logger.error("The database does not answer: %s", str(error).strip())
        return _answer(status.HTTP_503_SERVICE_UNAVAILABLE, "The database does not answer; try again.")
    if isinstance(error, UnreadablePostError):
        return _answer(status.HTTP_400_BAD_REQUEST, "The body broke off on its way; send it again.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        logger.error("The disk is full: %s", error)
        return _answer(status.HTTP_507_INSUFFICIENT_STORAGE, "The server's disk is full; nothing was kept of the file.")
    response = drf_exception_handler(error, context)
    if response is None:
        return None
    if isinstance(error, exceptions.ValidationError):
        response.data = _body(*_summary(_flatten(error.detail)))
    else:
        response.data = _body(f"{response.data['detail']}{_instead(error, context['view'])}")
    return response


def _instead(error: Exception, view: APIView) -> str:
    """For what DRF refuses without saying what it would take; our own messages do."""
    if isinstance(error, exceptions.MethodNotAllowed):
        return f" Use {' or '.join(method for method in view.allowed_methods if method not in ('HEAD', 'OPTIONS'))}."
    if isinstance(error, exceptions.UnsupportedMediaType) and str(error.detail).startswith("Unsupported"):
        return f" Send {' or '.join(parser.media_type for parser in view.parser_classes)}."
    return ""


def _answer(code: int, message: str, errors: Sequence[dict[str, Any]] = ()) -> Response:
    return Response(_body(message, errors), status=code)


def _body(message: str, errors: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    body: dict[str, Any] = {"status": "Error", "message": _printable(message)}
    if errors:
        body["errors"] = [{name: _printable(value) for name, value in error.items()} for error in errors]
    return body


def _printable(value: Any) -> Any:
    """What a client sent and an error repeats may hold half a surrogate pair, which no answer can."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _summary(problems: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The first problem as a sentence, how many more there are, and the first of them."""
    first = problems[0]
    place = f"line {first['line']}: " if "line" in first else f"row {first['row']}: " if first.get("row", 1) > 1 else ""
    more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
    return f"{place}{first['message']}{more}", problems[:MAX_ERRORS]


def _flatten(detail: Any, name: str | None = None) -> list[dict[str, Any]]:
    """A DRF error tree as a list of {"field", "message"}."""
    if isinstance(detail, dict):
        return [
            problem
            for key, value in detail.items()
            for problem in _flatten(value, None if key == "non_field_errors" else str(key))
        ]
    if isinstance(detail, list):
        return [problem for value in detail for problem in _flatten(value, name)]
    return [{"field": name, "message": f"{name}: {detail}" if name else str(detail)}]
