"""Real server processes for tests, each with a database and artifacts of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

from tests.postgresql import free_port

BACKEND = Path(__file__).resolve().parents[1]
REPOSITORY = BACKEND.parents[1]


class Server:
    """A running server. `log` is the file that it writes to; `headers` go with each request."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log
        self.headers: dict[str, str] = {}

    def workers(self) -> list[int]:
        """The processes that answer, as they are now. Linux only."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self) -> None:
        """kill -9 of every process of the server."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """As a supervisor does it: requests that were accepted are answered first."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.kill()

    def get(self, path: str, **kwargs) -> requests.Response:
        return self._request("GET", path, **kwargs)

    def post(self, path: str, **kwargs) -> requests.Response:
        return self._request("POST", path, **kwargs)

    def _request(self, method: str, path: str, headers: dict[str, str] | None = None, **kwargs) -> requests.Response:
        return requests.request(
            method, self.url + path, headers={**self.headers, **(headers or {})}, timeout=30, **kwargs
        )


def environment(database_url: str, artifacts_dir: Path, **more: str) -> dict[str, str]:
    """The environment of a server of its own: nothing of the test run's settings reaches it.

    One process answers, as each takes seconds to load; whoever tests several asks for them.
    """
    ours = {"DATABASE_URL": database_url, "ML_ARTIFACTS_DIR": str(artifacts_dir)}
    ours |= {"BATCH_WORKERS": "0", "WEB_CONCURRENCY": "1"}
    return {**outside_world(), **ours, **more}


def outside_world() -> dict[str, str]:
    """This process's environment without what settings, tests and make would read."""
    ours = set(re.findall(r"^#? ?([A-Z_]+)=", (REPOSITORY / ".env.example").read_text(), re.MULTILINE))
    ours |= {"DJANGO_SETTINGS_MODULE", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VIRTUAL_ENV", "PYTHONPATH"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def token_header(env: dict[str, str]) -> dict[str, str]:
    """The header of a caller who has a token."""
    token = manage("create_token", "shop", "--create-user", env=env).stdout.strip()
    return {"Authorization": f"Token {token}"}


def manage(*arguments: str, env: dict[str, str], check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=BACKEND,
        env=env,
        check=check,
        capture_output=True,
        text=True,
        **kwargs,
    )


def start(
    env: dict[str, str],
    log: Path,
    *,
    wait_for: str = "/livez",
    port: int | None = None,
    command: Sequence[str] = (sys.executable, "serve.py"),
) -> Server:
    """Start the server as `make serve` does and wait until it answers. command: another one, which reads PORT too."""
    port = port or free_port()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=BACKEND,
            env={**env, "PORT": str(port)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_until_answered(server.url + wait_for, process, log)
    except BaseException:
        server.kill()
        raise
    return server


def wait_until_answered(url: str, process: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    """Return when an address answers 200. Raises RuntimeError when its process ends first, or time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The server stopped: {log.read_text()[-2000:]}")
        try:
            if requests.get(url, timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"{url} did not answer 200 in time: {log.read_text()[-2000:]}")


def open_files(pid: int) -> set[str]:
    """The names of what a process has open, a socket's as "socket:[inode]". Linux only."""
    names = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            names.add(link.readlink().name)
    return names


@contextmanager
def running(env: dict[str, str], log: Path, **kwargs) -> Iterator[Server]:
    server = start(env, log, **kwargs)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def worker(env: dict[str, str], log: Path, *command: str) -> Iterator[subprocess.Popen]:
    """A worker of batch jobs, or another command of manage.py, which is killed in the end."""
    with log.open("ab") as output:
        command = [sys.executable, "manage.py", *(command or ["batch_worker"])]
        process = subprocess.Popen(command, cwd=BACKEND, env=env, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
