"""The engine thread: commands between batches, in order, errors reported, and few handovers."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from amusd.protocol.errors import UnavailableError
from amusd.rpc.outbox import Outbox
from amusd.serving.engine_thread import EngineThread

TIMEOUT_SECONDS = 30.0


class SteppedWorker:
    """A worker whose batches the test lets end one by one; it logs what happens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.flush: Callable[[], None] = lambda: None
        self.thread = threading.current_thread()
        self.num_due = 0
        self.error: BaseException | None = None
        self.can_recover = False
        self.on_batch: Callable[[], None] = lambda: None
        self.idle = threading.Event()
        self.recovered = threading.Event()
        self._begun = threading.Semaphore(0)
        self._may_end = threading.Semaphore(0)

    def step(self) -> bool:
        if self.error is not None:
            raise self.error
        if not self.num_due:
            self.idle.set()
            return False
        self.num_due -= 1
        self.log.append("begin")
        self._begun.release()
        assert self._may_end.acquire(timeout=TIMEOUT_SECONDS)
        self.on_batch()
        self.log.append("end")
        return True

    def recover(self, error: Exception) -> None:
        if not self.can_recover:
            raise error
        self.log.append(f"recovered from {error}")
        self.error = None
        self.recovered.set()

    def ask(self, num_batches: int) -> None:
        self.idle.clear()
        self.num_due += num_batches

    def wait_for_begin(self) -> None:
        assert self._begun.acquire(timeout=TIMEOUT_SECONDS)

    def let_end(self, num_batches: int = 1) -> None:
        self._may_end.release(num_batches)


class PanicError(BaseException):
    """As a panic of a Rust extension: no Exception."""


class Note:
    """Logs a word, and returns it."""

    def __init__(self, word: str) -> None:
        self._word = word

    def __call__(self, worker: SteppedWorker) -> str:
        worker.log.append(self._word)
        return self._word


def note(word: str) -> Callable[[SteppedWorker], None]:
    return lambda worker: worker.log.append(word)


@pytest.fixture
def thread() -> Iterator[EngineThread[SteppedWorker]]:
    thread = EngineThread("engine", SteppedWorker)
    thread.start()
    worker = thread.ready.result(TIMEOUT_SECONDS)
    yield thread
    worker.let_end(100)
    assert thread.stop(TIMEOUT_SECONDS)


@pytest.fixture
def worker(thread: EngineThread[SteppedWorker]) -> SteppedWorker:
    return thread.ready.result(TIMEOUT_SECONDS)


def in_a_batch(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker, num_batches: int = 1
) -> None:
    """Return when the first of ``num_batches`` has begun; it does not end by itself."""
    thread.submit(lambda it: it.ask(num_batches))
    worker.wait_for_begin()


def test_the_worker_is_made_on_the_thread_and_commands_run_there(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    ran_on = thread.submit(lambda _: threading.current_thread()).result(TIMEOUT_SECONDS)
    assert ran_on is worker.thread
    assert ran_on is not threading.current_thread()
    assert ran_on.name == "engine"


def test_a_command_answers_through_its_future(thread: EngineThread[SteppedWorker]) -> None:
    assert thread.submit(Note("hello")).result(TIMEOUT_SECONDS) == "hello"


def test_commands_run_in_order_whether_submitted_or_posted(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    words = [f"command {index}" for index in range(100)]
    futures = []
    for index, word in enumerate(words):
        if index % 3:
            thread.post(note(word))
        else:
            futures.append(thread.submit(Note(word)))
    assert [future.result(TIMEOUT_SECONDS) for future in futures] == words[::3]
    assert worker.log == words


def test_commands_run_between_batches_and_all_of_them_before_the_next(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    in_a_batch(thread, worker, num_batches=2)
    thread.submit(Note("first"))
    thread.post(note("second"))
    thread.submit(Note("third"))
    worker.let_end()
    worker.wait_for_begin()
    worker.let_end()
    assert worker.idle.wait(TIMEOUT_SECONDS)
    assert worker.log == ["begin", "end", "first", "second", "third", "begin", "end"]


def test_a_busy_worker_needs_no_commands_to_go_on(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    worker.let_end(5)
    thread.post(lambda it: it.ask(5))
    thread.submit(Note("asked")).result(TIMEOUT_SECONDS)
    assert worker.idle.wait(TIMEOUT_SECONDS)
    assert [word for word in worker.log if word != "asked"] == ["begin", "end"] * 5


def test_a_posted_command_wakes_an_idle_worker(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    thread.submit(Note("idle from now on")).result(TIMEOUT_SECONDS)
    assert worker.idle.wait(TIMEOUT_SECONDS)
    thread.post(lambda it: it.ask(1))
    worker.wait_for_begin()
    worker.let_end()


# Errors


def test_an_exception_goes_to_its_future_and_the_thread_goes_on(
    thread: EngineThread[SteppedWorker],
) -> None:
    def fail(_: SteppedWorker) -> None:
        raise KeyError("lost")

    failed = thread.submit(fail)
    with pytest.raises(KeyError, match="lost"):
        failed.result(TIMEOUT_SECONDS)
    assert thread.submit(Note("still there")).result(TIMEOUT_SECONDS) == "still there"


def test_an_exception_of_a_posted_command_is_logged_and_the_thread_goes_on(
    thread: EngineThread[SteppedWorker], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: SteppedWorker) -> None:
        raise KeyError("lost")

    thread.post(fail)
    assert thread.submit(Note("still there")).result(TIMEOUT_SECONDS) == "still there"
    [record] = caplog.records
    assert "a command of the engine thread failed" in record.message
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)
    assert not thread.failed.done()


def test_a_command_cannot_end_the_thread_by_exiting(thread: EngineThread[SteppedWorker]) -> None:
    def leave(_: SteppedWorker) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        thread.submit(leave).result(TIMEOUT_SECONDS)
    assert thread.submit(Note("still there")).result(TIMEOUT_SECONDS) == "still there"


def test_a_command_that_was_cancelled_is_not_run(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    in_a_batch(thread, worker)
    cancelled = thread.submit(Note("cancelled"))
    after = thread.submit(Note("after"))
    assert cancelled.cancel()
    worker.let_end()
    after.result(TIMEOUT_SECONDS)
    assert worker.log == ["begin", "end", "after"]


def test_a_batch_that_fails_ends_the_thread_and_failed_holds_its_error(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    worker.error = RuntimeError("out of memory")
    thread.submit(Note("wake up"))
    assert isinstance(thread.failed.exception(TIMEOUT_SECONDS), RuntimeError)
    with pytest.raises(UnavailableError, match="is ending"):
        thread.submit(Note("too late"))
    with pytest.raises(UnavailableError, match="is ending"):
        thread.post(note("too late"))


def test_a_worker_that_recovers_keeps_its_thread(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    worker.can_recover = True
    worker.error = RuntimeError("a bug")
    thread.submit(Note("wake up"))
    assert worker.recovered.wait(TIMEOUT_SECONDS)
    thread.submit(Note("still there")).result(TIMEOUT_SECONDS)
    assert worker.log[-2:] == ["recovered from a bug", "still there"]
    assert not thread.failed.done()


@pytest.mark.parametrize("error", [SystemExit(), PanicError()])
def test_whatever_ends_the_thread_is_told(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker, error: BaseException
) -> None:
    worker.error = error
    thread.submit(Note("wake up"))
    assert thread.failed.exception(TIMEOUT_SECONDS) is error


def test_a_posted_command_cannot_end_the_thread(thread: EngineThread[SteppedWorker]) -> None:
    def panic(_: SteppedWorker) -> None:
        raise PanicError

    thread.post(panic)
    assert thread.submit(Note("still there")).result(TIMEOUT_SECONDS) == "still there"
    assert not thread.failed.done()


def test_a_thread_that_does_not_answer_takes_no_questions_but_notes(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    thread.refusal = "the engine hangs"
    with pytest.raises(UnavailableError, match="the engine hangs"):
        thread.submit(Note("question"))
    thread.post(note("close"))
    thread.refusal = ""
    thread.submit(Note("again")).result(TIMEOUT_SECONDS)
    assert worker.log == ["close", "again"]


def test_a_traceback_of_a_batch_names_no_other_error(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    worker.error = RuntimeError("out of memory")
    thread.submit(Note("wake up"))
    error = thread.failed.exception(TIMEOUT_SECONDS)
    assert error is not None
    assert error.__context__ is None


# Start and stop


def test_before_the_worker_is_made_the_service_is_loading() -> None:
    may_load = threading.Event()

    def load() -> SteppedWorker:
        assert may_load.wait(TIMEOUT_SECONDS)
        return SteppedWorker()

    thread = EngineThread("engine", load)
    thread.start()
    with pytest.raises(UnavailableError, match="loading its model"):
        thread.submit(Note("too early"))
    with pytest.raises(UnavailableError, match="loading its model"):
        thread.post(note("too early"))
    may_load.set()
    worker = thread.ready.result(TIMEOUT_SECONDS)
    assert thread.submit(Note("now")).result(TIMEOUT_SECONDS) == "now"
    assert worker.log == ["now"]
    assert thread.stop(TIMEOUT_SECONDS)


def test_ready_holds_why_the_worker_could_not_be_made() -> None:
    def load() -> SteppedWorker:
        raise OSError("no such file")

    thread = EngineThread("engine", load)
    thread.start()
    with pytest.raises(OSError, match="no such file"):
        thread.ready.result(TIMEOUT_SECONDS)
    assert thread.stop(TIMEOUT_SECONDS)


def test_ready_holds_a_panic_while_the_worker_is_made() -> None:
    def load() -> SteppedWorker:
        raise PanicError

    thread = EngineThread("engine", load)
    thread.start()
    assert isinstance(thread.ready.exception(TIMEOUT_SECONDS), PanicError)
    assert thread.stop(TIMEOUT_SECONDS)


def test_a_caller_that_stops_waiting_for_ready_does_not_cancel_it(
    thread: EngineThread[SteppedWorker],
) -> None:
    futures: tuple[Future[SteppedWorker] | Future[None], ...] = (thread.ready, thread.failed)
    assert not any(future.cancel() for future in futures)


def test_a_stop_lets_the_running_batch_end(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    in_a_batch(thread, worker, num_batches=3)
    assert not thread.stop(timeout_seconds=0.0)
    worker.let_end()
    assert thread.stop(TIMEOUT_SECONDS)
    assert worker.log == ["begin", "end"]


def test_commands_that_come_in_the_last_batch_are_refused_and_not_run(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    in_a_batch(thread, worker)
    late = thread.submit(Note("late"))
    thread.post(note("late"))
    worker.on_batch = fail
    worker.let_end()
    with pytest.raises(UnavailableError, match="is ending"):
        late.result(TIMEOUT_SECONDS)
    assert thread.stop(TIMEOUT_SECONDS)
    assert worker.log == ["begin"]
    assert [record.message for record in caplog.records] == ["the engine thread failed"]


def test_after_a_stop_no_command_is_taken(thread: EngineThread[SteppedWorker]) -> None:
    assert thread.stop(TIMEOUT_SECONDS)
    with pytest.raises(UnavailableError, match="is ending: use another replica"):
        thread.submit(Note("too late"))
    with pytest.raises(UnavailableError, match="is ending: use another replica"):
        thread.post(note("too late"))
    assert not thread.failed.done()


# Handovers to the event loop


class CountingHandovers:
    """Counts the calls that other threads hand to the running event loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num = 0
        loop = asyncio.get_running_loop()
        self._call_soon_threadsafe = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", self._count)

    def _count(self, callback: Callable[..., object], *arguments: object) -> asyncio.Handle:
        self.num += 1
        return self._call_soon_threadsafe(callback, *arguments)


async def take(outbox: Outbox[str], num_messages: int) -> list[str]:
    """Return the next messages of an outbox."""
    messages: list[str] = []
    filled = asyncio.Event()

    async def write(message: str) -> None:
        messages.append(message)
        if len(messages) == num_messages:
            filled.set()

    drained = asyncio.create_task(outbox.drain(write))
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await filled.wait()
    drained.cancel()
    return messages


async def test_a_batch_is_handed_over_at_once_for_all_its_sessions(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread.postbox.attach()
    outboxes: list[Outbox[str]] = [Outbox(100) for _ in range(5)]
    handovers = CountingHandovers(monkeypatch)

    def send() -> None:
        for word in ("one", "two"):
            for outbox in outboxes:
                thread.postbox.put(outbox, word)

    worker.on_batch = send
    worker.let_end(3)
    thread.post(lambda it: it.ask(3))
    assert await asyncio.to_thread(worker.idle.wait, TIMEOUT_SECONDS)
    assert await asyncio.gather(*(take(one, 6) for one in outboxes)) == [["one", "two"] * 3] * 5
    # One of them is the end of asyncio.to_thread.
    assert handovers.num == 3 + 1


async def test_the_commands_before_a_batch_are_handed_over_with_it(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread.postbox.attach()
    outbox: Outbox[str] = Outbox(100)
    in_a_batch(thread, worker)
    handovers = CountingHandovers(monkeypatch)
    for number in range(10):
        thread.post(lambda _, word=str(number): thread.postbox.put(outbox, word))  # type: ignore[misc]
    worker.let_end()
    assert await take(outbox, 10) == [str(number) for number in range(10)]
    assert handovers.num == 1


async def test_the_worker_may_hand_over_before_its_batch_ends(
    thread: EngineThread[SteppedWorker], worker: SteppedWorker
) -> None:
    thread.postbox.attach()
    outbox: Outbox[str] = Outbox(100)

    def ask_and_flush(it: SteppedWorker) -> None:
        it.ask(1)
        thread.postbox.put(outbox, "early")
        it.flush()

    thread.post(ask_and_flush)
    worker.wait_for_begin()
    assert await take(outbox, 1) == ["early"]
    worker.let_end()
