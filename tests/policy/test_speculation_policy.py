"""When the verify model starts a pass, and how long it waits for a proposal."""

from dataclasses import replace

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


def asynchronous(timeout_seconds: float = 10.0) -> Asynchronous:
    return Asynchronous(8, StepTimes(), timeout_seconds)


def warmed_up() -> Asynchronous:
    """Return a policy that has seen draft steps of 10 ms, and passes of 50 ms at any size."""
    policy = asynchronous()
    for num_checked in (0, 0, 1, 8):
        policy.passed(verdict(num_checked), is_first=False)
    policy.proposed(proposal(), 0.0)
    policy.proposed(proposal(), 0.0)
    return policy


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        (Strategy.AMUSD, Asynchronous),
        (Strategy.SPECULATIVE, Lockstep),
        (Strategy.AUTOREGRESSIVE, Lockstep),
    ],
)
def test_only_amusd_is_asynchronous(strategy: Strategy, kind: type[SpeculationPolicy]) -> None:
    assert isinstance(make_policy(strategy, 8, StepTimes(), 10.0), kind)


@pytest.mark.parametrize("draft_stops", [False, True])
def test_if_the_draft_knows_probabilities_the_verify_service_chooses_what_a_pass_checks(
    draft_stops: bool,
) -> None:
    policy = Asynchronous(32, StepTimes(), 10.0, draft_stops)
    for num_checked in range(9):  # each row takes as long as a pass over one token
        seconds = PASS_SECONDS * (num_checked + 1)
        policy.passed(Verdict(0, 2, num_checked, num_checked // 2, 1, seconds), is_first=False)
    before = policy.lookahead
    assert policy.max_checked < before < 16
    policy.proposed(replace(proposal(), probabilities=(0.5,)), 0.0)
    assert policy.max_checked == policy.lookahead == before * (1 + draft_stops)


# Lockstep


def test_lockstep_waits_for_the_draft() -> None:
    policy = Lockstep(draft_timeout_seconds=10.0)
    policy.passed(verdict(), is_first=False)
    assert policy.draft_wait_seconds() == 10.0
    assert policy.start_size(0, 0.0) > 0


@pytest.mark.parametrize("num_ready", [1, 5])
def test_in_lockstep_a_pass_starts_with_what_is_ready(num_ready: int) -> None:
    assert Lockstep(10.0).start_size(num_ready, 0.0) <= num_ready


# Draft wait


def test_before_the_first_pass_the_draft_wait_is_the_timeout() -> None:
    assert asynchronous(10.0).draft_wait_seconds() == 10.0


def test_the_draft_wait_of_amusd_is_the_time_of_a_pass() -> None:
    policy = asynchronous()
    policy.passed(verdict(pass_seconds=0.05), is_first=True)
    assert policy.draft_wait_seconds() == 0.05


def test_the_draft_wait_has_a_minimum() -> None:
    policy = asynchronous()
    policy.passed(verdict(pass_seconds=0.0), is_first=True)
    assert 0.001 <= policy.draft_wait_seconds() <= 0.01


def test_the_draft_wait_is_never_longer_than_the_timeout() -> None:
    policy = asynchronous(timeout_seconds=0.5)
    policy.passed(verdict(pass_seconds=3.0), is_first=True)
    assert policy.draft_wait_seconds() == 0.5


# Start of a pass


def test_a_pass_without_proposals_starts_only_if_the_next_proposal_is_late() -> None:
    policy = warmed_up()
    assert policy.start_size(0, now_seconds=1.0) > 0  # the next proposal is due
    slow = warmed_up()
    for _ in range(100):
        slow.proposed(proposal(draft_seconds=5.0), 1.0)
    assert slow.start_size(0, now_seconds=1.0) == 0


def test_after_a_rollback_the_next_proposal_is_expected_later() -> None:
    steady, rolled_back = asynchronous(), asynchronous()
    for policy in (steady, rolled_back):
        for num_checked in (0, 1, 8):
            policy.passed(verdict(num_checked), is_first=False)
        for _ in range(100):
            policy.proposed(proposal(draft_seconds=0.03), 0.0)
    rolled_back.rolled_back(1, 0.0)
    late = 0.03  # when a draft without a rollback has its next proposal ready
    assert steady.start_size(0, late) > 0
    assert rolled_back.start_size(0, late) <= steady.start_size(0, late)


def test_the_time_from_a_rollback_to_the_next_proposal_is_learned() -> None:
    slow, fast = warmed_up(), warmed_up()
    for policy, seconds in ((slow, 1.0), (fast, 0.001)):
        for epoch in range(1, 20):
            policy.rolled_back(epoch, float(epoch))
            policy.proposed(Proposal(epoch - 1, 2, (1,), STEP_SECONDS, 1), epoch + 0.0001)  # stale
            policy.proposed(Proposal(epoch, 2, (1,), STEP_SECONDS, 1), epoch + seconds)
        policy.rolled_back(20, 20.0)
    assert slow.start_size(0, 20.0) == 0
    assert fast.start_size(0, 20.0) > 0


def test_first_proposal_and_first_pass_include_the_prefill_and_are_not_learned() -> None:
    times = StepTimes()
    policy = Asynchronous(8, times, 10.0)
    policy.proposed(proposal(draft_seconds=9.0), 0.0)
    policy.passed(verdict(pass_seconds=9.0), is_first=True)
    assert times.draft_seconds == 0.0
    assert times.pass_seconds(1) is None


def test_a_stuck_draft_is_not_awaited_until_its_next_proposal() -> None:
    policy = warmed_up()
    assert policy.start_size(0, 0.0) > 0
    for _ in range(3):
        policy.draft_wait_expired()
    assert policy.start_size(0, 1.0) == 0
    assert policy.start_size(2, 1.0) == 2
    policy.proposed(proposal(), 1.0)
    assert policy.start_size(0, 1.0) > 0


# N-gram lookup


def test_lookup_does_not_affect_the_step_time_of_the_model() -> None:
    times = StepTimes()
    policy = Asynchronous(8, times, 10.0)
    looked_up = Proposal(0, 2, (1,), 1e-5, 1, DraftSource.LOOKUP)
    for made in (looked_up, looked_up, proposal(draft_seconds=5.0), looked_up):
        policy.proposed(made, 0.0)
    assert times.draft_seconds == 0.0  # the model's only step so far includes the prefill
    policy.proposed(proposal(), 0.0)
    assert times.draft_seconds == STEP_SECONDS


def test_the_time_for_a_token_includes_the_work_between_steps() -> None:
    times = StepTimes()
    policy = Asynchronous(8, times, 10.0)
    now = 0.0
    for number in range(60):
        now += 1.25 * STEP_SECONDS
        policy.proposed(Proposal(0, 2 + number, (1,), STEP_SECONDS, 1), now)
    assert times.draft_seconds == pytest.approx(1.25 * STEP_SECONDS, rel=0.01)


def test_a_pause_of_the_draft_does_not_count_as_time_for_a_token() -> None:
    times = StepTimes()
    policy = Asynchronous(8, times, 10.0)
    for number in range(20):
        policy.proposed(Proposal(0, 2 + number, (1,), STEP_SECONDS, 1), float(number))
    assert times.draft_seconds == pytest.approx(STEP_SECONDS)


def test_tokens_are_collected_up_to_the_lookahead_if_they_arrive_well_within_a_pass() -> None:
    quick, slow = warmed_up(), warmed_up()
    for policy, seconds in ((quick, 0.1 * STEP_SECONDS), (slow, 100 * STEP_SECONDS)):
        for epoch in range(1, 30):
            policy.rolled_back(epoch, float(epoch))
            policy.proposed(Proposal(epoch, 2, (1,), STEP_SECONDS, 1), epoch + seconds)
            policy.passed(verdict(pass_seconds=40 * STEP_SECONDS), is_first=False)
    assert quick.tokens_per_proposal == quick.lookahead > 1
    assert slow.tokens_per_proposal < slow.lookahead
