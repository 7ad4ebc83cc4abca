"""Verify loop: all sessions of a verify service. It belongs to the engine thread.

Every pass takes the sessions whose turn it is, and for each of them whatever has been proposed
since its last pass. Long prompts are read in pieces, so that other sessions get their turns.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from amusd.core.errors import (
    AmusdError,
    DuplicateSessionError,
    InvalidInputError,
    LimitExceededError,
)
from amusd.core.events import Forward, Verdict
from amusd.core.model import ServiceLimits
from amusd.core.verify_session import VerifySession
from amusd.engine.interface import Engine, Feed

Emit = Callable[[Verdict | AmusdError], None]


@dataclass(frozen=True, slots=True)
class VerifyOpening:
    """What a session is opened with."""

    session_id: str
    tokens: list[int]
    max_position: int
    epoch: int = 0
    vocabulary_fingerprint: str = ""


@dataclass(slots=True)
class _Task:
    """An open session, its slot, and the time its prompt has taken so far."""

    session: VerifySession
    slot: int
    emit: Emit
    max_checked: int
    prefill_seconds: float = 0.0
    failed: bool = False


class VerifyWorker:
    """Verifies for all open sessions in turn."""

    def __init__(self, engine: Engine, limits: ServiceLimits, prefill_tokens: int) -> None:
        """Verify with ``engine`` within ``limits``, ``prefill_tokens`` of a prompt a pass."""
        self.engine = engine
        self.limits = limits
        self._prefill_tokens = prefill_tokens
        self._tasks: dict[str, _Task] = {}

    @property
    def num_sessions(self) -> int:
        """Number of open sessions."""
        return len(self._tasks)

    def open(self, opening: VerifyOpening, emit: Emit) -> None:
        """Open a session whose verdicts, or the error that ends it, go to ``emit``."""
        self._check(opening)
        session = VerifySession(
            opening.tokens, opening.max_position, self.limits.max_lookahead, opening.epoch
        )
        slot = self.engine.open(opening.max_position)
        self._tasks[opening.session_id] = _Task(session, slot, emit, self.limits.max_lookahead)

    def offer(self, session_id: str, proposals: Forward) -> None:
        """Give an open session tokens to check; an error ends the session."""
        task = self._tasks[session_id]
        if task.failed:
            return
        try:
            self.engine.description.check_tokens(proposals.tokens)
            task.session.offer(proposals.epoch, proposals.position, proposals.tokens)
            most = self.limits.max_lookahead
            task.max_checked = min(proposals.max_checked or most, most)
        except AmusdError as error:
            _fail(task, error)

    def close(self, session_id: str) -> None:
        """End an open session and free its slot."""
        self.engine.close(self._tasks.pop(session_id).slot)

    def step(self) -> bool:
        """Run one pass for the sessions whose turn it is; return whether there was one."""
        due = (
            (name, task)
            for name, task in self._tasks.items()
            if task.session.is_due and not task.failed
        )
        batch = list(itertools.islice(due, self.engine.max_batch))
        if not batch:
            return False
        for name, task in batch:  # to the end of the queue
            del self._tasks[name]
            self._tasks[name] = task
        self._run([task for _, task in batch])
        return True

    def _run(self, batch: list[_Task]) -> None:
        feeds = [self._feed(task) for task in batch]
        started = time.perf_counter()
        try:
            outputs = self.engine.run(feeds)
        except AmusdError as error:
            for task in batch:
                _fail(task, error)
            return
        # A shared pass is shared time.
        seconds = (time.perf_counter() - started) / len(batch)
        for task, feed, predictions in zip(batch, feeds, outputs, strict=True):
            if feed.num_outputs:
                self._settle(task, predictions, seconds)
            else:
                task.prefill_seconds += seconds

    def _feed(self, task: _Task) -> Feed:
        """Return the next piece of the prompt, or the last final token and what to check."""
        session = task.session
        unread = session.tokens_from(self.engine.length(task.slot))
        if len(unread) > self._prefill_tokens:
            return Feed(task.slot, unread[: self._prefill_tokens], num_outputs=0)
        checking = session.begin_pass(task.max_checked)
        return Feed(task.slot, [*unread, *checking], num_outputs=len(checking) + 1)

    def _settle(self, task: _Task, predictions: list[int], seconds: float) -> None:
        verdict = task.session.end_pass(predictions, task.prefill_seconds + seconds)
        task.prefill_seconds = 0.0
        # The verify model's own next token has not been through the model yet.
        self.engine.truncate(task.slot, task.session.verified_position - 1)
        task.emit(verdict)

    def _check(self, opening: VerifyOpening) -> None:
        if opening.session_id in self._tasks:
            raise DuplicateSessionError(
                f"session {opening.session_id!r} is open already: choose another id"
            )
        model = self.engine.description
        theirs = opening.vocabulary_fingerprint
        if theirs and theirs != model.vocabulary.fingerprint:
            raise InvalidInputError(
                f"the session's vocabulary is not that of {model.name}: the verify model has "
                "changed, restart the orchestrator"
            )
        self.engine.description.check_tokens(opening.tokens)
        if opening.max_position > self.limits.max_context:
            raise LimitExceededError(
                f"max_position is {opening.max_position}: the verify service takes up to "
                f"{self.limits.max_context} tokens"
            )
        if len(self._tasks) >= self.limits.max_sessions:
            raise LimitExceededError(
                f"{self.limits.max_sessions} sessions are open: try again later, or raise "
                "--max-sessions"
            )


def _fail(task: _Task, error: AmusdError) -> None:
    """End a session with an error; its stream closes it then, so that its id stays taken."""
    task.failed = True
    task.emit(error)
