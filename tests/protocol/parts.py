"""The three parts of a session, each with the pure core that it has in its service."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import starmap

from amusd.engine.synthetic import SyntheticModel
from amusd.policy.speculation_length import StepTimes
from amusd.policy.speculation_switch import SpeculationSwitch, SwitchMember
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_probabilities import trimmed
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Advance, Branch, Decision, Forward, Proposal, Rollback, Verdict
from amusd.protocol.finish import FinishReason
from amusd.protocol.ledger import Ledger
from amusd.protocol.session_controller import SessionController
from amusd.protocol.strategy import Strategy, draft_plan
from amusd.protocol.verify_session import VerifySession
from tests.protocol.scenario import VOCABULARY, Setup
from tests.protocol.watch import Watch


class DraftSide:
    """A draft session and its model; sends what is ready after each event, like its worker."""

    def __init__(self, setup: Setup) -> None:
        plan = draft_plan(setup.strategy, setup.lookahead)
        assert plan is not None
        end = min(setup.max_position, setup.draft_context)
        limits = DraftLimits(
            plan.lookahead,
            end,
            plan.tokens_per_proposal,
            max_branches=6,
            min_use_probability=setup.min_use,
        )
        self.session = DraftSession(setup.prompt, limits)
        self.sent: deque[Proposal] = deque()
        self._growing: deque[tuple[Branch, int]] = deque()  # with the tokens that were sent of it
        self._model = SyntheticModel(VOCABULARY, setup.seed, setup.agreement)
        self._silence = SyntheticModel(vocabulary=1000, seed=setup.seed + 1)
        self._setup = setup

    def step(self) -> None:
        source = self._source()
        if source is None:
            self.session.extend((), DraftSource.LOOKUP)
        else:
            self._draft(source)
        self._send()

    def _source(self) -> DraftSource | None:
        """What writes next; None: nothing that may."""
        if not self._setup.mixes_sources:
            return DraftSource.MODEL
        allowed = [source for source in DraftSource if source in self.session.sources]
        return allowed[self.session.length % len(allowed)] if allowed else None

    def _draft(self, source: DraftSource) -> None:
        drafted: list[int] = []
        while len(drafted) < self._setup.tokens_per_step and not self._is_silent(drafted):
            drafted.append(self._model.next_token([*self.session.tokens, *drafted]))
        start = self.session.length
        self.session.extend(tuple(drafted), source, self._probabilities(start, drafted))
        for position in range(start, self.session.length):
            self._branch(position)

    def _probabilities(self, position: int, tokens: Sequence[int]) -> tuple[float, ...]:
        return trimmed(starmap(self._setup.probability_of, enumerate(tokens, position)))

    def _branch(self, position: int) -> None:
        """Hang branches on a token, one for the token that is right if this one is wrong."""
        before, own = self.session.tokens[:position], self.session.tokens[position]
        end = min(self._setup.max_position, self._setup.draft_context)
        depth = min(self._setup.branch_depth, self._setup.lookahead, end - position - 1)
        if depth < 1:
            return
        for index in range(self._setup.num_branches):
            other = (own - 1 + 2 * index) % VOCABULARY
            if other == own:
                continue
            tokens: list[int] = []
            while len(tokens) < depth:
                tokens.append(self._model.next_token([*before, other, *tokens]))
            known = self._probabilities(position + 1, tokens)
            branch = Branch(position, other, tuple(tokens), probabilities=known)
            if self._setup.grows_branches:
                self._growing.append((branch, 0))
                self.grow()
            else:
                self.session.branch(branch)

    @property
    def can_grow(self) -> bool:
        return bool(self._growing)

    def grow(self) -> None:
        """Give a branch its next token."""
        branch, num_sent = self._growing.popleft()
        tokens, known = branch.tokens[: num_sent + 1], branch.probabilities[: num_sent + 1]
        self.session.branch(replace(branch, tokens=tokens, probabilities=known))
        if num_sent + 1 < len(branch.tokens):
            self._growing.append((branch, num_sent + 1))
        self._send()

    def advance(self, message: Advance) -> None:
        self.session.advance(
            message.epoch,
            message.position,
            message.tokens,
            message.lookahead,
            message.tokens_per_proposal,
        )
        self._send()

    def rollback(self, message: Rollback) -> None:
        self._growing.clear()
        self.session.rollback(
            message.epoch,
            message.verified_position,
            message.corrected_token,
            message.lookahead,
            message.tokens_per_proposal,
            message.first_proposal,
            message.branch_tokens,
        )
        self._send()

    def _is_silent(self, drafted: list[int]) -> bool:
        context = [*self.session.tokens, *drafted]
        return self._silence.next_token(context) < 1000 * self._setup.silence

    def _send(self) -> None:
        while (run := self.session.take_run()) is not None:
            proposal = Proposal(
                run.epoch,
                run.position,
                run.tokens,
                source=run.source,
                branches=run.branches,
                probabilities=run.probabilities,
            )
            self.sent.append(proposal)


class VerifySide:
    """A verify session and its model, whose passes take time: messages arrive within them."""

    def __init__(self, setup: Setup, session: VerifySession) -> None:
        self.session = session
        self.sent: deque[Verdict] = deque()
        self._model = SyntheticModel(VOCABULARY, setup.seed)
        self._setup = setup
        self._max_checked = setup.max_checked or setup.lookahead
        self._context: list[int] = []
        self._checking: tuple[int, ...] | None = None
        self.last_rejection: tuple[Branch | None, tuple[int, ...]] | None = None
        """The branch held for the rejection of the last pass, and what waits after it."""

    @property
    def in_pass(self) -> bool:
        return self._checking is not None

    def offer(self, message: Forward) -> None:
        self.session.offer(
            message.epoch,
            message.position,
            message.tokens,
            message.branches,
            message.probabilities,
        )

    def begin_pass(self) -> None:
        self._context = list(self.session.tokens)
        self._checking = self.session.begin_pass(self._max_checked)

    def end_pass(self) -> None:
        assert self._checking is not None
        contexts = [
            [*self._context, *self._checking[:length]] for length in range(len(self._checking) + 1)
        ]
        predictions = [self._model.next_token(context) for context in contexts]
        proposals = (*self._checking, *self.session.pending)
        self._checking = None
        epoch, held = self.session.epoch, {one.root: one for one in self.session.branches}
        self.sent.append(self.session.end_pass(predictions, pass_seconds=0.0))
        self._check_compared(proposals)
        self.last_rejection = None
        if self.session.epoch > epoch:
            root = (self.session.verified_position - 1, self.session.tokens[-1])
            self.last_rejection = held.get(root), self.session.pending

    def _check_compared(self, proposals: Sequence[int]) -> None:
        """Each compared token has the probability that the draft stated, and its outcome."""
        position, final = len(self._context), self.session.tokens
        for index, one in enumerate(self.session.compared):
            token = proposals[index]
            assert one.probability == self._setup.probability_of(position + index, token)
            assert one.is_right == (final[position + index] == token)


class DialledPolicy:
    """Holds proposals back, and lets the draft run ahead, as the setup says."""

    def __init__(self, setup: Setup, ledger: Ledger) -> None:
        self.max_checked = setup.max_checked
        self._num_collected = setup.num_collected
        self._most_ahead = setup.lookahead
        self._collects = setup.collects and setup.strategy is not Strategy.SPECULATIVE
        self._ledger = ledger

    @property
    def lookahead(self) -> int:
        """Another one each time, but never less than is waited for; 0 leaves it as it is."""
        span = self._most_ahead - self._num_collected + 2
        lookahead = self._num_collected - 1 + self._ledger.verified_position % span
        return lookahead if lookahead >= self._num_collected else 0

    @property
    def tokens_per_proposal(self) -> int:
        """Another one each time, 0 to 3; 0 leaves it as it is."""
        return self._ledger.verified_position % 4 if self._collects else 0

    def first_proposal(self, now_seconds: float) -> int:
        return self._ledger.epoch % 3 if self._collects else 0

    def start_size(self, num_ready: int, now_seconds: float) -> int:
        return self._num_collected

    def draft_wait_seconds(self) -> float:
        return 0.0

    def draft_wait_expired(self) -> None:
        pass

    def proposed(self, proposal: Proposal, now_seconds: float) -> None:
        pass

    def rolled_back(self, epoch: int, now_seconds: float) -> None:
        pass

    def passed(self, verdict: Verdict, is_first: bool) -> None:
        pass


class DialledMember(SwitchMember):
    """Switches speculation off and on as the setup says."""

    def __init__(self, setup: Setup, ledger: Ledger) -> None:
        super().__init__(SpeculationSwitch(StepTimes()))
        self._setup = setup
        self._ledger = ledger

    @property
    def speculates(self) -> bool:
        rest = self._setup.rest
        return not rest or self._ledger.verified_position // rest % 2 == 0

    @property
    def is_alone(self) -> bool:
        return not self._setup.is_shared


class Orchestrator:
    """A session's controller, without its streams and waits."""

    def __init__(self, setup: Setup, ledger: Ledger) -> None:
        has_draft = setup.strategy is not Strategy.AUTOREGRESSIVE
        self.ledger = ledger
        self.watch = Watch(ledger, setup.lookahead, setup.max_branches)
        self.has_draft = has_draft
        self.output: tuple[int, ...] = ()
        self.outgoing: deque[Advance | Rollback] = deque()
        self.forwards: deque[Forward] = deque()
        self._controller = SessionController(
            ledger, DialledPolicy(setup, ledger), setup.finish, has_draft, setup.min_use
        )
        # While the draft rests, it gets no messages, so the laws of the watch do not hold.
        self._is_watched = not setup.rest
        if setup.rest or setup.is_shared:
            self._controller.join(DialledMember(setup, ledger))

    @property
    def pass_due(self) -> bool:
        return self._controller.pass_due

    @property
    def reason(self) -> FinishReason | None:
        return self._controller.finish_reason

    def on_verdict(self, verdict: Verdict) -> None:
        decision = self._controller.on_verdict(verdict, 0.0)
        if self.has_draft and self._is_watched:
            self.watch.after(decision)
        elif self._is_watched:
            self.watch.after_loss()
        self._carry_out(decision)

    def on_proposal(self, proposal: Proposal) -> None:
        self.watch.before_proposal(proposal)
        decision = self._controller.on_proposal(proposal, 0.0)
        if self.has_draft and self._is_watched:
            self.watch.after_proposal(decision)
        else:
            self.watch.after_lost_proposal()
        self._carry_out(decision)

    def on_draft_lost(self) -> None:
        self.has_draft = False
        self._carry_out(self._controller.on_draft_lost())

    def on_verify_moved(self) -> None:
        self._carry_out(self._controller.on_verify_moved())

    def go_alone(self) -> None:
        self._carry_out(self._controller.on_draft_wait_over())

    def _carry_out(self, decision: Decision) -> None:
        for message in (decision.rollback, decision.advance):
            if message is not None:
                self.outgoing.append(message)
        if decision.forward is not None:
            self.forwards.append(decision.forward)
        self.output += decision.committed
