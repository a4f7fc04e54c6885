"""With DEBUG=1 the API asks for no token, and so answers nobody but this machine's user."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rest_framework.test import APIClient

SITE = "127.0.0.1:8000"


@pytest.fixture
def here(settings) -> APIClient:
    """A client on this machine that names the server as `make serve` does."""
    settings.DEBUG = True
    settings.ALLOWED_HOSTS = []
    return APIClient(headers={"Host": SITE})


@pytest.fixture(scope="module")
def guarded() -> APIClient:
    """As `here`, for the property-based tests: these settings hold for the whole module."""
    from django.test import override_settings

    with override_settings(DEBUG=True, ALLOWED_HOSTS=[]):
        yield APIClient(headers={"Host": SITE})


def assert_refused(response, *words: str) -> None:
    assert response.status_code == 403
    body = response.json()
    assert body["status"] == "Error"
    assert all(word in body["message"] for word in words), body


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_answered(here, address):
    assert here.get("/livez", REMOTE_ADDR=address).status_code == 200


@pytest.mark.parametrize(
    "address", ["10.0.0.7", "192.168.1.20", "8.8.8.8", "::ffff:10.0.0.7", "2001:db8::1", "0.0.0.0", "unix:", ""]
)
def test_any_other_address_is_refused(here, address):
    assert_refused(here.get("/livez", REMOTE_ADDR=address), "this machine only", "DEBUG=0")


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/api/docs", "/api/schema", "/admin/", "/static/x.css", "/nowhere"]
)
def test_nothing_at_all_is_open_to_other_addresses(here, path):
    assert_refused(here.get(path, REMOTE_ADDR="10.0.0.7"), "this machine only")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Forwarded-For", "203.0.113.9"),
        ("X-Forwarded-For", "127.0.0.1, 203.0.113.9"),
        ("X-Forwarded-For", "203.0.113.9, 127.0.0.1"),
        ("X-Forwarded-For", "unknown"),
        ("X-Forwarded-For", ""),
        ("X-Real-IP", "203.0.113.9"),
        ("Forwarded", "for=203.0.113.9;proto=https"),
        ("Forwarded", 'For="[2001:db8:cafe::17]:4711"'),
        ("Forwarded", "for=127.0.0.1, for=203.0.113.9"),
        ("Forwarded", "for=_hidden"),
        ("Forwarded", "proto=https"),
    ],
)
def test_a_proxy_that_serves_others_is_refused(here, header, value):
    assert_refused(here.get("/livez", headers={header: value}), "this machine only")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Forwarded-For", "::1, 127.0.0.1"),
        ("X-Real-IP", "::1"),
        ("Forwarded", "for=127.0.0.1;proto=http"),
        ("Forwarded", 'for="[::1]"'),
    ],
)
def test_a_proxy_that_serves_this_machine_is_answered(here, header, value):
    assert here.get("/livez", headers={header: value}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8080", "[::1]:8000"])
def test_the_names_of_this_machine_are_answered(here, host):
    assert here.get("/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["rebound.example", "127.0.0.1.example", "10.0.0.7:8000", "bad host", "localhost@x"])
def test_a_foreign_name_that_points_here_is_refused(here, host):
    assert_refused(here.get("/livez", headers={"Host": host}), "localhost and 127.0.0.1 only")


def test_curl_and_scripts_are_answered(here, algorithms, customer):
    assert here.post("/api/v1/classifier/predict", customer, headers={"User-Agent": "curl/8"}).status_code == 200


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_a_page_of_this_server_may_predict(here, algorithms, customer, site):
    response = here.post(
        "/api/v1/classifier/predict",
        customer,
        headers={"Origin": f"http://{SITE}", "Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors"},
    )

    assert response.status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1", "http://127.0.0.1:80001", ""],
)
def test_another_sites_page_is_refused(here, algorithms, customer, origin):
    response = here.post("/api/v1/classifier/predict", customer, headers={"Origin": origin})

    assert_refused(response, "another site's page")


@pytest.mark.parametrize("site", ["cross-site", "same-site", "something-new"])
@pytest.mark.parametrize("mode", ["cors", "no-cors", "navigate"])
def test_a_browser_that_says_the_page_is_another_sites_is_refused(here, site, mode):
    response = here.post("/api/v1/classifier/predict", {}, headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode})

    assert_refused(response, "another site's page")


def test_a_link_on_another_site_may_be_followed(here):
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}

    assert here.get("/api/docs", headers=followed).status_code == 200
    assert_refused(here.get("/api/docs", headers={**followed, "Sec-Fetch-Dest": "iframe"}), "another site's page")
    assert_refused(here.post("/api/docs", headers=followed), "another site's page")


@given(origin=st.text(st.characters(min_codepoint=32, max_codepoint=126)))
@example("http://[")
@example("http://127.0.0.1:8000@evil.example")
@example("HTTP://127.0.0.1:8000/")
def test_no_origin_but_the_servers_own_passes(guarded, origin):
    expected = 200 if origin in {f"http://{SITE}", f"https://{SITE}"} else 403

    assert guarded.get("/livez", headers={"Origin": origin}).status_code == expected


@given(address=st.ip_addresses())
def test_an_address_passes_only_if_it_is_this_machines(guarded, address):
    mapped = getattr(address, "ipv4_mapped", None) or address

    response = guarded.get("/livez", headers={"X-Forwarded-For": str(address)})

    assert response.status_code == (200 if mapped.is_loopback else 403)


@given(value=st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_no_forwarding_header_breaks_the_guard(guarded, value):
    for header in ("X-Forwarded-For", "X-Real-IP", "Forwarded"):
        assert guarded.get("/livez", headers={header: value}).status_code in {200, 403}


def test_without_debug_the_guard_stands_aside(client, settings):
    settings.DEBUG = False

    response = client.get("/livez", REMOTE_ADDR="203.0.113.9", headers={"Origin": "https://elsewhere.example"})

    assert response.status_code == 200


@pytest.mark.whole
def test_a_real_development_server_is_open_to_this_machine_and_closed_to_others(server, customer):
    predict = "/api/v1/classifier/predict?status=production"

    assert server.post(predict, json=customer).status_code == 200
    assert server.get("/api/v1/endpoints", headers={"Origin": server.url}).status_code == 200
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"X-Forwarded-For": "203.0.113.9"}):
        assert_refused(server.post(predict, json=customer, headers=headers))
    assert_refused(server.post(predict, json=customer, headers={"Origin": "null"}))
