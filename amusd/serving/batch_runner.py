"""Runs batches on an engine, and finds the sequences that make a pass fail.

Rules of this file
- An exception of a pass, of any type, ends only the sessions that cause it. The batch runs again
  in halves, and these in halves, until a pass over one sequence fails.
- A pass that fails leaves the KV cache as it was. The KV cache of a sequence that ends by an
  unexpected exception is dropped, so that no other sequence reuses it.
- An exception is not kept: its traceback would keep the memory of its pass from being freed.
"""

import logging
import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from amusd.engine.interface import Engine, Outcome, ScheduledSequence
from amusd.observe.pass_listener import OnPass, PassReport, ignore_pass
from amusd.protocol.errors import AmusdError, InvalidInputError
from amusd.serving.engine_health import EngineHealth
from amusd.serving.scheduler import Scheduled, divide
from amusd.serving.sequence import Sequence
from amusd.serving.session_fault import EXITS, session_error

log = logging.getLogger(__name__)

SequenceT = TypeVar("SequenceT", bound=Sequence)


class BatchRunner(Generic[SequenceT]):
    """Runs the batches of one engine; for its engine thread."""

    def __init__(self, engine: Engine, health: EngineHealth, on_pass: OnPass = ignore_pass) -> None:
        """Report passes to ``health``, and those that succeed to ``on_pass``."""
        self._engine = engine
        self._health = health
        self._on_pass = on_pass
        self._has_logged = False  # one traceback a batch, however often it runs again

    def run(self, batch: list[Scheduled[SequenceT]]) -> list[Outcome]:
        """Return the outcome of each sequence of a batch, and count its time."""
        self._has_logged = False
        outcomes = self._attempt(batch)
        if isinstance(outcomes, _Failure):
            has_failed = outcomes.is_unexpected
            outcomes = self._isolate(batch, outcomes)
        else:
            has_failed = self._drop_refused(batch, outcomes)
        if has_failed:
            self._health.batch_failed()
        return outcomes

    def test(self, num_tokens: int) -> None:
        """Run a pass over a text of no session, and report to ``health`` whether it succeeds."""
        engine = self._engine
        fault = ""
        try:
            slot = engine.open(num_tokens)
            try:
                self._test(slot, num_tokens)
            finally:
                engine.truncate(slot, 0)  # so that its KV cache is not retained
                engine.close(slot)
        except EXITS:
            raise
        except BaseException as error:
            fault = _in_one_line(error)
            if fault != self._health.fault:
                log.exception("the test of the engine failed")
        self._health.tested(fault)

    def _test(self, slot: int, num_tokens: int) -> None:
        started = time.perf_counter()
        self._health.pass_began()
        [outcome] = self._engine.run([ScheduledSequence(slot, [0] * num_tokens, 1)])
        if isinstance(outcome, AmusdError):
            raise outcome
        self._health.pass_ended(time.perf_counter() - started)

    def _attempt(self, batch: list[Scheduled[SequenceT]]) -> "list[Outcome] | _Failure":
        """Run one pass over a batch and count its time; an exception leaves the KV cache as is."""
        lengths = [self._engine.length(_slot(one.sequence)) for one in batch]
        started, started_unix_nanos = time.perf_counter(), time.time_ns()
        self._health.pass_began()
        failure = None
        try:
            outcomes = list(self._engine.run([_scheduled(one) for one in batch]))
            if len(outcomes) != len(batch):
                raise RuntimeError(f"{len(outcomes)} outcomes of {len(batch)} sequences")
        except EXITS:
            raise
        except BaseException as error:
            failure = self._failed(error, len(batch))
        if failure is not None:
            for one, length in zip(batch, lengths, strict=True):
                self._engine.truncate(_slot(one.sequence), length)
            return failure
        seconds = time.perf_counter() - started
        report = _count(batch, started_unix_nanos, seconds)
        if all(_is_fault(outcome) for outcome in outcomes):
            self._health.pass_failed()
        else:
            self._health.pass_ended(seconds)
        self._on_pass(report)
        return outcomes

    def _failed(self, error: BaseException, num_sessions: int) -> "_Failure":
        """Return why a pass failed, and log an unexpected exception."""
        if isinstance(error, AmusdError):
            return _Failure(error.with_traceback(None), is_unexpected=False)
        if not self._has_logged:
            log.error("a pass failed; sessions in it: %d", num_sessions, exc_info=error)
            self._has_logged = True
        self._health.pass_failed()
        return _Failure(session_error(error, "computing"), is_unexpected=True)

    def _isolate(self, batch: list[Scheduled[SequenceT]], failure: "_Failure") -> list[Outcome]:
        """Run a batch that failed again in halves; return the outcome of each sequence."""
        if len(batch) == 1:
            sequence = batch[0].sequence
            if failure.is_unexpected:
                log.error("session %s ends: %s", sequence.session_id, failure.error)
                self.drop(sequence)
            return [failure.error]
        middle = len(batch) // 2
        found: list[Outcome] = []
        for half in (batch[:middle], batch[middle:]):
            outcomes = self._attempt(half)
            if isinstance(outcomes, _Failure):
                found += self._isolate(half, outcomes)
            else:
                self._drop_refused(half, outcomes)
                found += outcomes
        return found

    def _drop_refused(self, batch: list[Scheduled[SequenceT]], outcomes: list[Outcome]) -> bool:
        """Drop the KV cache of sequences that a pass has no tokens for.

        Return whether the engine is to blame for any of them, not the request.
        """
        for one, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, AmusdError):
                level = logging.ERROR if _is_fault(outcome) else logging.INFO
                log.log(level, "session %s ends: %s", one.sequence.session_id, outcome)
                self.drop(one.sequence)
        return any(_is_fault(outcome) for outcome in outcomes)

    def drop(self, sequence: Sequence) -> None:
        """Drop the KV cache of a sequence that ends, so that no other sequence reuses it."""
        self._engine.truncate(_slot(sequence), 0)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a pass over a batch failed. ``is_unexpected``: not by an error of this project."""

    error: AmusdError
    is_unexpected: bool


def _count(
    batch: list[Scheduled[SequenceT]], started_unix_nanos: int, seconds: float
) -> PassReport:
    """Count the time of a pass for each session in it; branches count for their session."""
    sizes = [len(one.tokens) for one in batch]
    num_branch_tokens, branch_seconds = 0, 0.0
    for one, size, share in zip(batch, sizes, divide(seconds, sizes), strict=True):
        owner = one.sequence.owner
        if owner is one.sequence:
            owner.clock.add(started_unix_nanos, seconds, share)
        else:
            owner.clock.add_branch(share)
            num_branch_tokens += size
            branch_seconds += share
    num_sessions = len({one.sequence.owner for one in batch})
    return PassReport(seconds, num_sessions, sum(sizes), num_branch_tokens, branch_seconds)


def _is_fault(outcome: Outcome) -> bool:
    """Whether an outcome is an error that the request has not caused."""
    return isinstance(outcome, AmusdError) and not isinstance(outcome, InvalidInputError)


def _scheduled(one: Scheduled[SequenceT]) -> ScheduledSequence:
    return ScheduledSequence(
        _slot(one.sequence), one.tokens, one.num_outputs, one.is_prefill, one.targets
    )


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None  # the scheduler picks no other
    return sequence.slot


def _in_one_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
