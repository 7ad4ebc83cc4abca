"""One generation: receive, decide, dispatch. The controller decides; this carries it out.

Events of both links are taken one by one on the event loop, and a decision is carried out in the
order that latency asks for: forward and rollback leave first, then tokens go to the client's
outbox. Nothing here waits: links and outbox are bounded queues with writers of their own.

The session owns its links and its timer, and ends them all. A replica that refuses the session
before it has answered is replaced by another one of its pool, opened from the ledger, which holds
all there is to know about a session.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from amusd.analysis.generation_statistics import Statistics, StatisticsRecorder
from amusd.analysis.timeline import Timeline, TimelineRecorder
from amusd.observe.observer import RequestWatch
from amusd.policy.speculation_policy import make_policy
from amusd.protocol.errors import (
    AmusdError,
    PreconditionError,
    StatusLostError,
    UnavailableError,
)
from amusd.protocol.events import NOTHING, Decision, Proposal, Verdict
from amusd.protocol.finish import FinishReason, FinishRule
from amusd.protocol.ledger import Ledger
from amusd.protocol.session_controller import SessionController
from amusd.protocol.strategy import Strategy, draft_plan
from amusd.rpc import faults
from orchestrator.backends import Backends
from orchestrator.links import DraftLink, Event, LinkLost, Role, SessionOpening, VerifyLink

_MAX_REFUSALS = 4  # of replicas of one role, before a session gives that role up

Emit = Callable[[tuple[int, ...]], None]
"""Takes final tokens of the output, at once."""


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """What to generate and how: a request that has been checked."""

    session_id: str
    tokens: tuple[int, ...]
    strategy: Strategy
    lookahead: int
    finish: FinishRule
    verify_timeout_seconds: float
    draft_timeout_seconds: float
    records_timeline: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a generation ended, and what it took."""

    reason: FinishReason
    statistics: Statistics
    timeline: Timeline | None = None


class Session:
    """Decodes one request; ``run`` is called once."""

    def __init__(
        self, backends: Backends, plan: SessionPlan, emit: Emit, watch: RequestWatch
    ) -> None:
        """Decode ``plan`` on ``backends``; final tokens go to ``emit`` as they come.

        ``watch`` records what happens.
        """
        self._watch = watch
        self._backends = backends
        self._plan = plan
        self._emit = emit
        self._ledger = Ledger(list(plan.tokens))
        self._drafting = draft_plan(plan.strategy, plan.lookahead)
        self._controller = SessionController(
            self._ledger,
            make_policy(
                plan.strategy, plan.lookahead, backends.step_times, plan.draft_timeout_seconds
            ),
            plan.finish,
            has_draft=self._drafting is not None,
        )
        self._recorder = StatisticsRecorder(time.monotonic())
        self._timeline = TimelineRecorder(time.time_ns()) if plan.records_timeline else None
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[FinishReason] = self._loop.create_future()
        self._timer = _Timer(self._loop, self._on_timeout)
        self._links: list[VerifyLink | DraftLink] = []  # all that were opened
        self._draft: DraftLink | None = None
        self._verify: VerifyLink | None = None
        self._refused: dict[Role, set[str]] = {"verify": set(), "draft": set()}
        self._num_refusals: Counter[Role] = Counter()

    async def run(self) -> Outcome:
        """Generate until the output is over.

        Raises:
            AmusdError: the verify service is lost or refuses. The draft's loss only slows down.
        """
        try:
            self._open()
            reason = await self._ended
        finally:
            await self._close()
            statistics = self._summary()
            self._watch.decoded(statistics)
        timeline = self._timeline.timeline() if self._timeline is not None else None
        return Outcome(reason, statistics, timeline)

    def _take(self, event: Event) -> None:
        """Take an event of a link: the hot path of a generation."""
        if self._ended.done():
            return
        try:
            decision = self._decide(event)
            if self._timeline is not None:
                self._timeline.decided(event, decision, time.time_ns())
            self._carry_out(decision)
        except Exception as error:  # of whatever kind: it ends this session, and no other
            self._ended.set_exception(error)
            return
        self._after_event()

    def _decide(self, event: Event) -> Decision:
        match event:
            case Verdict():
                return self._on_verdict(event)
            case Proposal():
                return self._on_proposal(event)
            case LinkLost(role="draft"):
                return self._on_draft_lost(event)
            case LinkLost():
                return self._on_verify_lost(event)

    def _carry_out(self, decision: Decision) -> None:
        # A forward is first: the verify model may be idle, the draft works in any case.
        if decision.forward is not None and self._verify is not None:
            self._verify.send(decision.forward)
        if self._draft is not None:
            for message in (decision.rollback, decision.advance):
                if message is not None:
                    self._draft.send(message)
        if decision.rollback is not None:
            self._watch.rolled_back(decision.rollback)
        if decision.committed:
            self._recorder.tokens(time.monotonic())
            self._emit(decision.committed)

    def _after_event(self) -> None:
        """End the session if its output is over, else bound the wait for the next event."""
        if self._ended.done():
            return
        reason = self._controller.finish_reason
        if reason is not None:
            self._ended.set_result(reason)
        elif self._controller.pass_due:
            self._timer.expect_within(self._plan.verify_timeout_seconds)
        else:
            self._timer.expect_within(self._controller.draft_wait_seconds())

    def _on_timeout(self) -> None:
        """Fail if a verdict is late; if a proposal is, let the verify model go on alone."""
        if self._ended.done():
            return
        if self._controller.pass_due:
            seconds = self._plan.verify_timeout_seconds
            self._ended.set_exception(
                UnavailableError(
                    f"verify service: no verdict within {seconds:.0f} s; is it overloaded?"
                )
            )
            return
        decision = self._controller.on_draft_wait_over()
        if self._timeline is not None:
            self._timeline.decided(None, decision, time.time_ns())
        self._carry_out(decision)
        self._after_event()

    def _on_verdict(self, verdict: Verdict) -> Decision:
        try:
            decision = self._controller.on_verdict(verdict, time.monotonic())
        except PreconditionError as error:
            raise UnavailableError(f"verify service: {error}") from error
        if decision is not NOTHING:
            self._recorder.verdict(verdict, len(decision.committed))
        return decision

    def _on_proposal(self, proposal: Proposal) -> Decision:
        self._recorder.proposal(proposal)
        try:
            self._backends.verify_model.check_tokens(proposal.tokens)
            return self._controller.on_proposal(proposal, time.monotonic())
        except AmusdError as error:
            # A draft that breaks the rules is as good as none; the output stays the same.
            return self._lose_draft(error)

    def _on_verify_lost(self, event: LinkLost) -> Decision:
        """Open the session elsewhere if no token has come yet.

        Raises:
            AmusdError: one has, or the session is refused for good.
        """
        if self._verify is None or event.link is not self._verify:
            return NOTHING
        has_token = self._ledger.verified_position > self._ledger.num_prompt_tokens
        if has_token or not self._may_move("verify", self._verify.address, event.error):
            raise event.error
        self._verify.cancel()
        self._open_verify()
        return self._controller.on_verify_moved()

    def _on_draft_lost(self, event: LinkLost) -> Decision:
        """Open the session elsewhere if this draft has not answered yet; else do without."""
        draft = self._draft
        if draft is None or event.link is not draft:
            return NOTHING
        if draft.has_answered or not self._may_move("draft", draft.address, event.error):
            return self._lose_draft(event.error)
        draft.cancel()
        return self._open_draft()

    def _may_move(self, role: Role, address: str, error: AmusdError) -> bool:
        """Record a replica that has refused; return whether to ask another one."""
        self._num_refusals[role] += 1
        if not isinstance(error, StatusLostError):  # else the same one is asked for its reason
            self._refused[role].add(address)
        return isinstance(error, UnavailableError) and self._num_refusals[role] < _MAX_REFUSALS

    def _lose_draft(self, error: AmusdError) -> Decision:
        if self._draft is None:
            return NOTHING
        self._draft.cancel()
        return self._do_without_draft(error)

    def _do_without_draft(self, error: AmusdError) -> Decision:
        self._draft = None
        self._recorder.fallback_reason = faults.status_details(str(error))
        self._watch.fell_back(error)
        return self._controller.on_draft_lost()

    def _open(self) -> None:
        if self._drafting is not None:
            if not self._backends.has_draft:
                raise PreconditionError(
                    f"strategy {self._plan.strategy.value} needs a draft, and this server has "
                    "none: ask for autoregressive"
                )
            self._carry_out(self._open_draft())
        self._open_verify()
        self._after_event()

    def _opening(self) -> SessionOpening:
        """Return what a replica has to know to go on from where the ledger is."""
        plan, ledger = self._plan, self._ledger
        return SessionOpening(
            plan.session_id,
            ledger.tokens,
            ledger.num_prompt_tokens + plan.finish.max_tokens,
            self._backends.vocabulary_fingerprint,
            ledger.epoch,
            plan.records_timeline,
        )

    def _open_verify(self) -> None:
        lease = self._backends.verify.take(self._refused["verify"])
        self._verify = VerifyLink(lease, self._take, self._watch.metadata)
        self._links.append(self._verify)
        self._verify.open(self._opening())

    def _open_draft(self) -> Decision:
        """Open a draft session; without a replica for it, return how to go on."""
        assert self._drafting is not None  # a strategy without a draft never comes here
        try:
            lease = self._backends.draft.take(self._refused["draft"])
        except UnavailableError as error:
            return self._do_without_draft(error)
        self._draft = DraftLink(
            lease,
            self._plan.session_id,
            self._take,
            self._plan.draft_timeout_seconds,
            self._watch.metadata,
        )
        self._links.append(self._draft)
        self._draft.open(self._opening(), self._drafting)
        return NOTHING

    def _summary(self) -> Statistics:
        self._ledger.close()
        num_output = self._controller.num_output
        return self._recorder.summary(self._ledger, num_output, time.monotonic())

    async def _close(self) -> None:
        """End all links, which frees both caches, and the timer."""
        self._ended.cancel()  # whatever still comes in is ignored
        self._timer.cancel()
        for link in self._links:
            link.cancel()
        tasks = [task for link in self._links for task in link.tasks]
        await asyncio.gather(*tasks, return_exceptions=True)


class _Timer:
    """Calls back when nothing was expected anew for long enough. It seldom touches the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_timeout: Callable[[], None]) -> None:
        self._loop = loop
        self._on_timeout = on_timeout
        self._deadline = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def expect_within(self, seconds: float) -> None:
        """Call back in ``seconds`` unless this is called again before."""
        self._deadline = self._loop.time() + seconds
        if self._handle is not None:
            if self._handle.when() <= self._deadline:
                return  # it looks at the deadline when it fires
            self._handle.cancel()
        self._handle = self._loop.call_at(self._deadline, self._fire)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        if self._loop.time() < self._deadline:
            self._handle = self._loop.call_at(self._deadline, self._fire)
        else:
            self._on_timeout()
