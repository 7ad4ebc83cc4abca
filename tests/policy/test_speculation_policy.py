"""When the verify model starts a pass, and how long it waits for a proposal."""

import pytest

from amusd.policy.speculation_length import StepTimes
from amusd.policy.speculation_policy import Asynchronous, Lockstep, SpeculationPolicy, make_policy
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Proposal, Verdict
from amusd.protocol.strategy import Strategy

PASS_SECONDS = 0.05
STEP_SECONDS = 0.01


def proposal(draft_seconds: float = STEP_SECONDS, num_steps: int = 1) -> Proposal:
    return Proposal(0, 2, (1,), draft_seconds, num_steps)


def verdict(num_checked: int = 1, pass_seconds: float = PASS_SECONDS) -> Verdict:
    return Verdict(0, 2, num_checked, num_checked, 1, pass_seconds)


def overlapping(timeout_seconds: float = 10.0) -> Asynchronous:
    return Asynchronous(8, StepTimes(), timeout_seconds)


def experienced() -> Asynchronous:
    """It knows a draft step of 10 ms, and passes of 50 ms over any size."""
    pace = overlapping()
    for num_checked in (0, 0, 1, 8):
        pace.passed(verdict(num_checked), is_first=False)
    pace.proposed(proposal(), 0.0)
    pace.proposed(proposal(), 0.0)
    return pace


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        (Strategy.AMUSD, Asynchronous),
        (Strategy.SPECULATIVE, Lockstep),
        (Strategy.AUTOREGRESSIVE, Lockstep),
    ],
)
def test_amusd_alone_lets_draft_and_verify_overlap(
    strategy: Strategy, kind: type[SpeculationPolicy]
) -> None:
    assert isinstance(make_policy(strategy, 8, StepTimes(), 10.0), kind)


# Taking turns


def test_in_lock_step_the_drafts_turn_is_waited_for() -> None:
    pace = Lockstep(draft_timeout_seconds=10.0)
    pace.passed(verdict(), is_first=False)
    assert pace.draft_wait_seconds() == 10.0
    assert pace.start_size(0, 0.0) > 0


@pytest.mark.parametrize("num_ready", [1, 5])
def test_in_lock_step_a_pass_starts_with_whatever_is_there(num_ready: int) -> None:
    assert Lockstep(10.0).start_size(num_ready, 0.0) <= num_ready


# Patience


def test_before_the_first_pass_the_draft_gets_all_its_time() -> None:
    assert overlapping(10.0).draft_wait_seconds() == 10.0


def test_amusd_waits_as_long_as_a_pass_takes() -> None:
    pace = overlapping()
    pace.passed(verdict(pass_seconds=0.05), is_first=True)
    assert pace.draft_wait_seconds() == 0.05


def test_patience_is_never_shorter_than_a_message_takes() -> None:
    pace = overlapping()
    pace.passed(verdict(pass_seconds=0.0), is_first=True)
    assert 0.001 <= pace.draft_wait_seconds() <= 0.01


def test_patience_is_never_longer_than_the_timeout() -> None:
    pace = overlapping(timeout_seconds=0.5)
    pace.passed(verdict(pass_seconds=3.0), is_first=True)
    assert pace.draft_wait_seconds() == 0.5


# Starts


def test_a_pass_without_proposals_is_started_only_if_the_next_one_is_far_away() -> None:
    pace = experienced()
    assert pace.start_size(0, now_seconds=1.0) > 0  # the next proposal is due
    slow = experienced()
    for _ in range(100):
        slow.proposed(proposal(draft_seconds=5.0), 1.0)
    assert slow.start_size(0, now_seconds=1.0) == 0


def test_after_a_rollback_the_next_proposal_is_further_away() -> None:
    steady, rolled_back = overlapping(), overlapping()
    for pace in (steady, rolled_back):
        for num_checked in (0, 1, 8):
            pace.passed(verdict(num_checked), is_first=False)
        for _ in range(100):
            pace.proposed(proposal(draft_seconds=0.03), 0.0)
    rolled_back.rolled_back(1, 0.0)
    late = 0.03  # when a steady draft has its next proposal ready
    assert steady.start_size(0, late) > 0
    assert rolled_back.start_size(0, late) <= steady.start_size(0, late)


def test_how_long_the_draft_takes_after_a_rollback_is_learnt_messages_included() -> None:
    slow, quick = experienced(), experienced()
    for pace, seconds in ((slow, 1.0), (quick, 0.001)):
        for epoch in range(1, 20):
            pace.rolled_back(epoch, float(epoch))
            pace.proposed(Proposal(epoch - 1, 2, (1,), STEP_SECONDS, 1), epoch + 0.0001)  # stale
            pace.proposed(Proposal(epoch, 2, (1,), STEP_SECONDS, 1), epoch + seconds)
        pace.rolled_back(20, 20.0)
    assert slow.start_size(0, 20.0) == 0
    assert quick.start_size(0, 20.0) > 0


def test_the_first_proposal_and_the_first_pass_have_read_the_prompt_and_teach_nothing() -> None:
    times = StepTimes()
    pace = Asynchronous(8, times, 10.0)
    pace.proposed(proposal(draft_seconds=9.0), 0.0)
    pace.passed(verdict(pass_seconds=9.0), is_first=True)
    assert times.draft_seconds == 0.0
    assert times.pass_seconds(1) is None


def test_a_draft_that_hangs_is_not_waited_for_again_until_it_shows_that_it_lives() -> None:
    pace = experienced()
    assert pace.start_size(0, 0.0) > 0
    for _ in range(3):
        pace.draft_wait_expired()
    assert pace.start_size(0, 1.0) == 0
    assert pace.start_size(2, 1.0) == 2
    pace.proposed(proposal(), 1.0)
    assert pace.start_size(0, 1.0) > 0


# Look-ups


def test_a_look_up_says_nothing_about_the_step_time_of_the_model() -> None:
    times = StepTimes()
    pace = Asynchronous(8, times, 10.0)
    looked_up = Proposal(0, 2, (1,), 1e-5, 1, DraftSource.LOOKUP)
    for made in (looked_up, looked_up, proposal(draft_seconds=5.0), looked_up):
        pace.proposed(made, 0.0)
    assert times.draft_seconds == 0.0  # the model has read the prompt so far
    pace.proposed(proposal(), 0.0)
    assert times.draft_seconds == STEP_SECONDS
