"""Logging of the services: lines on standard error, never a prompt or an output."""

import logging
from enum import StrEnum

from amusd.library_output import adopt_loggers, log_warnings
from amusd.observe.log_format import LogFormat, make_formatter


class LogLevel(StrEnum):
    """Lowest level of the messages that are logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def start_logging(role: str, level: LogLevel, log_format: LogFormat = LogFormat.TEXT) -> None:
    """Write log lines of ``level`` and above to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(make_formatter(log_format, role))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    adopt_loggers()
    log_warnings()
