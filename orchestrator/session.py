"""One generation: receive, decide, dispatch. The ledger decides; this carries it out.

The session owns two streams and their tasks, and ends them all, however it ends itself.
"""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from amusd.core.errors import AmusdError, PreconditionError, UnavailableError
from amusd.core.events import NOTHING, Advance, Decision, Forward, Proposal, Rollback, Verdict
from amusd.core.finish import FinishReason, FinishRule
from amusd.core.ledger import Ledger
from amusd.core.pace import make_pace
from amusd.core.statistics import Statistics, StatisticsRecorder
from amusd.core.strategy import DraftPlan, Strategy, draft_plan
from orchestrator.backends import Backends
from orchestrator.links import DraftLink, Event, Inbox, LinkLost, SessionOpening, VerifyLink

_MAX_INBOX = 1024

Message = TypeVar("Message", Advance, Rollback)
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a generation ended, and what it took."""

    reason: FinishReason
    statistics: Statistics


class Session:
    """Decodes one request; ``run`` is called once."""

    def __init__(self, backends: Backends, plan: SessionPlan, emit: Emit) -> None:
        """Decode ``plan`` on ``backends``; final tokens go to ``emit`` as they come."""
        self._backends = backends
        self._plan = plan
        self._emit = emit
        self._ledger = Ledger(list(plan.tokens))
        self._recorder = StatisticsRecorder(time.monotonic())
        self._pace = make_pace(
            plan.strategy, plan.lookahead, backends.step_times, plan.draft_timeout_seconds
        )
        self._inbox: Inbox = asyncio.Queue(_MAX_INBOX)
        self._tasks: list[asyncio.Task[None]] = []
        self._draft: DraftLink | None = None
        self._verify: VerifyLink
        # Whether a verdict is to come without our asking for it.
        self._pass_due = True
        # Proposals that wait for more of them while the verify model is idle.
        self._held: Forward | None = None
        self._num_output = 0

    async def run(self) -> Outcome:
        """Generate until the output is over.

        Raises:
            AmusdError: the verify service is lost or refuses. The draft's loss only slows down.
        """
        self._verify = VerifyLink(self._backends.verify, self._inbox)
        try:
            await self._open()
            reason = await self._decode()
        finally:
            await self._close()
        self._ledger.close()
        statistics = self._recorder.summary(self._ledger, self._num_output, time.monotonic())
        return Outcome(reason, statistics)

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
                    decision = self._lose_draft(event.error)
                case LinkLost():
                    raise event.error
                case None:  # no proposal has come in time: the verify model goes on alone
                    decision = Decision(forward=self._ledger.plain_pass())
            reason = await self._carry_out(decision)
            if reason is not None:
                return reason

    async def _next_event(self) -> Event | None:
        """Return the next event; None if the verify model has waited long enough for a draft."""
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        patience = self._pace.patience_seconds()
        timeout = self._plan.verify_timeout_seconds if self._pass_due else patience
        try:
            async with asyncio.timeout(timeout):
                return await self._inbox.get()
        except TimeoutError:
            if self._pass_due:
                raise UnavailableError(
                    f"verify service: no verdict within {timeout:.0f} s; is it overloaded?"
                ) from None
            return None

    def _on_verdict(self, verdict: Verdict) -> Decision:
        try:
            decision = self._ledger.verdict(verdict)
        except PreconditionError as error:
            raise UnavailableError(f"verify service: {error}") from error
        if decision is NOTHING:
            return decision
        now = time.monotonic()
        self._recorder.verdict(verdict)
        self._pace.passed(verdict, is_first=self._ledger.counts.passes == 1)
        if decision.rollback is not None:
            self._pace.rolled_back(now)
        # What is left of the tail is with the verify service already.
        self._pass_due = self._ledger.num_speculated > 0
        if self._pass_due:
            return decision
        if self._draft is None:
            # One pass is asked for ahead, so that the verify model need not wait for us.
            return dataclasses.replace(decision, forward=self._ledger.plain_pass(num_ahead=1))
        if self._pace.start_size(0, now) == 0:
            return dataclasses.replace(decision, forward=self._ledger.plain_pass())
        return decision

    def _on_proposal(self, proposal: Proposal) -> Decision:
        now = time.monotonic()
        self._recorder.proposal(proposal)
        self._pace.proposed(proposal, now)
        try:
            self._backends.check_tokens(proposal.tokens)
            decision = self._ledger.proposal(proposal)
        except AmusdError as error:
            # A draft that breaks the rules is as good as none; the output stays the same.
            return self._lose_draft(error)
        if decision.rollback is not None:
            self._pace.rolled_back(now)
        nothing_to_propose = (
            not proposal.tokens
            and proposal.epoch == self._ledger.epoch
            and proposal.position >= self._ledger.verified_position
        )
        if nothing_to_propose and not self._pass_due:
            return Decision(forward=self._ledger.plain_pass())
        return decision

    def _lose_draft(self, error: AmusdError) -> Decision:
        """Go on without the draft: an empty tail is plain decoding."""
        if self._draft is not None:
            self._draft.cancel()
            self._draft = None
            self._recorder.fallback_reason = str(error)
        return NOTHING if self._pass_due else Decision(forward=self._ledger.plain_pass())

    async def _carry_out(self, decision: Decision) -> FinishReason | None:
        if self._draft is not None:
            if decision.rollback is not None:
                self._held = None
                self._draft.send(self._bounded(decision.rollback))
            if decision.advance is not None:
                self._draft.send(self._bounded(decision.advance))
        if decision.forward is not None:
            await self._forward(decision.forward)
        if not decision.committed:
            return None
        tokens, reason = self._plan.finish.cut(decision.committed, self._num_output)
        self._recorder.tokens(time.monotonic())
        self._num_output += len(tokens)
        await self._emit(tokens)
        return reason

    def _bounded(self, message: Message) -> Message:
        """Let the draft run ahead as far as it is of use."""
        return dataclasses.replace(message, lookahead=self._pace.lookahead)

    async def _forward(self, forward: Forward) -> None:
        """Send proposals, or collect a few first while the verify model is idle.

        A request for a plain pass sends what has been collected instead.
        """
        must_start = self._pass_due or not forward.tokens
        if self._held is not None:
            tokens = self._held.tokens + forward.tokens
            forward = dataclasses.replace(self._held, tokens=tokens)
        num_ready = len(forward.tokens)
        room = self._plan.finish.max_tokens - self._num_output - 1
        wanted = min(room, self._pace.start_size(num_ready, time.monotonic()))
        if wanted > num_ready and not must_start:
            self._held = forward
            return
        self._held = None
        self._pass_due = True
        await self._verify.send(dataclasses.replace(forward, max_checked=self._pace.max_checked))

    async def _open(self) -> None:
        plan = self._plan
        max_position = len(plan.tokens) + plan.finish.max_tokens
        opening = SessionOpening(plan.session_id, plan.tokens, max_position)
        self._start(self._verify.read())
        drafting = draft_plan(plan.strategy, plan.lookahead)
        if drafting is not None:
            await self._open_draft(opening, drafting)
        await self._verify.open(opening)

    async def _open_draft(self, opening: SessionOpening, drafting: DraftPlan) -> None:
        if self._backends.draft is None:
            raise PreconditionError(
                f"strategy {self._plan.strategy.value} needs a draft, and this server has none: "
                "ask for autoregressive"
            )
        draft = DraftLink(
            self._backends.draft,
            opening.session_id,
            self._inbox,
            self._plan.draft_timeout_seconds,
        )
        self._draft = draft
        self._start(draft.read())
        self._start(draft.write())
        await draft.open(opening, drafting, self._backends.vocabulary_fingerprint)

    def _start(self, part: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(part))

    async def _close(self) -> None:
        """End both streams, which frees both caches, and every task."""
        self._verify.cancel()
        if self._draft is not None:
            self._draft.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
