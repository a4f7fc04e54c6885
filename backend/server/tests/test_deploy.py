"""The production recipe: the server on PostgreSQL behind nginx, which ends TLS."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest
import requests

from conftest import require
from tests import processes
from tests.postgresql import free_port
from tests.processes import REPOSITORY

pytestmark = [pytest.mark.whole, pytest.mark.service, pytest.mark.xdist_group("deployed")]

NAME = "retention.example.com"
PREDICT = "/api/v1/classifier/predict?status=production"
NGINX = """
{user}
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/retention.conf;
}}
"""


@dataclass(frozen=True)
class Deployed:
    """The site as its visitors reach it: by name, over TLS, through nginx."""

    https: int
    http: int
    folder: Path
    token: str
    password: str
    server: processes.Server | None

    def curl(self, path: str, *options: str, scheme: str = "https") -> tuple[int, dict[str, str], str]:
        """Status, headers and body of what curl gets, which checks the certificate."""
        port = self.https if scheme == "https" else self.http
        command = ["curl", "--silent", "--show-error", "--include", "--cacert", str(self.folder / "cert.pem")]
        command += ["--resolve", f"{NAME}:{port}:127.0.0.1", *options, f"{scheme}://{NAME}:{port}{path}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        head, _, body = done.stdout.replace("\r\n", "\n").rpartition("HTTP/1.1 ")[2].partition("\n\n")
        status, *lines = head.split("\n")
        return int(status.split()[0]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, body

    def until_nginx_answers(self, nginx: subprocess.Popen) -> tuple[int, dict[str, str], str]:
        deadline = time.monotonic() + 20
        while True:
            try:
                return self.curl("/livez")
            except subprocess.CalledProcessError:
                assert nginx.poll() is None and time.monotonic() < deadline, (self.folder / "error.log").read_text()
                time.sleep(0.1)

    def post(self, path: str, body: object, *options: str) -> tuple[int, dict[str, str], str]:
        json_body = ("-H", "Content-Type: application/json", "-d", json.dumps(body))
        return self.curl(path, *json_body, *options)

    @property
    def authorized(self) -> tuple[str, str]:
        return "-H", f"Authorization: Token {self.token}"


def start_nginx(folder: Path, *, https: int, http: int, upstream: int) -> subprocess.Popen:
    """nginx with the configuration that is shipped, on other ports and with a certificate of the test's own."""
    require(shutil.which("nginx"), "nginx is not installed; get it with: apt-get install nginx")
    require(shutil.which("openssl"), "openssl is not installed; get it with: apt-get install openssl")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    make = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={NAME} -addext subjectAltName=DNS:{NAME}".split()
    )
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    shipped = (REPOSITORY / "deploy/nginx.conf").read_text()
    for original, here in {
        "server 127.0.0.1:8000;": f"server 127.0.0.1:{upstream};",
        "listen 80;": f"listen 127.0.0.1:{http};",
        "listen 443 ssl;": f"listen 127.0.0.1:{https} ssl;",
        f"/etc/letsencrypt/live/{NAME}/fullchain.pem": str(certificate),
        f"/etc/letsencrypt/live/{NAME}/privkey.pem": str(key),
    }.items():
        assert shipped.count(original) == 1, original
        shipped = shipped.replace(original, here)
    (folder / "retention.conf").write_text(shipped)
    # The workers would run as another user, to whom pytest's folders are closed.
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, user=user))
    return subprocess.Popen(
        ["nginx", "-e", folder / "error.log", "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, trained: Path, postgresql_url: str) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("deployed")
    env = processes.environment(
        f"{postgresql_url}/deployed",
        trained,
        DEBUG="0",
        SECRET_KEY="a-long-and-random-key-of-67-characters-0123456789-abcdefghijklmnopq",
        ALLOWED_HOSTS=NAME,
        BEHIND_TLS_PROXY="1",
        STATIC_ROOT=str(folder / "static"),
        BATCH_MAX_BYTES="100000",
    )
    create = "from django.db import connection; connection.cursor().execute('CREATE DATABASE deployed')"
    processes.manage("shell", "--no-imports", "-c", create, env={**env, "DATABASE_URL": f"{postgresql_url}/postgres"})
    processes.manage("migrate", env=env)
    processes.manage("collectstatic", "--no-input", env=env)
    token = processes.manage("create_token", "shop", "--create-user", env=env).stdout.strip()
    shown = processes.manage("create_admin", "--random-password", env=env).stdout
    https, http, upstream = free_port(), free_port(), free_port()
    with processes.running(env, folder / "server.log", wait_for="/readyz", port=upstream) as server:
        nginx = start_nginx(folder, https=https, http=http, upstream=upstream)
        try:
            site = Deployed(https, http, folder, token, shown.split()[-1], server)
            site.until_nginx_answers(nginx)
            yield site
        finally:
            nginx.terminate()
            nginx.wait(20)


def test_a_token_predicts_through_nginx_and_is_needed(deployed, customer):
    status, headers, body = deployed.post(PREDICT, customer, *deployed.authorized)
    assert status == 200
    answer = json.loads(body)
    assert answer["status"] == "OK"
    assert headers["strict-transport-security"] == "max-age=31536000; includeSubDomains; preload"

    status, _, logged = deployed.curl(f"/api/v1/mlrequests/{answer['request_id']}", *deployed.authorized)
    assert status == 200 and json.loads(logged)["probability"] == answer["probability"]

    status, headers, body = deployed.post(PREDICT, customer)
    assert status == 401 and headers["www-authenticate"] == "Token" and json.loads(body)["status"] == "Error"


def test_what_needs_a_permission_or_another_name_is_refused(deployed):
    change = {"status": "retired", "parent_mlalgorithm": 3}
    status, _, body = deployed.post("/api/v1/mlalgorithmstatuses", change, *deployed.authorized)
    assert status == 403 and "endpoints.add_mlalgorithmstatus" in json.loads(body)["message"]

    status, _, body = deployed.curl("/api/v1/endpoints", "-H", "Host: other.example", *deployed.authorized)
    assert status == 400 and "ALLOWED_HOSTS" in json.loads(body)["message"]


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_a_load_balancer_probes_the_server_by_address_and_without_tls(deployed, path):
    by_address = {"headers": {"Host": "10.0.3.7:8000"}, "allow_redirects": False, "timeout": 30}

    assert requests.get(deployed.server.url + path, **by_address).status_code == 200
    assert requests.head(deployed.server.url + path, **by_address).status_code == 200
    assert requests.post(deployed.server.url + path, **by_address).status_code == 405


def test_plain_http_is_sent_to_https_by_nginx_and_by_the_server(deployed):
    status, headers, _ = deployed.curl("/api/docs", scheme="http")
    assert status == 301 and headers["location"] == f"https://{NAME}/api/docs"

    direct = deployed.server.get("/api/v1/endpoints", headers={"Host": NAME}, allow_redirects=False)
    assert direct.status_code == 301 and direct.headers["Location"].startswith("https://")


def test_what_a_client_says_of_its_scheme_is_not_believed(deployed):
    # The server could not tell the second from the first; nginx drops it.
    spoofed = ("-H", "X-Forwarded-Proto: http", "-H", "X_Forwarded_Proto: http")

    assert deployed.curl("/api/v1/endpoints", *deployed.authorized, *spoofed)[0] == 200


def test_the_server_itself_says_that_an_upload_is_too_large(deployed, tmp_path):
    large = tmp_path / "large.csv"
    large.write_bytes(b"Plan\n" + b"basic\n" * 2_000_000)

    status, headers, body = deployed.curl("/api/v1/batch-predict", "-F", f"file=@{large}", *deployed.authorized)

    assert status == 413 and headers["content-type"] == "application/json"
    assert "the limit is 100,000" in json.loads(body)["message"]


@pytest.mark.parametrize("token, status", [("right", 413), ("wrong", 401)])
def test_a_client_that_sends_all_before_it_reads_learns_why_it_was_refused(deployed, token, status):
    headers = {"Host": NAME, "X-Forwarded-Proto": "https", "Content-Type": "text/csv"}
    headers["Authorization"] = f"Token {deployed.token if token == 'right' else token}"

    connection = HTTPConnection(deployed.server.url.removeprefix("http://"), timeout=30)

    connection.request("POST", "/api/v1/batch-predict", b"Plan\n" + b"basic\n" * 4_000_000, headers)

    answer = connection.getresponse()
    assert answer.status == status and json.loads(answer.read())["message"]


def test_while_the_server_is_down_nginx_says_so_as_the_server_would(tmp_path):
    https, http = free_port(), free_port()
    nginx = start_nginx(tmp_path, https=https, http=http, upstream=free_port())
    try:
        site = Deployed(https, http, tmp_path, token="", password="", server=None)
        status, headers, body = site.until_nginx_answers(nginx)
    finally:
        nginx.terminate()
        nginx.wait(20)

    assert (status, headers["content-type"]) == (502, "application/json")
    assert json.loads(body) == {"status": "Error", "message": "The server does not answer; try again."}


def test_the_admin_shows_its_login_page_with_styles_and_lets_the_first_admin_in(deployed, tmp_path):
    jar = ("-b", str(tmp_path / "jar"), "-c", str(tmp_path / "jar"))
    status, _, page = deployed.curl("/admin/login/", *jar)
    assert status == 200 and 'name="password"' in page

    files = set(re.findall(r'(?:href|src)="(/static/[^"]+\.(?:css|js))"', page))
    assert any(file.endswith(".css") for file in files)
    for file in files:
        assert re.search(r"\.[0-9a-f]{12}\.", file), f"{file} has no hash in its name"
        status, headers, _ = deployed.curl(file)
        assert status == 200 and "immutable" in headers["cache-control"]
        assert headers["content-type"].startswith(("text/css", "text/javascript"))

    form = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page)[1]
    login = (f"csrfmiddlewaretoken={form}", "username=admin", f"password={deployed.password}", "next=/admin/")
    fields = [option for field in login for option in ("--data-urlencode", field)]
    origin = ("-H", f"Origin: https://{NAME}:{deployed.https}", "-H", f"Referer: https://{NAME}/admin/login/")
    status, headers, _ = deployed.curl("/admin/login/", *jar, *origin, *fields)
    assert status == 302 and headers["location"] == "/admin/"
    assert "secure" in headers["set-cookie"].lower()

    status, _, page = deployed.curl("/admin/", *jar)
    assert status == 200 and "Log out" in page
    assert deployed.curl("/api/docs", *jar)[0] == deployed.curl("/api/schema", *jar)[0] == 200
    assert deployed.curl("/api/docs")[0] == 302 and deployed.curl("/api/schema")[0] == 401


def test_the_log_is_json_and_holds_neither_customers_nor_secrets(deployed, customer):
    deployed.post(PREDICT, {**customer, "CustomerId": "KEYOFALICE77"}, *deployed.authorized)
    deployed.curl("/api/v1/mlrequests?customer_key=KEYOFALICE77", *deployed.authorized)

    lines = (deployed.folder / "server.log").read_text().splitlines()

    events = [json.loads(line) for line in lines]
    assert {"request"} < {event["event"].split(" ")[0] for event in events}
    everything = "\n".join([*lines, (deployed.folder / "error.log").read_text()])
    for secret in ("KEYOFALICE77", deployed.token, deployed.password):
        assert secret not in everything
