"""The serving loop of both services, with a role that only logs: batches, errors, memory, time."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace

import pytest

from amusd.engine.interface import ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.observe.pass_listener import PassReport
from amusd.protocol.errors import (
    AmusdError,
    DuplicateSessionError,
    InvalidInputError,
    LimitExceededError,
    UnknownSessionError,
)
from amusd.serving.engine_worker import EngineWorker
from amusd.serving.scheduler import Scheduled
from amusd.serving.sequence import Send
from tests.serving.fake_serving import FakeOpening, FakeSequence, make_sequence, slot_of

MODEL = SyntheticModel(vocabulary=500, batch=8)
LIMITS = ServiceLimits(max_sessions=8, max_context=1000, max_lookahead=4, max_waiting=2)
PROMPT = list(range(100))


@dataclass
class LoggingRole:
    """Logs what the worker asks of it. Its sequences take one token of the model and are done."""

    log: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    early: list[str] = field(default_factory=list)
    """Sessions for which ``prepare`` sends a message."""

    def open(self, opening: FakeOpening, send: Send) -> FakeSequence:
        if not opening.tokens:
            raise InvalidInputError("no prompt")
        return make_sequence(opening.session_id, opening.tokens, opening.capacity)

    def admitted(self, sequence: FakeSequence) -> None:
        where = "waits" if sequence.slot is None else "open"
        self.log.append((where, sequence.session_id))

    def receive(self, sequence: FakeSequence, event: int) -> None:
        if event < 0:
            raise InvalidInputError(f"event {event}")
        self.log.append((f"event {event}", sequence.session_id))

    def prepare(self, sequences: list[FakeSequence]) -> bool:
        sent = [one for one in sequences if one.session_id in self.early]
        self.log.extend(("early", one.session_id) for one in sent)
        self.early.clear()
        return bool(sent)

    def fill(self, num_places: int) -> list[Scheduled[FakeSequence]]:
        return []

    def settle(self, sequence: FakeSequence, predictions: list[int]) -> None:
        self.log.append(("settled", sequence.session_id))
        self.outputs[sequence.session_id] = predictions
        sequence.due = False

    def close(self, sequence: FakeSequence) -> None:
        self.log.append(("closed", sequence.session_id))


class LoggingEngine(SyntheticEngine):
    """Logs its batches, and fails at a text that ends with token 0, after it has taken it."""

    def __init__(self, role: LoggingRole, model: SyntheticModel = MODEL) -> None:
        super().__init__(model)
        self._log = role.log

    def run(self, feeds: Rows[ScheduledSequence]) -> list[list[int]]:
        self._log.append(("batch", str(len(feeds))))
        outputs = super().run(feeds)
        if any(feed.tokens[-1] == 0 for feed in feeds):
            raise LimitExceededError("no memory left")
        return outputs


class Service:
    """A worker with its role and its engine."""

    def __init__(
        self, batch: int = 8, prefill_budget: int = 1000, memory: int = 0, pass_ms: float = 0.0
    ) -> None:
        self.role = LoggingRole()
        model = replace(MODEL, batch=batch, memory=memory, pass_ms=pass_ms)
        self.engine = LoggingEngine(self.role, model)
        self.batches: list[PassReport] = []
        self.worker: EngineWorker[FakeSequence, FakeOpening, int] = EngineWorker(
            self.engine,
            self.role,
            LIMITS,
            prefill_budget,
            on_pass=self.batches.append,
        )

    def open(self, name: str, tokens: list[int], capacity: int = 200) -> FakeSequence:
        self.worker.open(FakeOpening(name, tokens, capacity), lambda message: None)
        return self.worker.sequence(name)


def ignore(message: object) -> None:
    """Take a message of a session that nobody reads."""


# Batches


def test_a_step_schedules_runs_and_settles() -> None:
    service = Service()
    service.open("a", [1, 2])
    service.open("b", [3])
    service.role.log.clear()
    assert service.worker.step()
    assert service.role.log == [("batch", "2"), ("settled", "a"), ("settled", "b")]
    assert service.role.outputs == {
        "a": [MODEL.next_token([1, 2])],
        "b": [MODEL.next_token([3])],
    }
    assert not service.worker.step()


def test_a_chunk_of_a_prompt_that_is_not_the_last_is_not_settled() -> None:
    service = Service(prefill_budget=2)
    service.open("a", [1, 2, 3, 4, 5])
    for _ in range(2):
        assert service.worker.step()
        assert service.role.outputs == {}
    assert service.worker.step()
    assert service.role.outputs == {"a": [MODEL.next_token([1, 2, 3, 4, 5])]}


def test_messages_that_need_no_batch_are_handed_over_before_it_runs() -> None:
    service = Service()
    service.open("a", [1])
    service.open("b", [2])
    service.worker.flush = lambda: service.role.log.append(("flush", ""))
    service.role.early = ["b"]
    service.role.log.clear()
    service.worker.step()
    assert service.role.log[:3] == [("early", "b"), ("flush", ""), ("batch", "2")]
    service.role.log.clear()
    service.worker.step()  # nothing to hand over
    assert ("flush", "") not in service.role.log


def test_the_time_of_a_batch_is_whole_and_shared_by_tokens() -> None:
    service = Service(pass_ms=5)
    short, long = service.open("a", [1]), service.open("b", [2, 3, 4])
    service.worker.step()
    times = [sequence.clock.take() for sequence in (short, long)]
    [report] = service.batches
    seconds = report.seconds
    assert (report.num_sessions, report.num_tokens, report.num_branch_tokens) == (2, 4, 0)
    assert seconds >= 0.005
    assert [one.seconds for one in times] == [seconds, seconds]
    assert [one.num_batches for one in times] == [1, 1]
    assert [one.share_seconds for one in times] == pytest.approx([seconds / 4, seconds * 3 / 4])
    assert [one.times for one in times] == [(), ()]  # not asked for
    assert short.clock.take().num_batches == 0


def test_a_sequence_that_records_times_knows_when_each_of_its_batches_ran() -> None:
    service = Service(prefill_budget=2)
    sequence = service.open("a", [1, 2, 3, 4])
    sequence.clock.records_times = True
    service.worker.step()
    service.worker.step()
    times = sequence.clock.take()
    assert [one.seconds for one in times.times] == [one.seconds for one in service.batches]
    first, second = times.times
    assert second.started_unix_nanos >= first.started_unix_nanos + int(first.seconds * 1e9)


# Batches that fail


def test_a_batch_that_fails_ends_the_session_that_causes_it_and_no_other() -> None:
    service = Service(batch=2)
    failed, beside = service.open("a", [1, 0]), service.open("b", [2])
    other = service.open("c", [3])
    assert service.worker.step()
    assert [str(one) for one in failed.errors] == ["no memory left"]
    assert service.role.outputs == {"b": [MODEL.next_token([2])]}
    assert service.worker.step()
    assert service.role.outputs["c"] == [MODEL.next_token([3])]
    assert beside.errors == other.errors == []
    assert not service.worker.step()
    assert [one.num_sessions for one in service.batches] == [1, 1]  # the ones that worked


def test_a_batch_that_fails_leaves_the_kv_cache_as_it_was() -> None:
    service = Service()
    donor = service.open("donor", PROMPT)
    service.worker.step()
    assert service.engine.length(slot_of(donor)) == 100
    failed = service.open("failed", [*PROMPT[:50], *[400] * 50, 0])
    service.worker.step()
    assert failed.has_failed
    assert failed.num_cached_tokens == 50
    assert service.engine.length(slot_of(failed)) == 50  # what was copied before the batch
    service.worker.close("failed")
    fresh = service.open("fresh", [*PROMPT[:50], *[400] * 50, 1])
    service.worker.step()
    # What the failed batch left behind is not reused.
    assert fresh.num_cached_tokens == 50
    assert service.role.outputs["fresh"] == [MODEL.next_token(fresh.tokens)]


def test_a_session_of_a_failed_batch_is_closed_as_any_other() -> None:
    service = Service()
    service.open("a", [0])
    service.worker.step()
    assert service.worker.num_sessions == 1
    with pytest.raises(DuplicateSessionError):
        service.open("a", [1])
    service.worker.close("a")
    assert service.worker.num_sessions == service.engine.num_open == 0
    service.open("a", [1])


# Messages


def test_an_event_goes_to_its_sequence() -> None:
    service = Service()
    service.open("a", [1])
    service.open("b", [2])
    service.role.log.clear()
    service.worker.receive("b", 7)
    assert service.role.log == [("event 7", "b")]


def test_an_event_that_is_refused_ends_its_session_once() -> None:
    service = Service()
    failed, other = service.open("a", [1]), service.open("b", [2])
    service.role.log.clear()
    for event in (-1, -2, 3):
        service.worker.receive("a", event)
    service.worker.receive("b", 4)
    assert [str(error) for error in failed.errors] == ["event -1"]
    assert service.role.log == [("event 4", "b")]
    service.worker.step()
    assert list(service.role.outputs) == ["b"]
    assert not other.has_failed


def test_a_session_that_is_not_open_is_unknown() -> None:
    service = Service()
    with pytest.raises(UnknownSessionError, match="no session 'a' is open here"):
        service.worker.sequence("a")
    service.open("a", [1])
    assert service.worker.sequence("a").session_id == "a"
    service.worker.close("a")
    with pytest.raises(UnknownSessionError):
        service.worker.sequence("a")


# Sessions and memory


@pytest.mark.parametrize(
    ("opening", "error"),
    [
        (FakeOpening("b", []), InvalidInputError),
        (FakeOpening("a", [1]), DuplicateSessionError),
        (FakeOpening("b", [1], capacity=301), InvalidInputError),
    ],
)
def test_an_opening_that_is_refused_leaves_everything_as_it_was(
    opening: FakeOpening, error: type[AmusdError]
) -> None:
    service = Service(memory=300)
    service.open("a", [1])
    before = list(service.role.log)
    with pytest.raises(error):
        service.worker.open(opening, ignore)
    assert service.role.log == before
    assert (service.worker.num_sessions, service.worker.num_waiting) == (1, 0)
    assert service.engine.usage.num_reserved == 200


@pytest.mark.parametrize("leave", ["close", "give_up"])
def test_the_role_goes_on_with_sequences_that_get_memory(leave: str) -> None:
    service = Service(memory=300)
    service.open("a", [1], capacity=290)
    service.open("b", [2], capacity=290)
    service.open("c", [3], capacity=10)
    assert (service.worker.num_sessions, service.worker.num_waiting) == (1, 2)
    assert service.role.log == [("open", "a"), ("waits", "b"), ("waits", "c")]
    service.role.log.clear()
    if leave == "close":
        service.worker.close("a")
        assert service.role.log == [("closed", "a"), ("open", "b"), ("open", "c")]
    else:
        service.worker.give_up("b")
        assert service.role.log == [("open", "c")]
    assert service.worker.num_waiting == 0


def test_a_session_that_is_closed_frees_its_memory_whether_it_ran_or_waited() -> None:
    service = Service(memory=300)
    service.open("a", [1])
    service.open("b", [2])
    service.worker.step()
    service.worker.close("b")
    service.worker.close("a")
    assert service.worker.num_sessions == service.worker.num_waiting == 0
    assert service.engine.usage.num_reserved == 0
    assert service.role.log[-2:] == [("closed", "b"), ("closed", "a")]
