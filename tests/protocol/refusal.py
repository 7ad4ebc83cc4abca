"""The law of illegal events: they raise, and change nothing."""

import contextlib
import copy
from collections.abc import Iterator

import pytest

from amusd.protocol.draft_session import DraftSession
from amusd.protocol.errors import AmusdError, PreconditionError
from amusd.protocol.ledger import Ledger
from amusd.protocol.verify_session import VerifySession

Part = Ledger | VerifySession | DraftSession


def state_of(part: Part) -> dict[str, object]:
    """Return a copy of all that ``part`` holds."""
    return copy.deepcopy({name: getattr(part, name) for name in type(part).__slots__})


@contextlib.contextmanager
def unchanged(part: Part) -> Iterator[None]:
    """Expect that nothing changes."""
    before = state_of(part)
    yield
    assert state_of(part) == before
    part.check_integrity()


@contextlib.contextmanager
def refused(part: Part, words: str, error: type[AmusdError] = PreconditionError) -> Iterator[None]:
    """Expect ``error`` with ``words`` in its message, and that nothing changes."""
    with unchanged(part), pytest.raises(error, match=words):
        yield
