"""The watchdog of an engine thread: it takes a service out of use while its engine is of no use.

- A pass *hangs* if it takes longer than ``EngineHealth.max_pass_seconds``. Then the service is
  NOT_SERVING, and its sessions end with UNAVAILABLE, so that other replicas can take them.
- An engine *fails* if a test of it failed (``EngineHealth.fault``). Then the service is
  NOT_SERVING, and the watchdog has the engine tested again and again.
- After ``restart_after_seconds`` of either, the process is not live.
- When the pass ends after all, or a test succeeds, the service serves again.

The watchdog is a task on the event loop, which answers health checks. It asks the engine thread for
an answer between two passes. The engine thread does nothing else for it.
"""

import asyncio
import logging
from typing import Any

from amusd.protocol.errors import UnavailableError
from amusd.rpc.server import ServiceShell
from amusd.serving.engine_health import EngineHealth
from amusd.serving.engine_thread import EngineThread

log = logging.getLogger(__name__)

_MAX_LOOK_SECONDS = 1.0
_LOOKS_PER_FLOOR = 5


class Watchdog:
    """Watches one engine thread. Its owner runs it as a task, and cancels it."""

    def __init__(
        self, shell: ServiceShell, thread: EngineThread[Any], health: EngineHealth
    ) -> None:
        """Watch ``thread``, whose worker keeps ``health`` up to date, for the server ``shell``."""
        self._shell = shell
        self._thread = thread
        self._health = health
        floor = health.settings.hang_floor_seconds
        self._look_seconds = min(_MAX_LOOK_SECONDS, floor / _LOOKS_PER_FLOOR or _MAX_LOOK_SECONDS)
        self._num_asked = 0
        self._num_answered = 0  # written by the engine thread
        self._num_begun = 0
        self._silent_seconds = 0.0
        self._was_hung = False
        self._problem_seconds = 0.0
        self._is_live = True

    async def run(self) -> None:
        """Watch from when the worker is ready until the thread ends, or until cancelled."""
        try:
            await asyncio.wrap_future(self._thread.ready)
        except Exception:
            return  # there is no worker; the log says why
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(self._look_seconds)
            now = loop.time()
            # A process that was stopped, or had no CPU, knows nothing of the time in between.
            elapsed, last = min(now - last, 2 * self._look_seconds), now
            try:
                await self._look(elapsed)
            except UnavailableError:
                return  # the engine thread has ended
            except Exception:
                log.exception("the watchdog failed")

    async def _look(self, elapsed: float) -> None:
        """Look at the engine thread, ``elapsed`` seconds after the last time."""
        self._count_silence(elapsed)
        is_hung = self._is_hung
        problem = self._hang_problem if is_hung else self._fault_problem
        self._problem_seconds = self._problem_seconds + elapsed if problem else 0.0
        had_problem, was_hung = bool(self._health.problem), self._was_hung
        self._was_hung = is_hung
        if problem and (not had_problem or is_hung > was_hung):
            await self._suspend(problem)
        if had_problem and not problem:
            await self._resume()
        if is_hung and not was_hung:
            log.error("the engine thread is here:\n%s", self._thread.stack())
            await self._shell.end_sessions(problem)
        await self._report_live(
            not problem or self._problem_seconds < self._health.settings.restart_after_seconds
        )

    @property
    def _is_hung(self) -> bool:
        floor = self._health.settings.hang_floor_seconds
        return floor > 0 and self._silent_seconds > self._health.max_pass_seconds

    @property
    def _hang_problem(self) -> str:
        return (
            "the engine of this replica hangs: a pass takes longer than "
            f"{self._health.max_pass_seconds:.3g} s; use another replica"
        )

    @property
    def _fault_problem(self) -> str:
        fault = self._health.fault
        return f"the engine of this replica fails ({fault}): use another replica" if fault else ""

    async def _suspend(self, problem: str) -> None:
        log.error("the service is not serving: %s", problem)
        self._health.problem = self._thread.refusal = problem
        await self._shell.suspend(problem)

    async def _resume(self) -> None:
        log.warning("the engine works again: the service is serving")
        self._health.problem = self._thread.refusal = ""
        await self._shell.resume()

    async def _report_live(self, is_live: bool) -> None:
        if is_live is self._is_live:
            return
        self._is_live = is_live
        if not is_live:
            log.error("the service is not live: restart it; %s", self._health.problem)
        await self._shell.set_live(is_live)

    def _count_silence(self, elapsed: float) -> None:
        """Count the time in which the engine thread neither answers nor begins a pass."""
        num_begun = self._health.num_begun
        if self._num_answered == self._num_asked:
            self._silent_seconds = 0.0
            self._num_asked += 1
            self._thread.post(self._answer)
        elif num_begun != self._num_begun:
            self._silent_seconds = 0.0
        else:
            self._silent_seconds += elapsed
        self._num_begun = num_begun

    def _answer(self, worker: Any) -> None:
        """Test an engine that fails, and answer; on the engine thread."""
        if self._health.fault:
            worker.test_engine()
        self._num_answered += 1
