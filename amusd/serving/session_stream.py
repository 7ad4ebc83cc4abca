"""The stream of a session, the same for Propose and Verify: open, messages both ways, close.

It lives on the event loop, and only awaits and translates. The engine thread does the work.
What differs between the two services is their ``StreamShape``.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from amusd.observe.observer import Observer, RequestWatch
from amusd.protocol.errors import InvalidInputError, UnavailableError
from amusd.rpc import faults
from amusd.rpc.outbox import Outbox, until_first_ends
from amusd.rpc.stream_limits import MAX_MESSAGES_WAITING
from amusd.serving.engine_thread import CommandWindow, EngineThread
from amusd.serving.engine_worker import AnyWorker, Opening
from amusd.serving.preparation import Preparations

EventT = TypeVar("EventT")
MessageT = TypeVar("MessageT")


@dataclass(frozen=True, slots=True)
class StreamShape(Generic[EventT, MessageT]):
    """How a service's stream translates.

    ``rpc`` names the stream, ``step`` the step of a request that carries an event. ``record``
    tells the observer of a message on its way out. ``preparation`` returns the slow work that a
    session needs before the worker opens it; None: there is none. The work runs beside the engine
    thread, and its result is kept as long as the session.
    """

    rpc: str
    step: str
    opening: Callable[[Any], Opening]
    event: Callable[[Any], EventT]
    response: Callable[[MessageT], Any]
    record: Callable[[RequestWatch, MessageT], None]
    preparation: Callable[[Any, Any], Callable[[], object] | None] = lambda worker, opening: None


class SessionStreams(Generic[EventT, MessageT]):
    """Serves the session streams of one service."""

    def __init__(
        self,
        shape: StreamShape[EventT, MessageT],
        engine: EngineThread[Any],
        max_wait_seconds: float,
        observer: Observer,
    ) -> None:
        """Serve sessions of the worker of ``engine``, once it is ready.

        A session waits for memory for at most ``max_wait_seconds``.
        """
        self._shape = shape
        self._engine = engine
        self._max_wait_seconds = max_wait_seconds
        self._observer = observer
        self._preparations = Preparations()

    async def serve(self, requests: AsyncIterator[Any], context: faults.Context) -> None:
        """Serve one stream from its first request to its end.

        Raises:
            AmusdError: the session is refused, or ends with an error.
        """
        with self._observer.request(context) as watch:
            first = await anext(requests, None)
            if first is None or first.WhichOneof("step") != "open":
                raise InvalidInputError(
                    f"the first request of a {self._shape.rpc} stream is an open"
                )
            self._check_length(len(first.open.token_ids))
            opening = self._shape.opening(first.open)
            outbox: Outbox[MessageT] = Outbox(MAX_MESSAGES_WAITING)

            async def write(message: MessageT) -> None:
                try:
                    await context.write(self._shape.response(message))
                finally:  # metrics come after the message
                    self._shape.record(watch, message)

            async with self._opened(opening, outbox):
                watch.opened(opening.session_id, len(opening.tokens))
                await faults.send_metadata(context)
                await until_first_ends(
                    self._receive(requests, opening.session_id), outbox.drain(write)
                )

    def _check_length(self, num_tokens: int) -> None:
        """Refuse a prompt over the limit before its tokens are copied: a message holds millions."""
        ready = self._engine.ready
        if not ready.done() or ready.exception() is not None:
            return
        most = ready.result().limits.max_context
        if num_tokens > most:
            raise InvalidInputError(
                f"the prompt has {num_tokens} tokens, the service takes up to {most}"
            )

    async def _receive(self, requests: AsyncIterator[Any], session_id: str) -> None:
        """Carry events to the engine thread until the client closes."""
        window = CommandWindow(self._engine)
        async for request in requests:
            step = request.WhichOneof("step")
            if step == "close":
                return
            if step == "open":
                raise InvalidInputError(
                    "this stream is open already: open a second session on a second stream"
                )
            if step != self._shape.step:
                raise InvalidInputError(
                    f"a request without a step: set {self._shape.step} or close"
                )
            event = self._shape.event(getattr(request, step))
            await window.post(partial(_receive, session_id=session_id, event=event))

    @contextlib.asynccontextmanager
    async def _opened(self, opening: Opening, outbox: Outbox[MessageT]) -> AsyncIterator[None]:
        """Open a session on the engine thread; close it at the end if it was opened at all.

        The close is not waited for, so that a cancelled call ends at once. It runs after all
        commands before it.
        """
        prepared = await self._prepared(opening)
        send = partial(self._engine.postbox.put, outbox)
        opened = self._engine.submit(lambda worker: worker.open(opening, send))

        def close(worker: AnyWorker) -> None:
            if not opened.cancelled() and opened.exception() is None:
                worker.close(opening.session_id)

        timer: asyncio.TimerHandle | None = None
        try:
            await asyncio.wrap_future(opened)
            timer = asyncio.get_running_loop().call_later(
                self._max_wait_seconds,
                self._post,
                lambda worker: worker.give_up(opening.session_id),
            )
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._post(close)
            del prepared

    async def _prepared(self, opening: Opening) -> object:
        """Do the slow work of opening a session; return what is to be kept with it."""
        ready = self._engine.ready
        if not ready.done() or ready.exception() is not None:
            return None
        work = self._shape.preparation(ready.result(), opening)
        return None if work is None else await self._preparations.run(work)

    def _post(self, command: Callable[[AnyWorker], None]) -> None:
        # If the thread is ending, the KV cache goes with it.
        with contextlib.suppress(UnavailableError):
            self._engine.post(command)


def _receive(worker: AnyWorker, session_id: str, event: Any) -> None:
    worker.receive(session_id, event)
