"""What happens to every request, whichever app answers it."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import structlog
from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.http import HttpRequest, HttpResponse, JsonResponse

log = structlog.get_logger("requests")

Handler = Callable[[HttpRequest], HttpResponse]


class RequestLog:
    """One line per request: method, path, status, milliseconds. No query string, no body, no address."""

    def __init__(self, get_response: Handler):
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        began = time.perf_counter()
        response = self.get_response(request)
        log.info(
            "request",
            method=request.method,
            path=request.path,
            status=response.status_code,
            ms=round((time.perf_counter() - began) * 1000, 1),
        )
        return response


class LoopbackOnly:
    """In development the API asks for no token, so nobody but this machine's user may reach it.

    Refuses other addresses (also those that a proxy passes on), and requests that another site's page
    makes a browser send. A plain link from elsewhere may be followed: its page cannot read the answer.
    """

    def __init__(self, get_response: Handler):
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        refusal = _refusal(request) if settings.DEBUG else None
        if refusal:
            return JsonResponse({"status": "Error", "message": refusal}, status=403)
        return self.get_response(request)


def _refusal(request: HttpRequest) -> str | None:
    forwarded = request.headers.get("X-Forwarded-For", "")
    addresses = [request.META.get("REMOTE_ADDR", ""), *(part for part in forwarded.split(",") if part.strip())]
    if not all(_is_loopback(address) for address in addresses):
        return "DEBUG=1 answers this machine only. Set DEBUG=0 and the production settings to serve others."
    try:
        host = request.get_host()
    except DisallowedHost:
        return "DEBUG=1 answers to the names localhost and 127.0.0.1 only."
    if request.headers.get("Sec-Fetch-Mode") == "navigate" and request.method in {"GET", "HEAD"}:
        return None
    origin = request.headers.get("Origin")
    from_elsewhere = origin is not None and urlsplit(origin).netloc != host
    if from_elsewhere or request.headers.get("Sec-Fetch-Site") in {"cross-site", "same-site"}:
        return "DEBUG=1 refuses requests from another site's page."
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip()).is_loopback
    except ValueError:
        return False
