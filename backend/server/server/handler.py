"""Django's request handler, which no header that a client sends may bring down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """A whole answer as a list, which servers send at once, where they would ask anything else for its pieces."""
        response = super().__call__(environ, start_response)
        if getattr(response, "streaming", True):  # or the server's own wrapper of a file
            return response
        body = [response.content]
        response.close()
        return body
