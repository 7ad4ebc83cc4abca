"""Verifying with a synthetic model: passes, round robin, limits, sessions that fail or end."""

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.errors import (
    AmusdError,
    DuplicateSessionError,
    InvalidInputError,
    LimitExceededError,
)
from amusd.protocol.events import Forward, Proposal, Verdict
from amusd.protocol.ledger import Ledger
from verify_service.verifying import VerifyOpening, VerifyWorker

LIMITS = ServiceLimits(max_sessions=4, max_context=64, max_lookahead=4)
OPENING = VerifyOpening("a", [1, 2, 3], max_position=40)
MODEL = SyntheticModel(vocabulary=50)
DRAFT = SyntheticModel(vocabulary=50, agreement=0.6)


class Receiver:
    """What a session has sent."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.errors: list[AmusdError] = []

    def __call__(self, message: Verdict | AmusdError) -> None:
        if isinstance(message, Verdict):
            self.verdicts.append(message)
        else:
            self.errors.append(message)


class Client(Receiver):
    """A session that is driven by a ledger of its own, as an orchestrator does."""

    def __init__(self, worker: VerifyWorker, name: str, prompt: list[int]) -> None:
        super().__init__()
        self.ledger = Ledger(prompt)
        self._worker = worker
        self._name = name
        worker.open(replace(OPENING, session_id=name, tokens=prompt), self)

    def propose(self, num_tokens: int) -> None:
        """Forward what a draft writes after the final tokens."""
        tokens = [*self.ledger.tokens, *written(DRAFT, list(self.ledger.tokens), num_tokens)]
        position = self.ledger.verified_position
        proposal = Proposal(self.ledger.epoch, position, tuple(tokens[position:]))
        forward = self.ledger.proposal(proposal).forward
        if forward is not None:
            self._worker.receive(self._name, forward)

    def read(self) -> None:
        """Take the verdicts that have come, and ask for a pass if none is to come."""
        for verdict in self.verdicts:
            self.ledger.verdict(verdict)
        self.verdicts.clear()
        if not self.ledger.num_speculated:
            self._worker.receive(self._name, self.ledger.unspeculated_pass())


class BreakingEngine(SyntheticEngine):
    """Fails at a text that ends with token 0."""

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        if any(feed.tokens[-1] == 0 for feed in feeds):
            raise LimitExceededError("no memory left")
        return super().run(feeds)


def make_engine(batch: int = 1) -> SyntheticEngine:
    return SyntheticEngine(replace(MODEL, batch=batch))


def make_worker(batch: int = 1, prefill_tokens: int = 100) -> VerifyWorker:
    return VerifyWorker(make_engine(batch), LIMITS, prefill_tokens)


def opened(worker: VerifyWorker, opening: VerifyOpening = OPENING) -> Receiver:
    receiver = Receiver()
    worker.open(opening, receiver)
    return receiver


def named(name: str, *prompt: int) -> VerifyOpening:
    return replace(OPENING, session_id=name, tokens=list(prompt) or OPENING.tokens)


def run(worker: VerifyWorker) -> int:
    """Run all passes that are due, and return how many that were."""
    num_passes = 0
    while worker.step():
        num_passes += 1
    return num_passes


def written(model: SyntheticModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What ``model`` writes after ``prompt`` if nobody interferes."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(model.next_token(tokens))
    return tokens[len(prompt) :]


FIRST, SECOND, THIRD, FOURTH = written(MODEL, OPENING.tokens, 4)
WRONG = (THIRD + 1) % 50


# Passes


def test_an_open_session_gets_its_first_token_without_being_asked() -> None:
    worker = make_worker()
    receiver = opened(worker)
    assert run(worker) == 1
    [verdict] = receiver.verdicts
    assert replace(verdict, pass_seconds=0.0, device_seconds=0.0, passes=()) == Verdict(
        0, 3, 0, 0, FIRST
    )
    assert verdict.pass_seconds > 0


def test_a_pass_checks_what_has_been_proposed_since_the_last() -> None:
    worker = make_worker()
    receiver = opened(worker)
    worker.receive("a", Forward(0, 3, (FIRST,)))
    worker.receive("a", Forward(0, 4, (SECOND, WRONG)))
    run(worker)
    [verdict] = receiver.verdicts
    assert replace(verdict, pass_seconds=0.0, device_seconds=0.0, passes=()) == Verdict(
        0, 3, 3, 2, THIRD
    )


def test_after_a_rejection_the_next_pass_is_as_in_a_fresh_session() -> None:
    worker = make_worker()
    receiver = opened(worker)
    worker.receive("a", Forward(0, 3, (FIRST, SECOND, WRONG)))
    run(worker)
    worker.receive("a", Forward(1, 6, ()))
    run(worker)
    assert receiver.verdicts[-1].next_token == FOURTH


def test_a_pass_checks_no_more_than_it_was_told_last() -> None:
    worker = make_worker()
    receiver = opened(worker)
    worker.receive("a", Forward(0, 3, (FIRST, SECOND, THIRD, FOURTH), max_checked=1))
    run(worker)
    # The token that follows a checked one is settled by the verify model's own.
    assert [verdict.num_checked for verdict in receiver.verdicts] == [1, 1]
    assert receiver.verdicts[-1].next_token == FOURTH


@pytest.mark.parametrize("max_checked", [0, 4, 99])
def test_without_a_lower_number_a_pass_checks_all_that_may_wait(max_checked: int) -> None:
    worker = make_worker()
    receiver = opened(worker)
    worker.receive("a", Forward(0, 3, (FIRST, SECOND, THIRD, FOURTH), max_checked))
    run(worker)
    assert [verdict.num_checked for verdict in receiver.verdicts] == [4]


def test_an_idle_session_takes_no_passes() -> None:
    worker = make_worker()
    opened(worker)
    run(worker)
    assert not worker.step()


def test_nothing_is_written_beyond_the_last_position() -> None:
    worker = make_worker()
    receiver = opened(worker, replace(OPENING, max_position=5))
    worker.receive("a", Forward(0, 3, (FIRST, SECOND, THIRD)))
    run(worker)
    worker.receive("a", Forward(0, 30, ()))
    assert not worker.step()
    assert [(it.num_checked, it.num_accepted) for it in receiver.verdicts] == [(1, 1)]


def test_times_of_passes_are_recorded_only_if_asked_for() -> None:
    worker = make_worker()
    receiver = opened(worker)
    run(worker)
    [verdict] = receiver.verdicts
    assert verdict.passes == ()


# Round robin


@pytest.mark.parametrize("prefill_tokens", [1, 2, 3, 7])
def test_a_prompt_computed_in_chunks_gives_the_same_as_at_once(prefill_tokens: int) -> None:
    prompt = [5, 6, 7, 8, 9, 1, 2]
    worker = make_worker(prefill_tokens=prefill_tokens)
    receiver = opened(worker, named("a", *prompt))
    first, second = written(MODEL, prompt, 2)
    worker.step()
    worker.receive("a", Forward(0, 7, (first,)))  # may come during prefill
    worker.receive("a", Forward(0, 8, ()))
    run(worker)
    assert receiver.verdicts[-1].next_token == second


def test_the_time_of_all_chunks_of_a_prompt_counts_in_the_first_verdict() -> None:
    engine = SyntheticEngine(replace(MODEL, pass_ms=1.0))
    worker = VerifyWorker(engine, LIMITS, prefill_budget=1)
    receiver = opened(worker)
    assert run(worker) == 3
    [verdict] = receiver.verdicts
    assert verdict.pass_seconds >= 0.003


def test_a_verdict_tells_when_each_of_its_passes_ran() -> None:
    worker = make_worker(prefill_tokens=1)
    receiver = opened(worker, replace(OPENING, records_times=True))
    before = time.time_ns()
    run(worker)
    worker.receive("a", Forward(0, 4, (SECOND,)))
    run(worker)
    first, second = receiver.verdicts
    assert (len(first.passes), len(second.passes)) == (3, 1)
    for verdict in (first, second):
        seconds = sum(one.seconds for one in verdict.passes)
        assert seconds == pytest.approx(verdict.pass_seconds)
    starts = [one.started_unix_nanos for one in (*first.passes, *second.passes)]
    assert starts == sorted(starts)
    assert before <= starts[0]
    assert starts[-1] <= time.time_ns()


def test_a_long_prompt_does_not_block_other_sessions() -> None:
    worker = make_worker(prefill_tokens=1)
    opened(worker, named("long", *range(20)))
    other = opened(worker, named("short", 1))
    worker.step()
    worker.step()
    assert len(other.verdicts) == 1


def test_a_batch_takes_as_many_sessions_as_the_engine_does() -> None:
    worker = make_worker(batch=2)
    receivers = [opened(worker, named(name)) for name in "abc"]
    assert run(worker) == 2
    assert all(len(receiver.verdicts) == 1 for receiver in receivers)


@given(
    prompts=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=9), min_size=1, max_size=4),
    batch=st.integers(1, 4),
    prefill_tokens=st.integers(1, 9),
    order=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=80),
)
@settings(max_examples=60, deadline=None)
def test_sessions_beside_others_write_what_they_write_alone(
    prompts: list[list[int]], batch: int, prefill_tokens: int, order: list[tuple[int, int]]
) -> None:
    worker = make_worker(batch, prefill_tokens)
    clients = [Client(worker, str(name), prompt) for name, prompt in enumerate(prompts)]
    for turn, num_tokens in order:
        if turn >= len(clients):
            worker.step()
        elif num_tokens and not clients[turn].ledger.num_speculated:
            clients[turn].propose(num_tokens)
        else:
            clients[turn].read()
    run(worker)
    for client, prompt in zip(clients, prompts, strict=True):
        client.read()
        assert client.errors == []
        assert client.ledger.output
        assert list(client.ledger.output) == written(MODEL, prompt, len(client.ledger.output))


# Limits


@pytest.mark.parametrize(
    ("opening", "error", "words"),
    [
        (replace(OPENING, tokens=[]), InvalidInputError, "send a prompt"),
        (replace(OPENING, tokens=[1, 50]), InvalidInputError, "token id 50 is outside"),
        (
            replace(OPENING, max_position=3),
            InvalidInputError,
            "max_position 3 leaves no room after 3 tokens",
        ),
        (
            replace(OPENING, max_position=65),
            InvalidInputError,
            "max_position is 65: the verify service takes up to 64 tokens",
        ),
    ],
)
def test_an_opening_that_cannot_be_served_is_refused_and_leaves_nothing_open(
    opening: VerifyOpening, error: type[AmusdError], words: str
) -> None:
    engine = make_engine()
    worker = VerifyWorker(engine, LIMITS, 100)
    with pytest.raises(error, match=words):
        opened(worker, opening)
    assert worker.num_sessions == engine.num_open == 0


def test_a_session_id_can_be_open_once() -> None:
    worker = make_worker()
    opened(worker)
    with pytest.raises(DuplicateSessionError, match="'a' is open already"):
        opened(worker)


def test_no_more_sessions_are_open_than_the_limit_and_a_close_makes_room() -> None:
    engine = make_engine()
    worker = VerifyWorker(engine, LIMITS, 100)
    for name in "abcd":
        opened(worker, named(name))
    with pytest.raises(LimitExceededError, match="4 sessions are open"):
        opened(worker, named("e"))
    worker.close("b")
    assert worker.num_sessions == engine.num_open == 3
    opened(worker, named("e"))


# Failures


@pytest.mark.parametrize(
    ("proposals", "words"),
    [
        (Forward(0, 9, (1,)), "leave a gap"),
        (Forward(0, 3, (50,)), "token id 50 is outside"),
        (Forward(0, 3, (1, 1, 1, 1, 1)), "more than 4 proposed tokens wait"),
    ],
)
def test_a_session_that_fails_reports_its_error_once_and_leaves_the_others_alone(
    proposals: Forward, words: str
) -> None:
    worker = make_worker()
    failed, other = opened(worker, named("a")), opened(worker, named("b", 4, 5))
    worker.receive("a", proposals)
    worker.receive("a", proposals)
    run(worker)
    assert [words in str(error) for error in failed.errors] == [True]
    assert failed.verdicts == []
    assert [verdict.next_token for verdict in other.verdicts] == written(MODEL, [4, 5], 1)


def test_the_id_of_a_failed_session_stays_taken_until_it_is_closed() -> None:
    worker = make_worker()
    opened(worker)
    worker.receive("a", Forward(0, 9, (1,)))
    with pytest.raises(DuplicateSessionError):
        opened(worker)
    worker.close("a")
    opened(worker)


def test_a_pass_that_fails_ends_the_sessions_of_its_batch_and_no_other() -> None:
    engine = BreakingEngine(MODEL)
    worker = VerifyWorker(engine, LIMITS, 100)
    failed, other = opened(worker, named("a", 1, 0)), opened(worker, named("b", 4, 5))
    run(worker)
    assert [str(error) for error in failed.errors] == ["no memory left"]
    assert len(other.verdicts) == 1
