"""Each rule of the ledger, on prompt 10 11, so that the output begins at position 2."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import PreconditionError
from amusd.protocol.events import NOTHING, Advance, Decision, Forward, Proposal, Rollback, Verdict
from amusd.protocol.ledger import Ledger
from amusd.protocol.ledger_counts import LedgerCounts, SourceOutcomes
from amusd.protocol.verify_session import VerifySession
from tests.protocol.refusal import refused, unchanged


@pytest.fixture
def ledger() -> Ledger:
    return Ledger([10, 11])


def proposed(*tokens: int, at: int = 2, epoch: int = 0) -> Proposal:
    return Proposal(epoch, at, tokens)


def verdict(next_token: int, accepted: int = 0, at: int = 2, epoch: int = 0) -> Verdict:
    return Verdict(epoch, at, num_checked=accepted, num_accepted=accepted, next_token=next_token)


def settled(ledger: Ledger) -> tuple[int, int, int, int]:
    """Drafted, accepted, rejected, wasted."""
    counts = ledger.counts
    ledger.check_integrity()
    return counts.drafted, counts.accepted, counts.rejected, counts.wasted


# What a session starts with


def test_a_session_needs_a_prompt() -> None:
    with pytest.raises(PreconditionError, match="at least one token"):
        Ledger([])


def test_the_prompt_is_final_from_the_start(ledger: Ledger) -> None:
    assert ledger.tokens == (10, 11)
    assert ledger.output == ()
    assert ledger.verified_position == ledger.num_prompt_tokens == 2
    assert (ledger.epoch, ledger.num_speculated, ledger.counts) == (0, 0, LedgerCounts())


def test_the_callers_prompt_is_not_written_to() -> None:
    prompt = [10, 11]
    Ledger(prompt).verdict(verdict(20))
    assert prompt == [10, 11]


def test_a_rebuilt_session_goes_on_in_its_epoch() -> None:
    ledger = Ledger([10, 11], epoch=4)
    assert ledger.proposal(proposed(1, epoch=3)) is NOTHING
    assert ledger.proposal(proposed(1, epoch=4)).forward == Forward(4, 2, (1,))


def test_a_plain_pass_is_asked_for_at_the_verified_position_or_further_ahead(
    ledger: Ledger,
) -> None:
    assert ledger.unspeculated_pass() == Forward(0, 2, ())
    assert ledger.unspeculated_pass(num_ahead=3) == Forward(0, 5, ())


def test_its_state_reads_in_one_line(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21))
    assert repr(ledger) == "Ledger(epoch=0, verified=2, tail=2, draft_head=4)"


# Proposals


def test_a_proposal_is_forwarded_and_makes_nothing_final(ledger: Ledger) -> None:
    assert ledger.proposal(proposed(20, 21)) == Decision(forward=Forward(0, 2, (20, 21)))
    assert ledger.tokens == (10, 11)
    assert ledger.num_speculated == 2
    assert settled(ledger) == (2, 0, 0, 0)


def test_a_proposal_that_comes_twice_is_forwarded_once(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21))
    with unchanged(ledger):
        assert ledger.proposal(proposed(20, 21)) is NOTHING


def test_only_what_is_new_in_an_overlapping_proposal_is_forwarded(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21))
    assert ledger.proposal(proposed(21, 22, at=3)).forward == Forward(0, 4, (22,))
    assert settled(ledger) == (3, 0, 0, 0)


def test_a_proposal_without_tokens_changes_nothing(ledger: Ledger) -> None:
    with unchanged(ledger):
        assert ledger.proposal(proposed()) is NOTHING


def test_a_proposal_of_an_old_epoch_is_counted_as_wasted_and_dropped(ledger: Ledger) -> None:
    ledger.proposal(proposed(20))
    ledger.verdict(verdict(30))
    assert ledger.proposal(proposed(21, 22, at=3)) is NOTHING
    assert (ledger.num_speculated, settled(ledger)) == (0, (3, 0, 1, 2))


def test_a_proposal_of_a_later_epoch_is_refused(ledger: Ledger) -> None:
    with refused(ledger, "a proposal of epoch 1 is ahead of epoch 0"):
        ledger.proposal(proposed(20, epoch=1))


def test_a_proposal_that_leaves_a_gap_is_refused(ledger: Ledger) -> None:
    ledger.proposal(proposed(20))
    with refused(ledger, "at position 4 leaves a gap after 3"):
        ledger.proposal(proposed(22, at=4))


def test_a_proposal_within_the_prompt_is_refused(ledger: Ledger) -> None:
    with refused(ledger, "lies within the prompt"):
        ledger.proposal(proposed(11, 20, at=1))


def test_a_proposal_that_contradicts_an_earlier_one_is_refused(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21))
    with refused(ledger, "contradict each other at position 3"):
        ledger.proposal(proposed(20, 99, 22))


# Another verify service


def test_what_waits_to_be_verified_can_be_sent_again(ledger: Ledger) -> None:
    assert ledger.tail is None
    ledger.proposal(proposed(20, 21, 22))
    assert ledger.tail == Forward(0, 2, (20, 21, 22))
    ledger.verdict(verdict(21, accepted=1))
    assert ledger.tail == Forward(0, 4, (22,))
    ledger.verdict(verdict(30, at=4))
    assert ledger.tail is None


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.booleans()), max_size=12))
def test_a_verify_session_made_of_the_ledger_goes_on_with_it(
    steps: list[tuple[int, int, bool]],
) -> None:
    """Whatever was proposed and verified, another service can take the session over."""
    ledger, token = Ledger([10, 11]), 100
    for num_proposed, num_accepted, guesses_next in steps:
        position = ledger.verified_position
        known = ledger.tail.tokens if ledger.tail else ()
        tokens = tuple(range(token, token + num_proposed))
        ledger.proposal(proposed(*tokens, at=position + len(known), epoch=ledger.epoch))
        tail = known + tokens
        accepted = min(num_accepted, len(tail))
        next_token = tail[accepted] if guesses_next and accepted < len(tail) else 99
        ledger.verdict(verdict(next_token, accepted, position, ledger.epoch))
        token += num_proposed
    session = VerifySession(list(ledger.tokens), 1000, 64, ledger.epoch)
    forward = ledger.tail
    if forward is not None:
        session.offer(forward.epoch, forward.position, forward.tokens)
    num_checked = len(session.begin_pass(64))
    assert num_checked == ledger.num_speculated
    final = ledger.tokens
    ledger.verdict(session.end_pass([98] * (num_checked + 1), 0.0))
    assert ledger.tokens == (*final, 98)
    assert session.tokens == list(ledger.tokens)
    ledger.check_integrity()


# Verdicts


def test_a_plain_verdict_makes_one_token_final(ledger: Ledger) -> None:
    decision = ledger.verdict(verdict(20))
    assert decision == Decision(advance=Advance(0, 2, (20,)), committed=(20,))
    assert ledger.output == (20,)
    assert ledger.counts.passes == 1


def test_a_verdict_commits_what_it_accepts_and_the_verify_models_own_token(
    ledger: Ledger,
) -> None:
    ledger.proposal(proposed(20, 21))
    decision = ledger.verdict(verdict(22, accepted=2))
    assert decision == Decision(advance=Advance(0, 2, (20, 21, 22)), committed=(20, 21, 22))
    assert settled(ledger) == (2, 2, 0, 0)


def test_a_proposal_that_equals_the_verify_models_token_goes_on(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21, 22))
    decision = ledger.verdict(verdict(21, accepted=1))
    assert decision == Decision(advance=Advance(0, 2, (20, 21)), committed=(20, 21))
    assert (ledger.num_speculated, ledger.epoch) == (1, 0)
    assert settled(ledger) == (3, 2, 0, 0)


def test_a_mismatch_rolls_back_to_the_verify_models_token(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21, 22, 23))
    decision = ledger.verdict(verdict(31, accepted=1))
    assert decision == Decision(rollback=Rollback(1, 4, 31), committed=(20, 31))
    assert ledger.output == (20, 31)
    assert (ledger.epoch, ledger.num_speculated, ledger.counts.rollbacks) == (1, 0, 1)
    assert settled(ledger) == (4, 1, 1, 2)


def test_the_draft_may_propose_at_once_after_a_rollback(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21))
    ledger.verdict(verdict(30))
    decision = ledger.proposal(proposed(31, 32, at=3, epoch=1))
    assert decision.forward == Forward(1, 3, (31, 32))


def test_a_verdict_that_comes_twice_counts_once(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21, 22))
    ledger.verdict(verdict(21, accepted=1))
    with unchanged(ledger):
        assert ledger.verdict(verdict(21, accepted=1)) is NOTHING


def test_an_older_verdict_changes_nothing_even_after_a_rollback(ledger: Ledger) -> None:
    ledger.verdict(verdict(20))
    ledger.proposal(proposed(21, at=3))
    ledger.verdict(verdict(31, at=3))
    with unchanged(ledger):
        assert ledger.verdict(verdict(20)) is NOTHING


def test_a_verdict_of_a_later_epoch_is_refused(ledger: Ledger) -> None:
    with refused(ledger, "a verdict of epoch 1 is ahead of epoch 0"):
        ledger.verdict(verdict(20, epoch=1))


def test_a_verdict_ahead_of_the_verified_position_is_refused(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21))
    with refused(ledger, "at position 3 is ahead of 2"):
        ledger.verdict(verdict(21, at=3))


def test_a_verdict_that_accepts_more_than_was_proposed_is_refused(ledger: Ledger) -> None:
    ledger.proposal(proposed(20))
    with refused(ledger, "accepts 2 of 1"):
        ledger.verdict(verdict(22, accepted=2))


def test_a_verdict_of_an_old_epoch_that_accepts_tokens_settles_nothing() -> None:
    ledger = Ledger([10, 11], epoch=1)
    ledger.proposal(proposed(30, 31, epoch=1))
    with unchanged(ledger):
        assert ledger.verdict(verdict(22, accepted=1, epoch=0)) is NOTHING


def test_a_verdict_of_an_old_epoch_that_accepts_nothing_still_holds() -> None:
    ledger = Ledger([10, 11], epoch=1)
    decision = ledger.verdict(verdict(20, epoch=0))
    assert decision == Decision(advance=Advance(1, 2, (20,)), committed=(20,))


def test_a_verdict_of_an_old_epoch_is_compared_with_the_tail_of_the_new_one() -> None:
    ledger = Ledger([10, 11], epoch=1)
    ledger.proposal(proposed(20, 21, epoch=1))
    assert ledger.verdict(verdict(20, epoch=0)).rollback is None
    assert ledger.verdict(verdict(31, at=3, epoch=0)).rollback == Rollback(2, 4, 31)
    assert settled(ledger) == (2, 1, 1, 0)


# Late proposals: the verify model went on without them


@pytest.fixture
def ahead(ledger: Ledger) -> Ledger:
    """The verify model has written 20 21 22 alone, at positions 2 to 4."""
    for position in (2, 3, 4):
        ledger.verdict(verdict(18 + position, at=position))
    return ledger


def test_late_tokens_that_are_right_count_as_accepted(ahead: Ledger) -> None:
    assert ahead.proposal(proposed(20, 21)) is NOTHING
    assert settled(ahead) == (2, 2, 0, 0)


def test_what_follows_late_tokens_that_are_right_is_forwarded(ahead: Ledger) -> None:
    decision = ahead.proposal(proposed(20, 21, 22, 23, 24))
    assert decision == Decision(forward=Forward(0, 5, (23, 24)))
    assert settled(ahead) == (5, 3, 0, 0)


def test_a_late_mismatch_rolls_back_to_it_and_advances_over_the_rest(ahead: Ledger) -> None:
    decision = ahead.proposal(proposed(20, 91, 92, 93))
    assert decision == Decision(rollback=Rollback(1, 4, 21), advance=Advance(1, 4, (22,)))
    assert ahead.output == (20, 21, 22)
    assert settled(ahead) == (4, 1, 1, 2)


def test_a_late_mismatch_at_the_last_final_token_needs_no_advance(ahead: Ledger) -> None:
    decision = ahead.proposal(proposed(20, 21, 92))
    assert decision == Decision(rollback=Rollback(1, 5, 22))


def test_after_a_late_rollback_the_draft_may_be_late_and_wrong_again(ahead: Ledger) -> None:
    ahead.proposal(proposed(90))
    decision = ahead.proposal(proposed(91, at=3, epoch=1))
    assert decision == Decision(rollback=Rollback(2, 4, 21), advance=Advance(2, 4, (22,)))
    assert settled(ahead) == (2, 0, 2, 0)


def test_after_a_late_rollback_the_draft_may_be_late_and_right(ahead: Ledger) -> None:
    ahead.proposal(proposed(90))
    decision = ahead.proposal(proposed(21, 22, 23, at=3, epoch=1))
    assert decision == Decision(forward=Forward(1, 5, (23,)))
    assert settled(ahead) == (4, 2, 1, 0)


def test_a_draft_that_was_told_of_final_tokens_goes_on_after_them(ahead: Ledger) -> None:
    assert ahead.proposal(proposed(23, at=5)).forward == Forward(0, 5, (23,))
    with refused(ahead, "leaves a gap after 6"):
        ahead.proposal(proposed(25, at=7))


# The end


def test_what_is_left_at_the_end_is_wasted(ledger: Ledger) -> None:
    ledger.proposal(proposed(20, 21, 22))
    ledger.verdict(verdict(21, accepted=1))
    ledger.close()
    assert (ledger.num_speculated, settled(ledger)) == (0, (3, 2, 0, 1))


def test_integrity_notices_a_lost_token(ledger: Ledger) -> None:
    ledger.counts.wasted += 1
    with pytest.raises(AssertionError, match="token counts do not add up"):
        ledger.check_integrity()


# Sources


def looked_up(*tokens: int, at: int = 2, epoch: int = 0) -> Proposal:
    return Proposal(epoch, at, tokens, source=DraftSource.LOOKUP)


def outcomes(ledger: Ledger) -> tuple[SourceOutcomes, SourceOutcomes]:
    """What became of the tokens of the model, and of those that were looked up."""
    ledger.check_integrity()
    by_source = ledger.counts.by_source
    return by_source[DraftSource.MODEL], by_source[DraftSource.LOOKUP]


def test_a_verdict_settles_each_token_for_its_own_source(ledger: Ledger) -> None:
    ledger.proposal(proposed(20))
    ledger.proposal(looked_up(21, 22, 23, at=3))
    ledger.verdict(verdict(32, accepted=2))
    assert outcomes(ledger) == (SourceOutcomes(1, 1, 0), SourceOutcomes(3, 1, 1))


def test_the_verify_models_own_next_token_may_be_of_another_source(ledger: Ledger) -> None:
    ledger.proposal(looked_up(20))
    ledger.proposal(proposed(21, at=3))
    ledger.verdict(verdict(21, accepted=1))
    assert outcomes(ledger) == (SourceOutcomes(1, 1, 0), SourceOutcomes(1, 1, 0))


def test_late_and_stale_tokens_are_settled_for_their_source(ledger: Ledger) -> None:
    ledger.verdict(verdict(20))
    ledger.verdict(verdict(21, at=3))
    ledger.proposal(looked_up(20, 31, 32))
    ledger.proposal(looked_up(33, at=5))
    assert outcomes(ledger) == (SourceOutcomes(), SourceOutcomes(4, 1, 1))
