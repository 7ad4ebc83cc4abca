"""The callback through which a worker reports its passes."""

from collections.abc import Callable

OnPass = Callable[[float, int], None]
"""Called after each pass or step with its seconds and its batch size."""


def ignore_pass(seconds: float, num_sessions: int) -> None:
    """Do nothing; the callback of a worker without metrics."""
