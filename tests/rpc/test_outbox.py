"""The way from an engine thread to a stream: in order, bounded, and ended by an error."""

import asyncio
import threading

import pytest

from amusd.protocol.errors import LimitExceededError, UnavailableError
from amusd.rpc.outbox import Outbox, until_first_ends


class Sink:
    """Collects what is written."""

    def __init__(self) -> None:
        self.items: list[int] = []

    async def write(self, item: int) -> None:
        self.items.append(item)


async def test_items_from_another_thread_are_written_in_order() -> None:
    outbox: Outbox[int] = Outbox(100)
    sink = Sink()

    def fill() -> None:
        for number in range(50):
            outbox.put(number)
        outbox.put(UnavailableError("over"))

    thread = threading.Thread(target=fill)
    thread.start()
    with pytest.raises(UnavailableError, match="over"):
        await outbox.drain(sink.write)
    thread.join()
    assert sink.items == list(range(50))


async def test_a_reader_that_is_too_slow_loses_its_session() -> None:
    outbox: Outbox[int] = Outbox(3)
    for number in range(10):
        outbox.put(number)
    await asyncio.sleep(0)  # the items are put by the event loop
    sink = Sink()
    with pytest.raises(LimitExceededError, match="read faster"):
        await outbox.drain(sink.write)
    assert sink.items == [0, 1, 2]


def test_putting_after_the_event_loop_has_ended_does_nothing() -> None:
    async def make() -> Outbox[int]:
        return Outbox(3)

    asyncio.run(make()).put(1)


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
