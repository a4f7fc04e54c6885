"""How gunicorn serves: `make serve` and the production example both use this file."""

import logging
import os

bind = f"127.0.0.1:{os.environ.get('PORT', '8000')}"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
worker_class = "gthread"
threads = int(os.environ.get("WEB_THREADS", "8"))
timeout = 120
graceful_timeout = 30
keepalive = 30
# One line per request is the application's own log.
accesslog = None
loglevel = "warning"


def post_worker_init(worker):
    """Say where to look, once the first worker has loaded the models."""
    if worker.age != 1:
        return
    root = f"http://{bind}"
    logging.getLogger("gunicorn.error").warning(
        "\n\nServing on %s  (Ctrl-C stops it)\n"
        "  API, to read and try   %s/api/docs\n"
        "  Admin                  %s/admin/   (make admin creates the first user)\n"
        "  Ready?                 %s/readyz\n",
        *[root] * 4,
    )
