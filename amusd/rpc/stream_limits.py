"""Limits that keep the streams of sessions bounded."""

from amusd.protocol.errors import InvalidInputError

MAX_SESSION_ID = 128
MAX_MESSAGES_WAITING = 1024
COMMANDS_BETWEEN_WAITS = 256
"""Commands that a stream may have under way. Waiting for each of them would let a batch begin
with only the first of many proposals."""


def check_session_id(session_id: str) -> None:
    """Raise InvalidInputError if this cannot name a session."""
    if not 1 <= len(session_id) <= MAX_SESSION_ID:
        raise InvalidInputError(
            f"session_id has {len(session_id)} characters: use 1 to {MAX_SESSION_ID}"
        )
