"""The engine thread: commands between passes, in order, and no exception is lost."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from amusd.protocol.errors import UnavailableError
from amusd.serving.engine_thread import EngineThread

TIMEOUT_SECONDS = 30.0


class ModelRunner:
    """A worker whose passes the test lets through one by one; it logs what happens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.thread = threading.current_thread()
        self.num_due = 0
        self.error: Exception | None = None
        self.idle = threading.Event()
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
        self.log.append("end")
        return True

    def ask(self, num_passes: int) -> None:
        self.num_due += num_passes

    def wait_for_begin(self) -> None:
        assert self._begun.acquire(timeout=TIMEOUT_SECONDS)

    def let_end(self, num_passes: int = 1) -> None:
        self._may_end.release(num_passes)


class Note:
    """Logs a word, and returns it."""

    def __init__(self, word: str) -> None:
        self._word = word

    def __call__(self, worker: ModelRunner) -> str:
        worker.log.append(self._word)
        return self._word


@pytest.fixture
def thread() -> Iterator[EngineThread[ModelRunner]]:
    thread = EngineThread("engine", ModelRunner)
    thread.start()
    worker = thread.ready.result(TIMEOUT_SECONDS)
    yield thread
    worker.let_end(100)
    assert thread.stop(TIMEOUT_SECONDS)


@pytest.fixture
def worker(thread: EngineThread[ModelRunner]) -> ModelRunner:
    return thread.ready.result(TIMEOUT_SECONDS)


def in_a_pass(thread: EngineThread[ModelRunner], worker: ModelRunner, num_passes: int = 1) -> None:
    """Return when the first of ``num_passes`` has begun; it does not end by itself."""
    thread.submit(lambda it: it.ask(num_passes))
    worker.wait_for_begin()


def test_the_worker_is_made_on_the_thread_and_commands_run_there(
    thread: EngineThread[ModelRunner], worker: ModelRunner
) -> None:
    ran_on = thread.submit(lambda _: threading.current_thread()).result(TIMEOUT_SECONDS)
    assert ran_on is worker.thread
    assert ran_on is not threading.current_thread()
    assert ran_on.name == "engine"


def test_a_command_answers_through_its_future(thread: EngineThread[ModelRunner]) -> None:
    assert thread.submit(Note("hello")).result(TIMEOUT_SECONDS) == "hello"


def test_commands_run_in_the_order_in_which_they_were_submitted(
    thread: EngineThread[ModelRunner], worker: ModelRunner
) -> None:
    words = [f"command {index}" for index in range(100)]
    futures = [thread.submit(Note(word)) for word in words]
    assert [future.result(TIMEOUT_SECONDS) for future in futures] == words
    assert worker.log == words


def test_commands_run_between_passes_and_all_of_them_before_the_next(
    thread: EngineThread[ModelRunner], worker: ModelRunner
) -> None:
    in_a_pass(thread, worker, num_passes=2)
    for word in ("first", "second", "third"):
        thread.submit(Note(word))
    worker.let_end()
    worker.wait_for_begin()
    worker.let_end()
    assert worker.idle.wait(TIMEOUT_SECONDS)
    assert worker.log == ["begin", "end", "first", "second", "third", "begin", "end"]


def test_a_busy_worker_needs_no_commands_to_go_on(
    thread: EngineThread[ModelRunner], worker: ModelRunner
) -> None:
    worker.let_end(5)
    thread.submit(lambda it: it.ask(5))
    assert worker.idle.wait(TIMEOUT_SECONDS)
    assert worker.log == ["begin", "end"] * 5


def test_an_exception_goes_to_its_future_and_the_thread_goes_on(
    thread: EngineThread[ModelRunner],
) -> None:
    def fail(_: ModelRunner) -> None:
        raise KeyError("lost")

    failed = thread.submit(fail)
    with pytest.raises(KeyError, match="lost"):
        failed.result(TIMEOUT_SECONDS)
    assert thread.submit(Note("still there")).result(TIMEOUT_SECONDS) == "still there"


def test_a_command_cannot_end_the_thread_by_exiting(thread: EngineThread[ModelRunner]) -> None:
    def leave(_: ModelRunner) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        thread.submit(leave).result(TIMEOUT_SECONDS)
    assert thread.submit(Note("still there")).result(TIMEOUT_SECONDS) == "still there"


def test_a_command_that_was_cancelled_is_not_run(
    thread: EngineThread[ModelRunner], worker: ModelRunner
) -> None:
    in_a_pass(thread, worker)
    cancelled = thread.submit(Note("cancelled"))
    after = thread.submit(Note("after"))
    assert cancelled.cancel()
    worker.let_end()
    after.result(TIMEOUT_SECONDS)
    assert worker.log == ["begin", "end", "after"]


def test_before_the_worker_is_made_the_service_is_loading() -> None:
    may_load = threading.Event()

    def load() -> ModelRunner:
        assert may_load.wait(TIMEOUT_SECONDS)
        return ModelRunner()

    thread = EngineThread("engine", load)
    thread.start()
    with pytest.raises(UnavailableError, match="loading its model"):
        thread.submit(Note("too early"))
    may_load.set()
    thread.ready.result(TIMEOUT_SECONDS)
    assert thread.submit(Note("now")).result(TIMEOUT_SECONDS) == "now"
    assert thread.stop(TIMEOUT_SECONDS)


def test_why_the_worker_could_not_be_made_is_told_by_ready() -> None:
    def load() -> ModelRunner:
        raise OSError("no such file")

    thread = EngineThread("engine", load)
    thread.start()
    with pytest.raises(OSError, match="no such file"):
        thread.ready.result(TIMEOUT_SECONDS)
    assert thread.stop(TIMEOUT_SECONDS)


def test_whoever_stops_waiting_for_ready_does_not_cancel_it(
    thread: EngineThread[ModelRunner],
) -> None:
    futures: tuple[Future[ModelRunner] | Future[None], ...] = (thread.ready, thread.failed)
    assert not any(future.cancel() for future in futures)


def test_a_pass_that_fails_ends_the_thread_and_is_told_by_failed(
    thread: EngineThread[ModelRunner], worker: ModelRunner
) -> None:
    worker.error = RuntimeError("out of memory")
    thread.submit(Note("wake up"))
    assert isinstance(thread.failed.exception(TIMEOUT_SECONDS), RuntimeError)
    with pytest.raises(UnavailableError, match="is ending"):
        thread.submit(Note("too late"))


def test_a_stop_lets_the_pass_that_runs_end(
    thread: EngineThread[ModelRunner], worker: ModelRunner
) -> None:
    in_a_pass(thread, worker, num_passes=3)
    assert not thread.stop(timeout_seconds=0.0)
    worker.let_end()
    assert thread.stop(TIMEOUT_SECONDS)
    assert worker.log == ["begin", "end"]


def test_after_a_stop_no_command_is_taken(thread: EngineThread[ModelRunner]) -> None:
    assert thread.stop(TIMEOUT_SECONDS)
    with pytest.raises(UnavailableError, match="is ending: use another replica"):
        thread.submit(Note("too late"))
    assert not thread.failed.done()
