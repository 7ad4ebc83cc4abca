"""The threads of the tokenizer: others go on meanwhile, and cancelled calls leave nothing."""

import asyncio
import threading

import pytest

from orchestrator.text_threads import _LONG_BYTES, _NUM_THREADS, TextThreads

SHORT, LONG = 10, _LONG_BYTES + 1


class Work:
    """Work that takes until it is let go."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> str:
        self.started.set()
        assert self.may_end.wait(30)
        return threading.current_thread().name


async def started(works: list[Work]) -> None:
    for work in works:
        assert await asyncio.to_thread(work.started.wait, 30)


async def settled() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_short_text_waits_for_no_long_one() -> None:
    threads, works = TextThreads(), [Work() for _ in range(_NUM_THREADS)]
    long = [asyncio.create_task(threads.run(LONG, work)) for work in works]
    await started(works)
    assert await threads.run(SHORT, lambda: "short") == "short"
    for work in works:
        work.may_end.set()
    assert all("long-text" in name for name in await asyncio.gather(*long))
    threads.close()


async def test_no_more_texts_are_worked_on_than_there_are_threads() -> None:
    threads, works = TextThreads(), [Work() for _ in range(_NUM_THREADS + 1)]
    running = [asyncio.create_task(threads.run(LONG, work)) for work in works]
    await started(works[:-1])
    await settled()
    assert not works[-1].started.is_set()
    works[0].may_end.set()
    await started(works[-1:])
    for work in works:
        work.may_end.set()
    await asyncio.gather(*running)
    threads.close()


async def test_a_cancelled_call_that_waits_is_never_worked_on() -> None:
    threads, works = TextThreads(), [Work() for _ in range(_NUM_THREADS)]
    running = [asyncio.create_task(threads.run(LONG, work)) for work in works]
    await started(works)
    waiting = Work()
    cancelled = asyncio.create_task(threads.run(LONG, waiting))
    await settled()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    for work in works:
        work.may_end.set()
    await asyncio.gather(*running)
    assert await threads.run(LONG, lambda: 5) == 5
    assert not waiting.started.is_set()
    threads.close()


async def test_a_cancelled_call_ends_at_once_and_its_thread_comes_free_later() -> None:
    threads, works = TextThreads(), [Work() for _ in range(_NUM_THREADS)]
    running = [asyncio.create_task(threads.run(LONG, work)) for work in works]
    await started(works)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert all(task.cancelled() for task in running)
    next_one = asyncio.create_task(threads.run(LONG, lambda: 7))
    await settled()
    assert not next_one.done()
    for work in works:
        work.may_end.set()
    assert await next_one == 7
    threads.close()


async def test_an_error_of_the_work_reaches_the_caller_and_the_thread_comes_free() -> None:
    threads = TextThreads()
    for _ in range(2 * _NUM_THREADS + 1):
        with pytest.raises(ZeroDivisionError):
            await threads.run(SHORT, lambda: 1 // 0)
    threads.close()


async def test_after_the_end_no_work_is_taken() -> None:
    threads = TextThreads()
    threads.close()
    for _ in range(_NUM_THREADS + 1):
        with pytest.raises(RuntimeError):
            await threads.run(SHORT, lambda: 1)
