"""The engine thread: the one thread on which a model runs and its sessions change.

Who owns what: the thread owns the worker and everything below it. Other threads hand it commands
through ``submit`` (with an answer) and ``post`` (without one). Messages go back through the
``Postbox``: one handover to the event loop for each batch, and for each run of commands.
The inbox is bounded by its users, who count the commands they have under way.
"""

import asyncio
import logging
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from amusd.protocol.errors import UnavailableError
from amusd.rpc.outbox import Postbox
from amusd.rpc.stream_limits import COMMANDS_BETWEEN_WAITS
from amusd.rpc.time_slices import restore_time_slice

log = logging.getLogger(__name__)


class Worker(Protocol):
    """Work of an engine thread, done in batches."""

    flush: Callable[[], None]
    """Hands over the messages sent so far."""

    def step(self) -> bool:
        """Run the next batch; return whether there was one."""

    def recover(self, error: Exception) -> None:
        """Go on after a step that raised ``error``; raise it again if that cannot be."""


_ENDING = "the service is ending: use another replica"

Work = TypeVar("Work", bound=Worker)
Result = TypeVar("Result")


class CommandWindow(Generic[Work]):
    """Bounds the commands that one stream has under way, without waiting for each of them."""

    def __init__(self, thread: "EngineThread[Work]") -> None:
        """Start with nothing under way."""
        self._thread = thread
        self._num_posted = 0

    async def post(self, command: Callable[[Work], None]) -> None:
        """Post a command; now and then wait until the engine thread has caught up.

        Raises:
            UnavailableError: as ``EngineThread.post``.
        """
        self._num_posted += 1
        if self._num_posted % COMMANDS_BETWEEN_WAITS:
            self._thread.post(command)
        else:
            await asyncio.wrap_future(self._thread.submit(command))


class EngineThread(Generic[Work]):
    """Runs a worker's batches, and between them the commands of other threads, in order."""

    def __init__(self, name: str, make_worker: Callable[[], Work]) -> None:
        """Prepare the thread. It makes the worker itself, so that a model loads there too."""
        self._make_worker = make_worker
        # Commands are called with the worker, or with None if it will not serve any more.
        self._inbox: queue.SimpleQueue[Callable[[Work | None], None]] = queue.SimpleQueue()
        self._stopping = False
        self.refusal = ""
        """Why ``submit`` refuses, because the answer would not come in time; empty: it does not."""
        self.postbox = Postbox()
        self.ready: Future[Work] = Future()
        self.failed: Future[None] = Future()
        for future in (self.ready, self.failed):
            future.set_running_or_notify_cancel()  # a caller that stops waiting cannot cancel it
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start; ``ready`` is done when the worker is made, or holds why it could not be."""
        self._thread.start()

    def submit(self, command: Callable[[Work], Result]) -> "Future[Result]":
        """Run ``command(worker)`` on the thread between two batches, and return its answer.

        Raises:
            UnavailableError: the worker is not there yet, or not any more, or does not answer.
        """
        self._check()
        if self.refusal:
            raise UnavailableError(self.refusal)
        future: Future[Result] = Future()

        def run(worker: Work | None) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if worker is None:
                    raise UnavailableError(_ENDING)
                future.set_result(command(worker))
            except BaseException as error:
                future.set_exception(error)  # for the caller that waits

        self._inbox.put(run)
        return future

    def post(self, command: Callable[[Work], None]) -> None:
        """Run ``command(worker)`` on the thread between two batches; nobody waits for it.

        A command reports errors to its session itself; an exception of it is only logged.

        Raises:
            UnavailableError: the worker is not there yet, or not any more.
        """
        self._check()

        def run(worker: Work | None) -> None:
            if worker is None:
                return
            try:
                command(worker)
            except BaseException:
                log.exception("a command of the engine thread failed")

        self._inbox.put(run)

    def stack(self) -> str:
        """Return what the thread does at this moment, as the lines of a traceback."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def stop(self, timeout_seconds: float) -> bool:
        """End after the batch that runs; return whether the thread is gone by the timeout."""
        self._stopping = True
        self._inbox.put(lambda _: None)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _check(self) -> None:
        if not self.ready.done():
            raise UnavailableError("the service is loading its model: try again soon")
        if self._stopping:
            raise UnavailableError(_ENDING)

    def _main(self) -> None:
        restore_time_slice()  # the service's other threads may preempt this one
        try:
            worker = self._make_worker()
        except BaseException as error:
            self._stopping = True
            self.ready.set_exception(error)
            return
        worker.flush = self.postbox.flush
        self.ready.set_result(worker)
        try:
            self._loop(worker)
        except BaseException as error:
            log.exception("the engine thread failed")
            self.failed.set_exception(error)
        finally:
            self._stopping = True
            self._refuse_rest()

    def _refuse_rest(self) -> None:
        """Answer commands that came too late, so that nobody waits for them."""
        while not self._inbox.empty():
            self._inbox.get_nowait()(None)

    def _loop(self, worker: Work) -> None:
        """Take all commands that have arrived before each batch: the batch can use them."""
        is_busy = False
        while not self._stopping:
            command: Callable[[Work | None], None] | None
            try:
                command = self._inbox.get(block=not is_busy)
            except queue.Empty:
                command = None
            if command is None:  # not in the handler above: a traceback of the step would name it
                try:
                    is_busy = worker.step()
                except Exception as error:
                    worker.recover(error)
                    is_busy = False
                self.postbox.flush()
            else:
                command(worker)
                is_busy = True
