"""Drafting with a synthetic model: proposals, sources, time, and several sessions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.engine.interface import NO_TOKEN, ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import NotFiniteError
from amusd.protocol.events import Advance, Proposal, Rollback
from draft_service.drafters import Drafter, model_drafter, ngram_drafter
from draft_service.drafting import DraftWorker
from tests.counting import CountingEngine
from tests.draft_service.draft_receiver import (
    LIMITS,
    OPENING,
    make_engine,
    make_ngram_worker,
    make_worker,
    named,
    opened,
    run,
    written,
)


@dataclass
class FadingProposer:
    """Writes token 9, and has nothing more to propose after a text of ``num_tokens``."""

    num_tokens: int = 4
    source = DraftSource.LOOKUP

    def read(self, session_id: str, tokens: list[int], most: int) -> int:
        return 0

    def propose(self, session_id: str, tokens: list[int], room: int) -> list[int]:
        return [9] if len(tokens) < self.num_tokens else []

    def branch(
        self, session_id: str, tokens: list[int], position: int, token: int, room: int
    ) -> list[int]:
        return []

    def truncate(self, session_id: str, length: int) -> None:
        pass

    def close(self, session_id: str) -> None:
        pass


# Drafting


def test_an_open_session_drafts_up_to_its_lookahead_without_being_asked() -> None:
    worker = make_worker()
    receiver = opened(worker)
    assert run(worker) == 4
    assert [proposal.position for proposal in receiver.proposals] == [3, 4, 5, 6]
    assert receiver.tokens == written([1, 2, 3], 4)


def test_a_proposal_has_the_models_probability_of_each_token() -> None:
    model = SyntheticModel(vocabulary=50, agreement=0.6, spread=0.5)
    worker = DraftWorker(model_drafter(SyntheticEngine(model), with_ngrams=False), LIMITS, 100)
    opening = replace(OPENING, limits=DraftLimits(8, 40, tokens_per_proposal=8))
    receiver = opened(worker, opening)
    run(worker)
    [proposal] = receiver.proposals
    tokens = [*OPENING.tokens, *proposal.tokens]
    start = len(OPENING.tokens)
    known = [model.probabilities(tokens[:end])[0] for end in range(start, len(tokens))]
    assert list(proposal.probabilities) == known
    assert len(set(known)) == 2


def test_a_model_that_knows_no_probabilities_proposes_without() -> None:
    worker = make_worker()
    receiver = opened(worker)
    run(worker)
    assert {proposal.probabilities for proposal in receiver.proposals} == {()}


def test_an_advance_lets_drafting_go_on() -> None:
    worker = make_worker()
    receiver = opened(worker)
    run(worker)
    worker.receive("a", Advance(0, 3, tuple(written([1, 2, 3], 2))))
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
    limits = replace(LIMITS, max_context=5)
    worker = DraftWorker(model_drafter(make_engine(), with_ngrams=False), limits, 100)
    receiver = opened(worker)
    run(worker)
    worker.rollback("a", Rollback(1, 5, corrected_token=7))
    assert receiver.proposals[-1] == Proposal(1, 5, ())


def test_a_drafter_with_nothing_to_propose_says_so_after_what_it_had_collected() -> None:
    drafter = Drafter(ngram_drafter().engine, (FadingProposer(),))
    worker = DraftWorker(drafter, LIMITS, prefill_budget=100)
    in_turn = DraftLimits(lookahead=4, max_position=40, tokens_per_proposal=4)
    receiver = opened(worker, replace(OPENING, limits=in_turn))
    assert run(worker) == 0
    sent = [(proposal.position, proposal.tokens) for proposal in receiver.proposals]
    assert sent == [(3, (9,)), (4, ())]


def test_an_advance_over_collected_tokens_settles_them_before_they_are_sent() -> None:
    limits = DraftLimits(lookahead=4, max_position=40, tokens_per_proposal=4)
    worker = make_worker()
    receiver = opened(worker, replace(OPENING, limits=limits))
    [token] = written([1, 2, 3], 1)
    worker.step()
    worker.receive("a", Advance(0, 3, (token,)))
    run(worker)
    assert receiver.proposals[0].position == 3
    assert receiver.tokens == written([1, 2, 3], 5)


def test_an_ngram_lookup_without_a_match_says_so_at_every_advance() -> None:
    worker = make_ngram_worker()
    receiver = opened(worker)
    run(worker)
    worker.receive("a", Advance(0, 3, (4,)))
    run(worker)
    assert [(it.position, it.tokens) for it in receiver.proposals] == [(3, ()), (4, ())]


@pytest.mark.parametrize("tokens_per_proposal", [1, 4])
def test_a_proposal_has_one_source_and_says_which(tokens_per_proposal: int) -> None:
    limits = DraftLimits(4, max_position=40, tokens_per_proposal=tokens_per_proposal)
    worker = make_worker(with_ngrams=True)
    receiver = opened(worker, replace(OPENING, limits=limits))
    own = written([1, 2, 3], 4)
    run(worker)
    assert receiver.tokens == own
    assert {proposal.source for proposal in receiver.proposals} == {DraftSource.MODEL}
    receiver.proposals.clear()
    worker.receive("a", Advance(0, 3, tuple(own)))
    worker.rollback("a", Rollback(1, 8, corrected_token=1))
    worker.receive("a", Advance(1, 8, (2, 3)))
    run(worker)
    looked_up = [one for one in receiver.proposals if one.source is DraftSource.LOOKUP]
    assert [(one.position, one.tokens) for one in looked_up] == [(10, tuple(own))]


def test_tokens_that_wait_to_be_proposed_are_followed_by_tokens_of_their_source() -> None:
    worker = make_worker(with_ngrams=True)
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


def test_an_ngram_lookup_that_is_never_right_is_switched_off_in_its_session() -> None:
    worker = make_worker(with_ngrams=True)
    limits = DraftLimits(4, max_position=60)
    receiver = opened(worker, replace(named("a", 1, 2, 3, 9, 1, 2, 3), limits=limits))
    sources, position = [], 7
    for epoch in range(1, 11):
        receiver.proposals.clear()
        run(worker)
        sources.append(receiver.proposals[0].source)
        wrong = receiver.proposals[0].tokens[0]
        worker.rollback("a", Rollback(epoch, position + 1, corrected_token=(wrong + 10) % 50))
        worker.receive("a", Advance(epoch, position + 1, (1, 2, 3)))
        position += 4
    assert sources == [DraftSource.LOOKUP] * 8 + [DraftSource.MODEL] * 2


def test_nothing_is_drafted_beyond_the_last_position() -> None:
    worker = make_worker()
    limits = DraftLimits(lookahead=8, max_position=5)
    assert opened(worker, replace(OPENING, limits=limits)).proposals == []
    assert run(worker) == 2


def test_a_proposal_counts_the_steps_that_it_took() -> None:
    worker = make_worker(prefill_budget=2)
    receiver = opened(worker, named("a", 1, 2, 3, 4, 5))
    run(worker)
    assert [proposal.num_steps for proposal in receiver.proposals] == [3, 1, 1, 1]
    assert all(proposal.draft_seconds > 0 for proposal in receiver.proposals)


def test_a_proposal_says_when_each_of_its_steps_ran_if_the_session_asked_for_it() -> None:
    worker = make_worker(prefill_budget=2)
    receiver = opened(worker, replace(named("a", 1, 2, 3, 4, 5), records_times=True))
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


def test_without_being_asked_a_proposal_does_not_say_when_its_steps_ran() -> None:
    worker = make_worker(prefill_budget=2)
    receiver = opened(worker, named("a", 1, 2, 3, 4, 5))
    run(worker)
    assert [proposal.steps for proposal in receiver.proposals] == [()] * 4


def test_ngram_hits_are_sent_without_a_batch_and_take_no_time() -> None:
    engine = CountingEngine(SyntheticModel(vocabulary=50))
    worker = DraftWorker(model_drafter(engine, with_ngrams=True), LIMITS, prefill_budget=100)
    opening = replace(named("a", 1, 2, 3, 4, 5, 6, 7, 1, 2, 3), records_times=True)
    receiver = opened(worker, opening)
    assert not worker.step()
    assert [(one.position, one.tokens) for one in receiver.proposals] == [(10, (4, 5, 6, 7))]
    assert receiver.proposals == [Proposal(0, 10, (4, 5, 6, 7), source=DraftSource.LOOKUP)]
    assert engine.passes == []


def test_a_drafter_without_a_model_runs_no_batch() -> None:
    worker = make_ngram_worker()
    receiver = opened(worker, named("a", 1, 2, 3, 4, 5, 1, 2))
    assert run(worker) == 0
    assert [(one.position, one.tokens) for one in receiver.proposals] == [(7, (3, 4, 5, 1))]
    worker.receive("a", Advance(0, 7, (3, 4)))
    assert run(worker) == 0
    assert [(one.position, one.tokens) for one in receiver.proposals[1:]] == [(11, (2, 3))]


# Round robin


def test_sessions_are_drafted_round_robin() -> None:
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
    prefill_budget=st.integers(1, 9),
    order=st.lists(st.integers(0, 4), max_size=60),
)
@settings(max_examples=60, deadline=None)
def test_sessions_beside_others_draft_what_they_draft_alone(
    prompts: list[list[int]], batch: int, prefill_budget: int, order: list[int]
) -> None:
    worker = make_worker(batch, prefill_budget)
    receivers = [opened(worker, named(str(name), *prompt)) for name, prompt in enumerate(prompts)]
    num_final = [0] * len(prompts)
    for number in order:
        if number >= len(prompts):
            worker.step()
            continue
        # The draft's own next token becomes final.
        start = num_final[number]
        final = written(prompts[number], start + 1)[start:]
        position = len(prompts[number]) + start
        worker.receive(str(number), Advance(0, position, tuple(final)))
        num_final[number] += 1
    run(worker)
    for receiver, prompt, num in zip(receivers, prompts, num_final, strict=True):
        own = written(prompt, num + OPENING.limits.lookahead)
        for proposal in receiver.proposals:
            start = proposal.position - len(prompt)
            assert own[start : start + len(proposal.tokens)] == list(proposal.tokens)
        assert receiver.proposals[-1].position == len(prompt) + len(own) - 1
        assert receiver.errors == []


# A model that breaks


class BrokenEngine(SyntheticEngine):
    """Computes NaN for sequences that hold token 9."""

    def run(self, batch: Sequence[ScheduledSequence]) -> list[list[int]]:
        return [
            [NO_TOKEN] * len(outputs) if 9 in self._cache[one.slot] else outputs
            for one, outputs in zip(batch, super().run(batch), strict=True)
        ]


def test_only_the_session_for_which_the_model_computes_nan_fails() -> None:
    engine = BrokenEngine(SyntheticModel(vocabulary=50, batch=2))
    worker = DraftWorker(model_drafter(engine, with_ngrams=False), LIMITS, prefill_budget=100)
    good, bad = opened(worker, named("good", 1, 2, 3)), opened(worker, named("bad", 1, 9, 3))
    assert run(worker) == 4
    assert good.tokens == written([1, 2, 3], 4)
    assert not good.errors
    assert not bad.proposals
    [error] = bad.errors
    assert isinstance(error, NotFiniteError)
