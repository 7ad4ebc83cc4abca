"""The whole protocol in one thread: three pure parts, the channels between them, and a scheduler.

``Simulation.moves`` lists what can happen next; a ``Schedule`` chooses. Channels are those of
the orchestrator's links: streams keep their order, and a rollback travels beside the stream of
advances, where the next message is sent only when it has been answered. After every move each
part checks its own integrity, and at every event of the ledger ``Watch`` the laws between parts.
"""

from collections import deque
from collections.abc import Callable, Iterator

from amusd.protocol.events import Advance, Proposal, Rollback
from amusd.protocol.ledger import Ledger
from amusd.protocol.verify_session import VerifySession
from tests.protocol.parts import DraftSide, Orchestrator, VerifySide
from tests.protocol.scenario import Move, Option, Schedule, Setup


class Simulation:
    """One session from its prompt to the end of its output."""

    def __init__(
        self, setup: Setup, ledger: Ledger | None = None, verify: VerifySession | None = None
    ) -> None:
        """Start; ``ledger`` and ``verify`` replace the real parts by altered ones."""
        self.setup = setup
        self.orchestrator = Orchestrator(
            setup, ledger or Ledger(setup.prompt, max_branches=setup.max_branches)
        )
        verify = verify or VerifySession(
            setup.prompt, setup.max_position, setup.lookahead, max_branches=setup.max_branches
        )
        self.verify = VerifySide(setup, verify)
        self.draft = DraftSide(setup) if self.orchestrator.has_draft else None
        self.num_moves = 0
        self.num_overtaken = 0
        self._advances: deque[Advance] = deque()
        self._rollback: deque[Rollback] = deque()
        self._awaits_answer = False
        self._draft_lost = False
        self._last_words: deque[Proposal] = deque()
        self._past: list[Callable[[], None]] = []
        self._num_repeats = 0

    @property
    def ledger(self) -> Ledger:
        return self.orchestrator.ledger

    def run(self, schedule: Schedule) -> "Simulation":
        """Move until the output is over."""
        for _ in self.steps(schedule):
            self.check()
        self.ledger.close()
        self.check()
        return self

    def steps(self, schedule: Schedule) -> Iterator[Move]:
        """Move until the output is over; yield after each move what it was."""
        while self.orchestrator.reason is None:
            moves = self.moves()
            if not moves:
                raise AssertionError(f"nothing can happen any more: {self!r}")
            move = schedule.next_move(moves)
            self.move(move, schedule)
            yield move
            if self.num_moves == self.setup.dies_after:
                self._kill_draft(schedule)
            if self.num_moves == self.setup.verify_dies_after:
                self._replace_verify()
                yield Move.MOVED

    def __repr__(self) -> str:
        draft = self.draft.session if self.draft else None
        return f"{self.ledger!r} {self.verify.session!r} {draft!r}"

    def moves(self) -> list[Move]:
        """What can happen next."""
        core, verify = self.orchestrator, self.verify
        possible = {
            Move.PROPOSAL: bool(self._proposals) or self._draft_lost,
            Move.FORWARD: bool(core.forwards),
            Move.BEGIN: not verify.in_pass and verify.session.is_due,
            Move.END: verify.in_pass,
            Move.VERDICT: bool(verify.sent),
            Move.ALONE: not core.pass_due and self.setup.impatient,
            **self._draft_moves(),
        }
        moves = [move for move in Move if possible.get(move)]
        if moves and self._past and self._num_repeats < self.setup.num_repeats:
            moves.append(Move.REPEAT)
        return moves

    def move(self, move: Move, schedule: Schedule) -> None:
        """Let one thing happen."""
        self.num_moves += 1
        core, verify = self.orchestrator, self.verify
        match move:
            case Move.PROPOSAL:
                self._deliver_proposal()
            case Move.FORWARD:
                self._deliver(verify.offer, core.forwards)
            case Move.BEGIN:
                verify.begin_pass()
            case Move.END:
                verify.end_pass()
            case Move.VERDICT:
                self._deliver(core.on_verdict, verify.sent)
            case Move.ALONE:
                core.go_alone()
            case Move.REPEAT:
                self._num_repeats += 1
                schedule.one_of(self._past)()
            case _:
                assert self.draft is not None
                self._move_draft(move, self.draft)

    def check(self) -> None:
        """Raise AssertionError if a part contradicts itself."""
        self.ledger.check_integrity()
        self.verify.session.check_integrity()
        if self.draft is not None:
            self.draft.session.check_integrity()
        assert len(self.orchestrator.output) <= self.setup.max_tokens

    @property
    def _proposals(self) -> deque[Proposal]:
        return self.draft.sent if self.draft is not None else self._last_words

    def _draft_moves(self) -> dict[Move, bool]:
        if self.draft is None:
            return {}
        return {
            Move.DRAFT: self.draft.session.room > 0,
            Move.GROW: self.draft.can_grow,
            Move.SEND: bool(self.orchestrator.outgoing) and not self._awaits_answer,
            Move.ADVANCE: bool(self._advances),
            Move.ROLLBACK: bool(self._rollback),
            Move.ANSWER: self._awaits_answer and not self._rollback,
        }

    def _move_draft(self, move: Move, draft: DraftSide) -> None:
        match move:
            case Move.DRAFT:
                draft.step()
            case Move.GROW:
                draft.grow()
            case Move.SEND:
                self._send_to_draft(self.orchestrator.outgoing.popleft())
            case Move.ADVANCE:
                self.num_overtaken += self._advances[0].epoch < draft.session.epoch
                self._deliver(draft.advance, self._advances)
            case Move.ROLLBACK:
                draft.rollback(self._rollback.popleft())
            case Move.ANSWER:
                self._awaits_answer = False

    def _send_to_draft(self, message: Advance | Rollback) -> None:
        if isinstance(message, Advance):
            self._advances.append(message)
        else:
            self._rollback.append(message)
            self._awaits_answer = True

    def _deliver_proposal(self) -> None:
        if self._proposals:
            self._deliver(self.orchestrator.on_proposal, self._proposals)
        else:
            self._draft_lost = False
            self.orchestrator.on_draft_lost()

    def _deliver(self, receive: Callable[[Option], None], channel: deque[Option]) -> None:
        message = channel.popleft()
        if self.setup.num_repeats:
            self._past.append(lambda: receive(message))
        receive(message)

    def _replace_verify(self) -> None:
        """Lose the verify service, and all messages on their way to it and from it."""
        ledger, setup = self.ledger, self.setup
        if self.orchestrator.reason is not None:
            return
        opened = VerifySession(
            list(ledger.tokens),
            setup.max_position,
            setup.lookahead,
            ledger.epoch,
            setup.max_branches,
        )
        self.verify = VerifySide(setup, opened)
        self.orchestrator.forwards.clear()
        self.orchestrator.on_verify_moved()

    def _kill_draft(self, schedule: Schedule) -> None:
        """End the draft; the first few of the proposals on their way still arrive."""
        if self.draft is None:
            return
        arriving = schedule.one_of(range(len(self.draft.sent) + 1))
        self._last_words.extend(list(self.draft.sent)[:arriving])
        self.draft = None
        self._draft_lost = True
