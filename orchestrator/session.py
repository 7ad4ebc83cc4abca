"""One generation: receive, decide, dispatch. The controller decides; this carries it out.

Events of both links are taken one by one on the event loop, and a decision is carried out in the
order that latency asks for: forward and rollback leave first, then tokens go to the client's
outbox. Nothing here waits: links and outbox are bounded queues with writers of their own.

The session owns its links and its timer, and ends them all. A verify replica that ends the session,
or does not answer, is replaced by another one of its pool, opened from the ledger, which holds all
there is to know about a session. So is a draft replica that has not proposed anything yet; without
a draft, decoding continues at the verify model's own speed.
"""

import asyncio
import time
from collections.abc import Callable

from amusd.analysis.generation_statistics import Statistics, StatisticsRecorder
from amusd.analysis.timeline import TimelineEvent, TimelineRecorder
from amusd.fleet.failover import Attempts, Ending
from amusd.observe.observer import RequestWatch
from amusd.policy.speculation_policy import make_policy
from amusd.policy.speculation_switch import SwitchMember
from amusd.protocol.errors import (
    AmusdError,
    InternalError,
    InvalidInputError,
    PreconditionError,
    UnavailableError,
)
from amusd.protocol.events import NOTHING, Decision, Proposal, Verdict
from amusd.protocol.finish import FinishReason, TextEnd
from amusd.protocol.ledger import Ledger
from amusd.protocol.session_controller import SessionController
from amusd.protocol.strategy import draft_plan
from amusd.rpc import faults
from orchestrator.backends import Backends
from orchestrator.emission import Emission, Emit
from orchestrator.links import DraftLink, Event, LinkLost, Role, SessionOpening, VerifyLink
from orchestrator.session_plan import Outcome, SessionPlan
from orchestrator.session_timer import Timer

_RECHECK_SECONDS = 1.0  # while a verdict is late
_MIN_REPORTED_SILENCE_SECONDS = 1.0  # of a draft at the end of an output
_MIN_REPORTED_PASSES = 4  # the same, for a draft that has never proposed anything
_MIN_FIRST_SILENCE_SECONDS = 0.05  # in which these passes ran


class Session:
    """Decodes one request; ``run`` is called once."""

    def __init__(
        self,
        backends: Backends,
        plan: SessionPlan,
        emit: Emit,
        watch: RequestWatch,
        text_end: TextEnd | None = None,
        on_event: Callable[[TimelineEvent], None] | None = None,
    ) -> None:
        """Decode ``plan`` on ``backends``; final tokens go to ``emit`` as they come.

        ``watch`` records what happens. The output also ends where ``text_end`` says. ``on_event``
        takes the events of a plan that streams its timeline.
        """
        self._watch = watch
        self._backends = backends
        self._plan = plan
        self._emit = emit
        self._ledger = Ledger(list(plan.tokens), max_branches=plan.max_branches)
        self._drafting = draft_plan(plan.strategy, plan.lookahead)
        times, timeout = backends.step_times, plan.draft_timeout_seconds
        self._controller = SessionController(
            self._ledger,
            make_policy(plan.strategy, plan.lookahead, times, timeout, plan.policy),
            plan.finish,
            has_draft=self._drafting is not None,
            text_end=text_end,
            min_use_probability=plan.min_use_probability,
        )
        self._recorder = StatisticsRecorder(time.monotonic())
        self._timeline: TimelineRecorder | None = None
        if plan.records_timeline or plan.streams_timeline:
            self._timeline = TimelineRecorder(
                time.time_ns(),
                max_branches=plan.max_branches,
                on_event=on_event if plan.streams_timeline else None,
            )
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[FinishReason] = self._loop.create_future()
        self._timer = Timer(self._loop, self._on_timeout)
        self._awaits_verdict_since: float | None = None
        self._links: list[VerifyLink | DraftLink] = []  # all that were opened
        self._draft: DraftLink | None = None
        self._verify: VerifyLink | None = None
        self._member: SwitchMember | None = None
        self._has_draft_to_open = self._drafting is not None
        self._attempts: dict[Role, Attempts] = {"verify": Attempts(), "draft": Attempts()}
        self._failed_pass: VerifyLink | None = None  # until another replica repeats it

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
        timeline = None
        if self._timeline is not None and self._plan.records_timeline:
            timeline = self._timeline.timeline()
        return Outcome(reason, statistics, timeline)

    @property
    def verify_address(self) -> str:
        """The verify replica that has the session; empty before it is opened."""
        return self._verify.address if self._verify is not None else ""

    def _take(self, event: Event) -> None:
        """Take an event of a link: the hot path of a generation."""
        if self._ended.done():
            return
        try:
            decision = self._decide(event)
            if self._timeline is not None:
                self._timeline.decided(event, decision, time.time_ns())
            self._carry_out(decision, event)
            self._after_event()
        except Exception as error:  # of whatever kind: it ends this session, and no other
            self._end_with(error)

    def _end_with(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

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

    def _carry_out(self, decision: Decision, event: Event | None = None) -> None:
        # A forward is first: the verify model may be idle, the draft works in any case.
        if decision.forward is not None and self._verify is not None:
            self._verify.send(decision.forward)
        if self._draft is not None:
            for message in (decision.rollback, decision.advance):
                if message is not None:
                    self._draft.send(message)
        elif self._has_draft_to_open and decision.advance is not None:
            self._carry_out(self._open_draft())
        if decision.rollback is not None:
            self._watch.rolled_back(decision.rollback)
        if decision.committed:
            self._recorder.tokens(time.monotonic())
            self._emit(Emission.of(decision.committed, event))

    def _after_event(self) -> None:
        """End the session if its output is over, else bound the wait for the next event."""
        if self._ended.done():
            return
        reason = self._controller.finish_reason
        if reason is not None:
            self._tell_silence()
            self._ended.set_result(reason)
            return
        self._give_up_silent_draft()
        if not self._controller.pass_due:
            self._awaits_verdict_since = None
            self._timer.expect_within(self._controller.draft_wait_seconds())
            return
        if self._awaits_verdict_since is None:
            self._awaits_verdict_since = time.monotonic()
        self._timer.expect_within(
            min(self._plan.verify_timeout_seconds, self._plan.replica_timeout_seconds)
        )

    def _on_timeout(self) -> None:
        """Move if a verdict is late; if a proposal is, let the verify model go on alone."""
        if self._ended.done():
            return
        try:
            if self._controller.pass_due:
                self._on_verdict_late()
                return
            self._carry_out_timed(self._controller.on_draft_wait_over())
            self._after_event()
        except Exception as error:  # as in ``_take``
            self._end_with(error)

    def _carry_out_timed(self, decision: Decision) -> None:
        """Carry out a decision that follows from the time alone."""
        if self._timeline is not None:
            self._timeline.decided(None, decision, time.time_ns())
        self._carry_out(decision)

    def _on_verdict_late(self) -> None:
        """Leave the verify replica after the timeout, or before it if it answers nobody.

        Without another replica, the session waits for the whole timeout.
        """
        link, since = self._verify, self._awaits_verdict_since
        assert link is not None  # both are there while a verdict is awaited
        assert since is not None
        waited, timeout = time.monotonic() - since, self._plan.verify_timeout_seconds
        if waited >= timeout:
            reason = f"no verdict within {timeout:g} s"
            link.lease.failed(since, reason)
            error = UnavailableError(f"verify service: {reason}; is it overloaded?")
        elif link.lease.is_answering or not self._has_other_verify(link):
            self._timer.expect_within(min(_RECHECK_SECONDS, timeout - waited))
            return
        else:
            error = UnavailableError("verify service: it does not answer")
        self._take(LinkLost("verify", error, link))

    def _has_other_verify(self, link: VerifyLink) -> bool:
        avoided = self._attempts["verify"].avoided
        return self._backends.verify.has_other({*avoided, link.address})

    def _on_verdict(self, verdict: Verdict) -> Decision:
        try:
            self._backends.verify_model.check_tokens((verdict.next_token,))
            decision = self._controller.on_verdict(verdict, time.monotonic())
        except (PreconditionError, InvalidInputError) as error:
            raise InternalError(f"verify service: {error}") from error
        self._awaits_verdict_since = None
        if decision is not NOTHING:
            self._recorder.verdict(verdict, len(decision.committed))
        if self._failed_pass is not None:
            failed, self._failed_pass = self._failed_pass, None
            failed.lease.failed(failed.ended_seconds, "a pass failed that succeeds elsewhere")
        return decision

    def _on_proposal(self, proposal: Proposal) -> Decision:
        self._recorder.proposal(proposal)
        try:
            self._backends.verify_model.check_tokens(proposal.all_tokens)
            return self._controller.on_proposal(proposal, time.monotonic())
        except AmusdError as error:
            # A draft that breaks the rules is as good as none; the output stays the same.
            return self._lose_draft(error)

    def _on_verify_lost(self, event: LinkLost) -> Decision:
        """Open the session elsewhere, from its final tokens.

        Raises:
            AmusdError: the session is refused for good, or nothing else can take it.
        """
        link = self._verify
        if link is None or event.link is not link:
            return NOTHING
        if not self._attempts["verify"].may_move(link.address, event.ending):
            raise event.error
        link.cancel()
        self._open_verify(instead_of=event)
        self._watch.count("moves")
        self._awaits_verdict_since = None
        self._failed_pass = link if isinstance(event.error, InternalError) else None
        return self._controller.on_verify_moved()

    def _on_draft_lost(self, event: LinkLost) -> Decision:
        """Open the session elsewhere if this draft has not answered yet; else do without."""
        draft, attempts = self._draft, self._attempts["draft"]
        if draft is None or event.link is not draft:
            return NOTHING
        may_move = not draft.has_answered and attempts.may_move(draft.address, event.ending)
        is_over = event.ending is Ending.FAILED and not self._backends.draft.has_other(
            attempts.avoided
        )
        if is_over or not may_move:
            return self._lose_draft(event.error)
        draft.cancel()
        self._controller.on_draft_moved(time.monotonic())
        return self._open_draft()

    def _give_up_silent_draft(self) -> None:
        """Do without a draft that has proposed nothing for the whole timeout."""
        draft, timeout = self._draft, self._plan.draft_timeout_seconds
        if draft is None:
            return
        now = time.monotonic()
        silence = self._controller.draft_silence_seconds(now)
        if silence < timeout:
            return
        reason = f"no proposal within {timeout:g} s"
        draft.lease.failed(now - silence, reason)
        lost = LinkLost("draft", UnavailableError(f"draft service: {reason}"), draft)
        self._carry_out_timed(self._on_draft_lost(lost))

    def _tell_silence(self) -> None:
        """Say in the statistics if the end of the output came without the draft."""
        draft, controller = self._draft, self._controller
        if draft is None:
            return
        silence = controller.draft_silence_seconds(time.monotonic())
        is_known = draft.has_answered or controller.has_rested
        is_long = is_known or controller.num_unaided_passes < _MIN_REPORTED_PASSES
        if silence < (_MIN_REPORTED_SILENCE_SECONDS if is_long else _MIN_FIRST_SILENCE_SECONDS):
            return
        reason = f"draft service: no proposal in the last {silence:.2g} s of the output"
        self._recorder.fallback_reason = reason
        self._watch.fell_back(UnavailableError(reason))

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
        if self._drafting is not None and not self._backends.has_draft:
            raise PreconditionError(
                f"strategy {self._plan.strategy.value} needs a draft, and this server has none: "
                "ask for autoregressive"
            )
        self._open_verify()
        if self._has_draft_to_open and not self._controller.draft_rests:
            self._carry_out(self._open_draft())
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
            plan.records_timeline or plan.streams_timeline,
            plan.max_branches,
            plan.sampling_after(self._controller.num_output),
            plan.min_use_probability,
        )

    def _open_verify(self, instead_of: LinkLost | None = None) -> None:
        """Open the session on a verify replica.

        Raises:
            AmusdError: none can be used; after a failure, the error says what failed.
        """
        try:
            lease = self._backends.verify.take(
                self._attempts["verify"].avoided, self._plan.preferred_verify
            )
        except UnavailableError as none_left:
            if instead_of is None or instead_of.ending is Ending.REFUSED:
                raise
            error = instead_of.error
            if not isinstance(error, UnavailableError):
                raise error from none_left
            raise UnavailableError(f"{error}; {none_left}") from error
        self._join(lease.address)
        self._verify = VerifyLink(lease, self._take, self._watch.metadata)
        self._links.append(self._verify)
        self._verify.open(self._opening())

    def _join(self, verify_address: str) -> None:
        """Count the session at its verify device, whose other sessions it affects."""
        if self._member is not None:
            self._member.leave()
        self._member = self._backends.switch_of(verify_address).join()
        if self._plan.may_rest and self._backends.adapts_speculation:
            self._controller.join(self._member)

    def _open_draft(self) -> Decision:
        """Open a draft session; without a replica for it, return how to go on."""
        assert self._drafting is not None  # a strategy without a draft never comes here
        self._has_draft_to_open = False
        try:
            lease = self._backends.draft.take(self._attempts["draft"].avoided)
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
        if self._member is not None:
            self._member.leave()
        for link in self._links:
            link.cancel()
        tasks = [task for link in self._links for task in link.tasks]
        await asyncio.gather(*tasks, return_exceptions=True)
