"""Each rule of a verify session, on prompt 10 11, so that the output begins at position 2."""

import pytest

from amusd.protocol.errors import InvalidInputError, LimitExceededError, PreconditionError
from amusd.protocol.events import Verdict
from amusd.protocol.verify_session import VerifySession
from tests.protocol.refusal import refused, unchanged

MANY = 100


@pytest.fixture
def session() -> VerifySession:
    return VerifySession([10, 11], max_position=20, max_pending=4)


def one_pass(session: VerifySession, *predictions: int, max_tokens: int = MANY) -> Verdict:
    """Run a pass whose model writes ``predictions``; as many as are checked, and one."""
    checked = session.begin_pass(max_tokens)
    assert len(predictions) == len(checked) + 1
    verdict = session.end_pass(list(predictions), pass_seconds=0.5)
    session.check_integrity()
    return verdict


# What a session starts with


def test_a_session_needs_a_prompt() -> None:
    with pytest.raises(InvalidInputError, match="send a prompt"):
        VerifySession([], max_position=20, max_pending=4)


@pytest.mark.parametrize("max_position", [0, 1, 2])
def test_a_session_needs_room_after_its_prompt(max_position: int) -> None:
    with pytest.raises(InvalidInputError, match="leaves no room after 2 tokens"):
        VerifySession([10, 11], max_position, max_pending=4)


def test_a_plain_pass_is_due_from_the_start(session: VerifySession) -> None:
    assert session.is_due
    assert one_pass(session, 20) == Verdict(0, 2, 0, 0, 20, pass_seconds=0.5)
    assert not session.is_due


def test_a_rebuilt_session_goes_on_in_its_epoch() -> None:
    session = VerifySession([10, 11], max_position=20, max_pending=4, epoch=3)
    session.offer(2, 2, (90,))
    session.offer(3, 2, (20,))
    assert one_pass(session, 20, 21) == Verdict(3, 2, 1, 1, 21, pass_seconds=0.5)


# ModelRunner


@pytest.mark.parametrize("following", [22, 92])
def test_tokens_without_a_prediction_are_checked_in_the_next_pass(
    session: VerifySession, following: int
) -> None:
    session.offer(0, 2, (20, 21, following))
    assert session.begin_pass(MANY) == (20, 21, following)
    session.offer(0, 5, (23,))
    assert session.end_pass([20, 21], 0.5) == Verdict(0, 2, 1, 1, 21, pass_seconds=0.5)
    session.check_integrity()
    assert session.begin_pass(MANY) == (following, 23)
    assert session.end_pass([22, 23, 24], 0.5).num_accepted == (2 if following == 22 else 0)
    session.check_integrity()


def test_the_last_prediction_of_a_short_pass_may_reject_the_next_token(
    session: VerifySession,
) -> None:
    session.offer(0, 2, (20, 91, 22))
    session.begin_pass(MANY)
    assert session.end_pass([20, 21], 0.5) == Verdict(0, 2, 1, 1, 21, pass_seconds=0.5)
    session.check_integrity()
    assert session.epoch == 1
    assert session.begin_pass(MANY) == ()


def test_a_pass_commits_what_it_accepts_and_the_models_own_token(session: VerifySession) -> None:
    session.offer(0, 2, (20, 21))
    assert one_pass(session, 20, 21, 22) == Verdict(0, 2, 2, 2, 22, pass_seconds=0.5)
    assert session.tokens == [10, 11, 20, 21, 22]
    assert session.tokens[4:] == [22]


def test_a_pass_accepts_up_to_the_first_mismatch_only(session: VerifySession) -> None:
    session.offer(0, 2, (20, 91, 22))
    # What the model writes after a wrong token does not matter, even where it agrees.
    assert one_pass(session, 20, 21, 22, 23) == Verdict(0, 2, 3, 1, 21, pass_seconds=0.5)
    assert session.tokens[2:] == [20, 21]


def test_nothing_is_due_while_a_pass_runs(session: VerifySession) -> None:
    session.begin_pass(MANY)
    session.offer(0, 2, (20,))
    assert not session.is_due


def test_a_pass_checks_no_more_than_it_is_told_and_the_rest_waits(session: VerifySession) -> None:
    session.offer(0, 2, (20, 21, 22, 23))
    one_pass(session, 20, 21, max_tokens=1)  # the 21 that waits is settled with it
    assert session.begin_pass(MANY) == (22, 23)


def test_a_token_that_waits_and_differs_from_the_models_own_is_rejected(
    session: VerifySession,
) -> None:
    session.offer(0, 2, (20, 91, 22))
    one_pass(session, 20, 21, max_tokens=1)
    assert not session.is_due
    with unchanged(session):
        session.offer(0, 5, (23,))


def test_proposals_that_come_during_a_pass_are_checked_by_the_next(
    session: VerifySession,
) -> None:
    session.offer(0, 2, (20,))
    session.begin_pass(MANY)
    session.offer(0, 3, (21, 22))
    session.end_pass([20, 21], 0.0)
    assert session.is_due
    assert session.begin_pass(MANY) == (22,)


def test_nothing_is_written_beyond_the_last_position() -> None:
    session = VerifySession([10, 11], max_position=4, max_pending=4)
    session.offer(0, 2, (20, 21, 22))
    assert session.begin_pass(MANY) == (20,)
    session.end_pass([20, 21], 0.0)
    session.check_integrity()
    assert session.verified_position == 4
    assert not session.is_due


# Plain passes


def test_a_plain_pass_is_asked_for_by_position(session: VerifySession) -> None:
    one_pass(session, 20)
    session.offer(0, 3, ())
    assert session.is_due
    one_pass(session, 21)
    assert not session.is_due


def test_plain_passes_may_be_asked_for_ahead(session: VerifySession) -> None:
    session.offer(0, 4, ())
    for token in (20, 21, 22):
        assert session.is_due
        one_pass(session, token)
    assert not session.is_due


def test_a_plain_pass_for_a_position_that_is_final_is_ignored(session: VerifySession) -> None:
    one_pass(session, 20)
    with unchanged(session):
        session.offer(0, 2, ())


def test_a_plain_pass_asked_for_during_a_pass_adds_none(session: VerifySession) -> None:
    session.begin_pass(MANY)
    session.offer(0, 2, ())
    session.end_pass([20], 0.0)
    assert not session.is_due


def test_a_plain_pass_of_an_old_epoch_still_holds(session: VerifySession) -> None:
    session.offer(0, 2, (90,))
    one_pass(session, 20, 21)
    session.offer(0, 3, ())
    assert session.is_due


def test_what_is_proposed_before_a_plain_pass_is_checked_by_it(session: VerifySession) -> None:
    session.offer(0, 2, ())
    session.offer(0, 2, (20,))
    assert session.begin_pass(MANY) == (20,)


# Proposals


def test_a_proposal_that_comes_twice_is_checked_once(session: VerifySession) -> None:
    session.offer(0, 2, (20, 21))
    with unchanged(session):
        session.offer(0, 2, (20, 21))


def test_a_proposal_that_comes_again_after_its_pass_changes_nothing(
    session: VerifySession,
) -> None:
    session.offer(0, 2, (20, 21))
    one_pass(session, 20, 21, 22)
    with unchanged(session):
        session.offer(0, 2, (20, 21))


def test_a_proposal_of_an_old_epoch_is_ignored(session: VerifySession) -> None:
    session.offer(0, 2, (90,))
    one_pass(session, 20, 21)
    with unchanged(session):
        session.offer(0, 3, (91,))


def test_a_later_epoch_drops_what_was_proposed_before(session: VerifySession) -> None:
    session.offer(0, 2, (20, 21))
    session.offer(1, 2, (30,))
    assert session.begin_pass(MANY) == (30,)
    assert session.end_pass([30, 31], 0.0).epoch == 1


def test_late_tokens_that_are_right_let_the_rest_be_checked(session: VerifySession) -> None:
    one_pass(session, 20)
    session.offer(0, 2, (20, 21))
    assert session.begin_pass(MANY) == (21,)


def test_late_tokens_that_are_right_and_all_there_is_ask_for_no_pass(
    session: VerifySession,
) -> None:
    one_pass(session, 20)
    session.offer(0, 2, (20,))
    assert not session.is_due


def test_a_late_token_that_is_wrong_ends_its_epoch(session: VerifySession) -> None:
    one_pass(session, 20)
    session.offer(0, 2, (90, 91))
    assert not session.is_due
    with unchanged(session):
        session.offer(0, 4, (92,))
    session.offer(1, 3, (21,))
    assert session.begin_pass(MANY) == (21,)


def test_a_verdict_carries_the_epoch_that_its_pass_began_in(session: VerifySession) -> None:
    session.begin_pass(MANY)
    session.offer(1, 2, (20,))
    assert session.end_pass([20], 0.0).epoch == 0
    session.offer(1, 3, (21,))
    session.begin_pass(MANY)
    assert session.end_pass([21, 22], 0.0).epoch == 1


def test_a_gap_is_refused(session: VerifySession) -> None:
    session.offer(0, 2, (20,))
    with refused(session, "at position 4 leave a gap after 3"):
        session.offer(0, 4, (22,))


def test_a_contradiction_is_refused(session: VerifySession) -> None:
    session.offer(0, 2, (20, 21))
    with refused(session, "contradict each other at position 3", InvalidInputError):
        session.offer(0, 2, (20, 91))


def test_a_contradiction_with_tokens_that_are_being_checked_is_refused(
    session: VerifySession,
) -> None:
    session.offer(0, 2, (20, 21))
    session.begin_pass(1)
    with refused(session, "contradict each other at position 2", InvalidInputError):
        session.offer(0, 2, (90,))


def test_a_new_epoch_cannot_begin_while_tokens_of_the_old_one_are_checked(
    session: VerifySession,
) -> None:
    session.offer(0, 2, (20,))
    session.begin_pass(MANY)
    with refused(session, "epoch 1 begins while tokens of epoch 0", PreconditionError):
        session.offer(1, 2, (30,))


def test_no_more_tokens_wait_than_the_limit(session: VerifySession) -> None:
    session.offer(0, 2, (20, 21, 22, 23))
    with refused(session, "more than 4 proposed tokens wait", LimitExceededError):
        session.offer(0, 6, (24,))
    session.begin_pass(MANY)
    session.offer(0, 6, (24,))


def test_its_state_reads_in_one_line(session: VerifySession) -> None:
    session.offer(0, 2, (20, 21, 22))
    session.begin_pass(2)
    assert repr(session) == "VerifySession(epoch=0, verified=2, checking=2, pending=1)"
