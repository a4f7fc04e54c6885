"""How gunicorn serves, for those who prefer it to serve.py."""

import os
import signal
import sys
from pathlib import Path

chdir = str(Path(__file__).resolve().parent)
sys.path.insert(0, chdir)
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "server.settings")

from django.conf import settings  # noqa: E402
from django.core.exceptions import ImproperlyConfigured  # noqa: E402
from gunicorn.workers.gthread import ThreadWorker  # noqa: E402

from server import serving  # noqa: E402

try:
    # Before any process is started, so that a setting that cannot be read stops it with a sentence.
    # Errors only: gunicorn's warnings quote requests that it cannot read, and with them customers.
    gunicorns = {name: {"level": "ERROR", "propagate": True} for name in ("gunicorn.error", "gunicorn.http.wsgi")}
    logconfig_dict = {**settings.LOGGING, "loggers": {**settings.LOGGING["loggers"], **gunicorns}}
    asked = serving.wanted()
    bind, workers, threads = asked.address, asked.workers, asked.threads
except ImproperlyConfigured as error:
    sys.exit(str(error))


class Worker(ThreadWorker):
    """Ctrl-C ends it at once, also while a client is slow to send; SIGTERM is what lets requests end first."""

    def handle_quit(self, sig, frame):
        # gunicorn's own would take locks here that the interrupted code may hold.
        os._exit(0)


worker_class = Worker
# A process that gives no sign of life for so long is replaced. A slow request does not count: it has a thread.
timeout = 120
# How long a stopping server goes on with the requests that it has accepted.
graceful_timeout = 30
# Longer than nginx keeps its idle connections (60 s), so that it never writes into one that closes.
keepalive = 75
# The application logs one line per request itself.
accesslog = None
# It would be one socket in the home folder for all of a user's servers.
control_socket_disable = True


def when_ready(server):
    """In development a closed terminal ends the server as Ctrl-C does; to gunicorn its signal says: reload."""
    if settings.DEBUG:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGINT))


def post_worker_init(worker):
    """Say where to look, once the first process has loaded the models; one that replaces it says nothing."""
    if worker.age > 1:
        return
    serving.announce(", ".join(worker.cfg.bind))
