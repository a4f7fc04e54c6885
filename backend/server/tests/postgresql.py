"""A PostgreSQL of the tests' own: started in a temporary folder on a free port, gone afterwards.

As a command it runs another one with DATABASE_URL set: `python postgresql.py pytest ...`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

HOW_TO_GET = "PostgreSQL is not installed; get it with: apt-get install postgresql"


def binaries() -> Path | None:
    """The folder of the newest installed server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class Cluster:
    """A server with its data in a folder. url: the server's, without a database's name."""

    def __init__(self, folder: Path, durable: bool):
        programs = binaries()
        if programs is None:
            raise RuntimeError(HOW_TO_GET)
        # PostgreSQL refuses to run as root.
        self._as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self._programs, self._data, self._log = programs, folder / "data", folder / "log"
        port = free_port()
        self._settings = f"-p {port} -k {folder} -c fsync={'on' if durable else 'off'} -c max_connections=200"
        self.url = f"postgresql://postgres@127.0.0.1:{port}"
        if self._as_user:
            shutil.chown(folder, "postgres")
        folder.chmod(0o755)
        self._run("initdb", "-A", "trust", "-U", "postgres", "-E", "UTF8")

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-o", self._settings, "-l", str(self._log), "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def kill(self) -> None:
        """kill -9 of every process of the server."""
        first = int((self._data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        for process in [first, *map(int, children)]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, str(self._programs / program), "-D", str(self._data), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def cluster(durable: bool = False) -> Iterator[Cluster]:
    """A running server of one's own. Unless durable, a power failure may damage it."""
    folder = Path(tempfile.mkdtemp(prefix="retention-postgresql-"))
    try:
        server = Cluster(folder, durable)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(durable: bool = False) -> Iterator[str]:
    """Yields the server's URL, without a database's name. Unless durable, a power failure may damage it."""
    with cluster(durable) as server:
        yield server.url


def new_database(url: str) -> str:
    """The URL of a new, empty database on a running server."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{url}/{name}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main(command: list[str]) -> int:
    if binaries() is None:
        sys.stdout.write(f"Skipped: {HOW_TO_GET}\n")
        return 1 if os.environ.get("REQUIRE_SERVICES") == "1" else 0
    with running() as url:
        return subprocess.run(command, env={**os.environ, "DATABASE_URL": f"{url}/postgres"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
