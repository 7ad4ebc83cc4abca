"""Whether a checkpoint holds the weights that its configuration asks for.

Transformers fills weights that are missing with random numbers, and leaves out those that it does
not know. Both give a model that decodes nonsense without an error.
"""

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)

_REPORTERS = ("transformers.modeling_utils", "transformers.utils.loading_report")


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """Keep Transformers from logging tables about the weights while it loads a model."""
    loggers = [logging.getLogger(name) for name in _REPORTERS]
    # A filter, not a level: at a high level Transformers starts other reports.
    for logger in loggers:
        logger.addFilter(_nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def refuse_wrong_weights(name: str, report: Mapping[str, Collection[Any]]) -> None:
    """Check the loading report of Transformers for the model ``name``; log what is left out.

    Raises:
        ValueError: a weight is missing or has another shape than the configuration asks for.
    """
    mismatched = sorted(report.get("mismatched_keys") or ())
    if mismatched:
        key, found, expected = mismatched[0]
        raise ValueError(
            f"config.json does not fit the weights: {key} is {list(found)} in the weights, "
            f"{list(expected)} by config.json{_and_more(mismatched)}"
        )
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise ValueError(
            "config.json does not fit the weights: it asks for "
            f"{missing[0]}{_and_more(missing)}, which the weights lack"
        )
    unused = sorted(report.get("unexpected_keys") or ())
    if unused:
        log.warning(
            "%s: the model by config.json does not use %s%s of its weights: check config.json",
            name,
            unused[0],
            _and_more(unused),
        )


def _and_more(keys: Collection[Any]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""
