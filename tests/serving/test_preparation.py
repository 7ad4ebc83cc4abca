"""Work beside the engine thread: how much at once, and what becomes of it."""

import asyncio
import threading

import pytest

from amusd.protocol.errors import LimitExceededError
from amusd.serving.preparation import MAX_AT_ONCE, Preparations

TIMEOUT_SECONDS = 30.0


class Blocking:
    """Work that begins, and ends when the test lets it."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.has_begun = threading.Semaphore(0)
        self.may_end = threading.Event()

    def __call__(self) -> int:
        self.num_begun += 1
        self.has_begun.release()
        assert self.may_end.wait(TIMEOUT_SECONDS)
        return self.num_begun

    async def begins(self, number: int) -> None:
        for _ in range(number):
            assert await asyncio.to_thread(self.has_begun.acquire, timeout=TIMEOUT_SECONDS)


async def test_the_result_or_the_error_of_the_work_comes_back() -> None:
    preparations = Preparations()
    assert await preparations.run(lambda: 3) == 3
    for _ in range(MAX_AT_ONCE + 1):  # an error gives its turn back
        with pytest.raises(ZeroDivisionError):
            await preparations.run(lambda: 1 // 0)


async def test_a_bounded_number_runs_at_once_and_the_others_wait_or_are_refused() -> None:
    work, preparations = Blocking(), Preparations(max_wait_seconds=0.02)
    running = [asyncio.create_task(preparations.run(work)) for _ in range(MAX_AT_ONCE)]
    await work.begins(MAX_AT_ONCE)
    with pytest.raises(LimitExceededError, match="try again"):
        await preparations.run(lambda: None)
    work.may_end.set()
    await asyncio.gather(*running)
    assert await preparations.run(lambda: 5) == 5


async def test_work_whose_caller_has_left_keeps_its_turn_until_it_ends() -> None:
    work, preparations = Blocking(), Preparations(max_wait_seconds=0.02)
    running = [asyncio.create_task(preparations.run(work)) for _ in range(MAX_AT_ONCE)]
    await work.begins(MAX_AT_ONCE)
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    with pytest.raises(LimitExceededError):
        await preparations.run(lambda: None)
    work.may_end.set()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            try:
                assert await preparations.run(lambda: 7) == 7
            except LimitExceededError:
                continue
            break
