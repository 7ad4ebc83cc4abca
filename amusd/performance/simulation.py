"""Runs a deployment in simulated time: the real session logic between two clocked devices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from amusd.performance.agreement import RIGHT, Agreement, RandomAgreement
from amusd.performance.clocked_draft import DraftDevice, DraftSide
from amusd.performance.clocked_session import ClockedSession
from amusd.performance.clocked_verify import PassRules, VerifyDevice, VerifySide
from amusd.performance.deployment import Deployment
from amusd.performance.event_queue import EventQueue
from amusd.performance.prepared_branches import PreparedBranches
from amusd.policy.speculation_length import StepTimes
from amusd.policy.speculation_policy import (
    AsynchronousPolicy,
    SpeculationPolicy,
    make_policy,
)
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.finish import FinishRule
from amusd.protocol.ledger import Ledger
from amusd.protocol.session_controller import SessionController
from amusd.protocol.strategy import Strategy, draft_plan
from amusd.protocol.verify_session import VerifySession

SERVICE_LOOKAHEAD = 64
"""Most proposals of a session that may wait, as the services have it by default."""
SERVICE_BRANCHES = 128
"""Most branches of a session, as the services have it by default."""
_DRAFT_TIMEOUT_SECONDS = 1e6  # a simulated draft is never lost
_ADAPTIVE_LOOKAHEAD = 32
_PROMPT = (RIGHT,)


@dataclass(frozen=True, slots=True)
class Method:
    """How a simulated deployment decodes.

    ``own_policy`` makes a policy that this project does not serve, and ``own_rules`` are those of
    another system's passes.
    """

    strategy: Strategy
    lookahead: int = 0
    policy: AsynchronousPolicy = AsynchronousPolicy.ADAPTIVE
    has_branches: bool = False
    own_policy: Callable[[], SpeculationPolicy] | None = None
    own_rules: PassRules | None = None

    def __post_init__(self) -> None:
        """Refuse a look-ahead beyond what the services take.

        Raises:
            InvalidInputError: the look-ahead is out of range.
        """
        if not 0 <= self.lookahead <= SERVICE_LOOKAHEAD:
            raise InvalidInputError(
                f"lookahead is {self.lookahead}: use up to {SERVICE_LOOKAHEAD}; 0: the default"
            )

    def make_policy(self, times: StepTimes) -> SpeculationPolicy:
        """Return a policy for one session."""
        if self.own_policy is not None:
            return self.own_policy()
        return make_policy(
            self.strategy, self.max_lookahead, times, _DRAFT_TIMEOUT_SECONDS, self.policy
        )

    @property
    def max_lookahead(self) -> int:
        """How far the draft runs ahead at most, in tokens."""
        is_published = self.policy is AsynchronousPolicy.PUBLISHED
        default = SERVICE_LOOKAHEAD if is_published else _ADAPTIVE_LOOKAHEAD
        return self.lookahead or default


AUTOREGRESSIVE = Method(Strategy.AUTOREGRESSIVE)
AMUSD = Method(Strategy.AMUSD)
PUBLISHED = Method(Strategy.AMUSD, policy=AsynchronousPolicy.PUBLISHED)
BRANCHES = Method(Strategy.AMUSD, has_branches=True)


def speculative(lookahead: int) -> Method:
    """Return drafting ``lookahead`` tokens and verifying them in turn."""
    return Method(Strategy.SPECULATIVE, lookahead)


@dataclass(frozen=True, slots=True)
class Run:
    """What a simulated run took. Counts are those of all sessions."""

    seconds: float
    num_tokens: int
    num_sessions: int
    num_passes: int
    num_rollbacks: int
    num_branch_hits: int
    num_messages: int
    draft_busy_seconds: float
    verify_busy_seconds: float

    @property
    def seconds_per_token(self) -> float:
        """Time between two tokens of one session."""
        return self.seconds * self.num_sessions / self.num_tokens

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sessions."""
        return self.num_tokens / self.seconds


class Simulation:
    """All sessions of a deployment, which start together."""

    def __init__(
        self,
        deployment: Deployment,
        method: Method,
        num_tokens: int,
        agreements: list[Agreement],
    ) -> None:
        """Decode ``num_tokens`` in a session for each of ``agreements``."""
        self._deployment = deployment
        self._method = method
        self._num_tokens = num_tokens
        self._queue = EventQueue()
        self._times = StepTimes()
        self._verify = VerifyDevice(self._queue, deployment.verify)
        self._draft = DraftDevice(self._queue, deployment.draft)
        self._num_open = 0
        self._ended_seconds = 0.0
        self._sessions = [self._open(agreement) for agreement in agreements]

    def run(self) -> Run:
        """Decode until the last session ends."""
        self._verify.go_on()
        self._draft.go_on()
        while self._num_open and self._queue.step():
            pass
        assert not self._num_open, "a simulated session has stopped"
        ledgers = [session.controller.ledger for session in self._sessions]
        counts = [session.counts for session in self._sessions]
        return Run(
            seconds=self._ended_seconds,
            num_tokens=self._num_tokens * len(self._sessions),
            num_sessions=len(self._sessions),
            num_passes=self._verify.num_batches,
            num_rollbacks=sum(ledger.counts.rollbacks for ledger in ledgers),
            num_branch_hits=sum(ledger.counts.branch_hits for ledger in ledgers),
            num_messages=sum(
                one.verdicts + one.forwards + one.proposals + one.rollbacks + one.advances
                for one in counts
            ),
            draft_busy_seconds=self._draft.busy_seconds,
            verify_busy_seconds=self._verify.busy_seconds,
        )

    def _open(self, agreement: Agreement) -> ClockedSession:
        method = self._method
        plan = draft_plan(method.strategy, method.max_lookahead)
        max_branches = SERVICE_BRANCHES if method.has_branches else 0
        controller = SessionController(
            Ledger(list(_PROMPT), max_branches=max_branches),
            method.make_policy(self._times),
            FinishRule(self._num_tokens, frozenset()),
            has_draft=plan is not None,
        )
        end = len(_PROMPT) + self._num_tokens
        verify = VerifySession(list(_PROMPT), end, SERVICE_LOOKAHEAD, max_branches=max_branches)
        session = ClockedSession(
            self._queue, self._deployment.messages, controller, lambda: self._close(sides)
        )
        verify_side = VerifySide(
            verify, end, SERVICE_LOOKAHEAD, session.send_verdict, method.own_rules
        )
        draft_side: DraftSide | None = None
        if plan is not None:
            limits = DraftLimits(plan.lookahead, end, plan.tokens_per_proposal, max_branches)
            draft_side = self._draft_side(DraftSession(list(_PROMPT), limits), agreement, session)
        sides = (verify_side, draft_side)
        session.attach(
            (self._verify, verify_side),
            None if draft_side is None else (self._draft, draft_side),
        )
        self._verify.sides.append(verify_side)
        self._num_open += 1
        return session

    def _draft_side(
        self, draft: DraftSession, agreement: Agreement, session: ClockedSession
    ) -> DraftSide:
        branches = None
        if self._method.has_branches and self._deployment.branching is not None:
            branches = PreparedBranches(self._deployment, draft, agreement)
        side = DraftSide(draft, agreement, branches, session.send_proposal)
        self._draft.sides.append(side)
        return side

    def _close(self, sides: tuple[VerifySide, DraftSide | None]) -> None:
        """Free the places of a session in the batches."""
        verify, draft = sides
        self._num_open -= 1
        self._ended_seconds = self._queue.now_seconds
        self._verify.receive(partial(self._verify.sides.remove, verify))
        if draft is not None:
            self._draft.receive(partial(self._draft.sides.remove, draft))


def simulate(deployment: Deployment, method: Method, num_tokens: int = 2000, seed: int = 0) -> Run:
    """Return what ``num_tokens`` of each session take; ``seed`` chooses the text."""
    agreements: list[Agreement] = [
        RandomAgreement(deployment, num_tokens + SERVICE_LOOKAHEAD, 1000 * seed + number)
        for number in range(deployment.num_sessions)
    ]
    return Simulation(deployment, method, num_tokens, agreements).run()
