"""Bodies as clients send them; whatever is wrong with one is the client's error and not the server's."""

from __future__ import annotations

import shutil
import tempfile
from typing import Any, BinaryIO

from django.core.files.uploadedfile import TemporaryUploadedFile, UploadedFile
from django.core.files.uploadhandler import FileUploadHandler, TemporaryFileUploadHandler
from django.http import QueryDict
from django.utils.datastructures import MultiValueDict
from rest_framework import parsers
from rest_framework.exceptions import ParseError

from apps.endpoints import job_files, json_text
from apps.endpoints.storage import BLOCK


class CountingStream:
    """A stream that knows how many bytes were read from it."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.bytes_read = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.bytes_read += len(data)
        return data


def _check_whole(read: int, context: dict[str, Any]) -> None:
    """Refuse a body that broke off on its way: what is left of a form still reads as one, with fewer customers."""
    announced = int(context["request"].META.get("CONTENT_LENGTH") or 0)
    if read < announced:
        raise ParseError(f"The body broke off after {read:,} of {announced:,} bytes; send it again.")


class WholeBody:
    """For forms, whose parsers read from a stream."""

    def parse(self, stream: BinaryIO, media_type: str, parser_context: dict[str, Any]) -> Any:
        counting = CountingStream(stream)
        parsed = super().parse(counting, media_type, parser_context)
        _check_whole(counting.bytes_read, parser_context)
        return parsed


class JSONBody(parsers.JSONParser):
    """JSON. NaN and Infinity pass, so that the schema can name the field that holds them."""

    def parse(self, stream: BinaryIO, media_type: str, parser_context: dict[str, Any]) -> Any:
        encoding = parsers.get_encoding(parser_context)
        body = stream.read()
        _check_whole(len(body), parser_context)
        try:
            return json_text.loads(body, encoding)
        except ValueError as error:
            raise ParseError(f"JSON parse error - {error}") from None
        except RecursionError:
            raise ParseError("JSON parse error - nested too deeply.") from None


class FormBody(WholeBody, parsers.FormParser):
    """name=value&name=value"""


class MultipartBody(WholeBody, parsers.MultiPartParser):
    """Fields and files."""


class CsvBody(parsers.BaseParser):
    """A CSV as the whole body, which becomes the field `file` of a form."""

    media_type = "text/csv"

    def parse(self, stream: BinaryIO, media_type: str, parser_context: dict[str, Any]) -> parsers.DataAndFiles:
        counting = CountingStream(stream)
        upload = _Upload("body.csv", self.media_type, 0)
        shutil.copyfileobj(counting, upload.file, BLOCK)
        _check_whole(counting.bytes_read, parser_context)
        upload.size = counting.bytes_read
        upload.seek(0)
        return parsers.DataAndFiles(QueryDict(), MultiValueDict({"file": [upload]}))


class _Upload(TemporaryUploadedFile):
    """On the disk where jobs keep their files, so that one that becomes a job need not be copied."""

    def __init__(
        self,
        name: str,
        content_type: str,
        size: int,
        charset: str | None = None,
        content_type_extra: dict[str, str] | None = None,
    ):
        file = tempfile.NamedTemporaryFile(dir=job_files.uploads(), suffix=job_files.UPLOAD)  # noqa: SIM115
        UploadedFile.__init__(self, file, name, content_type, size, charset, content_type_extra)


class UploadOnDisk(TemporaryFileUploadHandler):
    """Streams a file to disk, in place of Django's handler, which takes the folder for temporary files."""

    def new_file(self, *args: Any, **kwargs: Any) -> None:
        FileUploadHandler.new_file(self, *args, **kwargs)
        self.file = _Upload(self.file_name, self.content_type, 0, self.charset, self.content_type_extra)
