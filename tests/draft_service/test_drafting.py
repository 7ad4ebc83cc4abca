"""The drafting loop over a synthetic model: turns, limits, and sessions that fail or end."""

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import ServiceLimits
from amusd.protocol.draft_session import DraftLimits
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import (
    AmusdError,
    DuplicateSessionError,
    InvalidInputError,
    LimitExceededError,
    PreconditionError,
    UnknownSessionError,
)
from amusd.protocol.events import Advance, Proposal, Rollback
from draft_service.draft_worker import DraftOpening, DraftWorker
from draft_service.drafters import (
    Drafted,
    DraftRequest,
    HybridDrafter,
    ModelDrafter,
    Outcome,
    PromptLookupDrafter,
)

LIMITS = ServiceLimits(max_sessions=4, max_context=64, max_lookahead=8)
OPENING = DraftOpening("a", [1, 2, 3], DraftLimits(lookahead=4, max_position=40))


class Receiver:
    """What a session has sent."""

    def __init__(self) -> None:
        self.proposals: list[Proposal] = []
        self.errors: list[AmusdError] = []

    def __call__(self, message: Proposal | AmusdError) -> None:
        if isinstance(message, Proposal):
            self.proposals.append(message)
        else:
            self.errors.append(message)

    @property
    def tokens(self) -> list[int]:
        return [token for proposal in self.proposals for token in proposal.tokens]


class FadingDrafter(ModelDrafter):
    """Has nothing more to propose after a text of ``num_tokens``."""

    num_tokens = 4

    def draft(self, requests: Sequence[DraftRequest]) -> list[Outcome]:
        [request] = requests
        if len(request.tokens) >= self.num_tokens:
            return [Drafted(DraftSource.MODEL, ())]
        return super().draft(requests)


class BreakingEngine(SyntheticEngine):
    """Fails at a text that ends with token 0."""

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        if any(feed.tokens[-1] == 0 for feed in feeds):
            raise LimitExceededError("no memory left")
        return super().run(feeds)


def make_engine(batch: int = 1, vocabulary: int = 50) -> SyntheticEngine:
    return SyntheticEngine(SyntheticModel(vocabulary=vocabulary, batch=batch))


def make_worker(batch: int = 1, prefill_tokens: int = 100) -> DraftWorker:
    return DraftWorker(ModelDrafter(make_engine(batch), prefill_tokens), LIMITS)


def opened(worker: DraftWorker, opening: DraftOpening = OPENING) -> Receiver:
    receiver = Receiver()
    worker.open(opening, receiver)
    return receiver


def named(name: str, *prompt: int) -> DraftOpening:
    return replace(OPENING, session_id=name, tokens=list(prompt) or OPENING.tokens)


def run(worker: DraftWorker) -> int:
    """Run all steps that are due, and return how many that were."""
    num_steps = 0
    while worker.step():
        num_steps += 1
    return num_steps


def written(prompt: list[int], num_tokens: int) -> list[int]:
    """What the model writes after ``prompt`` if nobody interferes."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(SyntheticModel(vocabulary=50).next_token(tokens))
    return tokens[len(prompt) :]


# Drafting


def test_an_open_session_drafts_up_to_its_lookahead_without_being_asked() -> None:
    worker = make_worker()
    receiver = opened(worker)
    assert run(worker) == 4
    assert [proposal.position for proposal in receiver.proposals] == [3, 4, 5, 6]
    assert receiver.tokens == written([1, 2, 3], 4)


def test_an_advance_lets_drafting_go_on() -> None:
    worker = make_worker()
    receiver = opened(worker)
    run(worker)
    worker.advance("a", Advance(0, 3, tuple(written([1, 2, 3], 2))))
    assert run(worker) == 2
    assert receiver.tokens == written([1, 2, 3], 6)


def test_after_a_rollback_the_draft_goes_on_as_a_fresh_session_would() -> None:
    worker = make_worker()
    receiver = opened(worker)
    run(worker)
    accepted = written([1, 2, 3], 1)
    num_dropped = worker.rollback("a", Rollback(1, 5, corrected_token=7))
    assert num_dropped == 3
    receiver.proposals.clear()
    run(worker)
    assert receiver.tokens == written([1, 2, 3, *accepted, 7], 4)
    assert {proposal.epoch for proposal in receiver.proposals} == {1}
    assert receiver.proposals[0].position == 5


def test_a_rollback_to_the_end_of_the_drafts_context_says_that_there_is_no_more() -> None:
    drafter = ModelDrafter(make_engine(), prefill_tokens=100)
    worker = DraftWorker(drafter, replace(LIMITS, max_context=5))
    receiver = opened(worker)
    run(worker)
    worker.rollback("a", Rollback(1, 5, corrected_token=7))
    assert receiver.proposals[-1] == Proposal(1, 5, ())


def test_a_drafter_without_ideas_says_so_after_what_it_had_collected() -> None:
    worker = DraftWorker(FadingDrafter(make_engine(), prefill_tokens=100), LIMITS)
    in_turn = DraftLimits(lookahead=4, max_position=40, tokens_per_proposal=4)
    receiver = opened(worker, replace(OPENING, limits=in_turn))
    [token] = written([1, 2, 3], 1)
    worker.step()
    worker.advance("a", Advance(0, 3, (token,)))  # settles the token before it is sent
    run(worker)
    sent = [(proposal.position, proposal.tokens) for proposal in receiver.proposals]
    assert sent == [(3, (token,)), (4, ())]


def test_prompt_lookup_without_a_match_says_so_at_every_advance() -> None:
    worker = DraftWorker(PromptLookupDrafter(), LIMITS)
    receiver = opened(worker)
    run(worker)
    worker.advance("a", Advance(0, 3, (4,)))
    run(worker)
    assert [(it.position, it.tokens) for it in receiver.proposals] == [(3, ()), (4, ())]


def make_hybrid_worker() -> DraftWorker:
    return DraftWorker(HybridDrafter(ModelDrafter(make_engine(), 100)), LIMITS)


@pytest.mark.parametrize("tokens_per_proposal", [1, 4])
def test_a_proposal_has_one_source_and_says_which(tokens_per_proposal: int) -> None:
    limits = DraftLimits(4, max_position=40, tokens_per_proposal=tokens_per_proposal)
    worker = make_hybrid_worker()
    receiver = opened(worker, replace(OPENING, limits=limits))
    own = written([1, 2, 3], 4)
    run(worker)
    assert receiver.tokens == own
    assert {proposal.source for proposal in receiver.proposals} == {DraftSource.MODEL}
    receiver.proposals.clear()
    worker.advance("a", Advance(0, 3, tuple(own)))
    worker.rollback("a", Rollback(1, 8, corrected_token=1))
    worker.advance("a", Advance(1, 8, (2, 3)))
    run(worker)
    looked_up = [one for one in receiver.proposals if one.source is DraftSource.LOOKUP]
    assert [(one.position, one.tokens) for one in looked_up] == [(10, tuple(own))]


def test_tokens_that_wait_to_be_proposed_are_followed_by_tokens_of_their_source() -> None:
    worker = make_hybrid_worker()
    # The model's first token depends on the last two, and completes a match with them; but it has
    # begun the proposal.
    first = written([0, 0, 0, 0, 0, 2, 3], 1)
    prompt = [2, 3, *first, 9, 8, 2, 3]
    opening = replace(OPENING, tokens=prompt, limits=DraftLimits(4, 40, tokens_per_proposal=4))
    receiver = opened(worker, opening)
    run(worker)
    [proposal] = receiver.proposals
    assert (proposal.source, proposal.tokens[:1]) == (DraftSource.MODEL, tuple(first))
    assert receiver.tokens == written(prompt, 4)


def test_a_look_up_that_is_never_right_is_switched_off_in_its_session() -> None:
    worker = make_hybrid_worker()
    limits = DraftLimits(4, max_position=60)
    receiver = opened(worker, replace(named("a", 1, 2, 3, 9, 1, 2, 3), limits=limits))
    sources, position = [], 7
    for epoch in range(1, 11):
        receiver.proposals.clear()
        run(worker)
        sources.append(receiver.proposals[0].source)
        wrong = receiver.proposals[0].tokens[0]
        worker.rollback("a", Rollback(epoch, position + 1, corrected_token=(wrong + 10) % 50))
        worker.advance("a", Advance(epoch, position + 1, (1, 2, 3)))
        position += 4
    assert sources == [DraftSource.LOOKUP] * 8 + [DraftSource.MODEL] * 2


def test_nothing_is_drafted_beyond_the_last_position() -> None:
    worker = make_worker()
    limits = DraftLimits(lookahead=8, max_position=5)
    assert opened(worker, replace(OPENING, limits=limits)).proposals == []
    assert run(worker) == 2


def test_a_proposal_tells_how_many_steps_it_took() -> None:
    worker = make_worker(prefill_tokens=2)
    receiver = opened(worker, named("a", 1, 2, 3, 4, 5))
    run(worker)
    assert [proposal.num_steps for proposal in receiver.proposals] == [3, 1, 1, 1]
    assert all(proposal.draft_seconds > 0 for proposal in receiver.proposals)


def test_a_proposal_tells_when_each_of_its_steps_ran() -> None:
    worker = make_worker(prefill_tokens=2)
    receiver = opened(worker, named("a", 1, 2, 3, 4, 5))
    before = time.time_ns()
    run(worker)
    for proposal in receiver.proposals:
        assert len(proposal.steps) == proposal.num_steps
        seconds = sum(step.seconds for step in proposal.steps)
        assert seconds == pytest.approx(proposal.draft_seconds)
    starts = [step.started_unix_nanos for one in receiver.proposals for step in one.steps]
    assert starts == sorted(starts)
    assert before <= starts[0]
    assert starts[-1] <= time.time_ns()


# Turns


def test_sessions_take_turns() -> None:
    worker = make_worker()
    first, second = opened(worker, named("a")), opened(worker, named("b"))
    for num_each in (1, 2, 3):
        worker.step()
        worker.step()
        assert len(first.proposals) == len(second.proposals) == num_each


def test_a_batch_takes_as_many_sessions_as_the_engine_does() -> None:
    worker = make_worker(batch=2)
    receivers = [opened(worker, named(name)) for name in "abc"]
    worker.step()
    assert [len(receiver.proposals) for receiver in receivers] == [1, 1, 0]
    worker.step()
    assert [len(receiver.proposals) for receiver in receivers] == [2, 1, 1]


@given(
    prompts=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=9), min_size=1, max_size=4),
    batch=st.integers(1, 4),
    prefill_tokens=st.integers(1, 9),
    order=st.lists(st.integers(0, 4), max_size=60),
)
@settings(max_examples=60, deadline=None)
def test_sessions_beside_others_draft_what_they_draft_alone(
    prompts: list[list[int]], batch: int, prefill_tokens: int, order: list[int]
) -> None:
    worker = make_worker(batch, prefill_tokens)
    receivers = [opened(worker, named(str(name), *prompt)) for name, prompt in enumerate(prompts)]
    num_final = [0] * len(prompts)
    for turn in order:
        if turn >= len(prompts):
            worker.step()
            continue
        # The draft's own next token becomes final.
        start = num_final[turn]
        final = written(prompts[turn], start + 1)[start:]
        position = len(prompts[turn]) + start
        worker.advance(str(turn), Advance(0, position, tuple(final)))
        num_final[turn] += 1
    run(worker)
    for receiver, prompt, num in zip(receivers, prompts, num_final, strict=True):
        own = written(prompt, num + OPENING.limits.lookahead)
        for proposal in receiver.proposals:
            start = proposal.position - len(prompt)
            assert own[start : start + len(proposal.tokens)] == list(proposal.tokens)
        assert receiver.proposals[-1].position == len(prompt) + len(own) - 1
        assert receiver.errors == []


# Limits


@pytest.mark.parametrize(
    ("opening", "error", "words"),
    [
        (replace(OPENING, tokens=[]), InvalidInputError, "send a prompt"),
        (replace(OPENING, tokens=[1, 50]), InvalidInputError, "token id 50 is outside"),
        (
            replace(OPENING, limits=DraftLimits(4, max_position=3)),
            InvalidInputError,
            "max_position 3 leaves no room after 3 tokens",
        ),
        (
            replace(OPENING, vocabulary_fingerprint="another"),
            InvalidInputError,
            "pair models that share their tokenizer",
        ),
        (
            replace(OPENING, tokens=[1] * 64, limits=DraftLimits(4, 100)),
            LimitExceededError,
            "the prompt has 64 tokens, the draft service takes fewer than 64",
        ),
        (
            replace(OPENING, limits=DraftLimits(9, 40)),
            LimitExceededError,
            "lookahead is 9: ask for 8 or less",
        ),
    ],
)
def test_an_opening_that_cannot_be_served_is_refused_and_leaves_nothing_open(
    opening: DraftOpening, error: type[AmusdError], words: str
) -> None:
    engine = make_engine()
    worker = DraftWorker(ModelDrafter(engine, 100), LIMITS)
    with pytest.raises(error, match=words):
        opened(worker, opening)
    assert worker.num_sessions == engine.num_open == 0


def test_the_verify_models_own_vocabulary_is_welcome() -> None:
    worker = make_worker()
    fingerprint = worker.drafter.description.vocabulary.fingerprint
    opened(worker, replace(OPENING, vocabulary_fingerprint=fingerprint))
    assert worker.num_sessions == 1


def test_prompt_lookup_takes_any_vocabulary_and_any_token() -> None:
    worker = DraftWorker(PromptLookupDrafter(), LIMITS)
    opened(worker, replace(OPENING, tokens=[10**6], vocabulary_fingerprint="another"))
    assert worker.num_sessions == 1


def test_a_session_id_can_be_open_once() -> None:
    worker = make_worker()
    opened(worker)
    with pytest.raises(DuplicateSessionError, match="'a' is open already"):
        opened(worker)


def test_no_more_sessions_are_open_than_the_limit_and_a_close_makes_room() -> None:
    engine = make_engine()
    worker = DraftWorker(ModelDrafter(engine, 100), LIMITS)
    for name in "abcd":
        opened(worker, named(name))
    with pytest.raises(LimitExceededError, match="4 sessions are open"):
        opened(worker, named("e"))
    worker.close("b")
    assert worker.num_sessions == engine.num_open == 3
    opened(worker, named("e"))


# Failures


def test_a_rollback_of_a_session_that_is_not_open_is_refused() -> None:
    with pytest.raises(UnknownSessionError, match="no session 'a' is open here"):
        make_worker().rollback("a", Rollback(1, 4, 7))


def test_a_rollback_that_is_refused_leaves_the_session_as_it_was() -> None:
    worker = make_worker()
    receiver = opened(worker)
    worker.step()
    with pytest.raises(InvalidInputError, match="token id 50 is outside"):
        worker.rollback("a", Rollback(1, 4, 50))
    with pytest.raises(PreconditionError, match="ahead of"):
        worker.rollback("a", Rollback(1, 9, 7))
    run(worker)
    assert receiver.tokens == written([1, 2, 3], 4)


@pytest.mark.parametrize(
    ("advance", "words"),
    [(Advance(0, 9, (1,)), "leaves a gap"), (Advance(0, 3, (50,)), "token id 50 is outside")],
)
def test_a_session_that_fails_says_why_once_and_leaves_the_others_alone(
    advance: Advance, words: str
) -> None:
    worker = make_worker()
    failed, other = opened(worker, named("a")), opened(worker, named("b", 4, 5))
    worker.advance("a", advance)
    worker.advance("a", advance)
    run(worker)
    assert [words in str(error) for error in failed.errors] == [True]
    assert failed.proposals == []
    assert other.tokens == written([4, 5], 4)


def test_the_id_of_a_failed_session_stays_taken_until_it_is_closed() -> None:
    worker = make_worker()
    opened(worker)
    worker.advance("a", Advance(0, 9, (1,)))
    with pytest.raises(DuplicateSessionError):
        opened(worker)
    worker.close("a")
    opened(worker)


def test_a_step_that_fails_ends_the_sessions_of_its_batch_and_no_other() -> None:
    engine = BreakingEngine(SyntheticModel(vocabulary=50))
    worker = DraftWorker(ModelDrafter(engine, 100), LIMITS)
    failed, other = opened(worker, named("a", 1, 0)), opened(worker, named("b", 4, 5))
    worker.step()
    worker.step()
    assert [str(error) for error in failed.errors] == ["no memory left"]
    assert other.tokens == written([4, 5], 1)
    assert other.errors == []
