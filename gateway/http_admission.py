"""Which requests are let in, and how open ones end when their client leaves or the gateway ends."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

from starlette.types import Receive

from gateway.api_errors import too_many, unavailable
from gateway.http_io import ClientLeftError


class Admission:
    """Tracks the open generations. Lives on the event loop of the server."""

    def __init__(self, max_requests: int) -> None:
        """Let in ``max_requests`` at a time."""
        self._max_requests = max_requests
        self._num_open = 0
        self._refusal = ""
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._cut_off: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def num_open(self) -> int:
        """Number of open generations."""
        return self._num_open

    @property
    def refusal(self) -> str:
        """Why no request is let in; empty: they are."""
        return self._refusal

    def refuse(self, reason: str) -> None:
        """Let in no request from now on."""
        self._refusal = reason

    async def wait_until_empty(self) -> None:
        """Wait until no generation is open."""
        await self._is_empty.wait()

    def cut_off(self, reason: str) -> None:
        """End all open generations with 503 and ``reason``."""
        if not self._cut_off.done():
            self._cut_off.set_result(reason)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place while it is open.

        Raises:
            ApiError: the gateway is ending, or all places are taken.
        """
        if self._refusal:
            raise unavailable(self._refusal)
        if self._num_open >= self._max_requests:
            raise too_many(f"{self._max_requests} requests are open: try again later")
        self._num_open += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._is_empty.set()

    async def run(self, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` for a request whose body was read; end it early if it must.

        Raises:
            ClientLeftError: the client closed its connection.
            ApiError: ``work`` raised it, or the gateway ends.
        """
        tasks = (asyncio.create_task(work), asyncio.create_task(_until_left(receive)))
        working, _ = tasks
        try:
            await asyncio.wait((*tasks, self._cut_off), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._cut_off.done():
            raise unavailable(self._cut_off.result())
        raise ClientLeftError


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
