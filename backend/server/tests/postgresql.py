"""A PostgreSQL of the tests' own: started in a temporary folder on a free port, gone afterwards.

As a command it runs another one with DATABASE_URL set: `python postgresql.py pytest ...`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def running(durable: bool = False) -> Iterator[str]:
    """Yields the server's URL, without a database's name. Unless durable, a power failure may damage it."""
    programs = binaries()
    if programs is None:
        raise RuntimeError(HOW_TO_GET)
    # PostgreSQL refuses to run as root.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="retention-postgresql-"))
    data, port = folder / "data", free_port()
    if as_user:
        shutil.chown(folder, "postgres")
    folder.chmod(0o755)

    def control(*arguments: str) -> None:
        command = [*as_user, str(programs / "pg_ctl"), "-D", str(data), "-w", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    try:
        subprocess.run(
            [*as_user, str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "postgres", "-E", "UTF8"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        settings = f"-p {port} -k {folder} -c fsync={'on' if durable else 'off'} -c max_connections=200"
        control("-o", settings, "-l", str(folder / "log"), "start")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}"
        finally:
            control("-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
