"""Probabilities on their way from the draft to the verify service: hints beside tokens."""

import math

import pytest

from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_probabilities import check_probabilities, padded, trimmed
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.events import Branch, Forward, Proposal, Verdict
from amusd.protocol.ledger import Ledger
from amusd.protocol.verify_session import Compared, VerifySession
from tests.protocol.refusal import refused

UNFIT = [(0.5,), (0.5, 0.5, 0.5), (0.5, 1.5), (0.5, -0.1), (0.5, math.nan), (math.inf, 0.5)]


@pytest.fixture
def verify() -> VerifySession:
    return VerifySession([10, 11], max_position=20, max_pending=8, max_branches=4)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger([10, 11], max_branches=4)


@pytest.mark.parametrize("probabilities", UNFIT)
def test_what_does_not_fit_the_tokens_is_refused_or_unknown(
    probabilities: tuple[float, ...],
) -> None:
    with pytest.raises(InvalidInputError, match="beside 2 tokens: send one of 0 to 1"):
        check_probabilities((7, 8), probabilities)
    assert padded((7, 8), probabilities) == (0.0, 0.0)


def test_the_limits_and_unknown_ones_fit() -> None:
    for probabilities in ((), (0.0, 1.0)):
        check_probabilities((7, 8), probabilities)
    assert padded((7, 8), (0.0, 1.0)) == (0.0, 1.0)
    assert padded((7, 8), ()) == (0.0, 0.0)


def test_unknown_ones_are_not_sent_unless_others_are_known() -> None:
    assert trimmed([0.0, 0.0]) == ()
    assert trimmed([0.0, 0.5]) == (0.0, 0.5)


# The draft session


def test_a_run_has_the_probability_of_each_of_its_tokens() -> None:
    session = DraftSession([10, 11], DraftLimits(8, 100, tokens_per_proposal=2))
    session.extend((20,), DraftSource.MODEL, (0.5,))
    session.extend((21,), DraftSource.MODEL)
    run = session.take_run()
    assert run is not None
    assert run.probabilities == (0.5, 0.0)


def test_a_token_that_is_final_before_it_is_sent_keeps_its_place() -> None:
    session = DraftSession([10, 11], DraftLimits(8, 100, tokens_per_proposal=3))
    session.extend((20, 21), DraftSource.MODEL, (0.5, 0.6))
    session.advance(0, 2, (20,))
    session.extend((22,), DraftSource.MODEL, (0.7,))
    run = session.take_run()
    assert run is not None
    assert (run.tokens, run.probabilities) == ((20, 21, 22), (0.0, 0.6, 0.7))


def test_what_a_rollback_takes_of_a_branch_keeps_its_probabilities() -> None:
    session = DraftSession([10, 11], DraftLimits(8, 100, 1, max_branches=2))
    session.extend((20,), DraftSource.MODEL, (0.5,))
    session.branch(Branch(2, 30, (31, 32), probabilities=(0.8, 0.9)))
    session.take_run()
    session.rollback(1, 3, 30, branch_tokens=(31,))
    run = session.take_run()
    assert run is not None
    assert (run.tokens, run.probabilities) == ((32,), (0.9,))


# The ledger


def test_the_ledger_forwards_them_with_the_tokens_that_are_new(ledger: Ledger) -> None:
    ledger.proposal(Proposal(0, 2, (20, 21), probabilities=(0.5, 0.6)))
    again = ledger.proposal(Proposal(0, 3, (21, 22), probabilities=(0.6, 0.7)))
    assert again.forward == Forward(0, 4, (22,), probabilities=(0.7,))
    assert ledger.tail == Forward(0, 2, (20, 21, 22), probabilities=(0.5, 0.6, 0.7))
    ledger.verdict(Verdict(0, 2, 1, 1, 21))
    assert ledger.tail == Forward(0, 4, (22,), probabilities=(0.7,))


@pytest.mark.parametrize("probabilities", UNFIT)
def test_a_draft_that_sends_unfit_ones_is_forwarded_without(
    ledger: Ledger, probabilities: tuple[float, ...]
) -> None:
    branch = Branch(2, 30, (31, 32), probabilities=probabilities)
    proposal = Proposal(0, 2, (20, 21), branches=(branch,), probabilities=probabilities)
    forward = ledger.proposal(proposal).forward
    assert forward == Forward(0, 2, (20, 21), branches=(Branch(2, 30, (31, 32)),))
    assert ledger.tail == forward


def test_a_branch_that_begins_an_epoch_brings_its_own(ledger: Ledger) -> None:
    branch = Branch(2, 30, (31, 32), probabilities=(0.8, 0.9))
    ledger.proposal(Proposal(0, 2, (20,), branches=(branch,), probabilities=(0.5,)))
    ledger.verdict(Verdict(0, 2, 1, 0, 30))
    assert ledger.tail == Forward(1, 3, (31, 32), probabilities=(0.8, 0.9))


# The verify session


def test_a_pass_says_what_it_compared_and_what_the_draft_thought_of_it(
    verify: VerifySession,
) -> None:
    verify.offer(0, 2, (20, 21, 22, 23), probabilities=(0.9, 0.8, 0.0, 0.3))
    verify.begin_pass(8)
    verify.end_pass([20, 21, 99, 23, 24], 0.0)
    assert verify.compared == (Compared(0.9, True), Compared(0.8, True), Compared(0.0, False))
    assert verify.pending_probabilities == []


@pytest.mark.parametrize(("token", "is_right"), [(21, True), (99, False)])
def test_a_proposal_that_only_waits_is_compared_with_the_models_own_token(
    verify: VerifySession, token: int, is_right: bool
) -> None:
    verify.offer(0, 2, (20, 21, 22), probabilities=(0.9, 0.8, 0.7))
    verify.begin_pass(1)
    verify.end_pass([20, token], 0.0)
    assert verify.compared == (Compared(0.9, True), Compared(0.8, is_right))
    assert verify.pending_probabilities == ([0.7] if is_right else [])


def test_proposals_that_a_pass_could_not_check_wait_with_their_probabilities(
    verify: VerifySession,
) -> None:
    verify.offer(0, 2, (20, 21, 22, 23), probabilities=(0.9, 0.8, 0.7, 0.6))
    verify.begin_pass(8)
    verify.end_pass([20, 21], 0.0)  # no prediction behind the second one
    assert verify.compared == (Compared(0.9, True), Compared(0.8, True))
    assert (verify.pending, verify.pending_probabilities) == ((22, 23), [0.7, 0.6])
    verify.check_integrity()


def test_a_pass_over_nothing_compares_nothing(verify: VerifySession) -> None:
    verify.begin_pass(8)
    verify.end_pass([20], 0.0)
    assert verify.compared == ()


def test_a_branch_that_begins_an_epoch_is_checked_with_its_own(verify: VerifySession) -> None:
    branch = Branch(2, 30, (31, 32), probabilities=(0.6, 0.7))
    verify.offer(0, 2, (20,), (branch,), (0.5,))
    verify.begin_pass(8)
    verify.end_pass([30, 99], 0.0)
    assert verify.pending == (31, 32)
    assert verify.pending_probabilities == [0.6, 0.7]


@pytest.mark.parametrize("probabilities", UNFIT)
def test_unfit_ones_are_refused_and_change_nothing(
    verify: VerifySession, probabilities: tuple[float, ...]
) -> None:
    branch = Branch(2, 30, (31, 32), probabilities=probabilities)
    with refused(verify, "beside 2 tokens", InvalidInputError):
        verify.offer(0, 2, (20, 21), probabilities=probabilities)
    with refused(verify, "beside 2 tokens", InvalidInputError):
        verify.offer(0, 2, (20,), (branch,))


# Where the draft stops


def test_the_draft_stops_behind_the_token_that_makes_further_ones_unlikely() -> None:
    limits = DraftLimits(8, 100, tokens_per_proposal=8, min_use_probability=0.2)
    session = DraftSession([10, 11], limits)
    session.extend((20,), DraftSource.MODEL, (0.5,))
    assert session.room == 7
    assert session.take_run() is None  # it is collected
    session.extend((21,), DraftSource.MODEL, (0.3,))
    assert session.room == 0
    run = session.take_run()
    assert run is not None
    assert run.tokens == (20, 21)
    assert session.take_run() is None
    session.advance(0, 2, (20,))
    assert session.room == 7  # 0.3 is likely enough


def test_tokens_of_unknown_probability_stop_nothing() -> None:
    session = DraftSession([10, 11], DraftLimits(8, 100, min_use_probability=0.2))
    session.extend((20, 21, 22), DraftSource.LOOKUP)
    assert session.room == 5
    session.extend((), DraftSource.LOOKUP)
    session.take_run()


def test_without_a_least_probability_only_the_lookahead_stops_the_draft() -> None:
    session = DraftSession([10, 11], DraftLimits(8, 100))
    session.extend((20,), DraftSource.MODEL, (1e-9,))
    assert session.room == 7


@pytest.mark.parametrize("least", [-0.1, 1.0, math.nan, math.inf])
def test_a_least_probability_out_of_range_is_refused(least: float) -> None:
    with pytest.raises(InvalidInputError, match=r"min_use_probability is .*: ask for 0 to below 1"):
        DraftLimits(8, 100, min_use_probability=least)
