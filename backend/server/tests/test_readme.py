"""The README, run as a newcomer would: every `sh` block in a fresh clone, in order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import requests

from tests.postgresql import free_port
from tests.processes import REPOSITORY, outside_world
from tests.test_deploy import start_nginx
from tests.test_make_serve import copy_repository

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("fresh clone")]

FENCE = re.compile(r"^```(?P<language>\w*) ?(?P<tag>.*)\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)

# curl itself calls an error page a success; a reader does not.
STRICT_CURL = 'curl() { command curl --silent --show-error --fail-with-body "$@"; }\n'


@dataclass(frozen=True)
class Block:
    language: str
    tag: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    return [Block(m["language"], m["tag"], m["text"], text[: m.start()].count("\n") + 2) for m in FENCE.finditer(text)]


README = blocks((REPOSITORY / "README.md").read_text())


def shape(value: object) -> object:
    """A JSON value without what differs from run to run: keys and types, and texts that are not numbers."""
    if isinstance(value, dict):
        return {key: shape(member) for key, member in value.items()}
    if isinstance(value, list):
        return [shape(member) for member in value]
    return type(value).__name__ if isinstance(value, (int, float)) else value


def run(block: Block, clone: Path, url: str) -> str:
    script = STRICT_CURL + block.text.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=clone,
        env=outside_world(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    expected = 22 if block.tag == "refused" else 0  # what --fail-with-body exits with
    assert done.returncode == expected, f"README.md line {block.line}: {block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def story() -> Iterator[tuple[Block, Block | None]]:
    """The blocks that are run, each with the JSON that the README shows below it, if it does."""
    for block, following in zip(README, [*README[1:], None], strict=True):
        if (block.language == "sh" and block.tag in {"", "refused"}) or block.language in {"python", "diff"}:
            yield block, following if following and following.language == "json" else None


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work tree as a newcomer's clone would have it."""
    path = copy_repository(tmp_path_factory.mktemp("readme") / "ML_Pipeline")
    subprocess.run(["git", "init", "--quiet", "."], cwd=path, check=True)
    return path


@contextmanager
def serving(clone: Path, block: Block, ready: str = "/readyz") -> Iterator[str]:
    """Run a block that serves until it is stopped; yields the address once it is ready."""
    port = free_port()
    script = block.text.replace("runserver", f"runserver {port} --noreload")
    script = script.replace("jupyter lab", f"jupyter lab --no-browser --allow-root --port {port}")
    with (clone / "serving.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=clone,
            env={**outside_world(), "PORT": str(port)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                if requests.get(f"http://127.0.0.1:{port}{ready}", timeout=5).status_code == 200:
                    break
            except requests.RequestException:
                pass
            written = (clone / "serving.log").read_text()
            assert process.poll() is None, f"README.md line {block.line}: {written}"
            assert time.monotonic() < deadline, f"README.md line {block.line}: not ready in time: {written}"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


def tagged(tag: str) -> Block:
    (block,) = [block for block in README if block.tag == tag]
    return block


def test_every_command_works_in_order_and_answers_as_shown(clone):
    with serving(clone, tagged("serve")) as url:
        for block, shown in story():
            if block.language == "python":
                (clone / block.tag.removeprefix("file=")).write_text(block.text)
            elif block.language == "diff":
                subprocess.run(["git", "apply", "-"], input=block.text, text=True, cwd=clone, check=True)
            else:
                printed = run(block, clone, url)
                if shown:
                    assert shape(json.loads(printed)) == shape(json.loads(shown.text)), f"README.md line {shown.line}"

    with serving(clone, tagged("long")) as url:
        listed = requests.get(f"{url}/api/v1/mlalgorithms?status=testing", timeout=30).json()
        added = [algorithm for algorithm in listed if algorithm["key"] == "gradient_boosting"]
        assert added, "the model that the README adds is served after the next start"
        asked = {"Orders": 4, "RecencyDays": 20}
        answer = requests.post(f"{url}/api/v1/classifier/predict?algorithm=gradient_boosting", json=asked, timeout=30)
        assert answer.json()["algorithm"] == "gradient boosting"


def test_the_production_recipe_serves_through_nginx(clone, postgresql_url, tmp_path):
    preparing, purging = (block for block in README if block.tag == "production")
    database = urlsplit(postgresql_url)
    with psycopg.connect(f"{postgresql_url}/postgres", autocommit=True) as connection:
        connection.execute("CREATE ROLE retention LOGIN PASSWORD 'secret'")
        connection.execute("CREATE DATABASE retention OWNER retention")
    prepared = replace(preparing, text=preparing.text.replace("127.0.0.1:5432", database.netloc.partition("@")[2]))
    try:
        run(prepared, clone, "")
        with serving(clone, tagged("production-serve")) as url:
            https = free_port()
            nginx = start_nginx(tmp_path, https=https, http=free_port(), upstream=urlsplit(url).port)
            try:
                name = "retention.example.com"
                through_nginx = f"--cacert {tmp_path}/cert.pem --resolve {name}:{https}:127.0.0.1 --retry 20"
                call = tagged("production-call")
                text = call.text.replace(name, f"{name}:{https}").replace(
                    "curl", f"curl {through_nginx} --retry-all-errors"
                )
                answer = json.loads(run(replace(call, text=text), clone, ""))
                assert answer["algorithm"] == "random forest"
                run(purging, clone, "")
            finally:
                nginx.terminate()
                nginx.wait(20)
    finally:
        (clone / ".env").unlink()


def test_the_notebooks_open(clone):
    with serving(clone, tagged("jupyter"), ready="/api") as url:
        assert "version" in requests.get(f"{url}/api", timeout=30).json()


def test_every_shell_block_is_one_that_is_run():
    tags = {block.tag for block in README if block.language == "sh"}

    production = {"production", "production-serve", "production-call"}
    elsewhere = {"cluster-scheduler", "cluster-worker"}  # test_cluster.py
    assert tags == {"", "serve", "refused", "long", "untested", "jupyter"} | production | elsewhere
    assert [block.text for block in README if block.tag == "untested"] == ["make test\n"]
