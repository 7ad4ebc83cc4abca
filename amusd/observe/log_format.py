"""Formats of log lines: text, or JSON for collectors. A line names its session if it has one."""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum

current_session: ContextVar[str] = ContextVar("current_session", default="")
"""Name of the session of the running task."""


class LogFormat(StrEnum):
    """Format of a service's log."""

    TEXT = "text"
    JSON = "json"


class TextFormatter(logging.Formatter):
    """Lines of time, level, service, message, fields and session."""

    def __init__(self, service: str) -> None:
        """Format lines of ``service``."""
        super().__init__(f"%(asctime)s %(levelname)s {service} %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """Return the line without a traceback."""
        fields: dict[str, object] = getattr(record, "fields", {})
        parts = [super().formatMessage(record)]
        parts += [f"{name}={value}" for name, value in fields.items()]
        session = current_session.get()
        if session:
            parts.append(f"session={session!a}")  # clients choose the name: escape line breaks
        return " ".join(parts)


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def __init__(self, service: str) -> None:
        """Format lines of ``service``."""
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Return the object: time, level, service, logger, message, session, fields, traceback."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        session = current_session.get()
        if session:
            line["session"] = session
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def make_formatter(log_format: LogFormat, service: str) -> logging.Formatter:
    """Return the formatter of a service for ``log_format``."""
    return JsonFormatter(service) if log_format is LogFormat.JSON else TextFormatter(service)
