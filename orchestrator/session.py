"""One generation: receive, decide, dispatch. The controller decides; this carries it out.

The session owns two streams and their tasks, and ends them all, however it ends itself. A replica
that refuses the session before it has answered is replaced by another one of its pool, opened from
the ledger, which is all there is to know about a session.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from amusd.analysis.generation_statistics import Statistics, StatisticsRecorder
from amusd.analysis.timeline import Timeline, TimelineRecorder
from amusd.observe.observer import RequestWatch
from amusd.policy.speculation_policy import make_policy
from amusd.protocol.errors import AmusdError, PreconditionError, StatusLostError, UnavailableError
from amusd.protocol.events import NOTHING, Decision, Proposal, Verdict
from amusd.protocol.finish import FinishReason, FinishRule
from amusd.protocol.ledger import Ledger
from amusd.protocol.session_controller import SessionController
from amusd.protocol.strategy import DraftPlan, Strategy, draft_plan
from orchestrator.backends import Backends
from orchestrator.links import (
    DraftLink,
    Event,
    Inbox,
    LinkLost,
    Role,
    SessionOpening,
    VerifyLink,
)

_MAX_INBOX = 1024
_MAX_REFUSALS = 4  # of replicas of one role, before a session gives that role up

Emit = Callable[[tuple[int, ...]], Awaitable[None]]


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

        ``watch`` is told of what happens.
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
        self._inbox: Inbox = asyncio.Queue(_MAX_INBOX)
        self._tasks: list[asyncio.Task[None]] = []
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
            await self._open()
            reason = await self._decode()
        finally:
            await self._close()
            statistics = self._summary()
            self._watch.decoded(statistics)
        timeline = self._timeline.timeline() if self._timeline is not None else None
        return Outcome(reason, statistics, timeline)

    def _summary(self) -> Statistics:
        self._ledger.close()
        num_output = self._controller.num_output
        return self._recorder.summary(self._ledger, num_output, time.monotonic())

    async def _decode(self) -> FinishReason:
        """Receive, decide, dispatch until the output is over; this is the hot loop."""
        while True:
            event = await self._next_event()
            match event:
                case Verdict():
                    decision = self._on_verdict(event)
                case Proposal():
                    decision = self._on_proposal(event)
                case LinkLost(role="draft"):
                    decision = await self._on_draft_lost(event)
                case LinkLost():
                    decision = await self._on_verify_lost(event)
                case None:  # no proposal has come in time
                    decision = self._controller.on_draft_wait_over()
            if self._timeline is not None:
                self._timeline.decided(event, decision, time.time_ns())
            await self._carry_out(decision)
            if self._controller.finish_reason is not None:
                return self._controller.finish_reason

    async def _next_event(self) -> Event | None:
        """Return the next event; None if the verify model has waited long enough for a draft."""
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        pass_due = self._controller.pass_due
        draft_wait = self._controller.draft_wait_seconds()
        timeout = self._plan.verify_timeout_seconds if pass_due else draft_wait
        try:
            async with asyncio.timeout(timeout):
                return await self._inbox.get()
        except TimeoutError:
            if pass_due:
                raise UnavailableError(
                    f"verify service: no verdict within {timeout:.0f} s; is it overloaded?"
                ) from None
            return None

    def _on_verdict(self, verdict: Verdict) -> Decision:
        try:
            decision = self._controller.on_verdict(verdict, time.monotonic())
        except PreconditionError as error:
            raise UnavailableError(f"verify service: {error}") from error
        if decision is not NOTHING:
            self._recorder.verdict(verdict)
        return decision

    def _on_proposal(self, proposal: Proposal) -> Decision:
        self._recorder.proposal(proposal)
        try:
            self._backends.verify_model.check_tokens(proposal.tokens)
            return self._controller.on_proposal(proposal, time.monotonic())
        except AmusdError as error:
            # A draft that breaks the rules is as good as none; the output stays the same.
            return self._lose_draft(error)

    async def _on_verify_lost(self, event: LinkLost) -> Decision:
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
        await self._open_verify()
        return self._controller.on_verify_moved()

    async def _on_draft_lost(self, event: LinkLost) -> Decision:
        """Open the session elsewhere if this draft has not said anything yet; else do without."""
        draft, drafting = self._draft, self._drafting
        if draft is None or drafting is None or event.link is not draft:
            return NOTHING
        if draft.has_answered or not self._may_move("draft", draft.address, event.error):
            return self._lose_draft(event.error)
        draft.cancel()
        return await self._open_draft(drafting)

    def _may_move(self, role: Role, address: str, error: AmusdError) -> bool:
        """Take note of a replica that has refused; return whether to ask another one."""
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
        self._recorder.fallback_reason = str(error)
        self._watch.fell_back(error)
        return self._controller.on_draft_lost()

    async def _carry_out(self, decision: Decision) -> None:
        try:
            for message in (decision.rollback, decision.advance):
                if message is not None and self._draft is not None:
                    self._draft.send(message)
            if decision.rollback is not None:
                self._watch.rolled_back(decision.rollback)
        except UnavailableError as error:
            await self._carry_out(self._lose_draft(error))
        if decision.forward is not None and self._verify is not None:
            await self._verify.send(decision.forward)
        if decision.committed:
            self._recorder.tokens(time.monotonic())
            await self._emit(decision.committed)

    async def _open(self) -> None:
        if self._drafting is not None:
            if not self._backends.has_draft:
                raise PreconditionError(
                    f"strategy {self._plan.strategy.value} needs a draft, and this server has "
                    "none: ask for autoregressive"
                )
            await self._carry_out(await self._open_draft(self._drafting))
        await self._open_verify()

    def _opening(self) -> SessionOpening:
        """Return what a replica has to know to go on from where the ledger is."""
        plan, ledger = self._plan, self._ledger
        return SessionOpening(
            plan.session_id,
            ledger.tokens,
            ledger.num_prompt_tokens + plan.finish.max_tokens,
            self._backends.vocabulary_fingerprint,
            ledger.epoch,
        )

    async def _open_verify(self) -> None:
        lease = self._backends.verify.take(self._refused["verify"])
        self._verify = VerifyLink(lease, self._inbox, self._watch.metadata)
        self._start(self._verify.read())
        await self._verify.open(self._opening())

    async def _open_draft(self, drafting: DraftPlan) -> Decision:
        """Open a draft session; without a replica for it, return how to go on."""
        try:
            lease = self._backends.draft.take(self._refused["draft"])
        except UnavailableError as error:
            return self._do_without_draft(error)
        draft = DraftLink(
            lease,
            self._plan.session_id,
            self._inbox,
            self._plan.draft_timeout_seconds,
            self._watch.metadata,
        )
        self._draft = draft
        self._start(draft.read())
        self._start(draft.write())
        await draft.open(self._opening(), drafting)
        return NOTHING

    def _start(self, part: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(part))

    async def _close(self) -> None:
        """End both streams, which frees both caches, and every task."""
        for link in (self._verify, self._draft):
            if link is not None:
                link.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
