"""Real server processes for tests, each with a database and artifacts of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from tests.postgresql import free_port

BACKEND = Path(__file__).resolve().parents[1]
REPOSITORY = BACKEND.parents[1]


class Server:
    """A running gunicorn. `log` is the file that it writes to."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log

    def kill(self) -> None:
        """kill -9 of every process of the server."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def get(self, path: str, **kwargs) -> requests.Response:
        return requests.get(self.url + path, timeout=30, **kwargs)

    def post(self, path: str, **kwargs) -> requests.Response:
        return requests.post(self.url + path, timeout=30, **kwargs)


def environment(database_url: str, artifacts_dir: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in {"DJANGO_SETTINGS_MODULE", "SECRET_KEY"}}
    return {**kept, "DATABASE_URL": database_url, "ML_ARTIFACTS_DIR": str(artifacts_dir), **more}


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


def start(env: dict[str, str], log: Path, *, wait_for: str = "/livez", port: int | None = None) -> Server:
    """Start gunicorn as `make serve` does and wait until it answers."""
    port = port or free_port()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "server.wsgi"],
            cwd=BACKEND,
            env={**env, "PORT": str(port)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The server stopped: {log.read_text()[-2000:]}")
        try:
            if requests.get(server.url + wait_for, timeout=2).status_code == 200:
                return server
        except requests.RequestException:
            time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"The server did not answer in time: {log.read_text()[-2000:]}")


@contextmanager
def running(env: dict[str, str], log: Path, **kwargs) -> Iterator[Server]:
    server = start(env, log, **kwargs)
    try:
        yield server
    finally:
        server.stop()
