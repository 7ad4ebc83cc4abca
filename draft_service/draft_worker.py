"""Drafting loop: all sessions of a draft service. It belongs to the engine thread.

Sessions join and leave between steps, and several share one; those who had no place in it come
first in the next. Between two steps the thread takes advances and rollbacks, so none of them waits
for longer than a step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from amusd.fleet.model_description import ServiceLimits
from amusd.observe.pass_listener import OnPass, ignore_pass
from amusd.protocol.draft_session import DraftLimits, DraftSession
from amusd.protocol.errors import (
    AmusdError,
    InvalidInputError,
    LimitExceededError,
    UnknownSessionError,
)
from amusd.protocol.events import Advance, DeviceTime, Proposal, Rollback
from amusd.serving.waiting_queue import Sessions, fail, shares, slot_of
from draft_service.drafters import Drafted, Drafter, DraftRequest, Outcome

Emit = Callable[[Proposal | AmusdError], None]


@dataclass(frozen=True, slots=True)
class DraftOpening:
    """What a session is opened with."""

    session_id: str
    tokens: list[int]
    limits: DraftLimits
    epoch: int = 0
    vocabulary_fingerprint: str = ""


@dataclass(slots=True)
class _Task:
    """A session, its slot, and the time spent since its last proposal."""

    session: DraftSession
    num_prompt: int
    emit: Emit
    slot: int | None = None
    draft_seconds: float = 0.0
    device_seconds: float = 0.0
    steps: list[DeviceTime] = field(default_factory=list)
    failed: bool = False

    def tell(self, error: AmusdError) -> None:
        """Send the error that ends the session."""
        self.emit(error)


class DraftWorker:
    """Drafts for all open sessions, several in one step."""

    def __init__(
        self,
        drafter: Drafter,
        limits: ServiceLimits,
        on_pass: OnPass = ignore_pass,
    ) -> None:
        """Draft with ``drafter`` within ``limits``.

        ``on_pass`` is told of each step: its seconds, and how many sessions shared it.
        """
        self._on_pass = on_pass
        self.drafter = drafter
        self.limits = limits
        self._sessions: Sessions[_Task] = Sessions(drafter, limits)

    @property
    def num_sessions(self) -> int:
        """Number of open sessions."""
        return self._sessions.num_open

    @property
    def num_waiting(self) -> int:
        """Number of sessions that wait for memory."""
        return self._sessions.num_waiting

    def open(self, opening: DraftOpening, emit: Emit) -> None:
        """Open a session whose proposals, or the error that ends it, go to ``emit``.

        Without memory it waits in line, and says of every position that it has nothing to propose.
        """
        self._check(opening)
        limits = opening.limits
        capacity = min(limits.max_position, self.limits.max_context)
        session = DraftSession(
            opening.tokens,
            DraftLimits(limits.lookahead, capacity, limits.tokens_per_proposal),
            opening.epoch,
        )
        task = _Task(session, len(opening.tokens), emit)
        self._sessions.add(opening.session_id, task, capacity)
        _send(task)

    def advance(self, session_id: str, advance: Advance) -> None:
        """Tell a session which tokens are final; an error ends the session."""
        task = self._sessions[session_id]
        if task.failed:
            return
        try:
            self.drafter.description.check_tokens(advance.tokens)
            task.session.advance(advance.epoch, advance.position, advance.tokens, advance.lookahead)
        except AmusdError as error:
            fail(task, error)
            return
        _send(task)

    def rollback(self, session_id: str, rollback: Rollback) -> int:
        """Bring a session back; return how many drafted tokens were dropped."""
        task = self._sessions.get(session_id)
        if task is None:
            raise UnknownSessionError(
                f"no session {session_id!r} is open here: it has ended, or lives on a replica"
            )
        self.drafter.description.check_tokens((rollback.corrected_token,))
        num_dropped = task.session.rollback(
            rollback.epoch,
            rollback.verified_position,
            rollback.corrected_token,
            rollback.lookahead,
        )
        if task.slot is not None:
            self.drafter.truncate(task.slot, rollback.verified_position - 1)
        _send(task)
        return num_dropped

    def give_up(self, session_id: str) -> None:
        """End a session with an error if it still waits for memory."""
        _resume(self._sessions.give_up(session_id))

    def close(self, session_id: str) -> None:
        """End a session and free its slot, for those who wait."""
        _resume(self._sessions.remove(session_id))

    def step(self) -> bool:
        """Draft one step for the sessions whose turn it is; return whether there was one."""
        due = list(self._sessions.due(lambda task: task.session.room))
        if not due:
            return False
        requests = [
            DraftRequest(
                slot_of(task),
                task.session.tokens,
                task.session.room,
                task.session.sources,
                task.num_prompt,
            )
            for task in due
        ]
        started, started_nanos = time.perf_counter(), time.time_ns()
        outcomes = self.drafter.draft(requests)
        seconds = time.perf_counter() - started
        turns = [
            (task, outcome)
            for task, outcome in zip(due, outcomes, strict=True)
            if outcome is not None
        ]
        self._on_pass(seconds, len(turns))
        self._sessions.took_turn(task for task, _ in turns)
        parts = shares(seconds, [_num_computed(outcome) for _, outcome in turns])
        for (task, outcome), part in zip(turns, parts, strict=True):
            task.draft_seconds += seconds
            task.device_seconds += part
            task.steps.append(DeviceTime(started_nanos, seconds))
            _settle(task, outcome)
        return True

    def _check(self, opening: DraftOpening) -> None:
        self._sessions.check_new(opening.session_id)
        model = self.drafter.description
        ours, theirs = model.vocabulary.fingerprint, opening.vocabulary_fingerprint
        if ours and theirs and ours != theirs:
            raise InvalidInputError(
                f"the vocabulary of {model.name} is not the verify model's: pair models that "
                "share their tokenizer"
            )
        model.check_tokens(opening.tokens)
        if opening.limits.max_position <= len(opening.tokens):
            raise InvalidInputError(
                f"max_position {opening.limits.max_position} leaves no room after "
                f"{len(opening.tokens)} tokens"
            )
        if len(opening.tokens) >= self.limits.max_context:
            raise LimitExceededError(
                f"the prompt has {len(opening.tokens)} tokens, the draft service takes fewer "
                f"than {self.limits.max_context}"
            )
        if opening.limits.lookahead > self.limits.max_lookahead:
            raise LimitExceededError(
                f"lookahead is {opening.limits.lookahead}: ask for "
                f"{self.limits.max_lookahead} or less"
            )


def _num_computed(outcome: Outcome) -> int:
    return 0 if outcome is None or isinstance(outcome, AmusdError) else outcome.num_computed


def _settle(task: _Task, outcome: Outcome) -> None:
    if isinstance(outcome, AmusdError):
        fail(task, outcome)
    elif isinstance(outcome, Drafted):
        task.session.extend(outcome.tokens, outcome.source)
        _send(task)


def _resume(tasks: list[_Task]) -> None:
    """Let sessions draft that have waited for memory."""
    for task in tasks:
        task.session.resume()


def _send(task: _Task) -> None:
    """Propose what is ready, with the time spent since the last proposal."""
    if task.slot is None:
        task.session.extend(())  # so that nobody waits for a session that itself waits for memory
    while (run := task.session.take_run()) is not None:
        task.emit(
            Proposal(
                run.epoch,
                run.position,
                run.tokens,
                task.draft_seconds,
                len(task.steps),
                run.source,
                task.device_seconds,
                tuple(task.steps),
            )
        )
        task.draft_seconds = task.device_seconds = 0.0
        task.steps.clear()
