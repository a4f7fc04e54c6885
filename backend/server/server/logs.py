"""How a log line looks: for people on a console, or one JSON object per line."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
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


_requests = logging.getLogger("requests")


def request(method: str, path: str, status: int, began: float) -> None:
    """The line of an answered request, as structlog would log it, but made quickly. began: by `time.perf_counter`."""
    if not _requests.isEnabledFor(logging.INFO):
        return
    ms = round((time.perf_counter() - began) * 1000, 1)
    seconds, rest = divmod(time.time_ns() // 1000, 1_000_000)
    timestamp = f"{_to_the_second(seconds)}.{rest:06}Z"
    line = {"method": method, "path": path, "status": status, "ms": ms, "event": "request"}
    _pass_on(_requests, logging.INFO, line | {"level": "info", "logger": _requests.name, "timestamp": timestamp})


@lru_cache(1)
def _to_the_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """For lines of the standard library; those of structlog are whole and need only be rendered."""

    def __init__(self, rendering: Sequence[Processor], quickly: Callable[[EventDict], str | None], **kwargs: Any):
        """quickly: a faster way to render a line, None for a line that it does not take."""
        super().__init__(processors=[self.remove_processors_meta, *rendering], **kwargs)
        self._rendering, self._quickly = rendering, quickly

    def format(self, record: logging.LogRecord) -> str:
        if not getattr(record, "is_structured", False):
            return super().format(record)
        if text := self._quickly(record.msg):
            return text
        line = record.msg.copy()
        for render in self._rendering:
            line = render(None, record.levelname.lower(), line)
        return line


_PLAIN = {str, int, float, bool, NoneType}
_encode = msgspec.json.Encoder().encode


def _plain_json(line: EventDict) -> str | None:
    """By msgspec; None for what is not plain or not ASCII, which stderr may not be able to say, and for a traceback."""
    if "exc_info" not in line and all(type(value) in _PLAIN for value in line.values()):
        with suppress(UnicodeEncodeError):  # half a surrogate pair
            text = _encode(line)
            if text.isascii():
                return text.decode()
    return None


def formatter(kind: str) -> logging.Formatter:
    """For lines of structlog and of the standard library alike."""
    # A plain traceback names files and lines; a richer one would print local variables, customers among them.
    console = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    to_json = structlog.processors.JSONRenderer(separators=(",", ":"))
    rendering, quickly = {
        "console": ([console], lambda line: None),
        "json": ([structlog.processors.format_exc_info, to_json], _plain_json),
    }[kind]
    return _Formatter(rendering, quickly, foreign_pre_chain=_PROCESSORS)
