"""What a worker tells of its passes, whoever listens."""

from collections.abc import Callable

OnPass = Callable[[float, int], None]
"""Is told of each pass or step: its seconds, and how many sessions shared it."""


def ignore_pass(seconds: float, num_sessions: int) -> None:
    """Do nothing: nobody listens."""
