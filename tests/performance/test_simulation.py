"""Laws of the simulation: bounds, known cases, and the order of its results."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.performance.deployment import Branching, Deployment, MessageSeconds, StepSeconds
from amusd.performance.simulation import (
    AMUSD,
    AUTOREGRESSIVE,
    BRANCHES,
    PUBLISHED,
    Method,
    simulate,
    speculative,
)
from amusd.policy.performance_model import speculative_seconds, zero_latency_bound_seconds

PASS_SECONDS = 0.05
METHODS = [
    pytest.param(AUTOREGRESSIVE, id="autoregressive"),
    pytest.param(speculative(3), id="speculative"),
    pytest.param(PUBLISHED, id="published"),
    pytest.param(AMUSD, id="amusd"),
    pytest.param(BRANCHES, id="branches"),
]


def deployment(
    acceptance: float = 0.75, ratio: float = 0.2, hop_seconds: float = 0.0
) -> Deployment:
    return Deployment(
        StepSeconds.constant(ratio * PASS_SECONDS),
        StepSeconds.constant(PASS_SECONDS),
        (acceptance,),
        MessageSeconds.by_hop(hop_seconds, hop_seconds),
        branching=Branching.of_total(0.8),
    )


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None)
@given(
    acceptance=st.floats(0.3, 0.95), ratio=st.floats(0.05, 0.8), hop_seconds=st.floats(0.0, 0.05)
)
def test_no_method_beats_the_zero_latency_bound(
    method: Method, acceptance: float, ratio: float, hop_seconds: float
) -> None:
    found = simulate(deployment(acceptance, ratio, hop_seconds), method, 300)
    bound = zero_latency_bound_seconds(acceptance, ratio * PASS_SECONDS, lambda _: PASS_SECONDS)
    # A text of 300 tokens has an acceptance of its own.
    assert found.seconds_per_token >= 0.75 * bound


@given(hop_seconds=st.floats(0.0, 1.0), pass_seconds=st.floats(1e-3, 1.0))
@settings(max_examples=20, deadline=None)
def test_autoregressive_decoding_takes_a_pass_for_each_token_and_two_verdicts(
    hop_seconds: float, pass_seconds: float
) -> None:
    """One pass is requested ahead: only the first and the last verdict are waited for."""
    setup = replace(
        deployment(),
        verify=StepSeconds.constant(pass_seconds),
        messages=MessageSeconds(verdict=hop_seconds),
    )
    found = simulate(setup, AUTOREGRESSIVE, 20)
    assert found.num_passes in (20, 21)
    least = 20 * pass_seconds + 2 * hop_seconds
    assert least <= found.seconds * (1 + 1e-9)
    if hop_seconds < 0.99 * pass_seconds:
        assert found.seconds == pytest.approx(least)


@pytest.mark.parametrize("lookahead", [1, 3, 5])
def test_speculative_decoding_agrees_with_the_closed_form(lookahead: int) -> None:
    setup = deployment(acceptance=0.7)
    found = simulate(setup, speculative(lookahead), 4000)
    expected = speculative_seconds(0.7, lookahead, 0.01, lambda _: PASS_SECONDS)
    assert found.seconds_per_token == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_draft_that_is_right_more_often_is_faster(method: Method) -> None:
    times = [
        simulate(deployment(acceptance), method, 800).seconds_per_token
        for acceptance in (0.5, 0.65, 0.8, 0.95)
    ]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("method", METHODS)
def test_longer_messages_never_help(method: Method) -> None:
    times = [
        simulate(deployment(hop_seconds=hop), method, 500).seconds_per_token
        for hop in (0.0, 0.01, 0.03)
    ]
    for shorter, longer in pairwise(times):
        assert longer >= 0.98 * shorter


def test_branches_hide_the_wait_after_a_rejection() -> None:
    setup = deployment(ratio=0.1, hop_seconds=0.01)
    without, with_branches = simulate(setup, AMUSD, 800), simulate(setup, BRANCHES, 800)
    assert with_branches.num_branch_hits > 0
    assert with_branches.seconds_per_token < 0.9 * without.seconds_per_token


def test_branches_that_are_never_right_are_never_taken() -> None:
    setup = replace(deployment(), branching=Branching.of_total(0.0))
    found = simulate(setup, BRANCHES, 300)
    assert found.num_branch_hits == 0
    assert found.seconds_per_token == pytest.approx(
        simulate(setup, AMUSD, 300).seconds_per_token, rel=0.02
    )


def test_the_published_policy_waits_for_two_fresh_tokens() -> None:
    """With a draft that is never right each token needs a pass and the wait for two steps."""
    setup = deployment(acceptance=0.0, ratio=0.2)
    found = simulate(setup, PUBLISHED, 400)
    # A step that runs at the rollback is wasted: two to three steps a token.
    assert PASS_SECONDS + 0.02 <= found.seconds_per_token <= PASS_SECONDS + 0.03


def test_sessions_share_the_passes_of_a_device() -> None:
    alone = simulate(deployment(), AUTOREGRESSIVE, 50)
    four = simulate(replace(deployment(), num_sessions=4), AUTOREGRESSIVE, 50)
    assert four.seconds == pytest.approx(alone.seconds)
    assert four.tokens_per_second == pytest.approx(4 * alone.tokens_per_second)
    assert four.seconds_per_token == pytest.approx(alone.seconds_per_token)


def test_the_same_seed_gives_the_same_run() -> None:
    assert simulate(deployment(), AMUSD, 100, seed=3) == simulate(deployment(), AMUSD, 100, seed=3)
    assert simulate(deployment(), AMUSD, 100, seed=3) != simulate(deployment(), AMUSD, 100, seed=4)
