"""Ends a session when something unexpected fails in its work. No other session is touched."""

import logging

from amusd.protocol.errors import AmusdError, InternalError
from amusd.serving.sequence import Sequence

log = logging.getLogger(__name__)

EXITS = (KeyboardInterrupt, SystemExit)
"""Exceptions that end the process. Any other one ends a session at most."""


def end_session(sequence: Sequence, error: BaseException, doing: str) -> AmusdError:
    """End a session with ``error``; return the error that its stream gets.

    An unexpected exception is logged with its traceback, and becomes INTERNAL. ``doing`` says what
    failed, such as "scheduling".
    """
    if not isinstance(error, AmusdError):
        log.error("%s session %s failed", doing, sequence.session_id, exc_info=error)
        error = session_error(error, doing)
    sequence.fail(error)
    return error


def session_error(error: BaseException, doing: str) -> AmusdError:
    """Return the error of a session in which ``error`` was raised.

    The error names only the type: the message of an unknown exception may quote the input.
    """
    return InternalError(
        f"the engine failed while {doing} this session ({type(error).__name__}): the log of the "
        "service says why"
    )
