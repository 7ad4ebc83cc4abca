"""The Rollback stream to a draft replica, the order of a session's messages, and lost drafts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest

from amusd.protocol.errors import AmusdError, InternalError, UnavailableError
from amusd.protocol.events import Advance, Proposal, Rollback
from amusd.protocol.strategy import DraftPlan, Strategy
from amusd.rpc.channel import open_channel
from amusd.v1 import draft_pb2
from orchestrator.backends import Backends
from orchestrator.links import DraftLink, Event, LinkLost, SessionOpening
from orchestrator.rollback_stream import DraftStub, RollbackStream
from tests.orchestrator.replicas import FakeDraft, FakeVerify, becomes_true
from tests.orchestrator.running_backends import Serve, generate, running

PROMPT = (1, 2)
TOKEN = 7


@dataclass
class Session:
    """Records what a session's listener is told."""

    answered_epochs: list[int] = field(default_factory=list)
    errors: list[AmusdError] = field(default_factory=list)

    def answered(self, response: draft_pb2.RollbackResponse) -> None:
        self.answered_epochs.append(response.epoch)

    def rollbacks_lost(self, error: AmusdError) -> None:
        self.errors.append(error)


def request(session_id: str, epoch: int) -> draft_pb2.RollbackRequest:
    return draft_pb2.RollbackRequest(session_id=session_id, epoch=epoch, verified_position=3)


@pytest.fixture
async def draft() -> FakeDraft:
    """A draft service whose rollbacks the test answers."""
    return FakeDraft(answers=False)


@pytest.fixture
async def stub(serve: Serve, draft: FakeDraft) -> AsyncIterator[DraftStub]:
    """What an orchestrator calls on ``draft``."""
    async with open_channel(await serve(draft)) as channel:
        yield DraftStub(channel)


@pytest.fixture
def rollbacks(stub: DraftStub) -> RollbackStream:
    return stub.rollbacks


# One stream for all sessions


async def test_answers_reach_their_session_in_whatever_order_they_come(
    rollbacks: RollbackStream, draft: FakeDraft
) -> None:
    sessions = {name: Session() for name in ("one", "two", "three")}
    for name, session in sessions.items():
        rollbacks.attach(name, session)
    for number, name in enumerate(("one", "two", "one", "three")):
        rollbacks.send(request(name, 1 + number))
    await becomes_true(lambda: len(draft.rollbacks) == 4)
    assert [(one.session_id, one.epoch) for one in draft.rollbacks] == [
        ("one", 1),
        ("two", 2),
        ("one", 3),
        ("three", 4),
    ]
    for one in reversed(draft.rollbacks):
        await draft.answer(one)
    await becomes_true(lambda: len(sessions["one"].answered_epochs) == 2)
    assert [one.answered_epochs for one in sessions.values()] == [[3, 1], [2], [4]]
    assert not [error for one in sessions.values() for error in one.errors]
    assert len(draft.rollback_streams) == 1


async def test_the_answer_for_a_session_that_has_ended_is_dropped(
    rollbacks: RollbackStream, draft: FakeDraft
) -> None:
    ended, other = Session(), Session()
    for name, session in (("ended", ended), ("other", other)):
        rollbacks.attach(name, session)
        rollbacks.send(request(name, 1))
    await becomes_true(lambda: len(draft.rollbacks) == 2)
    rollbacks.detach("ended", ended)
    for one in draft.rollbacks:
        await draft.answer(one)
    await becomes_true(lambda: other.answered_epochs == [1])
    assert (ended.answered_epochs, ended.errors, other.errors) == ([], [], [])


async def test_a_link_that_was_replaced_leaves_the_answers_to_its_successor(
    rollbacks: RollbackStream, draft: FakeDraft
) -> None:
    old, new = Session(), Session()
    rollbacks.attach("one", old)
    rollbacks.attach("one", new)
    rollbacks.detach("one", old)
    rollbacks.send(request("one", 1))
    await becomes_true(lambda: len(draft.rollbacks) == 1)
    await draft.answer(draft.rollbacks[0])
    await becomes_true(lambda: new.answered_epochs == [1])
    assert old.answered_epochs == []


async def test_a_refused_rollback_leaves_the_stream_open_for_the_others(
    rollbacks: RollbackStream, draft: FakeDraft
) -> None:
    refused, other = Session(), Session()
    for name, session in (("refused", refused), ("other", other)):
        rollbacks.attach(name, session)
        rollbacks.send(request(name, 1))
    await becomes_true(lambda: len(draft.rollbacks) == 2)
    draft.rollback_refusal = grpc.StatusCode.FAILED_PRECONDITION
    await draft.answer(draft.rollbacks[0])
    draft.rollback_refusal = None
    await draft.answer(draft.rollbacks[1])
    await becomes_true(lambda: (refused.answered_epochs, other.answered_epochs) == ([1], [1]))
    assert len(draft.rollback_streams) == 1


async def test_a_broken_stream_is_reported_and_opened_anew_at_the_next_rollback(
    rollbacks: RollbackStream, draft: FakeDraft
) -> None:
    draft.breaks = grpc.StatusCode.UNAVAILABLE
    session = Session()
    rollbacks.attach("one", session)
    rollbacks.send(request("one", 1))
    await becomes_true(lambda: bool(session.errors))
    (error,) = session.errors
    assert type(error) is UnavailableError
    assert str(error) == "draft service: the stream is broken"
    assert len(draft.rollback_streams) == 1

    draft.breaks, draft.answers = None, True
    rollbacks.send(request("one", 2))
    await becomes_true(lambda: session.answered_epochs == [2])
    assert [one.epoch for one in draft.rollbacks] == [1, 2]
    assert len(draft.rollback_streams) == 2
    assert session.errors == [error]


async def test_a_stream_that_the_replica_ends_is_reported_as_well(
    rollbacks: RollbackStream, draft: FakeDraft
) -> None:
    draft.breaks = grpc.StatusCode.OK
    session = Session()
    rollbacks.attach("one", session)
    rollbacks.send(request("one", 1))
    await becomes_true(lambda: bool(session.errors))
    assert str(session.errors[0]) == "draft service: ended the rollback stream"


async def test_more_rollbacks_than_may_wait_end_the_stream_and_are_reported(
    rollbacks: RollbackStream, draft: FakeDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.rollback_stream._MAX_OUTGOING", 2)
    session = Session()
    rollbacks.attach("one", session)
    for epoch in range(1, 5):  # none is written meanwhile
        rollbacks.send(request("one", epoch))
    await becomes_true(lambda: bool(session.errors))
    draft.answers = True
    rollbacks.send(request("one", 5))
    await becomes_true(lambda: session.answered_epochs[-1:] == [5])


# The messages of one session


@dataclass
class Linked:
    """A session's link to a draft replica, and the events that came over it."""

    link: DraftLink
    events: list[Event]

    @property
    def losses(self) -> list[AmusdError]:
        return [event.error for event in self.events if isinstance(event, LinkLost)]

    def roll_back(self, epoch: int) -> None:
        self.link.send(Rollback(epoch, len(PROMPT) + 1, TOKEN))

    def advance(self, epoch: int) -> None:
        self.link.send(Advance(epoch, len(PROMPT), (TOKEN,)))


@asynccontextmanager
async def linked(
    backends: Backends, *session_ids: str, timeout_seconds: float = 30.0
) -> AsyncIterator[list[Linked]]:
    """Open a session of each id on a draft replica, and wait until all are open."""
    opened: list[Linked] = []
    for session_id in session_ids:
        events: list[Event] = []
        lease = backends.draft.take()
        link = DraftLink(lease, session_id, events.append, timeout_seconds)
        opened.append(Linked(link, events))
        link.open(SessionOpening(session_id, PROMPT, 50, ""), DraftPlan(4, 1))
    try:
        await becomes_true(lambda: all(one.events for one in opened))
        yield opened
    finally:
        for one in opened:
            one.link.cancel()
        tasks = [task for one in opened for task in one.link.tasks]
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def backends(serve: Serve, draft: FakeDraft) -> AsyncIterator[Backends]:
    """The pools of an orchestrator with ``draft`` as its only draft replica."""
    async with running(await serve(FakeVerify()), await serve(draft)) as running_backends:
        await running_backends.connect(10)
        yield running_backends


async def test_an_advance_behind_a_rollback_is_sent_after_the_answer(
    backends: Backends, draft: FakeDraft
) -> None:
    async with linked(backends, "one") as [one]:
        one.advance(0)
        one.roll_back(1)
        one.advance(1)
        await becomes_true(lambda: "rollback 1" in draft.events)
        await round_trip(backends)
        await draft.answer(draft.rollbacks[0])
        await becomes_true(lambda: "advance 1" in draft.events)
        one.advance(1)
        await becomes_true(lambda: draft.events.count("advance 1") == 2)
        assert not one.losses
    in_order = [event for event in draft.events if event != "advance 0"]
    assert in_order == ["rollback 1", "answer 1", "advance 1", "advance 1"]
    assert draft.events.count("advance 0") == 1


async def round_trip(backends: Backends) -> None:
    """Make a call over the replica's connection: what was sent before it has arrived by then."""
    await backends.draft.take().stub.info(10)


async def test_only_the_answer_to_the_last_rollback_releases_the_advances_behind_it(
    backends: Backends, draft: FakeDraft
) -> None:
    async with linked(backends, "one") as [one]:
        one.roll_back(1)
        one.advance(1)  # of an older epoch as soon as the next rollback is sent
        one.roll_back(2)
        one.advance(2)
        await becomes_true(lambda: len(draft.rollbacks) == 2)
        await draft.answer(draft.rollbacks[0])
        await becomes_true(lambda: any(epoch_of(event) == 1 for event in one.events))
        await round_trip(backends)
        await draft.answer(draft.rollbacks[1])
        await becomes_true(lambda: "advance 2" in draft.events)
        assert not one.losses
    assert draft.events == ["rollback 1", "rollback 2", "answer 1", "answer 2", "advance 2"]


def epoch_of(event: Event) -> int | None:
    return event.epoch if isinstance(event, Proposal) else None


async def test_a_rollback_that_waits_holds_up_no_other_session(
    backends: Backends, draft: FakeDraft
) -> None:
    async with linked(backends, "waiting", "other") as [waiting, other]:
        waiting.roll_back(5)
        waiting.advance(5)
        other.roll_back(1)
        other.advance(1)
        await becomes_true(lambda: len(draft.rollbacks) == 2)
        await draft.answer(draft.rollbacks[1])
        await becomes_true(lambda: "advance 1" in draft.events)
        assert "advance 5" not in draft.events
        assert not waiting.losses + other.losses


async def test_a_broken_stream_loses_only_the_sessions_that_wait_for_an_answer(
    backends: Backends, draft: FakeDraft
) -> None:
    draft.breaks = grpc.StatusCode.UNAVAILABLE
    async with linked(backends, "waiting", "other") as [waiting, other]:
        waiting.roll_back(1)
        await becomes_true(lambda: bool(waiting.losses))
        (error,) = waiting.losses
        assert type(error) is UnavailableError
        draft.breaks, draft.answers = None, True
        other.roll_back(1)
        other.advance(1)
        await becomes_true(lambda: "advance 1" in draft.events)
        assert not other.losses


async def test_a_rollback_without_an_answer_loses_its_own_session(
    backends: Backends, draft: FakeDraft
) -> None:
    async with linked(backends, "waiting", "other", timeout_seconds=0.1) as [waiting, other]:
        waiting.roll_back(1)
        await becomes_true(lambda: bool(waiting.losses))
        (error,) = waiting.losses
        assert type(error) is UnavailableError
        assert str(error) == "draft service: no answer to a rollback within 0.1 s"
        assert not other.losses


async def test_an_answered_rollback_is_not_timed_out(backends: Backends, draft: FakeDraft) -> None:
    async with linked(backends, "one", "waiting", timeout_seconds=1.0) as [one, waiting]:
        draft.answers = True
        one.roll_back(1)
        await becomes_true(lambda: any(epoch_of(event) == 1 for event in one.events))
        draft.answers = False
        waiting.roll_back(1)  # its timeout comes later
        await becomes_true(lambda: bool(waiting.losses))
        assert not one.losses


async def test_a_session_that_has_ended_takes_no_more_answers(
    backends: Backends, draft: FakeDraft
) -> None:
    async with linked(backends, "ended", "other") as [ended, other]:
        for one in (ended, other):
            one.roll_back(1)
        await becomes_true(lambda: len(draft.rollbacks) == 2)
        ended.link.cancel()
        draft.rollback_refusal = grpc.StatusCode.NOT_FOUND
        for request_of_one in draft.rollbacks:
            await draft.answer(request_of_one)
        await becomes_true(lambda: bool(other.losses))
        assert not ended.losses


async def test_a_session_that_failed_tells_why_although_its_rollback_finds_it_gone(
    backends: Backends, draft: FakeDraft
) -> None:
    draft.fails, draft.rollback_refusal = asyncio.Event(), grpc.StatusCode.NOT_FOUND
    async with linked(backends, "one") as [one]:
        one.advance(0)
        await becomes_true(lambda: "advance 0" in draft.events)
        one.roll_back(1)
        await becomes_true(lambda: len(draft.rollbacks) == 1)
        await draft.answer(draft.rollbacks[0])
        await round_trip(backends)
        draft.fails.set()
        await becomes_true(lambda: bool(one.losses))
        (error,) = one.losses
        assert type(error) is InternalError
        assert str(error) == "draft service: the engine failed"


# Generations: the loss of the draft costs no token


async def generate_until_the_draft_is_lost(
    serve: Serve, draft: FakeDraft, draft_timeout_seconds: float = 30.0
) -> str:
    """Generate while the draft is lost; return the reason for the fallback."""
    draft.num_proposed, draft.is_wrong = 3, True
    verify = FakeVerify(num_free_passes=1)
    async with running(await serve(verify), await serve(draft)) as backends:
        await backends.connect(10)
        task = asyncio.create_task(generate(backends, Strategy.AMUSD, draft_timeout_seconds))
        async with asyncio.timeout(20):
            await draft.ended.wait()
            verify.may_go_on.set()
            outcome = await task
    assert [one.epoch for one in draft.rollbacks] == [1]
    assert outcome.statistics.num_rollbacks == 1
    return outcome.statistics.fallback_reason


async def test_a_generation_goes_on_without_a_draft_that_does_not_answer_rollbacks(
    serve: Serve, draft: FakeDraft
) -> None:
    reason = await generate_until_the_draft_is_lost(serve, draft, draft_timeout_seconds=0.2)
    assert reason == "draft service: no answer to a rollback within 0.2 s"


async def test_a_generation_goes_on_without_a_draft_that_refuses_a_rollback(
    serve: Serve, draft: FakeDraft
) -> None:
    draft.answers, draft.rollback_refusal = True, grpc.StatusCode.FAILED_PRECONDITION
    reason = await generate_until_the_draft_is_lost(serve, draft)
    assert reason == "draft service: the rollback is refused"


async def test_a_generation_goes_on_without_a_draft_whose_rollback_stream_breaks(
    serve: Serve, draft: FakeDraft
) -> None:
    draft.breaks = grpc.StatusCode.UNAVAILABLE
    reason = await generate_until_the_draft_is_lost(serve, draft)
    assert reason == "draft service: the stream is broken"


async def test_a_generation_keeps_a_draft_that_answers_its_rollbacks(
    serve: Serve, draft: FakeDraft
) -> None:
    draft.answers, draft.num_proposed, draft.is_wrong = True, 3, True
    async with running(await serve(FakeVerify()), await serve(draft)) as backends:
        await backends.connect(10)
        outcome = await generate(backends, Strategy.AMUSD)
    assert not outcome.statistics.fallback_reason
    assert outcome.statistics.num_rollbacks == 1
    assert "advance 1" in draft.events
