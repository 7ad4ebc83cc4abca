"""Verify loop: all sessions of a verify service. It belongs to the engine thread.

Sessions join and leave between passes. A pass takes as many of those whose turn it is as the
engine does, and for each of them whatever has been proposed since its last pass. Prompts are read
in pieces beside them, so that nobody waits for a long one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from amusd.engine.interface import Engine, ScheduledSequence
from amusd.fleet.model_description import ServiceLimits
from amusd.observe.pass_listener import OnPass, ignore_pass
from amusd.protocol.errors import AmusdError, InvalidInputError, LimitExceededError
from amusd.protocol.events import DeviceTime, Forward, Verdict
from amusd.protocol.verify_session import VerifySession
from amusd.serving.chunked_prefill import PromptReader, run_pass
from amusd.serving.waiting_queue import Sessions, fail, shares, slot_of

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
    """A session, its slot, and what has been spent on it and saved since its last verdict."""

    session: VerifySession
    num_prompt: int
    emit: Emit
    max_checked: int
    slot: int | None = None
    pass_seconds: float = 0.0
    device_seconds: float = 0.0
    passes: list[DeviceTime] = field(default_factory=list)
    num_cached: int = 0
    failed: bool = False

    def tell(self, error: AmusdError) -> None:
        """Send the error that ends the session."""
        self.emit(error)


class VerifyWorker:
    """Verifies for all open sessions, several in one pass."""

    def __init__(
        self,
        engine: Engine,
        limits: ServiceLimits,
        prefill_tokens: int,
        reuse_prefixes: bool = True,
        on_pass: OnPass = ignore_pass,
    ) -> None:
        """Verify with ``engine`` within ``limits``, ``prefill_tokens`` of prompts a pass.

        ``on_pass`` is told of each pass: its seconds, and how many sessions shared it.
        """
        self.engine = engine
        self.limits = limits
        self._on_pass = on_pass
        self._reader = PromptReader(engine, prefill_tokens, reuse_prefixes)
        self._sessions: Sessions[_Task] = Sessions(engine, limits)

    @property
    def num_sessions(self) -> int:
        """Number of open sessions."""
        return self._sessions.num_open

    @property
    def num_waiting(self) -> int:
        """Number of sessions that wait for memory."""
        return self._sessions.num_waiting

    def open(self, opening: VerifyOpening, emit: Emit) -> None:
        """Open a session whose verdicts, or the error that ends it, go to ``emit``.

        Without memory it waits in line; it takes proposals all the same.
        """
        self._check(opening)
        session = VerifySession(
            opening.tokens, opening.max_position, self.limits.max_lookahead, opening.epoch
        )
        task = _Task(session, len(opening.tokens), emit, self.limits.max_lookahead)
        self._sessions.add(opening.session_id, task, opening.max_position)

    def offer(self, session_id: str, proposals: Forward) -> None:
        """Give a session tokens to check; an error ends the session."""
        task = self._sessions[session_id]
        if task.failed:
            return
        try:
            self.engine.description.check_tokens(proposals.tokens)
            task.session.offer(proposals.epoch, proposals.position, proposals.tokens)
            most = self.limits.max_lookahead
            task.max_checked = min(proposals.max_checked or most, most)
        except AmusdError as error:
            fail(task, error)

    def give_up(self, session_id: str) -> None:
        """End a session with an error if it still waits for memory."""
        self._sessions.give_up(session_id)

    def close(self, session_id: str) -> None:
        """End a session and free its slot, for those who wait."""
        self._sessions.remove(session_id)

    def step(self) -> bool:
        """Run one pass for the sessions whose turn it is; return whether there was one."""
        started, started_nanos = time.perf_counter(), time.time_ns()
        batch: list[tuple[_Task, ScheduledSequence]] = []
        self._reader.begin_pass()
        for task in self._sessions.due(lambda task: task.session.is_due):
            feed = self._feed(task)
            if feed is not None:
                batch.append((task, feed))
            if len(batch) == self.engine.max_batch:
                break
        if not batch:
            return False
        self._sessions.took_turn(task for task, _ in batch)
        self._run(batch, started, started_nanos)
        return True

    def _run(
        self, batch: list[tuple[_Task, ScheduledSequence]], started: float, started_nanos: int
    ) -> None:
        feeds = [feed for _, feed in batch]
        try:
            outputs = run_pass(self.engine, feeds)
        except AmusdError as error:
            for task, _ in batch:
                fail(task, error)
            return
        seconds = time.perf_counter() - started
        self._on_pass(seconds, len(batch))
        parts = shares(seconds, [len(feed.tokens) for feed in feeds])
        for (task, feed), predictions, part in zip(batch, outputs, parts, strict=True):
            task.pass_seconds += seconds
            task.device_seconds += part
            task.passes.append(DeviceTime(started_nanos, seconds))
            if feed.num_outputs:
                self._settle(task, predictions)

    def _feed(self, task: _Task) -> ScheduledSequence | None:
        """Return a piece of the prompt, or what is final and unread and what to check after it.

        None: the prompt has to wait for another pass.
        """
        slot = slot_of(task)
        piece = self._reader.next_piece(slot, task.session.tokens, task.num_prompt)
        task.num_cached += piece.num_cached
        if not piece.tokens:
            return None
        if not piece.is_last:
            return ScheduledSequence(slot, piece.tokens, num_outputs=0, is_prompt=piece.is_prompt)
        checking = task.session.begin_pass(task.max_checked)
        tokens = [*piece.tokens, *checking]
        return ScheduledSequence(
            slot, tokens, num_outputs=len(checking) + 1, is_prompt=piece.is_prompt
        )

    def _settle(self, task: _Task, predictions: list[int]) -> None:
        verdict = task.session.end_pass(
            predictions,
            task.pass_seconds,
            task.device_seconds,
            task.num_cached,
            tuple(task.passes),
        )
        task.pass_seconds = task.device_seconds = 0.0
        task.num_cached = 0
        task.passes.clear()
        # The verify model's own next token has not been through the model yet.
        self.engine.truncate(slot_of(task), task.session.verified_position - 1)
        task.emit(verdict)

    def _check(self, opening: VerifyOpening) -> None:
        self._sessions.check_new(opening.session_id)
        model = self.engine.description
        theirs = opening.vocabulary_fingerprint
        if theirs and theirs != model.vocabulary.fingerprint:
            raise InvalidInputError(
                f"the session's vocabulary is not that of {model.name}: the verify model has "
                "changed, restart the orchestrator"
            )
        model.check_tokens(opening.tokens)
        if opening.max_position > self.limits.max_context:
            raise LimitExceededError(
                f"max_position is {opening.max_position}: the verify service takes up to "
                f"{self.limits.max_context} tokens"
            )
