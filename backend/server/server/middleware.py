"""What happens to every request, whichever app answers it."""

from __future__ import annotations

import ipaddress
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus

from django.conf import settings
from django.contrib.admindocs.views import simplify_regex
from django.core.exceptions import DisallowedHost
from django.http import HttpRequest, HttpResponse, JsonResponse, UnreadablePostError
from django.middleware.clickjacking import XFrameOptionsMiddleware
from django.middleware.security import SecurityMiddleware
from django.urls import Resolver404, resolve

from server import health, logs

Handler = Callable[[HttpRequest], HttpResponse]

_FORWARDED_FOR = re.compile(r'for="?\[?([^;,"\]]*)', re.IGNORECASE)


def _error(status: int, message: str) -> JsonResponse:
    return JsonResponse({"status": "Error", "message": message}, status=status)


class Drained:
    """Reads what a refused client, who announced how much it would be, is still sending.

    A server that closes a connection with bytes unread resets it: the client, or nginx (which then says 502),
    may lose the answer that says what was wrong. One client at a time, so that slow ones hold up no more than
    one thread; and none that waits to be told to go on.
    """

    # More than the proxy lets through; whoever sends more than that sees the connection close.
    MOST_BYTES = 128 * 2**20
    PIECE = 2**16

    def __init__(self, get_response: Handler):
        self.get_response = get_response
        self._reading = threading.Lock()

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        is_sending = request._read_started or "HTTP_EXPECT" not in request.META
        if response.status_code >= 400 and is_sending and self._reading.acquire(blocking=False):
            try:
                self._drain(request)
            finally:
                self._reading.release()
        return response

    def _drain(self, request: HttpRequest) -> None:
        with suppress(UnreadablePostError):
            for _ in range(0, self.MOST_BYTES, self.PIECE):
                if not request.read(self.PIECE):
                    break


class RequestLog:
    """One line per request: method, path, status, milliseconds. No query string, no body, no address."""

    def __init__(self, get_response: Handler):
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        began = time.perf_counter()
        response = self.get_response(request)
        logs.request(request.method, _loggable_path(request, response), response.status_code, began)
        return response


def _loggable_path(request: HttpRequest, response: HttpResponse) -> str:
    """The path where it led to an answer; else the pattern that it fitted, since a wrong path may name a customer."""
    if response.status_code < 300:
        return request.path
    if request.path_info in health.CHECKS:
        return request.path
    try:  # what was refused before its address was looked at has none yet
        match = request.resolver_match or resolve(request.path_info)
    except Resolver404:
        return "(no such address)"
    return simplify_regex(match.route)


class JsonErrors:
    """Errors are JSON wherever Django would show a page of its own, in development too; the admin keeps its pages."""

    def __init__(self, get_response: Handler):
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        is_json = "json" in response.get("Content-Type", "")
        if response.status_code < 400 or is_json or request.path.startswith("/admin/"):
            return response
        answer = _error(response.status_code, self._message(request, response))
        if response.has_header("Allow"):
            answer["Allow"] = response["Allow"]
        return answer

    def _message(self, request: HttpRequest, response: HttpResponse) -> str:
        match response.status_code:
            case 404:
                hint = " Addresses have no trailing slash." if request.path.endswith("/") else ""
                return f"There is nothing at {request.path}.{hint} The API is described at /api/docs."
            case 405:
                return f"{request.method} is not possible here, but {response.get('Allow', 'another method')} is."
            case 400:
                return "The request is malformed." if _host(request) else _UNKNOWN_HOST
            case 500:
                return "The server failed; its log says why."
        return f"{HTTPStatus(response.status_code).phrase}."


_UNKNOWN_HOST = "This server is not known by the name in the Host header; its setting ALLOWED_HOSTS lists those it has."


def _host(request: HttpRequest) -> str | None:
    try:
        return request.get_host()
    except DisallowedHost:
        return None


class LoopbackOnly:
    """In development the API asks for no token, so nobody but this machine's user may reach it.

    Refuses other addresses (also those that a proxy passes on), and requests that another site's page
    makes a browser send. A plain link from elsewhere may be followed: its page cannot read the answer.
    """

    def __init__(self, get_response: Handler):
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        refusal = _refusal(request) if settings.DEBUG else None
        return _error(403, refusal) if refusal else self.get_response(request)


def _refusal(request: HttpRequest) -> str | None:
    if not all(_is_loopback(address) for address in _addresses(request)):
        return "DEBUG=1 answers this machine only. Set DEBUG=0 and the production settings to serve others."
    host = _host(request)
    if host is None:
        return "DEBUG=1 answers to the names localhost and 127.0.0.1 only."
    is_link = (
        request.headers.get("Sec-Fetch-Mode") == "navigate" and request.headers.get("Sec-Fetch-Dest") == "document"
    )
    if is_link and request.method in {"GET", "HEAD"}:
        return None
    from_elsewhere = request.headers.get("Origin", f"http://{host}") not in {f"http://{host}", f"https://{host}"}
    if from_elsewhere or request.headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"}:
        return "DEBUG=1 refuses requests from another site's page."
    return None


def _addresses(request: HttpRequest) -> Iterator[str]:
    """Whoever sent the request, and whoever proxies say they sent it for."""
    yield request.META.get("REMOTE_ADDR", "")
    for name in ("X-Forwarded-For", "X-Real-IP"):
        if name in request.headers:
            yield from request.headers[name].split(",")
    if "Forwarded" in request.headers:
        yield from _FORWARDED_FOR.findall(request.headers["Forwarded"]) or [""]


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address.strip())
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


class HealthChecks:
    """Answers probes before names, TLS and sessions are looked at: they come by address and over plain HTTP."""

    def __init__(self, get_response: Handler):
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        check = health.CHECKS.get(request.path_info)
        return check(request) if check else self.get_response(request)


class ApiCalls:
    """A call of the API carries a token and no cookie, and gets JSON: it goes past all that pages need.

    What guards both is done here: the name in the Host header, the security headers, and the length of the answer.
    """

    def __init__(self, get_response: Handler):
        self.get_response = get_response
        self.view = get_response
        while hasattr(self.view, "get_response"):  # Django's wrapper of a middleware has what that has
            self.view = self.view.get_response
        self._headers = {is_secure: _security_headers(is_secure) for is_secure in (False, True)}

    def __call__(self, request: HttpRequest) -> HttpResponse:
        is_secure = request.is_secure()
        if not request.path_info.startswith("/api/v1/") or (settings.SECURE_SSL_REDIRECT and not is_secure):
            return self.get_response(request)
        request.get_host()
        response = self.view(request)
        for name, value in self._headers[is_secure]:
            response.headers[name] = value
        if not response.streaming:
            response.headers["Content-Length"] = str(len(response.content))
        return response


def _security_headers(is_secure: bool) -> list[tuple[str, str]]:
    """What Django's middleware, under the present settings, adds to an answer."""
    request = HttpRequest()
    request.is_secure = lambda: is_secure
    response = HttpResponse()
    for middleware in (SecurityMiddleware, XFrameOptionsMiddleware):
        response = middleware(lambda request: HttpResponse()).process_response(request, response)
    return [(name, value) for name, value in response.items() if name != "Content-Type"]
