"""Proof that the property tests can fail: parts with a rule taken out break a law.

Each altered part here ignores one thing that a rule of the core looks at. Some alterations make
output wrong, others only cost speed, which is why both are tested.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from random import Random

from amusd.protocol.errors import AmusdError
from amusd.protocol.events import Decision, Proposal, Verdict
from amusd.protocol.ledger import Ledger
from amusd.protocol.strategy import Strategy
from amusd.protocol.verify_session import VerifySession
from tests.protocol.scenario import Move, Schedule, Setup, verify_models_own
from tests.protocol.simulation import Simulation
from tests.protocol.watch import Watch

NUM_SEEDS = 400
MANY_SEEDS = 10 * NUM_SEEDS  # for what is rare; a search ends at the first


class PositionBlindLedger(Ledger):
    """Takes every verdict for one at the verified position."""

    def verdict(self, verdict: Verdict) -> Decision:
        return super().verdict(replace(verdict, position=self.verified_position))


class EpochBlindLedger(Ledger):
    """Takes every verdict for one of the present epoch."""

    def verdict(self, verdict: Verdict) -> Decision:
        return super().verdict(replace(verdict, epoch=self.epoch))


class StaleBlindLedger(Ledger):
    """Takes every proposal for one of the present epoch."""

    def proposal(self, proposal: Proposal) -> Decision:
        return super().proposal(replace(proposal, epoch=self.epoch))


class LateBlindLedger(Ledger):
    """Takes no note of proposals for positions that are final already."""

    def proposal(self, proposal: Proposal) -> Decision:
        self._draft_head = max(self._draft_head, self.verified_position)
        return super().proposal(proposal)


class EpochBlindVerifySession(VerifySession):
    """Takes every proposal for one of the present epoch."""

    def offer(self, epoch: int, position: int, tokens: tuple[int, ...]) -> None:
        super().offer(max(epoch, self._epoch), position, tokens)


class Unwatched(Watch):
    """Lets everything pass."""

    def before_proposal(self, proposal: Proposal) -> None:
        pass

    def after(self, decision: Decision) -> None:
        pass


def test_without_the_position_check_of_verdicts_output_goes_wrong() -> None:
    assert "wrong output" in outcomes(ledger=PositionBlindLedger)


def test_without_the_epoch_checks_of_both_sides_output_goes_wrong() -> None:
    found = outcomes(ledger=EpochBlindLedger, verify=EpochBlindVerifySession)
    assert "wrong output" in found


def test_without_the_epoch_check_of_the_verify_service_a_session_fails() -> None:
    assert "PreconditionError" in outcomes(verify=EpochBlindVerifySession)


def test_a_verify_service_that_ignores_epochs_changes_the_output() -> None:
    # It may accept a stale token where the ledger holds another one: verdicts count tokens only.
    assert "wrong output" in outcomes(verify=EpochBlindVerifySession)


def test_without_the_epoch_check_of_proposals_a_lawful_draft_looks_broken() -> None:
    assert "PreconditionError" in outcomes(ledger=StaleBlindLedger)


def test_without_a_look_at_late_proposals_output_stays_right_but_a_mismatch_is_missed() -> None:
    assert set(islice(outcomes(ledger=LateBlindLedger), NUM_SEEDS)) == {"right output"}
    assert "AssertionError" in outcomes(ledger=LateBlindLedger, watched=True)


def test_with_every_rule_in_place_none_of_this_happens() -> None:
    assert set(islice(outcomes(watched=True), NUM_SEEDS)) == {"right output"}


def outcomes(
    ledger: Callable[[list[int]], Ledger] = Ledger,
    verify: Callable[[list[int], int, int], VerifySession] = VerifySession,
    watched: bool = False,
) -> Iterator[str]:
    """Yield how runs with altered parts end, one for each seed."""
    for seed in range(MANY_SEEDS):
        setup = Setup(
            strategy=(Strategy.AMUSD, Strategy.SPECULATIVE)[seed % 2],
            lookahead=1 + seed % 8,
            agreement=(0.3, 0.7, 0.9)[seed % 3],
            seed=seed,
            num_repeats=10,
            impatient=True,
        )
        run = Simulation(
            setup,
            ledger(setup.prompt),
            verify(setup.prompt, setup.max_position, setup.lookahead),
        )
        if not watched:
            run.orchestrator.watch = Unwatched(run.ledger, setup.lookahead)
        yield outcome(run, Schedule(seed, uneven(seed)))


def outcome(run: Simulation, schedule: Schedule) -> str:
    try:
        run.run(schedule)
    except (AmusdError, AssertionError) as error:
        return type(error).__name__
    is_right = run.orchestrator.output == verify_models_own(run.setup)
    return "right output" if is_right else "wrong output"


def uneven(seed: int) -> dict[Move, int]:
    """Return weights that make other parts quick in each seed."""
    random = Random(seed)
    return {move: random.choice((1, 4, 16)) for move in Move}
