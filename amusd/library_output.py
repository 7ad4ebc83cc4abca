"""Keeps the bars, advice and log lines of model libraries out of our own output.

Transformers and the hub's client write to standard error by themselves: progress bars, retries,
warnings. In a service these become lines of its log. A command shows its own bars and errors only.
"""

import logging
import os
import sys
import warnings

_LIBRARIES = ("transformers", "huggingface_hub", "httpx", "httpx2", "httpcore", "filelock")


def silence_bars() -> None:
    """Switch off the bars and advice of libraries, before any of them is imported.

    A value in the environment wins.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def silence_log() -> None:
    """Show only errors of libraries, before any of them is imported; for commands."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def log_warnings() -> None:
    """Turn Python's warnings into lines of the log; for services."""
    logging.captureWarnings(True)
    warnings.formatwarning = _one_line


def adopt_loggers() -> None:
    """Send what libraries log to the handlers of the root logger alone; for services.

    Each library sets up its logger when it is imported, or later. So its logger ignores that.
    """
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.__class__ = _AdoptedLogger
        logger.setLevel(logging.WARNING)  # they log every request at INFO


class _AdoptedLogger(logging.Logger):
    """A logger without handlers of its own, and never more talkative than the service."""

    propagate = property(lambda self: True, lambda self, value: None)

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802  # logging's own name
        """Keep the messages to the root logger's handlers."""

    def setLevel(self, level: int | str) -> None:  # noqa: N802  # logging's own name
        """Set the level, or the root logger's if that is higher."""
        super().setLevel(level)
        super().setLevel(max(self.level, logging.getLogger().level, logging.WARNING))


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return f"{category.__name__}: {' '.join(str(message).split())}"


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line; without a message its type."""
    return " ".join(str(error).split()) or type(error).__name__


def root_of(error: BaseException) -> BaseException:
    """Return the exception that says why a library could not load something.

    Where a package is missing, that is the cause: libraries hide it behind a general message.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError):
            error = cause
        cause = cause.__cause__ or cause.__context__
    return error


def cause_of(error: BaseException) -> str:
    """Return the first line of why a library could not load something."""
    error = root_of(error)
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
