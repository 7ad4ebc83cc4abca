"""Counts that add up: nothing counts as accepted that the output does not hold."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.analysis.generation_statistics import PositionAcceptance, Statistics, StatisticsRecorder
from amusd.policy.speculation_length import StepTimes
from amusd.policy.speculation_policy import make_policy
from amusd.protocol.errors import PreconditionError
from amusd.protocol.events import NOTHING, Decision, Proposal, Verdict
from amusd.protocol.finish import FinishReason, FinishRule
from amusd.protocol.ledger import Ledger
from amusd.protocol.session_controller import SessionController
from amusd.protocol.strategy import Strategy
from tests.protocol.parts import Orchestrator
from tests.protocol.scenario import VOCABULARY, Schedule, Setup, verify_models_own
from tests.protocol.simulation import Simulation
from tests.protocol.test_protocol_properties import laws, mishaps, schedules

PROMPT = [1, 2]
RUN = (10, 11, 12, 13)


class EndsAt:
    """Ends an output at a token, as its text may; keeps all that it is asked about."""

    def __init__(self, last: int) -> None:
        self.asked: list[int] = []
        self._last = last

    def find_end(self, tokens: tuple[int, ...]) -> int | None:
        self.asked += tokens
        return tokens.index(self._last) + 1 if self._last in tokens else None


def controller(
    max_tokens: int = 20, *stop: int, text_end: EndsAt | None = None
) -> SessionController:
    """Return a controller whose draft has proposed ``RUN``, all with the verify service."""
    policy = make_policy(Strategy.AMUSD, 8, StepTimes(), 1.0)
    rule = FinishRule(max_tokens, frozenset(stop))
    found = SessionController(Ledger(PROMPT), policy, rule, has_draft=True, text_end=text_end)
    found.on_proposal(Proposal(0, 2, RUN), 0.0)
    return found


def verdict(num_accepted: int, next_token: int) -> Verdict:
    return Verdict(0, 2, len(RUN), num_accepted, next_token)


def settled(session: SessionController, decision: Decision, verdict: Verdict) -> Statistics:
    recorder = StatisticsRecorder(0.0)
    recorder.verdict(verdict, len(decision.committed))
    session.ledger.close()
    session.ledger.check_integrity()
    return recorder.summary(session.ledger, session.num_output, 1.0)


@pytest.mark.parametrize("num_accepted", [2, 3, 4])
def test_tokens_behind_a_stop_token_are_wasted(num_accepted: int) -> None:
    session, passed = controller(20, 11), verdict(num_accepted, 14)
    decision = session.on_verdict(passed, 0.0)
    assert decision.committed == (10, 11)
    assert session.finish_reason is FinishReason.STOP
    found = settled(session, decision, passed)
    assert (found.num_accepted, found.num_rejected, found.num_wasted) == (2, 0, 2)
    assert found.num_rollbacks == 0
    assert found.acceptance_per_position == (PositionAcceptance(1, 1),) * 2


@pytest.mark.parametrize("num_accepted", [2, 3, 4])
def test_tokens_behind_the_end_of_the_text_are_wasted(num_accepted: int) -> None:
    session, passed = controller(text_end=EndsAt(11)), verdict(num_accepted, 14)
    decision = session.on_verdict(passed, 0.0)
    assert (decision.committed, decision.forward) == ((10, 11), None)
    assert session.finish_reason is FinishReason.STOP
    assert session.ledger.output == (10, 11)
    found = settled(session, decision, passed)
    assert (found.num_output_tokens, found.num_accepted, found.num_wasted) == (2, 2, 2)
    assert found.acceptance_per_position == (PositionAcceptance(1, 1),) * 2


def test_the_end_of_the_text_is_searched_once_in_each_token_of_the_output() -> None:
    text_end = EndsAt(99)
    session, first = controller(6, text_end=text_end), replace(verdict(1, 11), pass_seconds=0.01)
    session.on_verdict(first, 0.0)
    assert session.on_verdict(first, 0.0) is NOTHING  # stale
    with pytest.raises(PreconditionError):
        session.on_verdict(replace(first, num_accepted=3, position=4), 0.0)  # too many
    assert text_end.asked == [10, 11]
    session.on_verdict(replace(first, num_accepted=2, next_token=14, position=4), 0.0)
    assert text_end.asked == [10, 11, 12, 13, 14]
    session.on_verdict(replace(first, num_accepted=0, next_token=15, position=7), 0.0)
    assert (session.finish_reason, text_end.asked[-1]) == (FinishReason.LENGTH, 15)


def test_tokens_beyond_max_tokens_are_not_searched() -> None:
    text_end = EndsAt(12)
    session = controller(2, text_end=text_end)
    session.on_verdict(verdict(4, 14), 0.0)
    assert (text_end.asked, session.finish_reason) == ([10, 11], FinishReason.LENGTH)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4])
def test_tokens_beyond_max_tokens_are_wasted(max_tokens: int) -> None:
    session, passed = controller(max_tokens), verdict(4, 14)
    decision = session.on_verdict(passed, 0.0)
    assert decision.committed == RUN[:max_tokens]
    assert session.finish_reason is FinishReason.LENGTH
    found = settled(session, decision, passed)
    assert (found.num_accepted, found.num_wasted) == (max_tokens, 4 - max_tokens)
    assert found.acceptance_per_position == (PositionAcceptance(1, 1),) * max_tokens
    assert found.acceptance_rate == 1.0


def test_a_stop_token_that_rejects_a_proposed_one_counts_as_rejection() -> None:
    session, passed = controller(20, 99), verdict(1, 99)
    decision = session.on_verdict(passed, 0.0)
    assert decision.committed == (10, 99)
    found = settled(session, decision, passed)
    assert (found.num_accepted, found.num_rejected, found.num_wasted) == (1, 1, 2)
    assert found.acceptance_per_position == (PositionAcceptance(1, 1), PositionAcceptance(1, 0))


def test_a_stale_verdict_ends_nothing_and_an_illegal_one_raises() -> None:
    session = controller(20, 10)
    assert session.on_verdict(replace(verdict(1, 99), position=1), 0.0) is NOTHING
    with pytest.raises(PreconditionError):
        session.on_verdict(verdict(5, 99), 0.0)
    with pytest.raises(PreconditionError):
        session.on_verdict(replace(verdict(1, 99), epoch=1), 0.0)
    assert session.finish_reason is None
    assert session.num_output == session.ledger.counts.accepted == 0


class Recording(Orchestrator):
    """Records statistics as a session does."""

    def __init__(self, setup: Setup, ledger: Ledger) -> None:
        super().__init__(setup, ledger)
        self.recorder = StatisticsRecorder(0.0)

    def on_verdict(self, verdict: Verdict) -> None:
        num_before, passes = len(self.output), self.ledger.counts.passes
        super().on_verdict(verdict)
        if self.ledger.counts.passes > passes:
            self.recorder.verdict(verdict, len(self.output) - num_before)


@given(mishaps(), schedules(), st.frozensets(st.integers(0, VOCABULARY - 1), max_size=3))
@laws
def test_the_counts_of_any_generation_add_up(
    setup: Setup, schedule: Schedule, stop_tokens: frozenset[int]
) -> None:
    setup = replace(setup, num_repeats=0, stop_tokens=stop_tokens)
    run = Simulation(setup)
    run.orchestrator = session = Recording(setup, run.ledger)
    run.run(schedule)
    found = session.recorder.summary(run.ledger, len(session.output), 1.0)
    assert session.output == verify_models_own(setup)
    assert found.num_drafted == found.num_accepted + found.num_rejected + found.num_wasted
    assert found.num_accepted + found.num_rejected <= found.num_output_tokens
    assert run.ledger.output == session.output
    sources = found.acceptance_per_source
    assert sum(one.num_drafted for one in sources) == found.num_drafted
    assert sum(one.num_accepted for one in sources) == found.num_accepted
    assert sum(one.num_checked for one in sources) == found.num_accepted + found.num_rejected
    positions = found.acceptance_per_position
    assert sum(one.num_accepted for one in positions) <= found.num_accepted
    assert sum(one.num_checked for one in positions) <= found.num_accepted + found.num_rejected
    assert all(one.num_accepted <= one.num_checked for one in positions)
    checked = [one.num_checked for one in positions]
    assert checked == sorted(checked, reverse=True)
