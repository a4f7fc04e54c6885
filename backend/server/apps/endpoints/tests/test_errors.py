"""Errors are JSON of one shape everywhere, and nothing that a client sends makes the server fail."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlencode, urlsplit

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import OperationalError, connection
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from apps.endpoints.models import MLRequest

PREDICT = "/api/v1/classifier/predict"
WRITES = [
    ("POST", PREDICT),
    ("POST", "/api/v1/batch-predict"),
    ("POST", "/api/v1/feedback"),
    ("POST", "/api/v1/mlalgorithmstatuses"),
    ("POST", "/api/v1/abtests"),
    ("POST", "/api/v1/stop_ab_test/1"),
    ("PUT", "/api/v1/mlrequests/{answered}"),
    ("PATCH", "/api/v1/mlrequests/{answered}"),
]
READS = [
    "/api/v1/endpoints",
    "/api/v1/mlalgorithms",
    "/api/v1/mlalgorithmstatuses",
    "/api/v1/mlrequests",
    "/api/v1/abtests",
]
TAKE_JSON = [
    (method, address)
    for method, address in WRITES
    if not any(other in address for other in ("batch", "feedback", "stop"))
]


def is_error(response, status: int | None = None) -> str:
    """The message, after the shape of the error was checked."""
    assert response.status_code == status if status else 400 <= response.status_code < 500, response.content
    assert response["Content-Type"] == "application/json"
    body = response.json()
    assert body["status"] == "Error"
    assert isinstance(body["message"], str) and body["message"]
    assert set(body) <= {"status", "message", "errors"}
    for error in body.get("errors", []):
        assert {"field", "message"} <= set(error) <= {"field", "message", "row", "line"}
    return body["message"]


CSV = SimpleUploadedFile("customers.csv", b"Orders\n4\n")


def asked(api, method: str, address: str, body: object):
    """The answer; a body with a file goes as a form."""
    is_form = isinstance(body, dict) and "file" in body
    return getattr(api, method)(address, body, **({"format": "multipart"} if is_form else {}))


@pytest.fixture
def answered(api, algorithms, customer) -> int:
    return api.post(PREDICT, customer).json()["request_id"]


def test_a_name_in_another_script_is_repeated_as_it_was_sent(wsgi, algorithms):
    as_wsgi_has_it = "algorithm=é".encode().decode("latin-1")
    status, answer = wsgi(b'{"Orders": 3}', QUERY_STRING=as_wsgi_has_it)
    assert status == 400
    assert answer["message"].startswith("No algorithm fits algorithm=é;")


class TestAddresses:
    @pytest.mark.parametrize(
        "address",
        [
            *("/nothing", "/api", "/api/", "/api/v1", "/api/v1/", "/api/v2/endpoints", "/api/v1/nothing", "/api/v1//"),
            *("/api/v1/endpoints/", "/api/v1/mlrequests/1/", "/api/v1/classifier/predict/", "/api/v1/batch-predict/"),
            *("/api/v1/mlrequests/x", "/api/v1/%00", "/api/v1/%ED%A0%80/predict", "/api/v1/é", "/api/v1/" + "x" * 4000),
            *("/api/v1/classifier/predict%0A", "/api/v1/classifier/Predict", "/api/v1/../endpoints"),
        ],
    )
    @pytest.mark.parametrize("method", ["get", "post", "delete", "options"])
    def test_what_leads_nowhere_is_404(self, api, algorithms, address, method):
        is_error(getattr(api, method)(address), 404)

    def test_a_trailing_slash_is_pointed_out(self, api, algorithms):
        assert "Addresses have no trailing slash." in is_error(api.get("/api/v1/endpoints/"), 404)

    @pytest.mark.parametrize("debug", [True, False])
    def test_they_are_json_in_development_and_in_production(self, api, algorithms, settings, debug):
        settings.DEBUG = debug
        settings.SECURE_SSL_REDIRECT = False

        assert "There is nothing at /nothing." in is_error(api.get("/nothing"), 404)

    @pytest.mark.parametrize(
        ("address", "allowed"),
        [
            (PREDICT, "POST, OPTIONS"),
            ("/api/v1/batch-predict", "POST, OPTIONS"),
            ("/api/v1/stop_ab_test/1", "POST, OPTIONS"),
            ("/api/v1/endpoints", "GET, HEAD, OPTIONS"),
            ("/api/v1/mlalgorithms", "GET, HEAD, OPTIONS"),
            ("/api/v1/mlalgorithmstatuses", "GET, POST, HEAD, OPTIONS"),
            ("/api/v1/abtests", "GET, POST, HEAD, OPTIONS"),
            ("/api/v1/mlrequests", "GET, HEAD, OPTIONS"),
            ("/api/v1/mlrequests/1", "GET, PUT, PATCH, HEAD, OPTIONS"),
        ],
    )
    def test_a_method_that_is_not_possible_is_405_with_those_that_are(self, api, algorithms, address, allowed):
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"} - set(allowed.split(", ")):
            response = api.generic(method, address)

            is_error(response, 405)
            assert response["Allow"] == allowed
        assert api.options(address).status_code == 200

    @pytest.mark.parametrize("address", READS)
    def test_lists_can_be_asked_for_their_headers_only(self, api, algorithms, address):
        response = api.head(address)

        assert (response.status_code, response.content) == (200, b"")

    @pytest.mark.parametrize(
        "accept", ["text/html", "application/xml", "text/csv;q=0.1", "nonsense", "*/*;q=", "é", ""]
    )
    def test_the_answer_is_json_whatever_is_accepted(self, api, algorithms, customer, accept):
        assert api.get("/api/v1/endpoints", HTTP_ACCEPT=accept)["Content-Type"] == "application/json"
        assert api.post(PREDICT, customer, HTTP_ACCEPT=accept).status_code == 200
        is_error(api.post(PREDICT, {}, HTTP_ACCEPT=accept), 400)

    def test_parameters_beyond_all_bounds_are_refused(self, api, algorithms, customer):
        query = "&".join(f"p{number}=1" for number in range(2000))

        for address in READS:
            api.get(f"{address}?{query}")
        is_error(api.post(f"{PREDICT}?{query}", customer), 400)


class TestRemedies:
    @pytest.mark.parametrize(
        ("method", "address", "body", "name", "remedy"),
        [
            ("post", f"{PREDICT}?staus=production", {"Orders": 4}, "staus", "did you mean status?"),
            ("post", "/api/v1/batch-predict", {"file": CSV, "on_eror": "skip"}, "on_eror", "did you mean on_error?"),
            ("post", "/api/v1/feedback?windowdays=3", [{"request_id": 1}], "windowdays", "did you mean window_days?"),
            ("post", "/api/v1/abtests", {"minimum_labeled": 500}, "minimum_labeled", "did you mean minimum_labelled?"),
            ("post", "/api/v1/abtests", {"champoin": 1}, "champoin", "use title, created_by, "),
            ("post", "/api/v1/mlalgorithmstatuses", {"reson": "x"}, "reson", "did you mean reason?"),
            ("post", "/api/v1/abtests/replay", {"chalenger": 2}, "chalenger", "did you mean challenger?"),
            ("get", "/api/v1/abtests/plan?baselin=0.8", None, "baselin", "did you mean baseline?"),
            ("get", "/api/v1/mlrequests?labeled=true", None, "labeled", "did you mean labelled?"),
            ("get", "/api/v1/mlrequests?limit=5", None, "limit", "use algorithm, abtest, "),
            ("get", "/api/v1/endpoints?q=shop", None, "q", "leave it out."),
        ],
    )
    def test_a_name_that_nothing_has_is_refused_with_the_one_that_was_meant(
        self, api, algorithms, method, address, body, name, remedy
    ):
        message = is_error(asked(api, method, address, body), 400)

        assert message.startswith(f"{name}: There is nothing of this name here; {remedy}")

    @pytest.mark.parametrize(
        ("method", "address", "body", "status", "remedy"),
        [
            ("post", "/api/v1/batch-predict", {"file": CSV, "mode": "later"}, 400, "Expected one of auto, async."),
            ("get", "/api/v1/mlalgorithms?status=bad", None, 400, "Expected one of testing, staging, "),
            ("get", "/api/v1/mlrequests?labelled=maybe", None, 400, "Expected one of true, false."),
            ("get", "/api/v1/mlrequests?created_after=yesterday", None, 400, "as in 2026-11-28T12:30:00Z."),
            (
                "post",
                "/api/v1/mlalgorithmstatuses",
                {"status": "staging", "parent_mlalgorithm": 77},
                400,
                "There is no algorithm 77; /api/v1/mlalgorithms lists them.",
            ),
            ("get", "/api/v1/mlrequests/99999", None, 404, "There is no request 99999."),
            ("get", "/api/v1/batch-jobs/99/errors", None, 404, "There is no batch job 99."),
            ("get", "/api/v1/abtests/9/report", None, 404, "There is no A/B test 9."),
            ("get", PREDICT, None, 405, "Use POST."),
            ("delete", "/api/v1/mlrequests/1", None, 405, "Use GET or PUT or PATCH."),
        ],
    )
    def test_a_refusal_says_what_would_do(self, api, algorithms, method, address, body, status, remedy):
        assert remedy in is_error(asked(api, method, address, body), status)

    def test_a_body_of_a_kind_that_is_not_read_is_told_which_are(self, api, algorithms):
        message = is_error(api.post(PREDICT, "Orders=4", content_type="text/plain"), 415)

        assert message.endswith("Send application/json or application/x-www-form-urlencoded or multipart/form-data.")

    def test_a_date_alone_is_a_moment_too(self, api, algorithms):
        assert api.get("/api/v1/mlrequests?created_after=2026-11-28").status_code == 200


CHARSETS = ["nonsense", "", "rot13", "hex", "undefined", "idna", "utf-7", "ü", '"', "'a'b'c"]
BROKEN_CONTENT_TYPES = [
    *(f"application/json; charset={charset}" for charset in CHARSETS),
    *(f"application/x-www-form-urlencoded; charset={charset}" for charset in CHARSETS),
    *(f"application/json{rest}" for rest in (";;;=", "; charset", "; =x", "; charset=utf-8; charset=rot13")),
    *(f"multipart/form-data{rest}" for rest in ("", "; boundary=", "; boundary=é", "; boundary=\x00", "; boundary=x")),
    f"multipart/form-data; boundary={'x' * 300}",
]


class TestContentTypes:
    @pytest.mark.parametrize(
        "content_type",
        [
            *("text/plain", "text/csv", "application/xml", "application/octet-stream", "json", "/", "nonsense"),
            *("application/jsonp", "application/json/x", "é/é", ";", "application", "multipart/mixed; boundary=x"),
        ],
    )
    @pytest.mark.parametrize(("method", "address"), TAKE_JSON)
    def test_another_is_415(self, api, answered, method, address, content_type):
        response = api.generic(method, address.format(answered=answered), "{}", content_type=content_type)

        is_error(response, 415)

    @pytest.mark.parametrize("content_type", BROKEN_CONTENT_TYPES)
    @pytest.mark.parametrize(("method", "address"), TAKE_JSON)
    def test_a_broken_one_breaks_nothing(self, api, answered, method, address, content_type):
        response = api.generic(method, address.format(answered=answered), '{"x": 1}', content_type=content_type)

        is_error(response)

    def test_json_in_another_charset_is_read_by_it(self, api, algorithms):
        body = '{"Plan": "privé"}'.encode("latin-1")

        response = api.generic("POST", PREDICT, body, content_type="application/json; charset=iso-8859-1")

        assert "'privé' was not seen" in response.json()["warnings"][1]

    def test_a_body_without_a_content_type_is_415(self, wsgi, algorithms):
        status, body = wsgi(b'{"Orders": 4}', CONTENT_TYPE="")

        assert (status, body["status"]) == (415, "Error")

    @pytest.mark.parametrize("charset", ["*=a'b'%ff", "=\x00", "=" + "x" * 20_000])
    def test_one_that_django_fails_to_read_is_415(self, wsgi, algorithms, charset):
        status, body = wsgi(b'{"Orders": 4}', CONTENT_TYPE=f"application/json; charset{charset}")

        assert (status, body["status"]) == (415, "Error")

    @pytest.mark.parametrize("charset", ["hex", "idna", "rot13", "utf-8"])
    @pytest.mark.parametrize("query", ["customer_key=%ff", "&".join(f"p{number}=1" for number in range(1_001))])
    def test_a_charset_that_cannot_read_the_query_breaks_nothing(self, wsgi, algorithms, charset, query):
        how = {"REQUEST_METHOD": "GET", "PATH_INFO": "/api/v1/mlrequests", "QUERY_STRING": query}
        status, body = wsgi(b"", **how, CONTENT_TYPE=f"text/plain; charset={charset}")

        assert (status, "results" in body) == ((200, True) if query.startswith("customer") else (400, False))


class TestBodies:
    @pytest.mark.parametrize(("method", "address"), WRITES)
    def test_one_over_the_limit_is_413(self, api, answered, settings, method, address):
        settings.MAX_BODY_BYTES = settings.BATCH_MAX_BYTES = 20

        response = api.generic(method, address.format(answered=answered), b"x" * 21, content_type="application/json")

        assert is_error(response, 413) == "The body has 21 bytes; the limit is 20. Send it in parts."

    @pytest.mark.parametrize(("method", "address"), WRITES)
    def test_one_in_chunks_is_411(self, api, answered, method, address):
        response = api.generic(
            method, address.format(answered=answered), content_type="application/json", HTTP_TRANSFER_ENCODING="chunked"
        )

        assert "Content-Length" in is_error(response, 411)

    def test_a_form_field_over_the_limit_is_413_beside_a_file_too(self, api, algorithms, settings):
        settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 1000
        fields = {"status": "x" * 2000, "file": SimpleUploadedFile("customers.csv", b"Orders\n1\n")}

        is_error(api.post("/api/v1/batch-predict", fields, format="multipart"), 413)

    @pytest.mark.parametrize(("method", "address"), TAKE_JSON)
    def test_a_form_of_more_fields_than_any_table_has_is_refused(self, api, answered, method, address):
        fields = {f"f{number}": "1" for number in range(2000)}

        for body, content_type in [
            (urlencode(fields), "application/x-www-form-urlencoded"),
            (
                "".join(f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n1\r\n' for name in fields)
                + "--x--\r\n",
                "multipart/form-data; boundary=x",
            ),
        ]:
            is_error(api.generic(method, address.format(answered=answered), body, content_type=content_type), 400)

    @pytest.mark.parametrize("length", ["abc", "-5", "1.5", "", " ", "9" * 30, "٣"])
    def test_a_content_length_that_is_no_length_breaks_nothing(self, wsgi, algorithms, length):
        status, body = wsgi(b'{"Orders": 4}', CONTENT_LENGTH=length)

        assert (status, body["status"]) in [(400, "Error"), (413, "Error")]

    @pytest.mark.parametrize(
        ("content_type", "body"),
        [
            ("application/json", b'{"Orders": 4}'),
            ("application/x-www-form-urlencoded", b"Orders=4&RecencyDays=20"),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="Orders"\r\n\r\n4\r\n--x--\r\n',
            ),
        ],
    )
    def test_one_that_breaks_off_is_refused_wherever_it_does(self, wsgi, algorithms, content_type, body):
        assert wsgi(body, CONTENT_TYPE=content_type)[0] == 200
        MLRequest.objects.all().delete()

        for cut in range(len(body)):
            status, answer = wsgi(body[:cut], CONTENT_TYPE=content_type, CONTENT_LENGTH=str(len(body)))

            assert (status, answer["status"]) == (400, "Error"), body[:cut]
        assert not MLRequest.objects.exists()

    def test_a_file_that_breaks_off_is_refused_wherever_it_does(self, wsgi, algorithms):
        table = b"Plan,Orders,RecencyDays,MeanGapDays,Newsletter\nbasic,4,20,31.5,True\nbasic,14,20,31.5,True\n"
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'
        whole = head + table + b"\r\n--x--\r\n"
        send = {"PATH_INFO": "/api/v1/batch-predict", "CONTENT_TYPE": "multipart/form-data; boundary=x"}

        assert wsgi(whole, **send)[0] == 201
        MLRequest.objects.all().delete()
        for cut in range(len(whole)):
            status, answer = wsgi(whole[:cut], **send, CONTENT_LENGTH=str(len(whole)))

            assert (status, answer["status"]) == (400, "Error"), whole[:cut]
        assert not MLRequest.objects.exists()


def test_a_database_that_does_not_answer_is_503_and_logged(api, algorithms, customer, caplog):
    def fail(execute, sql, params, many, context):
        raise OperationalError("the disk is full")

    with connection.execute_wrapper(fail):
        response = api.post(PREDICT, customer)

    assert response.status_code == 503
    assert response.json() == {"status": "Error", "message": "The database does not answer; try again."}
    assert "The database does not answer: the disk is full" in caplog.text


COLUMNS = ["Plan", "Orders", "RecencyDays", "MeanGapDays", "Newsletter", "CustomerId", "IsRetained"]
FIELDS = [*COLUMNS, "feedback", "status", "created_by", "title", "parent_mlalgorithm", "parent_mlalgorithm_1", "file"]
ANY_TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["production", "1", "NaN", "1e999", "\x00", "\ud800"]
)
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.sampled_from([2**63, 10**400, 1e308, -0.0]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(ANY_TEXT, values, max_size=3),
    max_leaves=6,
)
ANY_OBJECT = st.dictionaries(st.sampled_from(FIELDS) | ANY_TEXT, ANY_VALUE, max_size=5)
ANY_BODY = ANY_OBJECT | st.lists(ANY_OBJECT, max_size=4) | ANY_VALUE
ENCODABLE = st.text(st.characters(codec="utf-8"), max_size=12)
FUZZ = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class TestAnything:
    """Whatever is sent is answered, or refused as JSON; a failure would be raised by the test client."""

    @FUZZ
    @given(body=ANY_BODY)
    @example(body={"Orders": 10**400, "CustomerId": 10**400})
    @example(body={"\ud800": 1, "feedback": "\ud800"})
    def test_as_json(self, api, answered, body):
        for method, address in TAKE_JSON:
            text = json.dumps(body)
            response = api.generic(method, address.format(answered=answered), text, content_type="application/json")

            if response.status_code not in (200, 201):
                is_error(response)

    @FUZZ
    @given(fields=st.dictionaries(st.sampled_from(FIELDS) | ENCODABLE, ENCODABLE, max_size=5))
    def test_as_a_form(self, api, answered, fields):
        for method, address in WRITES:
            text = urlencode(fields)
            response = api.generic(
                method, address.format(answered=answered), text, content_type="application/x-www-form-urlencoded"
            )

            if response.status_code not in (200, 201):
                is_error(response)

    @FUZZ
    @given(
        fields=st.dictionaries(st.sampled_from(FIELDS), ENCODABLE, max_size=5),
        files=st.dictionaries(st.sampled_from(FIELDS), st.binary(max_size=60), max_size=2),
    )
    def test_as_a_multipart_form(self, api, answered, fields, files):
        for method, address in WRITES:
            uploads = {name: SimpleUploadedFile("a.csv", content) for name, content in files.items()}
            send = getattr(api, method.lower())
            response = send(address.format(answered=answered), {**fields, **uploads}, format="multipart")

            if response.status_code not in (200, 201):
                is_error(response)

    @FUZZ
    @given(body=st.binary(max_size=80))
    def test_as_bytes(self, api, answered, body):
        for method, address in WRITES:
            for content_type in (
                "application/json",
                "application/x-www-form-urlencoded",
                "multipart/form-data; boundary=x",
            ):
                response = api.generic(method, address.format(answered=answered), body, content_type=content_type)

                if response.status_code not in (200, 201):
                    is_error(response)

    @FUZZ
    @given(
        parameters=st.dictionaries(
            st.sampled_from(
                [
                    *("status", "version", "algorithm", "endpoint", "name", "active", "parent_mlalgorithm", "abtest"),
                    *("created_after", "created_before", "labelled", "customer_key", "cursor", "page_size", "format"),
                ]
            ),
            ENCODABLE | st.integers().map(str) | st.floats().map(str) | st.datetimes().map(str),
            max_size=4,
        )
    )
    def test_as_parameters(self, api, answered, customer, parameters):
        query = urlencode(parameters)
        for address in [*READS, f"/api/v1/mlrequests/{answered}"]:
            response = api.get(f"{address}?{query}")
            if response.status_code != 200:
                is_error(response)
        response = api.post(f"{PREDICT}?{query}", customer)
        if response.status_code != 200:
            is_error(response)


@pytest.mark.whole
class TestOverTheWire:
    """What a client sees of a real server that answers before it has read the body."""

    def test_a_body_over_the_limit_is_answered_and_the_connection_stays_good(self, server):
        import requests

        with requests.Session() as session:
            for size in (11 * 2**20, 60 * 2**20):
                response = session.post(
                    server.url + PREDICT, data=b"x" * size, headers={"Content-Type": "application/json"}, timeout=30
                )
                assert response.status_code == 413
                assert "the limit is 10,485,760" in response.json()["message"]
            assert session.post(server.url + PREDICT, json={"Orders": 4}, timeout=30).status_code == 200

        chunked = server.post(PREDICT, data=iter([b'{"Orders":', b" 4}"]), headers={"Content-Type": "application/json"})
        assert (chunked.status_code, chunked.json()["status"]) == (411, "Error")

        for head, body in [
            ("Content-Length: 100", b'{"Orders": 4}'),
            ("Content-Length: 99999999999", b""),
            ("Content-Length: abc", b"{}"),
        ]:
            assert self._raw(server.url, head, body).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))
        assert server.get("/readyz").json() == {"status": "ready"}

    @staticmethod
    def _raw(url: str, head: str, body: bytes) -> bytes:
        """What the server answers to a client that stops sending after the body."""
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            lines = [f"POST {PREDICT} HTTP/1.1", f"Host: {address.netloc}", "Content-Type: application/json", head]
            connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode() + body)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").read()
