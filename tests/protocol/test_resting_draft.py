"""Laws of a session whose draft rests now and then, and of one that asks for passes ahead."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.protocol.finish import FinishReason
from amusd.protocol.strategy import Strategy
from tests.protocol.scenario import Schedule, Setup, verify_models_own
from tests.protocol.simulation import Simulation
from tests.protocol.test_protocol_properties import mishaps, schedules, setups

laws = settings(max_examples=250, deadline=None)
rests = st.integers(1, 7)


@given(mishaps(), schedules(), st.integers(0, 7), st.booleans())
@laws
def test_rests_and_passes_asked_for_ahead_change_no_token(
    setup: Setup, schedule: Schedule, rest: int, is_shared: bool
) -> None:
    run = Simulation(replace(setup, rest=rest, is_shared=is_shared)).run(schedule)
    assert run.orchestrator.output == verify_models_own(setup)


@given(setups(), schedules(), rests, st.booleans())
@laws
def test_a_session_goes_on_by_itself_whenever_its_draft_rests(
    setup: Setup, schedule: Schedule, rest: int, is_shared: bool
) -> None:
    # The draft never breaks the protocol: no message to it is refused, and none of its own is.
    run = Simulation(replace(setup, rest=rest, is_shared=is_shared)).run(schedule)
    assert run.orchestrator.reason is FinishReason.LENGTH


@given(setups(), schedules(), st.booleans())
@laws
def test_a_draft_that_rests_gets_no_message(
    setup: Setup, schedule: Schedule, is_shared: bool
) -> None:
    setup = replace(setup, rest=6, num_prompt=6, is_shared=is_shared)  # off from the first token on
    run = Simulation(setup)
    for _ in run.steps(schedule):
        if run.ledger.verified_position < 12:
            assert not run.orchestrator.outgoing


def test_a_draft_speculates_again_after_its_rest() -> None:
    accepted = [
        Simulation(Setup(Strategy.AMUSD, agreement=1.0, max_tokens=60, seed=seed, rest=7))
        .run(Schedule(seed))
        .ledger.counts.accepted
        for seed in range(10)
    ]
    assert sum(accepted) > 100, accepted


def test_a_session_that_shares_its_device_is_always_due() -> None:
    for seed in range(20):
        run = Simulation(Setup(Strategy.AMUSD, max_tokens=40, seed=seed, is_shared=True))
        for _ in run.steps(Schedule(seed)):
            assert run.orchestrator.pass_due
