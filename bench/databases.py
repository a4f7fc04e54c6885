"""Run a script of this folder against a SQLite file and a PostgreSQL of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

BACKEND = Path(__file__).resolve().parents[1] / "backend/server"
sys.path.insert(0, str(BACKEND))

from tests import postgresql  # noqa: E402

SETTINGS = {"DJANGO_SETTINGS_MODULE": "server.settings", "DEBUG": "1", "LOG_LEVEL": "WARNING"}


def on_each(script: str) -> None:
    """Start it again with its own arguments, `--name` and DATABASE_URL; PostgreSQL only where it is installed."""
    tempfile.tempdir = "/var/tmp"  # /tmp may be memory, in which a durable write costs nothing
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        databases = {"SQLite": f"sqlite:///{folder}/bench.sqlite3"}
        if postgresql.binaries():
            databases["PostgreSQL"] = postgresql.new_database(stack.enter_context(postgresql.running(durable=True)))
        for name, url in databases.items():
            subprocess.run(
                [sys.executable, script, *sys.argv[1:], "--name", name],
                env={**os.environ, **SETTINGS, "DATABASE_URL": url, "BATCH_DIR": folder, "PYTHONPATH": str(BACKEND)},
                check=True,
            )
