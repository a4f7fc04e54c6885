"""Bodies as clients send them; whatever is wrong with one is the client's error and not the server's."""

from __future__ import annotations

from typing import Any, BinaryIO

from rest_framework import parsers
from rest_framework.exceptions import ParseError


class CountingStream:
    """A stream that knows how many bytes were read from it."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.bytes_read = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.bytes_read += len(data)
        return data


class WholeBody:
    """Refuses a body that broke off on its way: what is left of a form still reads as one, with fewer customers."""

    def parse(self, stream: BinaryIO, media_type: str, parser_context: dict[str, Any]) -> Any:
        counting = CountingStream(stream)
        parsed = super().parse(counting, media_type, parser_context)
        announced = int(parser_context["request"].META.get("CONTENT_LENGTH") or 0)
        if counting.bytes_read < announced:
            raise ParseError(f"The body broke off after {counting.bytes_read:,} of {announced:,} bytes; send it again.")
        return parsed


class JSONBody(WholeBody, parsers.JSONParser):
    """JSON. NaN and Infinity pass, so that the schema can name the field that holds them."""

    strict = False

    def parse(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse(*args, **kwargs)
        except RecursionError:
            raise ParseError("JSON parse error - nested too deeply.") from None


class FormBody(WholeBody, parsers.FormParser):
    """name=value&name=value"""


class MultipartBody(WholeBody, parsers.MultiPartParser):
    """Fields and files."""
