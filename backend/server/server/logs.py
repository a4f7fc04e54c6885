"""How a log line looks: for people on a console, or one JSON object per line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NoReturn

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
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *_PROCESSORS, _handle],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def _handle(logger: logging.Logger, method: str, line: EventDict) -> NoReturn:
    """Give a line to the handlers, without looking up first which code it comes from, as no format says that."""
    record = logging.LogRecord(logger.name, structlog.stdlib.NAME_TO_LEVEL[method], "", 0, line, (), None)
    record.is_structured = True
    logger.handle(record)
    raise structlog.DropEvent


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """For lines of the standard library; those of structlog are whole and need only be rendered."""

    def __init__(self, rendering: Sequence[Processor], **kwargs: Any):
        super().__init__(processors=[self.remove_processors_meta, *rendering], **kwargs)
        self._rendering = rendering

    def format(self, record: logging.LogRecord) -> str:
        if not getattr(record, "is_structured", False):
            return super().format(record)
        line = dict(record.msg)
        for render in self._rendering:
            line = render(None, record.levelname.lower(), line)
        return line


def formatter(kind: str) -> logging.Formatter:
    """For lines of structlog and of the standard library alike."""
    # A plain traceback names files and lines; a richer one would print local variables, customers among them.
    rendering = {
        "console": [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)],
        "json": [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
    }
    return _Formatter(rendering[kind], foreign_pre_chain=_PROCESSORS)
