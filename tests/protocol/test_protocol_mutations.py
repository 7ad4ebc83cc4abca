"""Proof that the property tests can fail: parts with a rule taken out break a law.

Each altered part here ignores one thing that a rule of the core looks at. Some alterations make
output wrong, others only cost speed, which is why both are tested.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any

import pytest

from amusd.protocol.branches import Branches
from amusd.protocol.errors import AmusdError
from amusd.protocol.events import Branch, Decision, Proposal, Verdict
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

    def offer(
        self,
        epoch: int,
        position: int,
        tokens: tuple[int, ...],
        branches: tuple[Branch, ...] = (),
        probabilities: tuple[float, ...] = (),
    ) -> None:
        super().offer(max(epoch, self._epoch), position, tokens, (), probabilities)


class MisplacedProbabilities(VerifySession):
    """Keeps the probabilities of tokens that are dropped."""

    def _reject(self, position: int) -> None:
        kept = list(self._pending_probabilities)
        super()._reject(position)
        self._pending_probabilities[:0] = kept


class ShiftedProbabilities(Ledger):
    """Gives a token the probability of the one before it."""

    def proposal(self, proposal: Proposal) -> Decision:
        known = proposal.probabilities
        return super().proposal(replace(proposal, probabilities=known[-1:] + known[:-1]))


class BranchlessVerifySession(VerifySession):
    """Takes no branch at a rejection, although the ledger does."""

    def _hold(self, branches: tuple[Branch, ...]) -> None:
        pass


class PunctualVerifySession(VerifySession):
    """Drops a branch that comes after the rejection it is for."""

    def offer(
        self,
        epoch: int,
        position: int,
        tokens: tuple[int, ...],
        branches: tuple[Branch, ...] = (),
        probabilities: tuple[float, ...] = (),
    ) -> None:
        if epoch >= self._epoch or not branches:
            super().offer(epoch, position, tokens, branches, probabilities)


class RootBlind(Branches):
    """Takes the last branch for the position of a rejection, whatever the outcome."""

    def rejected(self, position: int, token: int) -> Branch | None:
        others = [one.token for one in self.held if one.position == position]
        return super().rejected(position, others[-1] if others else token)


class RootBlindLedger(Ledger):
    """Takes branches by their position alone."""

    def __init__(self, prompt: list[int], epoch: int = 0, max_branches: int = 0) -> None:
        super().__init__(prompt, epoch, max_branches)
        self._branches = RootBlind(max_branches)


class FirstOnly(Branches):
    """Keeps a branch as it came first."""

    def takes(self, branch: Branch) -> bool:
        return not self.holds(branch) and super().takes(branch)


class BegunOnly(Branches):
    """Takes no further tokens of a branch that has begun the epoch."""

    def late(self, branches: Iterable[Branch]) -> Branch | None:
        return None if self.has_begun else super().late(branches)


def verify_session_with(kind: type[Branches]) -> type[VerifySession]:
    """A verify session with another rule for branches."""

    class Altered(VerifySession):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._branches = kind(self._branches.max_branches)

    return Altered


class HoardingLedger(Ledger):
    """Keeps the branches of an epoch that is over."""

    def _roll_back_to(self, position: int) -> Decision:
        held = self._branches.held
        decision = super()._roll_back_to(position)
        for branch in held:
            if branch.position >= self.verified_position:
                self._branches.hold(branch)
        return decision


class Unwatched(Watch):
    """Lets everything pass."""

    def before_proposal(self, proposal: Proposal) -> None:
        pass

    def after_proposal(self, decision: Decision) -> None:
        pass

    def after(self, decision: Decision) -> None:
        pass


def test_without_the_position_check_of_verdicts_output_goes_wrong() -> None:
    assert "wrong output" in outcomes(ledger=PositionBlindLedger)


def test_without_the_epoch_checks_of_both_sides_output_goes_wrong() -> None:
    found = outcomes(EpochBlindLedger, EpochBlindVerifySession, num_branches=0)
    assert "wrong output" in found


def test_without_the_epoch_check_of_the_verify_service_a_session_fails() -> None:
    assert "PreconditionError" in outcomes(verify=EpochBlindVerifySession)


def test_a_verify_service_that_ignores_epochs_changes_the_output() -> None:
    # It may accept a stale token where the ledger holds another one: verdicts count tokens only.
    # A draft that is often wrong leaves many stale tokens.
    found = outcomes(
        verify=EpochBlindVerifySession, strategy=Strategy.AMUSD, agreement=0.3, num_branches=0
    )
    assert "wrong output" in found


def test_without_the_epoch_check_of_proposals_a_lawful_draft_looks_broken() -> None:
    assert "PreconditionError" in outcomes(ledger=StaleBlindLedger)


def test_without_a_look_at_late_proposals_output_stays_right_but_a_mismatch_is_missed() -> None:
    found = outcomes(ledger=LateBlindLedger, grows_branches=False)
    assert set(islice(found, NUM_SEEDS)) == {"right output"}
    found = outcomes(ledger=LateBlindLedger, watched=True, grows_branches=False)
    assert "AssertionError" in found


def test_without_branches_at_the_verify_service_a_session_fails_or_stops() -> None:
    found = islice(outcomes(verify=BranchlessVerifySession), NUM_SEEDS)
    assert any(one in ("PreconditionError", "AssertionError", "wrong output") for one in found)


def test_without_late_branches_at_the_verify_service_a_session_fails_or_stops() -> None:
    found = outcomes(verify=PunctualVerifySession, strategy=Strategy.AMUSD, num_branches=2)
    assert any(one != "right output" for one in found)


@pytest.mark.parametrize("rule", [FirstOnly, BegunOnly])
def test_where_branches_do_not_grow_at_the_verify_service_a_session_fails_or_stops(
    rule: type[Branches],
) -> None:
    assert any(one != "right output" for one in outcomes(verify=verify_session_with(rule)))


def test_a_branch_for_another_outcome_changes_the_output() -> None:
    assert "wrong output" in outcomes(ledger=RootBlindLedger)


def test_a_branch_of_an_epoch_that_is_over_is_never_taken() -> None:
    assert any(one != "right output" for one in outcomes(ledger=HoardingLedger))


def test_where_probabilities_do_not_go_with_their_tokens_the_law_of_compared_tokens_fails() -> None:
    for found in (
        outcomes(verify=MisplacedProbabilities, has_chances=True),
        outcomes(ledger=ShiftedProbabilities, has_chances=True),
    ):
        assert "AssertionError" in found


def test_probabilities_out_of_place_never_change_the_output() -> None:
    found = outcomes(ledger=ShiftedProbabilities, has_chances=False, watched=True)
    assert set(islice(found, NUM_SEEDS)) == {"right output"}


def test_with_every_rule_in_place_none_of_this_happens() -> None:
    assert set(islice(outcomes(watched=True), NUM_SEEDS)) == {"right output"}


def outcomes(
    ledger: type[Ledger] = Ledger,
    verify: type[VerifySession] = VerifySession,
    watched: bool = False,
    **fixed: Any,
) -> Iterator[str]:
    """Yield how runs with altered parts end, one for each seed; some settings may be fixed."""
    for seed in range(MANY_SEEDS):
        setup = Setup(
            strategy=(Strategy.AMUSD, Strategy.SPECULATIVE)[seed % 2],
            lookahead=1 + seed % 8,
            agreement=(0.3, 0.7, 0.9)[seed % 3],
            seed=seed,
            num_repeats=10,
            impatient=True,
            num_branches=seed % 4,
            branch_depth=1 + seed % 3,
            grows_branches=seed % 5 < 3,
        )
        setup = replace(setup, **fixed)
        run = Simulation(
            setup,
            ledger(setup.prompt, max_branches=setup.max_branches),
            verify(
                setup.prompt,
                setup.max_position,
                setup.lookahead,
                max_branches=setup.max_branches,
            ),
        )
        if not watched:
            run.orchestrator.watch = Unwatched(run.ledger, setup.lookahead, setup.max_branches)
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
