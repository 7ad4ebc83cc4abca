"""The draft service of a simulation: real draft sessions on a device with a given step time."""

from collections.abc import Callable

from amusd.performance.agreement import Agreement
from amusd.performance.clocked_device import ClockedDevice
from amusd.performance.deployment import StepSeconds
from amusd.performance.event_queue import EventQueue
from amusd.performance.prepared_branches import PreparedBranches
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.events import Advance, Proposal, Rollback


class DraftSide:
    """One session on the draft service."""

    def __init__(
        self,
        session: DraftSession,
        agreement: Agreement,
        branches: PreparedBranches | None,
        send: Callable[[Proposal], None],
    ) -> None:
        """Write what ``agreement`` says; proposals go to ``send``."""
        self.session = session
        self.branches = branches
        self._agreement = agreement
        self._send = send
        self._run_start = session.length  # place 0 of the run
        self._step_seconds = 0.0
        self._num_steps = 0

    def advance(self, message: Advance) -> None:
        """Take final tokens. One that the draft has not written begins another run."""
        session = self.session
        length = session.length
        session.advance(
            message.epoch,
            message.position,
            message.tokens,
            message.lookahead,
            message.tokens_per_proposal,
        )
        if session.length > length:
            self._run_start = session.length
        self.flush()

    def rollback(self, message: Rollback) -> None:
        """Go on behind the verify model's token, and behind the branch for it if there is one."""
        position = message.verified_position
        if self.branches is not None:
            self.branches.before_rollback(position - 1, message.corrected_token)
        self.session.rollback(
            message.epoch,
            position,
            message.corrected_token,
            message.lookahead,
            message.tokens_per_proposal,
            message.first_proposal,
            message.branch_tokens,
        )
        self._run_start = position
        if self.branches is not None:
            self.branches.plan.after_rollback()
        self.flush()

    def wrote(self, seconds: float) -> None:
        """Take the token of a step of the model."""
        position = self.session.length
        place = position - self._run_start
        self._step_seconds += seconds
        self._num_steps += 1
        self.session.extend((self._agreement.draft_token(position, place),))
        if self.branches is not None and self.session.length > position:
            self.branches.wrote(position, place)

    def flush(self) -> None:
        """Send what is ready to be proposed."""
        if self.branches is not None:
            self.branches.plan.hand_over_due()
        while (run := self.session.take_run()) is not None:
            self._send(
                Proposal(
                    run.epoch,
                    run.position,
                    run.tokens,
                    self._step_seconds,
                    self._num_steps,
                    run.source,
                    branches=run.branches,
                )
            )
            self._step_seconds, self._num_steps = 0.0, 0


class DraftDevice(ClockedDevice):
    """All sessions of the draft service: each with room takes part in the next step."""

    def __init__(self, queue: EventQueue, step_seconds: StepSeconds) -> None:
        """Start without sessions."""
        super().__init__(queue, step_seconds)
        self.sides: list[DraftSide] = []
        self._batch: list[DraftSide] = []
        self._with_branches: list[DraftSide] = []

    def _schedule(self) -> int:
        self._batch = [side for side in self.sides if side.session.room > 0]
        self._with_branches = []
        num_tokens = len(self._batch)
        for side in self.sides:
            num_rows = side.branches.begin() if side.branches is not None else 0
            if num_rows:
                self._with_branches.append(side)
                num_tokens += num_rows
        if not num_tokens:
            self._send_branches()
        return num_tokens

    def _send_branches(self) -> None:
        """Send what is drafted of branches, because the device rests."""
        for side in self.sides:
            if side.branches is not None:
                side.branches.plan.hand_over()
                side.flush()

    def _settle(self, seconds: float) -> None:
        for side in self._batch:
            side.wrote(seconds)
        for side in self._with_branches:
            assert side.branches is not None
            side.branches.end()
        for side in {id(one): one for one in (*self._batch, *self._with_branches)}.values():
            side.flush()
