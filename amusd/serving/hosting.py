"""A draft or verify service from start to end: its server and its engine thread."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

from amusd.protocol.errors import AmusdError
from amusd.rpc.server import ServiceShell
from amusd.serving.engine_health import EngineHealth
from amusd.serving.engine_thread import EngineThread, Work
from amusd.serving.watchdog import Watchdog

log = logging.getLogger(__name__)

_THREAD_STOP_SECONDS = 5.0
_LEAST_STOP_SECONDS = 0.5
_SWITCH_INTERVAL_SECONDS = 0.0005


async def run_engine_service(
    shell: ServiceShell,
    thread: EngineThread[Work],
    describe: Callable[[Work], str],
    end_with_stdin: bool,
    health: EngineHealth | None = None,
) -> None:
    """Serve until a signal comes, or the engine thread fails.

    Args:
        shell: the server, its servicer added already.
        thread: the engine thread, not started yet.
        describe: one line for the log about what the worker serves.
        end_with_stdin: end when standard input closes, too.
        health: the health that the worker keeps up to date; a watchdog follows it.

    Raises:
        AmusdError: the port is taken, the model cannot be loaded, or the engine failed.
    """
    # The event loop must get its turn soon while the engine thread computes.
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    thread.postbox.attach()
    with shell.signals_handled(end_with_stdin):
        await shell.start()
        thread.start()
        async with _watched(shell, thread, health):
            try:
                await _serve(shell, thread, describe)
            finally:
                await _stop(shell, thread)


@contextlib.asynccontextmanager
async def _watched(
    shell: ServiceShell, thread: EngineThread[Work], health: EngineHealth | None
) -> AsyncIterator[None]:
    """Run a watchdog while the service serves and stops."""
    if health is None:
        yield
        return
    watching = asyncio.create_task(Watchdog(shell, thread, health).run())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _stop(shell: ServiceShell, thread: EngineThread[Work]) -> None:
    """Stop the server, then the thread; a pass that hangs is left behind within the grace."""
    loop = asyncio.get_running_loop()
    grace_ends = loop.time() + shell.grace_seconds
    await shell.stop()
    left = max(_LEAST_STOP_SECONDS, min(_THREAD_STOP_SECONDS, grace_ends - loop.time()))
    if not thread.ready.done():
        left = 0.0  # a model that still loads cannot be interrupted; the process ends without it
    if not await asyncio.to_thread(thread.stop, left) and thread.ready.done():
        log.warning("the engine thread does not end: the process ends without it")


async def _serve(
    shell: ServiceShell, thread: EngineThread[Work], describe: Callable[[Work], str]
) -> None:
    ended: asyncio.Future[None] = asyncio.ensure_future(shell.wait_for_end())
    ready: asyncio.Future[Work] = asyncio.wrap_future(thread.ready)
    failed: asyncio.Future[None] = asyncio.wrap_future(thread.failed)
    try:
        await asyncio.wait(_futures(ready, ended), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            log.info("ending before the model has loaded")
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
