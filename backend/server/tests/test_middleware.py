"""A call of the API goes past what pages need, and is guarded as they are."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import DisallowedHost
from django.test import Client, RequestFactory

from server.middleware import ApiCalls

API = "/api/v1/endpoints"
PAGE = "/admin/login/"
GUARDS = {
    "Strict-Transport-Security",
    "X-Content-Type-Options",
    "Referrer-Policy",
    "Cross-Origin-Opener-Policy",
    "X-Frame-Options",
}


@pytest.fixture
def in_production(settings, db):
    settings.DEBUG = False
    settings.SECURE_SSL_REDIRECT = True
    settings.SECURE_HSTS_SECONDS = 3600


@pytest.mark.parametrize("path", [API, "/api/v1/classifier/predict"])
def test_an_answer_has_the_security_headers_of_a_page_and_its_length(in_production, path):
    page, answer = (Client().get(where, secure=True) for where in (PAGE, path))

    assert {name: answer[name] for name in GUARDS} == {name: page[name] for name in GUARDS}
    assert int(answer["Content-Length"]) == len(answer.content)
    assert "Set-Cookie" not in answer


def test_without_tls_no_answer_promises_it(in_production, settings):
    settings.SECURE_SSL_REDIRECT = False

    assert "Strict-Transport-Security" not in Client().get(API)


def test_plain_http_is_sent_to_https(in_production):
    response = Client().post(f"{API}?page=2", {})

    assert (response.status_code, response["Location"]) == (301, f"https://testserver{API}?page=2")


def test_a_cookie_is_not_looked_at(in_production, django_assert_num_queries):
    browser = Client()
    browser.force_login(User.objects.create_superuser("root"))

    with django_assert_num_queries(0):
        assert browser.get(API, secure=True).status_code == 401


def test_a_call_goes_from_here_to_the_view_and_anything_else_through_the_middleware_between():
    passed = []

    def view(request):
        passed.append("view")
        raise DisallowedHost

    class Between:
        def __init__(self, get_response):
            self.get_response = get_response

        def __call__(self, request):
            passed.append("between")
            return self.get_response(request)

    middleware = ApiCalls(Between(Between(view)))
    for path in ("/api/v1/x", "/api/docs"):
        with pytest.raises(DisallowedHost):
            middleware(RequestFactory().get(path))

    assert passed == ["view", "between", "between", "view"]
