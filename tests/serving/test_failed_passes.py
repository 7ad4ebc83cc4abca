"""Passes that raise: who ends, who goes on, what is left in the KV cache, and what is counted."""

import logging
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.engine.interface import Outcome, ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.errors import (
    AmusdError,
    CacheFullError,
    InvalidInputError,
    LimitExceededError,
)
from amusd.rpc.faults import status_of
from amusd.sampling.parameters import SequenceSampling
from amusd.serving.engine_health import EngineHealth, HealthSettings
from amusd.serving.engine_worker import EngineWorker
from tests.serving.fake_serving import FakeOpening, FakeSequence, slot_of
from tests.serving.test_engine_worker import LoggingRole

MODEL = SyntheticModel(vocabulary=500, batch=16)
LIMITS = ServiceLimits(max_sessions=16, max_context=1000, max_lookahead=4, max_waiting=4)
POISON, REFUSED = 499, 498
PROMPT = list(range(100))


class PanicError(BaseException):
    """As a panic of a Rust extension: no Exception."""


class FragileEngine(SyntheticEngine):
    """Raises at a text with the token POISON; refuses the sequences with REFUSED alone."""

    def __init__(self, model: SyntheticModel = MODEL) -> None:
        super().__init__(model)
        self.error: BaseException = RuntimeError("index out of range")
        self.is_sick = False
        self.max_sessions = 100
        self.sizes: list[int] = []

    def run(self, feeds: Rows[ScheduledSequence]) -> list[Outcome]:
        self.sizes.append(len(feeds))
        outputs = super().run(feeds)  # it has taken the tokens when it raises
        has_poison = any(POISON in feed.tokens for feed in feeds)
        if self.is_sick or has_poison or len(feeds) > self.max_sessions:
            raise self.error
        return [
            AmusdError("logits are not finite") if REFUSED in feed.tokens else output
            for feed, output in zip(feeds, outputs, strict=True)
        ]


@dataclass
class FragileRole(LoggingRole):
    """Raises where the test says so, for the session ``bad``."""

    raises_in: str = ""
    closing: list[str] = field(default_factory=list)

    def prepare(self, sequences: list[FakeSequence]) -> bool:
        for sequence in sequences:
            self._fail("prepare", sequence)
        return super().prepare(sequences)

    def settle(self, sequence: FakeSequence, predictions: list[int]) -> None:
        self._fail("settle", sequence)
        super().settle(sequence, predictions)

    def receive(self, sequence: FakeSequence, event: int) -> None:
        self._fail("receive", sequence)
        super().receive(sequence, event)

    def admitted(self, sequence: FakeSequence) -> None:
        self._fail("admitted", sequence)
        super().admitted(sequence)

    def close(self, sequence: FakeSequence) -> None:
        self._fail("close", sequence)
        super().close(sequence)

    def _fail(self, where: str, sequence: FakeSequence) -> None:
        if self.raises_in == where and sequence.session_id == "bad":
            raise KeyError(where)


class Service:
    """A worker whose engine and role fail as the test says."""

    def __init__(self, prefill_budget: int = 1000, max_failed_passes: int = 3) -> None:
        self.role = FragileRole()
        self.engine = FragileEngine()
        self.num_failed = 0
        self.health = EngineHealth(
            HealthSettings(max_failed_passes=max_failed_passes), self._count_failed
        )
        self.worker: EngineWorker[FakeSequence, FakeOpening, int] = EngineWorker(
            self.engine, self.role, LIMITS, prefill_budget, health=self.health
        )

    def open(self, name: str, tokens: list[int]) -> FakeSequence:
        self.worker.open(FakeOpening(name, tokens), lambda message: None)
        return self.worker.sequence(name)

    def run(self) -> None:
        while self.worker.step():
            pass

    def _count_failed(self) -> None:
        self.num_failed += 1


# Whose session ends


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error"),
        MemoryError(),
        AssertionError("in C"),
        PanicError("overflow"),
        IndexError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_of_any_type_ends_the_session_that_causes_it(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    service.engine.error = error
    others = [service.open(f"session {index}", [index]) for index in range(1, 6)]
    bad = service.open("bad", [7, POISON])
    service.run()
    [told] = bad.errors
    assert type(error).__name__ in str(told)
    assert "engine failed while computing this session" in str(told)
    assert status_of(told).name == "INTERNAL"
    assert [one.errors for one in others] == [[]] * 5
    assert service.role.outputs == {
        one.session_id: [MODEL.next_token(one.tokens)] for one in others
    }
    assert service.num_failed == 1
    with_traceback = [record for record in caplog.records if record.exc_info]
    assert [record.exc_info and record.exc_info[1] for record in with_traceback] == [error]
    assert "session bad ends" in caplog.text


@given(bad=st.lists(st.booleans(), min_size=1, max_size=12))
def test_exactly_the_sessions_that_make_a_pass_fail_end(bad: list[bool]) -> None:
    logging.disable(logging.CRITICAL)
    try:
        service = Service(max_failed_passes=100)
        opened = [
            service.open(str(index), [index + 1, POISON if is_bad else 1])
            for index, is_bad in enumerate(bad)
        ]
        assert service.worker.step()
        assert [one.has_failed for one in opened] == bad
        assert [len(one.errors) for one in opened] == [int(one) for one in bad]
        assert len(service.role.outputs) == bad.count(False)
        # A binary search: at most two passes a level for each culprit.
        assert len(service.engine.sizes) <= 1 + 2 * bad.count(True) * len(bad).bit_length()
    finally:
        logging.disable(logging.NOTSET)


def test_a_batch_that_is_only_too_large_ends_nobody() -> None:
    service = Service()
    service.engine.max_sessions = 2
    opened = [service.open(str(index), [index]) for index in range(1, 8)]
    service.run()
    assert len(service.role.outputs) == 7
    assert not any(one.has_failed for one in opened)
    assert service.num_failed == 1
    assert service.health.num_failed_in_row == 0


def test_an_exit_is_no_failed_pass() -> None:
    service = Service()
    service.engine.error = SystemExit()
    service.open("bad", [POISON])
    with pytest.raises(SystemExit):
        service.worker.step()


def test_a_session_that_the_engine_refuses_in_a_pass_ends_alone() -> None:
    service = Service()
    bad, other = service.open("bad", [*PROMPT, REFUSED]), service.open("other", [1])
    service.run()
    assert [str(one) for one in bad.errors] == ["logits are not finite"]
    assert list(service.role.outputs) == ["other"]
    assert other.errors == []
    assert service.engine.sizes == [2]  # it ran once
    assert service.engine.length(slot_of(bad)) == 0


def test_too_few_outcomes_are_a_failed_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    run = service.engine.run
    monkeypatch.setattr(service.engine, "run", lambda feeds: run(feeds)[:1])
    opened = [service.open("a", [1]), service.open("b", [2])]
    service.run()
    assert not any(one.has_failed for one in opened)  # a pass over one has one outcome
    assert sorted(service.role.outputs) == ["a", "b"]


# The KV cache afterwards


def test_sessions_that_go_on_have_the_kv_cache_that_they_need() -> None:
    service = Service(prefill_budget=60)
    good = service.open("good", PROMPT)
    service.worker.step()
    service.open("bad", [POISON])
    service.run()
    assert service.role.outputs == {"good": [MODEL.next_token(PROMPT)]}
    assert service.engine.length(slot_of(good)) == 100


def test_the_kv_cache_of_a_failed_session_is_not_reused() -> None:
    service = Service(prefill_budget=60)
    bad = service.open("bad", [*PROMPT, POISON])
    service.run()
    assert bad.has_failed
    service.worker.close("bad")
    fresh = service.open("fresh", [*PROMPT, 1])
    service.run()
    assert fresh.num_cached_tokens == 0
    assert service.role.outputs["fresh"] == [MODEL.next_token(fresh.tokens)]
    assert service.engine.num_open == 1


# Failures beside a pass


@pytest.mark.parametrize("where", ["prepare", "settle", "receive", "admitted"])
def test_a_failure_in_the_work_of_one_session_ends_it_alone(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    service.role.raises_in = where
    opened = [service.open(name, [1 + len(name)]) for name in ("first", "bad", "last one")]
    for one in opened:
        service.worker.receive(one.session_id, 1)
    service.run()
    assert [len(one.errors) for one in opened] == [0, 1, 0]
    assert "KeyError" in str(opened[1].errors[0])
    assert status_of(opened[1].errors[0]).name == "INTERNAL"
    assert sorted(service.role.outputs) == ["first", "last one"]
    assert any(record.exc_info for record in caplog.records)


def test_a_sequence_whose_scheduling_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    bad, other = service.open("bad", PROMPT), service.open("other", [1])
    reuse = service.engine.reuse

    def fail_for_bad(slot: int, tokens: Rows[int]) -> int:
        if slot == bad.slot:
            raise MemoryError
        return reuse(slot, tokens)

    monkeypatch.setattr(service.engine, "reuse", fail_for_bad)
    service.run()
    assert "MemoryError" in str(bad.errors)
    assert other.errors == []
    assert list(service.role.outputs) == ["other"]


def test_memory_that_cannot_be_had_for_a_waiting_session_ends_it_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = Service()
    with monkeypatch.context() as patch:
        patch.setattr(service.engine, "open", _full)
        waiting = [service.open(name, [1]) for name in ("bad", "other")]
    service.open("third", [2])  # waits behind them
    answers: list[BaseException | None] = [MemoryError(), None, None]
    allocate = service.engine.open

    def open_slot(capacity: int, sampling: SequenceSampling) -> int:
        error = answers.pop(0)
        if error is not None:
            raise error
        return allocate(capacity, sampling)

    monkeypatch.setattr(service.engine, "open", open_slot)
    service.worker.close("third")
    assert "MemoryError" in str(waiting[0].errors)
    assert waiting[1].slot is not None
    assert service.worker.num_waiting == 0


def _full(capacity: int, sampling: SequenceSampling) -> int:
    raise CacheFullError("full")


def test_a_session_whose_close_fails_frees_its_memory() -> None:
    service = Service()
    service.role.raises_in = "close"
    service.open("bad", [1])
    with pytest.raises(KeyError):
        service.worker.close("bad")
    assert service.worker.num_sessions == service.engine.num_open == 0


# Steps that fail outside of a pass


def test_a_step_that_fails_outside_of_a_pass_ends_its_sessions_and_the_worker_goes_on() -> None:
    service = Service(max_failed_passes=2)
    error = ZeroDivisionError("a bug")
    for name in ("a", "b"):
        opened = service.open(name, [1])
        service.worker.recover(error)
        assert "ZeroDivisionError" in str(opened.errors)
        service.worker.close(name)
        service.open(f"{name} next", [1])
        service.run()
        assert f"{name} next" in service.role.outputs
    assert service.num_failed == 2


def test_a_loop_that_fails_again_and_again_raises() -> None:
    service = Service(max_failed_passes=3)
    service.worker.recover(KeyError("a bug"))
    service.worker.recover(KeyError("a bug"))
    with pytest.raises(KeyError):
        service.worker.recover(KeyError("a bug"))


# Failed passes in a row


def fail(service: Service, num_times: int) -> None:
    for index in range(num_times):
        service.open(f"bad {index}", [POISON])
        service.run()
        service.worker.close(f"bad {index}")


def test_an_engine_that_fails_again_and_again_is_tested_and_found_at_fault() -> None:
    service = Service(max_failed_passes=3)
    service.engine.is_sick = True
    fail(service, 2)
    assert service.health.fault == ""
    fail(service, 1)
    assert service.health.fault == "RuntimeError: index out of range"
    assert service.num_failed == 3
    assert service.engine.num_open == 0


def test_an_engine_that_fails_for_a_whole_batch_is_tested_at_once() -> None:
    service = Service(max_failed_passes=5)
    opened = [service.open(str(index), [index]) for index in range(1, 5)]
    service.engine.is_sick = True
    assert service.worker.step()
    assert all(one.has_failed for one in opened)
    assert service.engine.sizes == [4, 2, 1, 1, 2, 1, 1, 1]  # the last is the test
    assert service.health.fault
    assert service.num_failed == 1


def test_requests_that_fail_one_after_the_other_do_not_put_a_good_engine_at_fault() -> None:
    service = Service(max_failed_passes=3)
    fail(service, 10)
    assert service.health.fault == ""
    assert service.num_failed == 10


def test_failed_passes_with_a_good_one_in_between_are_not_in_a_row() -> None:
    service = Service(max_failed_passes=3)
    for index in range(3):
        fail(service, 2)
        service.open(f"good {index}", [1])
        service.run()
        service.worker.close(f"good {index}")
    assert max(service.engine.sizes) == 1
    assert len(service.engine.sizes) == 9  # no test among them


@pytest.mark.parametrize("by", ["test", "session"])
def test_an_engine_that_works_again_is_not_at_fault(by: str) -> None:
    service = Service(max_failed_passes=1)
    service.engine.is_sick = True
    fail(service, 1)
    assert service.health.fault
    service.engine.is_sick = False
    if by == "test":
        service.worker.test_engine()
    else:
        service.open("good", [1])
        service.run()
    assert service.health.fault == ""
    assert not service.health.is_suspect


def test_a_test_leaves_nothing_in_the_kv_cache() -> None:
    service = Service()
    service.worker.test_engine()
    fresh = service.open("fresh", [0] * 100)
    service.run()
    assert fresh.num_cached_tokens == 0
    assert service.engine.num_open == 1
    assert service.health.fault == ""


def test_a_model_that_cannot_run_is_refused_at_the_start() -> None:
    service = Service()
    service.engine.is_sick = True
    with pytest.raises(AmusdError, match=r"cannot run synthetic \(RuntimeError: index out of ran"):
        service.worker.warm_up()


def test_an_engine_that_has_no_tokens_for_any_session_is_at_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = Service(max_failed_passes=2)
    error = AmusdError("logits are not finite")
    monkeypatch.setattr(service.engine, "run", lambda feeds: [error] * len(feeds))
    for name in ("a", "b"):
        service.open(name, [1])
        service.run()
    assert service.num_failed == 2
    assert service.health.fault == "AmusdError: logits are not finite"


def test_a_request_that_allows_no_token_is_no_fault_of_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = Service(max_failed_passes=1)
    error = InvalidInputError("the request allows no token")
    monkeypatch.setattr(service.engine, "run", lambda feeds: [error] * len(feeds))
    bad = service.open("bad", [1])
    service.run()
    assert [str(one) for one in bad.errors] == ["the request allows no token"]
    assert service.num_failed == 0
    assert service.health.num_failed_in_row == 0


def test_a_refusal_by_the_engine_is_no_failed_pass() -> None:
    service = Service(max_failed_passes=1)
    service.engine.error = LimitExceededError("slot 1 is full")
    bad = service.open("bad", [POISON])
    service.run()
    assert [str(one) for one in bad.errors] == ["slot 1 is full"]
    assert service.num_failed == 0
    assert service.health.fault == ""
