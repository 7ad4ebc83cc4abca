"""The timer of a session: when it calls back."""

import asyncio
import time

import pytest

from orchestrator.session_timer import Timer


class Calls:
    """A timer and the times of its calls."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.fired = asyncio.Event()
        self.at_seconds: list[float] = []
        self.timer = Timer(self._loop, self._on_timeout)

    def _on_timeout(self) -> None:
        self.at_seconds.append(self._loop.time())
        self.fired.set()


async def test_it_calls_back_after_the_last_expectation() -> None:
    calls = Calls()
    calls.timer.expect_within(0.02)
    calls.timer.expect_within(0.1)
    expected = asyncio.get_running_loop().time() + 0.1
    await asyncio.wait_for(calls.fired.wait(), 5)
    assert calls.at_seconds[0] >= expected - 0.01


async def test_an_earlier_expectation_replaces_a_later_one() -> None:
    calls = Calls()
    calls.timer.expect_within(60.0)
    calls.timer.expect_within(0.02)
    await asyncio.wait_for(calls.fired.wait(), 5)


async def test_a_cancelled_timer_stays_silent() -> None:
    calls = Calls()
    calls.timer.expect_within(0.01)
    calls.timer.cancel()
    await asyncio.sleep(0.05)
    assert not calls.at_seconds


async def test_what_arrives_during_a_stall_of_the_event_loop_is_read_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.session_timer._STALL_SECONDS", 0.1)
    calls = Calls()
    calls.timer.expect_within(0.05)
    time.sleep(0.3)  # noqa: ASYNC251  # the stall
    await asyncio.sleep(0)  # the timer has fired
    await asyncio.sleep(0)
    assert not calls.at_seconds
    calls.timer.expect_within(60.0)  # a message that has arrived meanwhile
    await asyncio.sleep(0.2)
    assert not calls.at_seconds


async def test_after_a_stall_without_a_message_it_calls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.session_timer._STALL_SECONDS", 0.1)
    calls = Calls()
    calls.timer.expect_within(0.05)
    time.sleep(0.3)  # noqa: ASYNC251  # the stall
    await asyncio.wait_for(calls.fired.wait(), 5)
