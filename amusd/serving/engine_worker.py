"""The serving loop that draft and verify service share: schedule, run, settle.

The engine thread owns the worker. What is special in drafting or verifying is its ``Role``.
"""

import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from amusd.engine.interface import Engine, ScheduledSequence
from amusd.fleet.model_description import ServiceLimits
from amusd.observe.pass_listener import OnPass, ignore_pass
from amusd.protocol.errors import AmusdError, UnknownSessionError
from amusd.serving.scheduler import Scheduled, Scheduler, divide
from amusd.serving.sequence import Send, Sequence


class Opening(Protocol):
    """What a session is opened with."""

    @property
    def session_id(self) -> str:
        """Name of the session."""

    @property
    def tokens(self) -> list[int]:
        """The tokens that are final so far."""


SequenceT = TypeVar("SequenceT", bound=Sequence)
OpeningT_contra = TypeVar("OpeningT_contra", bound=Opening, contravariant=True)
EventT_contra = TypeVar("EventT_contra", contravariant=True)


class Role(Protocol[SequenceT, OpeningT_contra, EventT_contra]):
    """What a service does with its sequences beside running batches."""

    def open(self, opening: OpeningT_contra, send: Send) -> SequenceT:
        """Return the sequence of a new session.

        Raises:
            AmusdError: the opening is refused.
        """

    def admitted(self, sequence: SequenceT) -> None:
        """Go on with a sequence that was added: it has memory now, or waits for some."""

    def receive(self, sequence: SequenceT, event: EventT_contra) -> None:
        """Take a message of the session's stream.

        Raises:
            AmusdError: the message ends the session.
        """

    def prepare(self, sequences: list[SequenceT]) -> bool:
        """Do what needs no batch; return whether any message was sent."""

    def settle(self, sequence: SequenceT, predictions: list[int]) -> None:
        """Take the model's next tokens after the last ones of a batch, [num_outputs]."""

    def close(self, sequence: SequenceT) -> None:
        """Drop what the role itself keeps of a sequence."""


class EngineWorker(Generic[SequenceT, OpeningT_contra, EventT_contra]):
    """All sessions of one engine. They join and leave between batches."""

    def __init__(
        self,
        engine: Engine,
        role: Role[SequenceT, OpeningT_contra, EventT_contra],
        limits: ServiceLimits,
        prefill_budget: int,
        reuses_prefixes: bool = True,
        on_pass: OnPass = ignore_pass,
    ) -> None:
        """Run batches of ``engine`` with at most ``prefill_budget`` prompt tokens each.

        ``on_pass`` is called after each batch with its seconds and its number of sessions.
        """
        self.engine = engine
        self.limits = limits
        self.flush: Callable[[], None] = _nothing
        """Hands over the messages sent so far; set by the engine thread."""
        self._role = role
        self._on_pass = on_pass
        self._scheduler: Scheduler[SequenceT] = Scheduler(
            engine, limits, engine.max_batch, prefill_budget, reuses_prefixes
        )

    @property
    def num_sessions(self) -> int:
        """Number of open sessions that have memory."""
        return self._scheduler.num_open

    @property
    def num_waiting(self) -> int:
        """Number of sessions that wait for memory."""
        return self._scheduler.num_waiting

    @property
    def num_left_out(self) -> int:
        """Number of sessions that have memory, but found no place in the last batch."""
        return self._scheduler.num_left_out

    def step(self) -> bool:
        """Run the next batch; return whether there was one."""
        if self._role.prepare(self._scheduler.runnable()):
            self.flush()
        batch = self._scheduler.schedule()
        if not batch:
            return False
        outputs = self._run(batch)
        self._settle(batch, outputs)
        return True

    def open(self, opening: OpeningT_contra, send: Send) -> None:
        """Open a session. Its messages, or the error that ends it, go to ``send``."""
        self._scheduler.check_new(opening.session_id)
        sequence = self._role.open(opening, send)
        self._scheduler.add(sequence)
        self._role.admitted(sequence)

    def receive(self, session_id: str, event: EventT_contra) -> None:
        """Take a message of a session; an error ends the session."""
        sequence = self._scheduler[session_id]
        if sequence.has_failed:
            return
        try:
            self._role.receive(sequence, event)
        except AmusdError as error:
            sequence.fail(error)

    def sequence(self, session_id: str) -> SequenceT:
        """Return an open sequence.

        Raises:
            UnknownSessionError: no session of this id is open.
        """
        sequence = self._scheduler.get(session_id)
        if sequence is None:
            raise UnknownSessionError(
                f"no session {session_id!r} is open here: it has ended, or another replica has it"
            )
        return sequence

    def give_up(self, session_id: str) -> None:
        """End a session with an error if it still waits for memory."""
        for sequence in self._scheduler.give_up(session_id):
            self._role.admitted(sequence)

    def close(self, session_id: str) -> None:
        """End a session and free its memory for the waiting ones."""
        self._role.close(self._scheduler[session_id])
        for sequence in self._scheduler.remove(session_id):
            self._role.admitted(sequence)

    def _run(self, batch: list[Scheduled[SequenceT]]) -> list[list[int]] | AmusdError:
        """Run a batch and count its time; an error leaves the KV cache as it was."""
        lengths = [self.engine.length(_slot(one.sequence)) for one in batch]
        started, started_unix_nanos = time.perf_counter(), time.time_ns()
        outputs: list[list[int]] | AmusdError
        try:
            outputs = self.engine.run(
                [
                    ScheduledSequence(
                        _slot(one.sequence), one.tokens, one.num_outputs, one.is_prefill
                    )
                    for one in batch
                ]
            )
        except AmusdError as error:
            # A later sequence might reuse what a failed batch left behind.
            for one, length in zip(batch, lengths, strict=True):
                self.engine.truncate(_slot(one.sequence), length)
            return error
        seconds = time.perf_counter() - started
        shares = divide(seconds, [len(one.tokens) for one in batch])
        for one, share in zip(batch, shares, strict=True):
            one.sequence.clock.add(started_unix_nanos, seconds, share)
        self._on_pass(seconds, len(batch))
        return outputs

    def _settle(
        self, batch: list[Scheduled[SequenceT]], outputs: list[list[int]] | AmusdError
    ) -> None:
        """Give each sequence its predictions, or the error of its batch."""
        if isinstance(outputs, AmusdError):
            for one in batch:
                one.sequence.fail(outputs)
            return
        for one, predictions in zip(batch, outputs, strict=True):
            if one.num_outputs:
                self._role.settle(one.sequence, predictions)


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None  # the scheduler picks no other
    return sequence.slot


def _nothing() -> None:
    """Messages are sent as they come."""


AnyWorker = EngineWorker[Any, Any, Any]
