"""Slow work that a session needs before it opens, done beside the engine thread.

The session's stream makes the thread. It ends with the work, which has a bound of its own; a
process that ends does not wait for it. At most ``MAX_AT_ONCE`` run at once.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from amusd.engine.interface import Engine
from amusd.protocol.errors import LimitExceededError
from amusd.sampling.parameters import SequenceSampling

MAX_AT_ONCE = 2
_MAX_WAIT_SECONDS = 60.0

Result = TypeVar("Result")


def constraint_preparation(worker: Any, opening: Any) -> Callable[[], object] | None:
    """Return the work of compiling the constraint of an opening; None: it has none."""
    sampling: SequenceSampling = opening.sampling
    if sampling.parameters.constraint is None:
        return None
    engine: Engine = worker.engine
    return partial(engine.prepare, sampling)


class Preparations:
    """Runs the preparations of one service's sessions. It belongs to the event loop."""

    def __init__(self, max_wait_seconds: float = _MAX_WAIT_SECONDS) -> None:
        """Let a session wait for its turn for at most ``max_wait_seconds``."""
        self._max_wait_seconds = max_wait_seconds
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Return ``work()``, computed on a thread. If the caller leaves, it goes on to its end.

        Raises:
            LimitExceededError: other sessions take all turns.
        """
        try:
            async with asyncio.timeout(self._max_wait_seconds):
                await self._turns.acquire()
        except TimeoutError:
            raise LimitExceededError(
                "other sessions prepare their constraints: try again, or use another replica"
            ) from None
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()

        def finish(set_outcome: Callable[[], None]) -> None:
            self._turns.release()
            if not done.cancelled():
                set_outcome()

        def run() -> None:
            try:
                outcome = partial(done.set_result, work())
            except BaseException as error:
                outcome = partial(done.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(finish, outcome)

        threading.Thread(target=run, name="prepare-session", daemon=True).start()
        return await done
