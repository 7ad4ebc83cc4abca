"""The way from an engine thread to a stream: in order, bounded, and ended by an error."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from amusd.protocol.errors import LimitExceededError, UnavailableError
from amusd.rpc.outbox import Outbox, Postbox, until_first_ends


class Stream:
    """A stream that takes every message at once."""

    def __init__(self) -> None:
        self.written: list[int] = []

    async def write(self, item: int) -> None:
        self.written.append(item)


class SlowStream(Stream):
    """A stream that takes a message when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.is_writing = asyncio.Event()
        self.may_write = asyncio.Event()

    async def write(self, item: int) -> None:
        self.is_writing.set()
        await self.may_write.wait()
        await super().write(item)


def on_another_thread(work: Callable[[], None]) -> None:
    """Run ``work`` to its end on another thread, while the event loop stands still."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.fixture
async def wakeups(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What other threads have handed to the event loop, one entry for each wake-up."""
    loop = asyncio.get_running_loop()
    call, seen = loop.call_soon_threadsafe, list[object]()

    def recorded(callback: Callable[..., object], *arguments: object) -> asyncio.Handle:
        seen.append(callback)
        return call(callback, *arguments)

    monkeypatch.setattr(loop, "call_soon_threadsafe", recorded)
    return seen


# The postbox of an engine thread


async def test_messages_of_another_thread_are_written_in_order(wakeups: list[object]) -> None:
    postbox, outbox, stream = Postbox(), Outbox[int](100), Stream()
    postbox.attach()

    def fill() -> None:
        for number in range(50):
            postbox.put(outbox, number)
        postbox.flush()
        for number in range(50, 60):
            postbox.put(outbox, number)
        postbox.put(outbox, UnavailableError("over"))
        postbox.flush()

    on_another_thread(fill)
    assert len(wakeups) == 2
    with pytest.raises(UnavailableError, match="over"):
        await outbox.drain(stream.write)
    assert stream.written == list(range(60))


async def test_one_flush_hands_over_the_messages_of_all_streams(wakeups: list[object]) -> None:
    postbox, outboxes = Postbox(), [Outbox[int](10) for _ in range(3)]
    postbox.attach()

    def fill() -> None:
        for number in range(6):
            postbox.put(outboxes[number % 3], number)
        postbox.flush()
        postbox.flush()  # nothing is left

    on_another_thread(fill)
    assert len(wakeups) == 1
    streams = [Stream() for _ in outboxes]
    await asyncio.sleep(0)  # the event loop delivers
    for outbox, stream in zip(outboxes, streams, strict=True):
        outbox.close()
        await outbox.drain(stream.write)
    assert [stream.written for stream in streams] == [[0, 3], [1, 4], [2, 5]]


async def test_nothing_is_delivered_before_the_flush(wakeups: list[object]) -> None:
    postbox, outbox, stream = Postbox(), Outbox[int](10), Stream()
    postbox.attach()
    on_another_thread(lambda: postbox.put(outbox, 1))
    outbox.close()
    await outbox.drain(stream.write)
    assert (wakeups, stream.written) == ([], [])


async def test_messages_that_come_before_the_event_loop_are_kept_for_it() -> None:
    postbox, outbox, stream = Postbox(), Outbox[int](10), Stream()
    postbox.put(outbox, 1)
    postbox.flush()
    postbox.attach()
    postbox.put(outbox, 2)
    postbox.put(outbox, UnavailableError("over"))
    postbox.flush()
    with pytest.raises(UnavailableError, match="over"):
        await outbox.drain(stream.write)
    assert stream.written == [1, 2]


def test_a_flush_after_the_event_loop_has_ended_does_nothing() -> None:
    postbox = Postbox()

    async def attach() -> Outbox[int]:
        postbox.attach()
        return Outbox[int](3)

    postbox.put(asyncio.run(attach()), 1)
    postbox.flush()


# The outbox of a stream


async def test_messages_before_an_error_are_written_and_none_after_it() -> None:
    outbox, stream = Outbox[int](10), Stream()
    for item in (1, 2, UnavailableError("over"), 3):
        outbox.put(item)
    with pytest.raises(UnavailableError, match="over"):
        await outbox.drain(stream.write)
    assert stream.written == [1, 2]


async def test_a_reader_that_is_too_slow_loses_its_session() -> None:
    outbox, stream = Outbox[int](3), Stream()
    for number in range(10):
        outbox.put(number)
    with pytest.raises(LimitExceededError, match=r"^3 messages wait.*read faster"):
        await outbox.drain(stream.write)
    assert stream.written == [0, 1, 2]


async def test_an_overflow_before_the_first_write_ends_the_stream_of_a_peer_that_never_reads() -> (
    None
):
    outbox, stream = Outbox[int](3), SlowStream()
    drained = asyncio.create_task(outbox.drain(stream.write))
    await asyncio.sleep(0)  # it waits for the first message
    for number in range(5):  # all arrive before it wakes up
        outbox.put(number)
    async with asyncio.timeout(10):
        with pytest.raises(LimitExceededError, match="read faster"):
            await drained


async def test_a_reader_that_stops_loses_its_session_while_a_message_is_written() -> None:
    outbox, stream = Outbox[int](3), SlowStream()
    drained = asyncio.create_task(outbox.drain(stream.write))
    outbox.put(0)
    await stream.is_writing.wait()  # and never takes the message
    for number in range(1, 5):
        outbox.put(number)
    async with asyncio.timeout(10):
        with pytest.raises(LimitExceededError, match="read faster"):
            await drained
    assert stream.written == []


async def test_messages_that_are_written_in_time_do_not_count_for_the_bound() -> None:
    outbox, stream = Outbox[int](3), Stream()
    written = asyncio.create_task(outbox.drain(stream.write))
    for number in range(30):
        outbox.put(number)
        await asyncio.sleep(0)  # the stream takes it
    outbox.close()
    await written
    assert stream.written == list(range(30))


async def test_a_close_lets_what_is_there_be_written_and_drops_what_comes_later() -> None:
    outbox, stream = Outbox[int](10), Stream()
    outbox.put(1)
    outbox.put(2)
    outbox.close()
    outbox.put(3)
    outbox.put(UnavailableError("too late"))
    await outbox.drain(stream.write)
    assert stream.written == [1, 2]


async def test_a_close_ends_a_drain_that_waits_for_messages() -> None:
    outbox, stream = Outbox[int](10), Stream()
    outbox.put(1)
    drained = asyncio.create_task(outbox.drain(stream.write))
    for _ in range(10):
        await asyncio.sleep(0)
    assert (stream.written, drained.done()) == ([1], False)
    outbox.close()
    async with asyncio.timeout(10):
        await drained


async def test_a_close_waits_for_the_message_that_is_being_written() -> None:
    outbox, stream = Outbox[int](10), SlowStream()
    outbox.put(1)
    outbox.put(2)
    drained = asyncio.create_task(outbox.drain(stream.write))
    await stream.is_writing.wait()
    outbox.close()
    stream.may_write.set()
    await drained
    assert stream.written == [1, 2]


# Tasks that end together


async def test_the_first_part_to_end_ends_the_others() -> None:
    ended: list[str] = []

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("for ever")

    async def at_once() -> None:
        ended.append("at once")

    await until_first_ends(for_ever(), at_once())
    assert ended == ["at once", "for ever"]


async def test_an_error_of_a_part_is_raised_after_the_others_have_ended() -> None:
    ended: list[str] = []

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("for ever")

    async def fail() -> None:
        raise UnavailableError("broken")

    with pytest.raises(UnavailableError, match="broken"):
        await until_first_ends(for_ever(), fail())
    assert ended == ["for ever"]
