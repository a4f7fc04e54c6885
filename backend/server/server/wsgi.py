"""The WSGI application. Starting it registers the newest training run and loads what is served."""

import gc
import logging
import os

import django
from django.conf import settings
from django.core.cache import close_caches
from django.core.signals import request_finished, request_started
from django.db import reset_queries

from apps.endpoints import checkpoints
from server.handler import Handler

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "server.settings")
django.setup(set_prefix=False)
application = Handler()


def fill_registry() -> None:
    """A missing model, or a database that is not ready, is said in the log and by /readyz; the server starts."""
    from django.db import Error, connections

    from apps.ml.artifacts import ArtifactError
    from apps.ml.registry import registry

    logger = logging.getLogger("server.wsgi")
    try:
        try:
            registry.register_newest_run()
        except ArtifactError as error:
            logger.warning("%s", error)
        registry.warm()
    except Error as error:
        logger.error("The database is not ready (%s). Apply migrations with `python manage.py migrate`.", error)
    finally:
        connections.close_all()


fill_registry()
checkpoints.begin()

# What Django looks after at each request, and nothing here keeps: a list of queries, and connections to caches.
if not settings.DEBUG:
    request_started.disconnect(reset_queries)
request_finished.disconnect(close_caches)

# What is loaded now stays. A full collection looked at all of it, for 150 ms in the middle of somebody's request; now
# it is left out, and the collector comes a thirtieth as often.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 10, 10)
