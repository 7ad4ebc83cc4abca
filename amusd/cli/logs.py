"""Logging of the services: lines on standard error, never a prompt or an output."""

import logging
from enum import StrEnum


class LogLevel(StrEnum):
    """How much a service says."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def start_logging(role: str, level: LogLevel) -> None:
    """Write log lines of ``level`` and above to standard error."""
    logging.basicConfig(level=level.upper(), format=f"%(asctime)s %(levelname)s {role} %(message)s")
    # Model loaders of the hub announce every request at INFO.
    for name in ("httpx", "httpx2", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
