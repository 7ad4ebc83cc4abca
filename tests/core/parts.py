"""The three parts of a session, each with the pure core that it has in its service."""

from collections import deque
from dataclasses import replace

from amusd.core.draft_session import DraftLimits, DraftSession
from amusd.core.events import NOTHING, Advance, Decision, Forward, Proposal, Rollback, Verdict
from amusd.core.finish import FinishReason
from amusd.core.ledger import Ledger
from amusd.core.strategy import Strategy, draft_plan
from amusd.core.verify_session import VerifySession
from amusd.engine.synthetic import SyntheticModel
from tests.core.scenario import VOCABULARY, Setup
from tests.core.watch import Watch


class DraftSide:
    """A draft session and its model; sends what is ready after each event, like its worker."""

    def __init__(self, setup: Setup) -> None:
        plan = draft_plan(setup.strategy, setup.lookahead)
        assert plan is not None
        end = min(setup.max_position, setup.draft_context)
        limits = DraftLimits(plan.lookahead, end, plan.tokens_per_proposal)
        self.session = DraftSession(setup.prompt, limits)
        self.sent: deque[Proposal] = deque()
        self._model = SyntheticModel(VOCABULARY, setup.seed, setup.agreement)
        self._silence = SyntheticModel(vocabulary=1000, seed=setup.seed + 1)
        self._setup = setup

    def step(self) -> None:
        drafted: list[int] = []
        while len(drafted) < self._setup.tokens_per_step and not self._is_silent(drafted):
            drafted.append(self._model.next_token([*self.session.tokens, *drafted]))
        self.session.extend(tuple(drafted))
        self._send()

    def advance(self, message: Advance) -> None:
        self.session.advance(message.epoch, message.position, message.tokens, message.lookahead)
        self._send()

    def rollback(self, message: Rollback) -> None:
        self.session.rollback(
            message.epoch, message.verified_position, message.corrected_token, message.lookahead
        )
        self._send()

    def _is_silent(self, drafted: list[int]) -> bool:
        context = [*self.session.tokens, *drafted]
        return self._silence.next_token(context) < 1000 * self._setup.silence

    def _send(self) -> None:
        while (run := self.session.take_run()) is not None:
            self.sent.append(Proposal(run.epoch, run.position, run.tokens))


class VerifySide:
    """A verify session and its model, whose passes take time: messages arrive within them."""

    def __init__(self, setup: Setup, session: VerifySession) -> None:
        self.session = session
        self.sent: deque[Verdict] = deque()
        self._model = SyntheticModel(VOCABULARY, setup.seed)
        self._max_checked = setup.max_checked or setup.lookahead
        self._context: list[int] = []
        self._checking: tuple[int, ...] | None = None

    @property
    def in_pass(self) -> bool:
        return self._checking is not None

    def offer(self, message: Forward) -> None:
        self.session.offer(message.epoch, message.position, message.tokens)

    def begin_pass(self) -> None:
        self._context = self.session.tokens_from(0)
        self._checking = self.session.begin_pass(self._max_checked)

    def end_pass(self) -> None:
        assert self._checking is not None
        contexts = [
            [*self._context, *self._checking[:length]] for length in range(len(self._checking) + 1)
        ]
        predictions = [self._model.next_token(context) for context in contexts]
        self._checking = None
        self.sent.append(self.session.end_pass(predictions, pass_seconds=0.0))


class Orchestrator:
    """What ``orchestrator.session`` does with its ledger, without its streams and waits."""

    def __init__(self, setup: Setup, ledger: Ledger) -> None:
        self.ledger = ledger
        self.watch = Watch(ledger, setup.lookahead)
        self.has_draft = setup.strategy is not Strategy.AUTOREGRESSIVE
        self.output: tuple[int, ...] = ()
        self.reason: FinishReason | None = None
        self.outgoing: deque[Advance | Rollback] = deque()
        self.forwards: deque[Forward] = deque()
        self.pass_due = True
        self._finish = setup.finish
        self._num_collected = setup.num_collected
        self._most_ahead = setup.lookahead
        self._held: Forward | None = None

    def on_verdict(self, verdict: Verdict) -> None:
        decision = self.ledger.verdict(verdict)
        self.watch.after(decision)
        if decision is not NOTHING:
            self.pass_due = self.ledger.num_speculated > 0
            if not self.has_draft and not self.pass_due:
                decision = replace(decision, forward=self.ledger.plain_pass(num_ahead=1))
        self._carry_out(decision)

    def on_proposal(self, proposal: Proposal) -> None:
        self.watch.before_proposal(proposal)
        decision = self.ledger.proposal(proposal)
        self.watch.after_proposal(decision)
        is_current = proposal.epoch == self.ledger.epoch
        is_ahead = proposal.position >= self.ledger.verified_position
        if not proposal.tokens and is_current and is_ahead and not self.pass_due:
            decision = Decision(forward=self.ledger.plain_pass())
        self._carry_out(decision)

    def on_draft_lost(self) -> None:
        self.has_draft = False
        if not self.pass_due:
            self.go_alone()

    def go_alone(self) -> None:
        self._carry_out(Decision(forward=self.ledger.plain_pass()))

    def _carry_out(self, decision: Decision) -> None:
        if self.has_draft:
            if decision.rollback is not None:
                self.outgoing.append(replace(decision.rollback, lookahead=self._lookahead()))
            if decision.advance is not None:
                self.outgoing.append(replace(decision.advance, lookahead=self._lookahead()))
        if decision.rollback is not None:
            self._held = None
        if decision.forward is not None:
            self._forward(decision.forward)
        tokens, self.reason = self._finish.cut(decision.committed, len(self.output))
        self.output += tokens

    def _lookahead(self) -> int:
        """Another one each time, but never less than is waited for; 0 leaves it as it is."""
        span = self._most_ahead - self._num_collected + 2
        lookahead = self._num_collected - 1 + self.ledger.verified_position % span
        return lookahead if lookahead >= self._num_collected else 0

    def _forward(self, forward: Forward) -> None:
        """Send proposals; while the verify model is idle, collect a few of them first."""
        is_plain = not forward.tokens
        if self._held is not None:
            forward = replace(self._held, tokens=self._held.tokens + forward.tokens)
        room = self._finish.max_tokens - len(self.output) - 1
        is_short = len(forward.tokens) < min(self._num_collected, room)
        if is_short and not is_plain and not self.pass_due:
            self._held = forward
            return
        self._held = None
        self.pass_due = True
        self.forwards.append(forward)
