"""The ASGI application: known callers' predictions on the server's event loop, and all else in threads."""

import os

from server import serving, wsgi
from server.bridge import Bridge

# On the loop nothing but the journal asks the database, on a connection of its own, and when it need not wait.
os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"

application = Bridge(wsgi.application, serving.wanted().threads)
