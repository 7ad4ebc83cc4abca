"""The comparison of strategies: its figures, its bound, and what another draft has to reach."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amusd.performance.deployment import Branching, Deployment, MessageSeconds, StepSeconds
from amusd.performance.latency_bound import bound_seconds
from amusd.performance.planning import break_even, make_plan, pays_per_device, verdict
from amusd.policy.performance_model import zero_latency_bound_seconds

FAST = Deployment(
    StepSeconds.constant(0.005),
    StepSeconds.constant(0.05),
    (0.8,),
    MessageSeconds.by_hop(0.0005, 0.0005),
)


@given(acceptance=st.floats(0.0, 1.0), ratio=st.floats(0.02, 2.0))
def test_the_bound_of_one_acceptance_is_the_closed_form(acceptance: float, ratio: float) -> None:
    setup = Deployment(StepSeconds.constant(ratio), StepSeconds.constant(1.0), (acceptance,) * 3)
    expected = zero_latency_bound_seconds(acceptance, ratio, lambda _: 1.0)
    assert bound_seconds(setup) == pytest.approx(expected, rel=1e-3)


@given(st.lists(st.floats(0.1, 0.95), min_size=1, max_size=6))
def test_the_bound_lies_between_those_of_the_worst_and_the_best_place(places: list[float]) -> None:
    bounds = [
        bound_seconds(replace(FAST, acceptance=tuple(one)))
        for one in ([max(places)], places, [min(places)])
    ]
    assert bounds[0] <= bounds[1] * (1 + 1e-6)
    assert bounds[1] <= bounds[2] * (1 + 1e-6)


def test_a_fast_draft_pays_and_the_plan_says_how_much() -> None:
    plan = make_plan(replace(FAST, branching=Branching.of_total(0.8)), 300)
    names = ["autoregressive", "speculative", "AMUSD as published", "AMUSD", "AMUSD with branches"]
    assert [one.name for one in plan.forecasts] == names
    plain, best = plan.forecast("autoregressive"), plan.fastest
    assert best.name == "AMUSD with branches"
    assert plain.seconds_per_token == pytest.approx(0.05, rel=0.01)
    assert (plain.lookahead, plain.num_devices, plain.draft_busy) == (0, 1, 0.0)
    assert best.tokens_per_second_per_device == best.tokens_per_second / 2
    assert pays_per_device(plan)
    speedup = plain.seconds_per_token / best.seconds_per_token
    assert verdict(plan).startswith(f"Use AMUSD with branches: {speedup:.2f}x plain decoding")


def test_without_branches_there_is_no_forecast_for_them() -> None:
    plan = make_plan(FAST, 100)
    assert [one.name for one in plan.forecasts][-1] == "AMUSD"


def test_a_slow_draft_that_is_rarely_right_does_not_pay() -> None:
    plan = make_plan(replace(FAST, draft=StepSeconds.constant(0.2), acceptance=(0.1,)), 100)
    assert plan.fastest.name == "autoregressive"
    assert verdict(plan) == "Use plain decoding: no strategy with this draft is faster."


def test_more_sessions_give_more_tokens_a_second() -> None:
    one, four = (make_plan(replace(FAST, num_sessions=count), 100) for count in (1, 4))
    for name in ("autoregressive", "AMUSD"):
        found = four.forecast(name).tokens_per_second / one.forecast(name).tokens_per_second
        assert 2.0 < found < 5.0


def test_a_smaller_draft_may_be_wrong_more_often_and_a_larger_one_less() -> None:
    smaller, same, larger = (break_even(FAST, 1200, scale) for scale in (0.5, 1.0, 2.0))
    assert smaller.acceptance is not None
    assert same.acceptance is not None
    assert larger.acceptance is not None
    assert smaller.acceptance[0] < 0.8 < larger.acceptance[0]
    assert same.acceptance[0] == pytest.approx(0.8, abs=0.04)


def test_a_draft_that_is_too_slow_is_never_as_fast() -> None:
    assert break_even(FAST, 400, 20.0).acceptance is None
