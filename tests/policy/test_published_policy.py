"""The policy of the AMUSD paper: when a pass starts."""

import pytest

from amusd.policy.published_policy import Published
from amusd.policy.speculation_length import StepTimes
from amusd.policy.speculation_policy import (
    AsynchronousPolicy,
    Lockstep,
    SpeculationPolicy,
    make_policy,
)
from amusd.protocol.events import Verdict
from amusd.protocol.strategy import Strategy


@pytest.mark.parametrize(("num_ready", "starts"), [(0, False), (1, False), (2, True), (5, True)])
def test_after_a_rejection_a_pass_waits_for_two_fresh_tokens(num_ready: int, starts: bool) -> None:
    policy = Published(10.0)
    policy.passed(Verdict(0, 2, 3, 1, 7), is_first=False)
    policy.rolled_back(1, now_seconds=0.0)
    assert (policy.start_size(num_ready, 0.0) <= num_ready) is starts


@pytest.mark.parametrize(("num_ready", "starts"), [(0, False), (1, True), (5, True)])
def test_without_a_rejection_a_pass_starts_with_what_is_ready(num_ready: int, starts: bool) -> None:
    policy = Published(10.0)
    policy.rolled_back(1, now_seconds=0.0)
    policy.passed(Verdict(1, 4, 2, 2, 7), is_first=False)
    assert (policy.start_size(num_ready, 0.0) <= num_ready) is starts


def test_the_draft_runs_ahead_as_far_as_it_was_opened_for() -> None:
    policy = Published(10.0)
    assert (policy.lookahead, policy.max_checked, policy.tokens_per_proposal) == (0, 0, 0)
    assert policy.draft_wait_seconds() == 10.0


@pytest.mark.parametrize(
    ("strategy", "kind"), [(Strategy.AMUSD, Published), (Strategy.SPECULATIVE, Lockstep)]
)
def test_only_the_strategy_amusd_follows_it(
    strategy: Strategy, kind: type[SpeculationPolicy]
) -> None:
    made = make_policy(strategy, 8, StepTimes(), 10.0, AsynchronousPolicy.PUBLISHED)
    assert isinstance(made, kind)
