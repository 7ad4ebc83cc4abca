"""The stream of a session between a client and the engine thread, without gRPC and a model."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import cast

import pytest

from amusd.fleet.model_description import ServiceLimits
from amusd.observe.observer import Observer, RequestWatch
from amusd.protocol.errors import (
    AmusdError,
    DuplicateSessionError,
    InvalidInputError,
    LimitExceededError,
    PreconditionError,
    UnavailableError,
)
from amusd.rpc.faults import Context
from amusd.rpc.stream_limits import COMMANDS_BETWEEN_WAITS, MAX_MESSAGES_WAITING
from amusd.serving.engine_thread import EngineThread
from amusd.serving.sequence import Send
from amusd.serving.session_stream import SessionStreams, StreamShape
from amusd.v1 import draft_pb2 as pb
from tests.serving.fake_serving import FakeOpening

TIMEOUT_SECONDS = 30.0
LONG = 3600.0


class LoggingWorker:
    """Logs its commands. Its sessions answer each event with the event's number."""

    limits = ServiceLimits(max_sessions=4, max_context=100, max_lookahead=4)

    def __init__(self) -> None:
        self.flush: Callable[[], None] = lambda: None
        self.log: list[str] = []
        self.sends: dict[str, Send] = {}
        self.opening_fails: AmusdError | None = None
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_opening = threading.Event()

    def step(self) -> bool:
        return False

    def recover(self, error: Exception) -> None:
        raise error

    def pause(self) -> None:
        """Keep the engine thread busy, as a long batch does, until the test lets it go on."""
        assert self.may_go_on.wait(TIMEOUT_SECONDS)

    def open(self, opening: FakeOpening, send: Send) -> None:
        self.is_opening.set()
        self.pause()
        if self.opening_fails is not None:
            raise self.opening_fails
        self.log.append(f"open {opening.session_id}")
        self.sends[opening.session_id] = send

    def receive(self, session_id: str, event: int) -> None:
        self.log.append(f"event {event}")
        self.sends[session_id](event)

    def give_up(self, session_id: str) -> None:
        self.log.append(f"give up {session_id}")
        self.sends[session_id](LimitExceededError("no memory came free"))

    def close(self, session_id: str) -> None:
        self.log.append(f"close {session_id}")
        del self.sends[session_id]


class FakeContext:
    """Collects the responses of a call. While ``may_write`` is not set, the client reads none."""

    def __init__(self) -> None:
        self.responses: list[str] = []
        self.may_write = asyncio.Event()
        self.may_write.set()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def send_initial_metadata(self, metadata: object) -> None:
        assert not self.responses

    async def write(self, response: str) -> None:
        await self.may_write.wait()
        self.responses.append(response)


class Client:
    """A client of one stream, whose requests the test sends one by one."""

    def __init__(
        self,
        thread: EngineThread[LoggingWorker],
        max_wait_seconds: float = LONG,
        preparation: Callable[[], object] | None = None,
    ) -> None:
        self.context = FakeContext()
        self.recorded: list[int] = []
        self.num_read = 0
        self._requests: asyncio.Queue[pb.ProposeRequest | None] = asyncio.Queue()
        shape: StreamShape[int, int] = StreamShape(
            rpc="Propose",
            step="advance",
            opening=lambda request: FakeOpening(request.session_id, list(request.token_ids)),
            event=lambda advance: int(advance.position),
            response=lambda message: f"response {message}",
            record=self._record,
            preparation=lambda worker, opening: preparation,
        )
        streams = SessionStreams(shape, thread, max_wait_seconds, Observer("draft"))
        context = cast("Context", self.context)
        self.call = asyncio.create_task(streams.serve(self._read(), context))

    def send(self, *requests: pb.ProposeRequest) -> None:
        for request in requests:
            self._requests.put_nowait(request)

    def end(self) -> None:
        """End the requests without a close."""
        self._requests.put_nowait(None)

    async def wait(self) -> None:
        """Wait until the call is over; raise what it raised."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await self.call

    async def has_responses(self, number: int) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while len(self.context.responses) < number:  # noqa: ASYNC110  # nothing signals it
                await asyncio.sleep(0.001)

    async def has_read(self, number: int) -> None:
        """Return when the stream has read so many requests and done all it can with them."""
        while self.num_read < number:  # noqa: ASYNC110  # nothing signals it
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)

    async def _read(self) -> AsyncIterator[pb.ProposeRequest]:
        while (request := await self._requests.get()) is not None:
            self.num_read += 1
            yield request

    def _record(self, watch: RequestWatch, message: int) -> None:
        self.recorded.append(message)


OPEN = pb.ProposeRequest(open=pb.ProposeOpen(session_id="a", token_ids=[1]))
CLOSE = pb.ProposeRequest(close=pb.ProposeClose())


def event(number: int) -> pb.ProposeRequest:
    return pb.ProposeRequest(advance=pb.ProposeAdvance(position=number))


@pytest.fixture
def thread() -> Iterator[EngineThread[LoggingWorker]]:
    thread = EngineThread("engine", LoggingWorker)
    thread.start()
    worker = thread.ready.result(TIMEOUT_SECONDS)
    yield thread
    worker.may_go_on.set()
    assert thread.stop(TIMEOUT_SECONDS)


@pytest.fixture
async def worker(thread: EngineThread[LoggingWorker]) -> LoggingWorker:
    thread.postbox.attach()
    return thread.ready.result(TIMEOUT_SECONDS)


async def caught_up(thread: EngineThread[LoggingWorker]) -> None:
    """Return when the engine thread has run all commands so far."""
    await asyncio.wrap_future(thread.submit(lambda _: None))


async def test_events_and_messages_go_through_in_order_until_the_close(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    client = Client(thread)
    client.send(OPEN, *map(event, range(5)))
    await client.has_responses(5)
    client.send(CLOSE, event(9))
    await client.wait()
    await caught_up(thread)
    assert worker.log == ["open a", *(f"event {number}" for number in range(5)), "close a"]
    assert client.context.responses == [f"response {number}" for number in range(5)]
    assert client.recorded == list(range(5))


async def test_the_end_of_the_requests_closes_the_session(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    client = Client(thread)
    client.send(OPEN)
    client.end()
    await client.wait()
    await caught_up(thread)
    assert worker.log == ["open a", "close a"]


# Work before a session opens


async def test_a_session_opens_when_its_preparation_is_done_and_the_engine_thread_goes_on(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    may_end = threading.Event()
    client = Client(thread, preparation=lambda: may_end.wait(TIMEOUT_SECONDS))
    client.send(OPEN, event(1))
    await client.has_read(1)
    await caught_up(thread)
    assert worker.log == []
    may_end.set()
    await client.has_responses(1)
    client.send(CLOSE)
    await client.wait()


async def test_the_result_of_a_preparation_is_kept_as_long_as_the_session(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    kept: weakref.WeakSet[FakeContext] = weakref.WeakSet()

    def prepare() -> FakeContext:
        made = FakeContext()
        kept.add(made)
        return made

    client = Client(thread, preparation=prepare)
    client.send(OPEN, event(1))
    await client.has_responses(1)
    gc.collect()
    assert len(kept) == 1
    client.send(CLOSE)
    await client.wait()
    gc.collect()
    assert len(kept) == 0


async def test_a_preparation_that_fails_refuses_the_session(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    def fail() -> None:
        raise InvalidInputError("the constraint is broken")

    client = Client(thread, preparation=fail)
    client.send(OPEN)
    with pytest.raises(InvalidInputError, match="constraint is broken"):
        await client.wait()
    await caught_up(thread)
    assert worker.log == []


async def test_a_client_that_leaves_during_its_preparation_opens_nothing(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    is_preparing, may_end = threading.Event(), threading.Event()

    def prepare() -> None:
        is_preparing.set()
        assert may_end.wait(TIMEOUT_SECONDS)

    client = Client(thread, preparation=prepare)
    client.send(OPEN)
    await asyncio.to_thread(is_preparing.wait, TIMEOUT_SECONDS)
    client.call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.wait()
    may_end.set()
    await caught_up(thread)
    assert worker.log == []


# Requests that are refused


@pytest.mark.parametrize("first", [[], [event(1)], [CLOSE], [pb.ProposeRequest()]])
async def test_a_stream_has_to_begin_with_an_open(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker, first: list[pb.ProposeRequest]
) -> None:
    client = Client(thread)
    client.send(*first)
    client.end()
    with pytest.raises(InvalidInputError, match="first request of a Propose stream is an open"):
        await client.wait()
    await caught_up(thread)
    assert worker.log == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [(OPEN, "open already"), (pb.ProposeRequest(), "without a step: set advance or close")],
)
async def test_a_request_that_makes_no_sense_ends_the_session(
    thread: EngineThread[LoggingWorker],
    worker: LoggingWorker,
    bad: pb.ProposeRequest,
    words: str,
) -> None:
    client = Client(thread)
    client.send(OPEN, bad)
    with pytest.raises(InvalidInputError, match=words):
        await client.wait()
    await caught_up(thread)
    assert worker.log == ["open a", "close a"]


async def test_a_session_that_is_refused_is_not_closed(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    worker.opening_fails = DuplicateSessionError("open already")
    client = Client(thread)
    client.send(OPEN)
    with pytest.raises(DuplicateSessionError):
        await client.wait()
    await caught_up(thread)
    assert worker.log == []  # the session of this id belongs to another stream


async def test_an_error_ends_the_stream_after_the_messages_before_it(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    client = Client(thread)
    client.send(OPEN)

    def fail(it: LoggingWorker) -> None:
        for message in (1, 2, PreconditionError("a gap"), 3):
            it.sends["a"](message)

    await opened(client, worker)
    thread.post(fail)
    with pytest.raises(PreconditionError, match="a gap"):
        await client.wait()
    await caught_up(thread)
    assert client.context.responses == ["response 1", "response 2"]
    assert worker.log == ["open a", "close a"]


async def opened(client: Client, worker: LoggingWorker) -> None:
    """Return when the engine thread has opened the client's session."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while "a" not in worker.sends:  # noqa: ASYNC110  # nothing signals it
            await asyncio.sleep(0.001)
    assert not client.call.done()


# Calls that are cancelled


async def test_a_cancelled_call_ends_at_once_and_its_session_is_closed(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    client = Client(thread)
    client.send(OPEN)
    await opened(client, worker)
    worker.may_go_on.clear()
    thread.post(LoggingWorker.pause)
    client.call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.wait()  # though the engine thread is busy
    assert worker.log == ["open a"]
    worker.may_go_on.set()
    await caught_up(thread)
    assert worker.log == ["open a", "close a"]


async def test_a_call_that_is_cancelled_while_its_session_opens_is_closed_afterwards(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    worker.may_go_on.clear()
    client = Client(thread)
    client.send(OPEN)
    assert await asyncio.to_thread(worker.is_opening.wait, TIMEOUT_SECONDS)
    client.call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.wait()
    worker.may_go_on.set()
    await caught_up(thread)
    assert worker.log == ["open a", "close a"]


async def test_a_call_that_is_cancelled_before_its_session_opens_leaves_nothing(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    worker.may_go_on.clear()
    thread.post(LoggingWorker.pause)
    client = Client(thread)
    client.send(OPEN)
    await client.has_read(1)
    client.call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.wait()
    worker.may_go_on.set()
    await caught_up(thread)
    assert worker.log == []


# Bounds


async def test_a_session_gives_up_waiting_for_memory_after_the_longest_wait(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    client = Client(thread, max_wait_seconds=0.01)
    client.send(OPEN)
    with pytest.raises(LimitExceededError, match="no memory came free"):
        await client.wait()
    await caught_up(thread)
    assert worker.log == ["open a", "give up a", "close a"]


async def test_a_session_that_has_ended_does_not_give_up_later(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    client = Client(thread, max_wait_seconds=0.05)
    client.send(OPEN, CLOSE)
    await client.wait()
    await asyncio.sleep(0.1)
    await caught_up(thread)
    assert "give up a" not in worker.log


async def test_a_stream_has_a_limited_number_of_events_under_way(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    client = Client(thread)
    client.send(OPEN)
    await opened(client, worker)
    worker.may_go_on.clear()
    thread.post(LoggingWorker.pause)
    num_events = 3 * COMMANDS_BETWEEN_WAITS
    client.send(*map(event, range(num_events)))
    for _ in range(10 * num_events):  # more turns of the event loop than there are events
        await asyncio.sleep(0)
    assert client.num_read == 1 + COMMANDS_BETWEEN_WAITS
    worker.may_go_on.set()
    await client.has_responses(num_events)
    assert client.recorded == list(range(num_events))
    client.send(CLOSE)
    await client.wait()


async def test_a_client_that_does_not_read_loses_its_session(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    client = Client(thread)
    client.send(OPEN)
    await opened(client, worker)
    client.context.may_write.clear()

    def send_too_many(it: LoggingWorker) -> None:
        for number in range(MAX_MESSAGES_WAITING + 10):
            it.sends["a"](number)

    await asyncio.wrap_future(thread.submit(send_too_many))
    client.context.may_write.set()
    with pytest.raises(LimitExceededError, match="read faster"):
        await client.wait()
    await caught_up(thread)
    assert len(client.context.responses) == MAX_MESSAGES_WAITING
    assert worker.log == ["open a", "close a"]


async def test_a_service_that_ends_refuses_a_new_session(
    thread: EngineThread[LoggingWorker], worker: LoggingWorker
) -> None:
    assert thread.stop(TIMEOUT_SECONDS)
    client = Client(thread)
    client.send(OPEN)
    with pytest.raises(UnavailableError, match="is ending"):
        await client.wait()
    assert worker.log == []
