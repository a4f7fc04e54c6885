"""How a log line looks: for people on a console, or one JSON object per line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from types import NoneType
from typing import Any, NoReturn

import msgspec
import structlog
from structlog.typing import EventDict, Processor

FORMATS = ("console", "json")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_PROCESSORS = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure() -> None:
    """Send structlog's lines through the standard library's handlers."""
    # No format says them, and to look them up costs a tenth of a line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *_PROCESSORS, _handle],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def _handle(logger: logging.Logger, method: str, line: EventDict) -> NoReturn:
    _pass_on(logger, structlog.stdlib.NAME_TO_LEVEL[method], line)
    raise structlog.DropEvent


def _pass_on(logger: logging.Logger, level: int, line: EventDict) -> None:
    """Give a line to the handlers, without looking up first which code it comes from, as no format says that."""
    record = logging.LogRecord(logger.name, level, "", 0, line, (), None)
    record.is_structured = True
    logger.handle(record)


def info(logger: logging.Logger, event: str, **values: Any) -> None:
    """What `structlog.get_logger(...).info(event, **values)` logs, for half the price: a line that comes often."""
    if logger.isEnabledFor(logging.INFO):
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        line = {**values, "event": event, "level": "info", "logger": logger.name, "timestamp": now}
        _pass_on(logger, logging.INFO, line)


_requests = logging.getLogger("requests")


def request(method: str, path: str, status: int, began: float) -> None:
    """The line of an answered request. began: by `time.perf_counter`."""
    ms = round((time.perf_counter() - began) * 1000, 1)
    info(_requests, "request", method=method, path=path, status=status, ms=ms)


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """For lines of the standard library; those of structlog are whole and need only be rendered."""

    def __init__(self, rendering: Sequence[Processor], **kwargs: Any):
        super().__init__(processors=[self.remove_processors_meta, *rendering], **kwargs)
        self._rendering = rendering

    def format(self, record: logging.LogRecord) -> str:
        if not getattr(record, "is_structured", False):
            return super().format(record)
        line = record.msg.copy()
        for render in self._rendering:
            line = render(None, record.levelname.lower(), line)
        return line


_PLAIN = {str, int, float, bool, NoneType}
_encode = msgspec.json.Encoder().encode


def _json(line: EventDict, default: Callable[[Any], Any]) -> str:
    """JSON in ASCII, whatever stderr's encoding is: by msgspec what is plain, and the rest by the standard library."""
    if all(type(value) in _PLAIN for value in line.values()):
        with suppress(UnicodeEncodeError):  # half a surrogate pair
            text = _encode(line)
            if text.isascii():
                return text.decode()
    return json.dumps(line, default=default, separators=(",", ":"))


def formatter(kind: str) -> logging.Formatter:
    """For lines of structlog and of the standard library alike."""
    # A plain traceback names files and lines; a richer one would print local variables, customers among them.
    rendering = {
        "console": [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)],
        "json": [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json)],
    }
    return _Formatter(rendering[kind], foreign_pre_chain=_PROCESSORS)
