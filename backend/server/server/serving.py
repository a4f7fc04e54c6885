"""Where and by how many processes the application is served, and what is said then, whichever server does it."""

from __future__ import annotations

import logging
import sys
from typing import NamedTuple

from django.conf import settings

from server import environment as env


class Serving(NamedTuple):
    """threads: of each process, beside the event loop if it has one."""

    host: str
    port: int
    workers: int
    threads: int

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def wanted() -> Serving:
    """What the environment asks for. Raises ImproperlyConfigured."""
    return Serving(
        host=env.text("BIND_ADDRESS", "127.0.0.1"),
        port=env.number("PORT", 8000),
        workers=env.number("WEB_CONCURRENCY", 2),
        threads=env.number("WEB_THREADS", 8),
    )


def batch_workers() -> int:
    """How many processes beside the server score batch jobs. Raises ImproperlyConfigured."""
    return env.number("BATCH_WORKERS", 1, least=0)


def announce(address: str) -> None:
    """Say where to look: on the console in development, else in the log."""
    if not settings.DEBUG:
        logging.getLogger("server").info("Serving on %s", address)
        return
    root = f"http://{address}"
    sys.stdout.write(
        f"\nServing on {root}   (Ctrl-C stops it)\n"
        f"  API, to read and try   {root}/api/docs\n"
        f"  Admin                  {root}/admin/   (make admin creates the first user)\n"
        f"  Ready?                 {root}/readyz\n\n"
    )
    sys.stdout.flush()
