"""Each rule of a draft session, on prompt 10 11, so that the output begins at position 2."""

import pytest

from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.events import DraftedRun
from tests.protocol.refusal import refused, unchanged


def make(lookahead: int = 4, max_position: int = 100, tokens_per_proposal: int = 1) -> DraftSession:
    return DraftSession([10, 11], DraftLimits(lookahead, max_position, tokens_per_proposal))


@pytest.fixture
def session() -> DraftSession:
    return make()


@pytest.fixture
def running() -> DraftSession:
    """It has proposed 20 21 22 at positions 2 to 4."""
    session = make()
    session.extend((20, 21, 22))
    session.take_run()
    return session


# Limits


@pytest.mark.parametrize(("lookahead", "tokens_per_proposal"), [(0, 1), (4, 0), (4, 5)])
def test_limits_under_which_nothing_could_be_proposed_are_refused(
    lookahead: int, tokens_per_proposal: int
) -> None:
    with pytest.raises(InvalidInputError, match="ask for 1"):
        DraftLimits(lookahead, 100, tokens_per_proposal)


def test_a_session_needs_a_prompt() -> None:
    with pytest.raises(InvalidInputError, match="send a prompt"):
        DraftSession([], DraftLimits(4, 100))


def test_the_room_is_the_lookahead_beyond_the_verified_position(session: DraftSession) -> None:
    assert session.room == 4
    session.extend((20, 21, 22))
    assert session.room == 1
    session.advance(0, 2, (20, 21))
    assert session.room == 3


def test_nothing_is_drafted_at_or_beyond_the_last_position() -> None:
    session = make(lookahead=8, max_position=5)
    session.extend((20, 21, 22, 23, 24))
    assert (session.length, session.room) == (5, 0)


def test_what_a_drafter_writes_beyond_the_lookahead_is_cut_off(session: DraftSession) -> None:
    session.extend((20, 21, 22, 23, 24, 25))
    assert session.tokens == [10, 11, 20, 21, 22, 23]
    session.check_integrity()


# Proposals


def test_each_token_is_proposed_once(session: DraftSession) -> None:
    session.extend((20,))
    assert session.take_run() == DraftedRun(0, 2, (20,))
    assert session.take_run() is None
    session.extend((21, 22))
    assert session.take_run() == DraftedRun(0, 3, (21, 22))


def test_tokens_are_collected_until_a_proposal_is_full() -> None:
    session = make(tokens_per_proposal=3)
    session.extend((20, 21))
    assert session.take_run() is None
    session.extend((22,))
    assert session.take_run() == DraftedRun(0, 2, (20, 21, 22))


def test_a_proposal_is_not_held_back_when_the_lookahead_is_used_up() -> None:
    session = make(lookahead=4, tokens_per_proposal=3)
    session.extend((20, 21, 22))
    session.take_run()
    session.extend((23,))
    assert session.take_run() == DraftedRun(0, 5, (23,))


def test_a_proposal_is_not_held_back_when_there_is_no_more_to_propose() -> None:
    session = make(tokens_per_proposal=3)
    session.extend((20,))
    session.extend(())
    assert session.take_run() == DraftedRun(0, 2, (20,))


def test_a_drafter_without_ideas_says_so_once_until_the_next_advance(
    session: DraftSession,
) -> None:
    session.extend(())
    assert session.room == 0
    assert session.take_run() == DraftedRun(0, 2, ())
    assert session.take_run() is None
    session.advance(0, 2, (20,))
    assert session.room == 4
    session.extend(())
    assert session.take_run() == DraftedRun(0, 3, ())


def test_after_its_last_tokens_a_drafter_without_ideas_says_so_too() -> None:
    session = make(tokens_per_proposal=4)
    session.extend((20,))
    session.advance(0, 2, (20,))  # settled before it was sent
    assert session.take_run() is None
    session.extend(())
    assert session.take_run() == DraftedRun(0, 2, (20,))
    assert session.take_run() == DraftedRun(0, 3, ())
    assert session.take_run() is None


def test_at_the_end_of_its_context_a_draft_says_at_every_advance_that_there_is_no_more() -> None:
    session = make(max_position=3)
    session.extend((20,))
    assert session.take_run() == DraftedRun(0, 2, (20,))
    assert session.take_run() == DraftedRun(0, 3, ())
    assert session.take_run() is None
    for position in (2, 3, 4):
        session.advance(0, position, (18 + position,))
        assert session.take_run() == DraftedRun(0, max(3, position + 1), ())
        assert session.take_run() is None


def test_a_draft_whose_lookahead_is_used_up_waits_in_silence() -> None:
    session = make(lookahead=1)
    session.extend((20,))
    session.take_run()
    assert session.take_run() is None


def test_a_rollback_to_the_end_of_its_context_is_followed_by_word_that_there_is_no_more() -> None:
    session = make(max_position=3)
    session.extend((20,))
    session.take_run()
    session.rollback(1, 3, 30)
    assert session.take_run() == DraftedRun(1, 3, ())


# Advances


def test_an_advance_over_its_own_tokens_keeps_the_draft(running: DraftSession) -> None:
    running.advance(0, 2, (20, 21))
    assert running.tokens == [10, 11, 20, 21, 22]
    assert running.take_run() is None


def test_a_draft_takes_over_final_tokens_that_it_has_not_written_yet(
    running: DraftSession,
) -> None:
    running.advance(0, 2, (20, 21, 22, 23, 24))
    assert running.tokens == [10, 11, 20, 21, 22, 23, 24]
    running.extend((25,))
    assert running.take_run() == DraftedRun(0, 7, (25,))


def test_final_tokens_that_were_taken_over_are_never_proposed(session: DraftSession) -> None:
    session.advance(0, 2, (20, 21))
    assert session.take_run() is None


def test_where_the_verify_model_disagrees_drafting_stops_at_once(running: DraftSession) -> None:
    running.advance(0, 2, (20, 31))
    assert running.room == 0
    assert running.take_run() is None
    running.check_integrity()


def test_a_wrong_token_is_still_proposed_so_that_the_ledger_sees_it() -> None:
    session = make(tokens_per_proposal=4)
    session.extend((20, 21))
    session.advance(0, 2, (30,))
    assert session.take_run() == DraftedRun(0, 2, (20, 21))


def test_a_stopped_draft_ignores_advances_until_the_rollback(running: DraftSession) -> None:
    running.advance(0, 2, (30,))
    with unchanged(running):
        running.advance(0, 3, (31,))


def test_an_advance_that_comes_twice_changes_nothing(running: DraftSession) -> None:
    running.advance(0, 2, (20, 21))
    with unchanged(running):
        running.advance(0, 2, (20, 21))


def test_an_advance_of_an_old_epoch_is_ignored(running: DraftSession) -> None:
    running.rollback(1, 4, 31)
    with unchanged(running):
        running.advance(0, 2, (20, 21))


def test_an_advance_of_a_later_epoch_is_refused(running: DraftSession) -> None:
    with refused(running, "roll back first"):
        running.advance(1, 2, (20,))


def test_an_advance_that_leaves_a_gap_is_refused(running: DraftSession) -> None:
    with refused(running, "at position 3 leaves a gap after 2"):
        running.advance(0, 3, (21,))


# A look-ahead that changes


def test_an_advance_may_shorten_the_lookahead_and_leave_it_so(session: DraftSession) -> None:
    session.advance(0, 2, (20,), lookahead=2)
    assert session.room == 2
    session.advance(0, 3, (21,))
    assert session.room == 2


def test_a_rollback_may_change_the_lookahead_too(running: DraftSession) -> None:
    running.rollback(1, 4, 31, lookahead=1)
    assert running.room == 1


def test_the_lookahead_never_exceeds_what_the_session_was_opened_with(
    session: DraftSession,
) -> None:
    session.advance(0, 2, (20,), lookahead=9)
    assert session.room == 4


def test_a_shorter_lookahead_keeps_what_is_written_already(running: DraftSession) -> None:
    running.advance(0, 2, (20,), lookahead=1)
    assert (running.length, running.room) == (5, 0)
    running.check_integrity()


def test_a_message_that_is_refused_does_not_change_the_lookahead(running: DraftSession) -> None:
    with refused(running, "leaves a gap"):
        running.advance(0, 9, (21,), lookahead=1)
    with refused(running, "too old"):
        running.rollback(0, 4, 31, lookahead=1)


# Rollbacks


def test_a_rollback_drops_the_wrong_token_and_what_followed(running: DraftSession) -> None:
    assert running.rollback(1, 4, 31) == 2
    assert running.tokens == [10, 11, 20, 31]
    assert (running.epoch, running.room) == (1, 4)
    running.extend((32,))
    assert running.take_run() == DraftedRun(1, 4, (32,))


def test_a_rollback_starts_a_stopped_draft_again(running: DraftSession) -> None:
    running.advance(0, 2, (30, 31))
    running.rollback(1, 3, 30)
    running.advance(1, 3, (31,))
    assert running.tokens == [10, 11, 30, 31]
    assert running.room == 4


def test_a_rollback_starts_a_drafter_without_ideas_again(running: DraftSession) -> None:
    running.extend(())
    running.rollback(1, 4, 31)
    assert running.room == 4


def test_a_rollback_drops_what_was_collected_and_not_sent() -> None:
    session = make(tokens_per_proposal=4)
    session.extend((20, 21, 22))
    session.rollback(1, 3, 30)
    assert session.take_run() is None
    session.extend((31, 32, 33, 34))
    assert session.take_run() == DraftedRun(1, 3, (31, 32, 33, 34))


@pytest.mark.parametrize("epoch", [2, 1, 0])
def test_a_rollback_to_no_later_epoch_is_refused(running: DraftSession, epoch: int) -> None:
    running.rollback(2, 4, 31)
    with refused(running, "too old"):
        running.rollback(epoch, 5, 32)


def test_a_rollback_ahead_of_what_was_drafted_is_refused(running: DraftSession) -> None:
    with refused(running, "ahead of the 5 tokens"):
        running.rollback(1, 7, 30)


def test_a_rollback_behind_what_is_verified_is_refused(running: DraftSession) -> None:
    running.advance(0, 2, (20, 21))
    with refused(running, "behind the 4 tokens"):
        running.rollback(1, 4, 30)


def test_its_state_reads_in_one_line(running: DraftSession) -> None:
    assert repr(running) == "DraftSession(epoch=0, verified=2, sent=5, length=5, stalled=False)"
