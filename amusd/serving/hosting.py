"""Where server and engine meet: a service from start to end, and a session from open to close."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

from amusd.protocol.errors import AmusdError, UnavailableError
from amusd.rpc.server import ServiceShell
from amusd.serving.engine_thread import EngineThread, Work

log = logging.getLogger(__name__)

_THREAD_STOP_SECONDS = 5.0
_SWITCH_INTERVAL_SECONDS = 0.0005


async def run_engine_service(
    shell: ServiceShell,
    thread: EngineThread[Work],
    describe: Callable[[Work], str],
    end_with_stdin: bool,
) -> None:
    """Serve until a signal comes, or the engine fails.

    Args:
        shell: the server, its servicer added already.
        thread: the engine thread, not started yet.
        describe: one line for the log about what the worker serves.
        end_with_stdin: end when standard input closes, too.

    Raises:
        AmusdError: the port is taken, the model cannot be loaded, or the engine failed.
    """
    # The event loop must get its turn soon while the engine thread computes.
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    with shell.signals_handled(end_with_stdin):
        await shell.start()
        thread.start()
        try:
            await _serve(shell, thread, describe)
        finally:
            await shell.stop()
            await asyncio.to_thread(thread.stop, _THREAD_STOP_SECONDS)


async def _serve(
    shell: ServiceShell, thread: EngineThread[Work], describe: Callable[[Work], str]
) -> None:
    ended: asyncio.Future[None] = asyncio.ensure_future(shell.wait_for_end())
    ready: asyncio.Future[Work] = asyncio.wrap_future(thread.ready)
    failed: asyncio.Future[None] = asyncio.wrap_future(thread.failed)
    try:
        await asyncio.wait(_futures(ready, ended), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            return
        log.info("serving %s", describe(ready.result()))
        await shell.set_ready()
        await asyncio.wait(_futures(ended, failed), return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            await shell.fail("the engine of this replica failed: use another one")
            raise AmusdError("the engine failed, the log says why: restart the service")
    finally:
        for waiting in (ended, ready, failed):
            waiting.cancel()


def _futures(*futures: "asyncio.Future[Any]") -> list["asyncio.Future[Any]"]:
    return list(futures)


@contextlib.asynccontextmanager
async def opened_session(
    thread: EngineThread[Work],
    open_it: Callable[[Work], None],
    close_it: Callable[[Work], None],
    give_up: Callable[[Work], None],
    max_wait_seconds: float,
) -> AsyncIterator[None]:
    """Open a session on the engine thread, and close it at the end if it was opened at all.

    After ``max_wait_seconds`` it is told to give up, in case it still waits for memory. The close
    is not waited for, so that a cancelled call ends at once; it runs after all that was submitted
    before it.
    """
    opened = thread.submit(open_it)

    def close(worker: Work) -> None:
        if not opened.cancelled() and opened.exception() is None:
            close_it(worker)

    def submit(command: Callable[[Work], None]) -> None:
        # If the thread is ending, the cache goes with it.
        with contextlib.suppress(UnavailableError):
            thread.submit(command)

    timer: asyncio.TimerHandle | None = None
    try:
        await asyncio.wrap_future(opened)
        timer = asyncio.get_running_loop().call_later(max_wait_seconds, submit, give_up)
        yield
    finally:
        if timer is not None:
            timer.cancel()
        submit(close)
