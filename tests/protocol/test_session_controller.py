"""What the controller says of a silent draft, and of the pass after a move."""

import pytest

from amusd.policy.speculation_length import StepTimes
from amusd.policy.speculation_policy import make_policy
from amusd.protocol.events import Decision, Proposal, Verdict
from amusd.protocol.finish import FinishRule
from amusd.protocol.ledger import Ledger
from amusd.protocol.session_controller import SessionController
from amusd.protocol.strategy import Strategy
from tests.protocol.parts import DialledPolicy
from tests.protocol.scenario import Setup

PASS_SECONDS = 0.05
TOKEN = 7


class Run:
    """A controller whose draft is never right nor wrong by chance: all tokens are equal."""

    def __init__(self, strategy: Strategy = Strategy.SPECULATIVE) -> None:
        self.times = StepTimes()
        self.ledger = Ledger([1, 2])
        self.controller = SessionController(
            self.ledger,
            make_policy(strategy, 4, self.times, 10.0),
            FinishRule(100, frozenset()),
            has_draft=strategy is not Strategy.AUTOREGRESSIVE,
        )

    def passed(self, now: float, num_accepted: int = 0) -> None:
        position = self.ledger.verified_position
        verdict = Verdict(
            self.ledger.epoch, position, num_accepted, num_accepted, TOKEN, PASS_SECONDS
        )
        self.controller.on_verdict(verdict, now)

    def proposed(self, now: float, num_tokens: int, epoch: int | None = None) -> None:
        epoch = self.ledger.epoch if epoch is None else epoch
        position = self.ledger.verified_position
        self.controller.on_proposal(Proposal(epoch, position, (TOKEN,) * num_tokens), now)

    def silence(self, now: float) -> float:
        return self.controller.draft_silence_seconds(now)


def test_held_proposals_keep_the_probability_of_each_token() -> None:
    ledger = Ledger([1, 2])
    policy = DialledPolicy(Setup(num_collected=3), ledger)
    controller = SessionController(ledger, policy, FinishRule(100, frozenset()), has_draft=True)
    controller.on_verdict(Verdict(0, 2, 0, 0, TOKEN), 0.0)
    assert controller.on_proposal(Proposal(0, 3, (TOKEN,)), 0.0) == Decision()
    rest = Proposal(0, 4, (TOKEN, TOKEN), probabilities=(0.5, 0.25))
    forward = controller.on_proposal(rest, 0.0).forward
    assert forward is not None
    assert forward.tokens == (TOKEN,) * 3
    assert forward.probabilities == (0.0, 0.5, 0.25)


def test_nothing_is_awaited_from_a_draft_that_has_stopped() -> None:
    ledger = Ledger([1, 2])
    policy = DialledPolicy(Setup(num_collected=4), ledger)
    finish = FinishRule(100, frozenset())
    controller = SessionController(ledger, policy, finish, has_draft=True, min_use_probability=0.2)
    controller.on_verdict(Verdict(0, 2, 0, 0, TOKEN), 0.0)
    first = Proposal(0, 3, (TOKEN,), probabilities=(0.5,))
    assert controller.on_proposal(first, 0.0) == Decision()
    last = Proposal(0, 4, (TOKEN,), probabilities=(0.3,))
    forward = controller.on_proposal(last, 0.0).forward
    assert forward is not None
    assert forward.tokens == (TOKEN, TOKEN)


def test_a_draft_is_silent_from_the_verdict_on_that_needs_its_proposal() -> None:
    run = Run()
    assert run.silence(5.0) == 0.0  # the prompt is computed
    run.passed(6.0)
    assert run.silence(8.0) == 2.0


def test_a_proposal_ends_the_silence_however_long_its_pass_takes() -> None:
    run = Run()
    run.passed(6.0)
    run.proposed(7.0, num_tokens=2)
    assert run.silence(100.0) == 0.0
    run.passed(100.0, num_accepted=2)
    assert run.silence(101.0) == 1.0


def test_a_draft_that_says_it_has_nothing_is_not_silent() -> None:
    run = Run()
    run.passed(6.0)
    run.proposed(7.0, num_tokens=0)
    assert run.silence(100.0) == 0.0


@pytest.mark.parametrize("strategy", [Strategy.SPECULATIVE, Strategy.AMUSD])
def test_passes_without_the_draft_do_not_end_its_silence(strategy: Strategy) -> None:
    run = Run(strategy)
    run.passed(6.0)
    for second in range(7, 12):
        if not run.controller.pass_due:
            run.controller.on_draft_wait_over()
        run.passed(float(second))
    assert run.silence(12.0) == 6.0
    assert run.controller.num_unaided_passes == 5
    run.proposed(12.0, num_tokens=1)
    assert run.controller.num_unaided_passes == 0


def test_another_draft_gets_its_own_time() -> None:
    run = Run()
    run.passed(6.0)
    run.controller.on_draft_moved(9.0)
    assert run.silence(10.0) == 1.0
    run.controller.on_draft_lost()
    assert run.silence(100.0) == 0.0


def test_without_a_draft_there_is_no_silence() -> None:
    run = Run(Strategy.AUTOREGRESSIVE)
    run.passed(6.0)
    assert run.silence(100.0) == 0.0


def test_the_first_pass_on_another_verify_service_is_not_learned_as_a_pass_time() -> None:
    run = Run(Strategy.AMUSD)
    run.passed(1.0)
    assert run.times.pass_seconds(1) is None
    run.controller.on_verify_moved()
    run.passed(2.0)
    assert run.times.pass_seconds(1) is None
    run.passed(3.0)
    assert run.times.pass_seconds(1) is not None
