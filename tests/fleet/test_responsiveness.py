"""When a replica counts as late, when it gets no sessions, and when it is tried again."""

import pytest

from amusd.fleet.responsiveness import Responsiveness

TIMEOUT = 10.0


@pytest.fixture
def answers() -> Responsiveness:
    return Responsiveness(TIMEOUT)


def test_a_replica_that_nobody_asks_is_on_time(answers: Responsiveness) -> None:
    assert not answers.is_late(1e9)
    assert answers.is_usable(1e9)


def test_a_call_without_an_answer_makes_a_replica_late_and_then_unusable(
    answers: Responsiveness,
) -> None:
    answers.asked(100.0)
    answers.asked(105.0)  # the first one still waits
    assert not answers.is_late(101.0)
    assert answers.is_late(103.0)
    assert answers.is_usable(109.0)
    assert answers.problem(111.0) == "it has not answered for 11 s"
    answers.replied(112.0)
    assert not answers.is_late(112.0)
    assert answers.is_usable(112.0)


def test_messages_to_sessions_count_as_answers(answers: Responsiveness) -> None:
    answers.asked(100.0)
    for second in range(100, 200, 2):
        answers.served(float(second))
    assert not answers.is_late(200.0)
    assert answers.is_late(203.0)
    assert not answers.is_usable(210.0)


def test_with_a_short_timeout_a_replica_is_late_before_it_is_unusable() -> None:
    answers = Responsiveness(0.2)
    answers.asked(100.0)
    assert answers.is_late(100.15)
    assert answers.is_usable(100.15)


def test_a_session_without_an_answer_pauses_a_replica_that_serves_nobody(
    answers: Responsiveness,
) -> None:
    answers.session_failed(100.0, 106.0, "no verdict within 6 s")
    assert answers.problem(106.5) == "no verdict within 6 s"
    assert answers.is_usable(107.5)


def test_a_session_without_an_answer_tells_nothing_of_a_replica_that_serves_others(
    answers: Responsiveness,
) -> None:
    answers.served(103.0)
    answers.session_failed(100.0, 106.0, "no verdict within 6 s")
    assert answers.is_usable(106.0)


def test_after_a_failure_a_replica_that_answers_no_call_stays_out(answers: Responsiveness) -> None:
    answers.asked(101.0)
    answers.session_failed(100.0, 104.0, "no proposal within 3 s")
    assert answers.problem(107.0) == "no proposal within 3 s"  # though its pause is over
    answers.replied(108.0)
    for _ in range(2):  # at once: the engine as a whole is back
        assert answers.is_usable(108.0)
        answers.session_opened(108.0)


def test_one_session_at_a_time_tries_a_replica_that_has_failed(answers: Responsiveness) -> None:
    answers.session_failed(0.0, 100.0, "silent")
    assert answers.is_usable(102.0)
    answers.session_opened(102.0)
    assert not answers.is_usable(103.0)
    assert answers.is_usable(102.0 + TIMEOUT)
    answers.served(104.0)
    answers.session_opened(104.0)
    assert answers.is_usable(104.0)


def test_the_pauses_of_a_replica_that_serves_no_session_grow_to_a_minute(
    answers: Responsiveness,
) -> None:
    now, pauses = 100.0, []
    for _ in range(1100):
        answers.replied(now)
        answers.session_failed(now - 1, now, "silent")
        pause = 0.0
        while not answers.is_usable(now + pause):
            pause += 0.5
        pauses.append(pause)
        now += pause
    assert pauses[:3] == [1.0, 2.0, 4.0]
    assert pauses[-1] == max(pauses) == 64.0


def test_failures_of_many_sessions_at_once_count_as_one(answers: Responsiveness) -> None:
    for _ in range(50):
        answers.session_failed(0.0, 100.0, "silent")
    assert answers.is_usable(101.5)


def test_rollbacks_alone_may_fail(answers: Responsiveness) -> None:
    answers.served(101.0)
    answers.rollback_failed(100.0, 103.0, "no answer to a rollback")
    answers.served(103.2)
    assert answers.problem(103.5) == "no answer to a rollback"
    answers.rolled_back()
    assert answers.is_usable(103.5)


def test_a_replica_that_comes_up_again_starts_anew(answers: Responsiveness) -> None:
    answers.asked(100.0)
    answers.session_failed(100.0, 120.0, "silent")
    assert not answers.is_usable(120.0)
    answers.reset()
    assert answers.is_usable(120.0)
