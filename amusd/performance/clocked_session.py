"""The orchestrator's part of one simulated session: the real controller, messages and timers.

It sends what ``orchestrator/session.py`` sends, in the same order: the forward first, then the
rollback and the advance. An advance behind a rollback waits until the rollback is answered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from amusd.performance.clocked_draft import DraftDevice, DraftSide
from amusd.performance.clocked_verify import VerifyDevice, VerifySide
from amusd.performance.deployment import MessageSeconds
from amusd.performance.event_queue import EventQueue
from amusd.protocol.events import NOTHING, Advance, Decision, Proposal, Rollback, Verdict
from amusd.protocol.session_controller import SessionController


@dataclass(slots=True)
class MessageCounts:
    """Messages between the services."""

    verdicts: int = 0
    forwards: int = 0
    proposals: int = 0
    rollbacks: int = 0
    advances: int = 0


class ClockedSession:
    """One session, from its first verdict to the end of its output."""

    def __init__(
        self,
        queue: EventQueue,
        messages: MessageSeconds,
        controller: SessionController,
        on_end: Callable[[], None],
    ) -> None:
        """Decide with ``controller``; call ``on_end`` at the end of the output."""
        self.counts = MessageCounts()
        self.controller = controller
        self._queue = queue
        self._seconds = messages
        self._on_end = on_end
        self._verify: tuple[VerifyDevice, VerifySide] | None = None
        self._draft: tuple[DraftDevice, DraftSide] | None = None
        self._num_events = 0  # a timer of an earlier event has no effect
        self._rolling_back_to: int | None = None  # a rollback that is not answered yet
        self._held: list[Advance] = []  # behind it

    def attach(
        self,
        verify: tuple[VerifyDevice, VerifySide],
        draft: tuple[DraftDevice, DraftSide] | None,
    ) -> None:
        """Send messages to these services."""
        self._verify, self._draft = verify, draft

    def send_verdict(self, verdict: Verdict) -> None:
        """Let a verdict travel to the orchestrator."""
        self.counts.verdicts += 1
        self._queue.after(self._seconds.verdict, partial(self._on_verdict, verdict))

    def send_proposal(self, proposal: Proposal) -> None:
        """Let a proposal travel to the orchestrator."""
        self.counts.proposals += 1
        self._queue.after(self._seconds.proposal, partial(self._on_proposal, proposal))

    def _on_verdict(self, verdict: Verdict) -> None:
        if self.controller.finish_reason is None:
            self._carry_out(self.controller.on_verdict(verdict, self._queue.now_seconds))

    def _on_proposal(self, proposal: Proposal) -> None:
        if self.controller.finish_reason is None:
            self._carry_out(self.controller.on_proposal(proposal, self._queue.now_seconds))

    def _carry_out(self, decision: Decision) -> None:
        self._num_events += 1
        if decision is not NOTHING:
            self._send(decision)
        if self.controller.finish_reason is not None:
            self._on_end()
        elif not self.controller.pass_due:
            wait = self.controller.draft_wait_seconds()
            self._queue.after(wait, partial(self._on_timeout, self._num_events))

    def _on_timeout(self, num_events: int) -> None:
        if num_events == self._num_events and self.controller.finish_reason is None:
            self._carry_out(self.controller.on_draft_wait_over())

    def _send(self, decision: Decision) -> None:
        assert self._verify is not None
        if decision.forward is not None:
            self.counts.forwards += 1
            device, side = self._verify
            arrive = partial(device.offer, side, decision.forward)
            self._queue.after(self._seconds.forward, arrive)
        if self._draft is None:
            return
        if decision.rollback is not None:
            self._send_rollback(decision.rollback)
        if decision.advance is not None and self._rolling_back_to is not None:
            self._held.append(decision.advance)
        elif decision.advance is not None:
            self._send_advance(decision.advance)

    def _send_rollback(self, rollback: Rollback) -> None:
        self.counts.rollbacks += 1
        self._held.clear()  # of an older epoch
        self._rolling_back_to = rollback.epoch
        self._to_draft(partial(self._roll_back, rollback))

    def _send_advance(self, advance: Advance) -> None:
        self.counts.advances += 1
        assert self._draft is not None
        self._to_draft(partial(self._draft[1].advance, advance))

    def _to_draft(self, message: Callable[[], None]) -> None:
        assert self._draft is not None
        self._queue.after(self._seconds.rollback, partial(self._draft[0].receive, message))

    def _roll_back(self, rollback: Rollback) -> None:
        assert self._draft is not None
        self._draft[1].rollback(rollback)
        self._queue.after(self._seconds.proposal, partial(self._answered, rollback.epoch))

    def _answered(self, epoch: int) -> None:
        if epoch == self._rolling_back_to:
            self._rolling_back_to = None
            held, self._held = self._held, []
            for advance in held:
                self._send_advance(advance)
