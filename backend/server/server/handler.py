"""Django's request handler, which no header that a client sends may bring down."""

from __future__ import annotations

from typing import Any

from django.core.handlers.wsgi import WSGIHandler, WSGIRequest


class Request(WSGIRequest):
    def _set_content_type_params(self, environ: dict[str, Any]) -> None:
        """Django raises where no error handler is near; a header that cannot be read is taken for none."""
        try:
            super()._set_content_type_params(environ)
        except ValueError:
            environ["CONTENT_TYPE"] = ""
            super()._set_content_type_params(environ)


class Handler(WSGIHandler):
    request_class = Request
