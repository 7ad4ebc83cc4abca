"""Drafting loop: all sessions of a draft service. It belongs to the engine thread.

A session gets one step at a time, the sessions take turns, and between two steps the thread
takes advances and rollbacks, so none of them waits for longer than a step.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from amusd.core.draft_session import DraftLimits, DraftSession
from amusd.core.errors import (
    AmusdError,
    DuplicateSessionError,
    InvalidInputError,
    LimitExceededError,
    UnknownSessionError,
)
from amusd.core.events import Advance, Proposal, Rollback
from amusd.core.model import ServiceLimits
from draft_service.drafters import Drafter, DraftRequest

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
    """An open session, its slot, and the time spent since its last proposal."""

    session: DraftSession
    slot: int
    emit: Emit
    draft_seconds: float = 0.0
    num_steps: int = 0
    failed: bool = False


class DraftWorker:
    """Drafts for all open sessions in turn."""

    def __init__(self, drafter: Drafter, limits: ServiceLimits) -> None:
        """Draft with ``drafter`` within ``limits``."""
        self.drafter = drafter
        self.limits = limits
        self._tasks: dict[str, _Task] = {}

    @property
    def num_sessions(self) -> int:
        """Number of open sessions."""
        return len(self._tasks)

    def open(self, opening: DraftOpening, emit: Emit) -> None:
        """Open a session whose proposals, or the error that ends it, go to ``emit``."""
        self._check(opening)
        limits = opening.limits
        capacity = min(limits.max_position, self.limits.max_context)
        session = DraftSession(
            opening.tokens,
            DraftLimits(limits.lookahead, capacity, limits.tokens_per_proposal),
            opening.epoch,
        )
        slot = self.drafter.open(capacity)
        self._tasks[opening.session_id] = _Task(session, slot, emit)

    def advance(self, session_id: str, advance: Advance) -> None:
        """Tell an open session which tokens are final; an error ends the session."""
        task = self._tasks[session_id]
        if task.failed:
            return
        try:
            self.drafter.description.check_tokens(advance.tokens)
            task.session.advance(advance.epoch, advance.position, advance.tokens, advance.lookahead)
        except AmusdError as error:
            _fail(task, error)
            return
        _send(task)

    def rollback(self, session_id: str, rollback: Rollback) -> int:
        """Bring a session back; return how many drafted tokens were dropped."""
        task = self._tasks.get(session_id)
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
        self.drafter.truncate(task.slot, rollback.verified_position - 1)
        _send(task)
        return num_dropped

    def close(self, session_id: str) -> None:
        """End an open session and free its slot."""
        self.drafter.close(self._tasks.pop(session_id).slot)

    def step(self) -> bool:
        """Draft one step for the sessions whose turn it is; return whether there was one."""
        due = (
            (name, task)
            for name, task in self._tasks.items()
            if task.session.room and not task.failed
        )
        batch = list(itertools.islice(due, self.drafter.max_batch))
        if not batch:
            return False
        for name, task in batch:  # to the end of the queue
            del self._tasks[name]
            self._tasks[name] = task
        self._draft([task for _, task in batch])
        return True

    def _draft(self, batch: list[_Task]) -> None:
        requests = [
            DraftRequest(task.slot, task.session.tokens, task.session.room, task.session.sources)
            for task in batch
        ]
        started = time.perf_counter()
        try:
            outcomes = self.drafter.draft(requests)
        except AmusdError as error:
            for task in batch:
                _fail(task, error)
            return
        # A shared step is shared time.
        seconds = (time.perf_counter() - started) / len(batch)
        for task, drafted in zip(batch, outcomes, strict=True):
            task.draft_seconds += seconds
            task.num_steps += 1
            if drafted is not None:
                task.session.extend(drafted.tokens, drafted.source)
                _send(task)

    def _check(self, opening: DraftOpening) -> None:
        model = self.drafter.description
        if opening.session_id in self._tasks:
            raise DuplicateSessionError(
                f"session {opening.session_id!r} is open already: choose another id"
            )
        ours, theirs = model.vocabulary.fingerprint, opening.vocabulary_fingerprint
        if ours and theirs and ours != theirs:
            raise InvalidInputError(
                f"the vocabulary of {model.name} is not the verify model's: pair models that "
                "share their tokenizer"
            )
        self.drafter.description.check_tokens(opening.tokens)
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
        if len(self._tasks) >= self.limits.max_sessions:
            raise LimitExceededError(
                f"{self.limits.max_sessions} sessions are open: try again later, or raise "
                "--max-sessions"
            )


def _send(task: _Task) -> None:
    """Propose what is ready, with the time spent since the last proposal."""
    while (run := task.session.take_run()) is not None:
        task.emit(
            Proposal(
                run.epoch,
                run.position,
                run.tokens,
                task.draft_seconds,
                task.num_steps,
                run.source,
            )
        )
        task.draft_seconds = 0.0
        task.num_steps = 0


def _fail(task: _Task, error: AmusdError) -> None:
    """End a session with an error; its stream closes it then, so that its id stays taken."""
    task.failed = True
    task.emit(error)
