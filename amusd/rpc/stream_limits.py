"""Ground that the servicers of sessions share: names, and streams that stay bounded."""

import asyncio
from concurrent.futures import Future
from typing import Any

from amusd.protocol.errors import InvalidInputError

MAX_SESSION_ID = 128
MAX_MESSAGES_WAITING = 1024
_COMMANDS_BETWEEN_WAITS = 256


def check_session_id(session_id: str) -> None:
    """Raise InvalidInputError if this cannot name a session."""
    if not 1 <= len(session_id) <= MAX_SESSION_ID:
        raise InvalidInputError(
            f"session_id has {len(session_id)} characters: use 1 to {MAX_SESSION_ID}"
        )


class CommandWindow:
    """Bounds the commands that one stream has under way, without waiting for each of them.

    Waiting for each would let a pass begin with only the first of many proposals.
    """

    def __init__(self) -> None:
        """Start with nothing under way."""
        self._num_submitted = 0

    async def passed(self, command: "Future[Any]") -> None:
        """Take note of a command; now and then wait until the engine thread has caught up."""
        self._num_submitted += 1
        if self._num_submitted % _COMMANDS_BETWEEN_WAITS == 0:
            await asyncio.wrap_future(command)
