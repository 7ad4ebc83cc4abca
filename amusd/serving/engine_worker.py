"""The serving loop that draft and verify service share: schedule, run, settle.

The engine thread owns the worker. What is special in drafting or verifying is its ``Role``.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from amusd.engine.interface import Engine, Outcome
from amusd.fleet.model_description import ServiceLimits
from amusd.observe.pass_listener import OnPass, ignore_pass
from amusd.protocol.errors import AmusdError, UnknownSessionError
from amusd.serving.batch_runner import BatchRunner
from amusd.serving.engine_health import EngineHealth
from amusd.serving.scheduler import Scheduled, Scheduler
from amusd.serving.sequence import Send, Sequence
from amusd.serving.session_fault import end_session, session_error

log = logging.getLogger(__name__)


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

    def fill(self, num_places: int) -> "Iterable[Scheduled[Any]]":
        """Return what else takes part in a batch, in at most ``num_places`` free places."""

    def settle(self, sequence: SequenceT, predictions: list[int]) -> None:
        """Take the model's next tokens after the last ones of a batch, [num_outputs].

        A chunk of a prompt that gets log-probabilities has outputs, too.

        Raises:
            AmusdError: the tokens end the session. Its KV cache is dropped.
        """

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
        health: EngineHealth | None = None,
    ) -> None:
        """Run batches of ``engine`` with at most ``prefill_budget`` prompt tokens each.

        ``on_pass`` is called after each pass. The worker keeps ``health`` up to date.
        """
        self.engine = engine
        self.limits = limits
        self.health = health or EngineHealth()
        self.flush: Callable[[], None] = _nothing
        """Hands over the messages sent so far; set by the engine thread."""
        self._role = role
        self._num_lost_steps = 0
        self._runner: BatchRunner[SequenceT] = BatchRunner(engine, self.health, on_pass)
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
        if self._prepare(self._scheduler.runnable()):
            self.flush()
        batch = self._scheduler.schedule()
        batch += self._role.fill(self.engine.max_batch - len(batch))
        if not batch:
            return False
        self._settle(batch, self._runner.run(batch))
        if self.health.is_suspect:
            self.flush()
            self.test_engine()
        self._num_lost_steps = 0
        return True

    def recover(self, error: Exception) -> None:
        """End all sessions that could have caused ``error`` outside of a pass, and go on.

        After ``max_failed_passes`` such steps in a row the loop itself is broken: it raises.
        """
        self._num_lost_steps += 1
        if self._num_lost_steps >= self.health.settings.max_failed_passes:
            raise error
        log.error("a step failed outside of a pass: its sessions end", exc_info=error)
        self.health.batch_failed()
        for sequence in self._scheduler.runnable():
            sequence.fail(session_error(error, "scheduling"))

    def warm_up(self) -> None:
        """Run a first pass before the service serves: the watchdog learns how long a pass takes.

        Raises:
            AmusdError: the pass failed.
        """
        self.test_engine()
        if self.health.fault:
            raise AmusdError(
                f"the engine cannot run {self.engine.description.name} ({self.health.fault}): the "
                "log says why"
            )

    def test_engine(self) -> None:
        """Run a pass as long as a chunk of a prompt; report its result to ``health``."""
        if not self.engine.description.output_size:
            return  # there is no model
        most = self.engine.usage.max_tokens
        self._runner.test(min(self._scheduler.prefill_budget, self.limits.max_context, most))

    def open(self, opening: OpeningT_contra, send: Send) -> None:
        """Open a session. Its messages, or the error that ends it, go to ``send``."""
        self._scheduler.check_new(opening.session_id)
        sequence = self._role.open(opening, send)
        self._scheduler.add(sequence)
        self._admitted(sequence)

    def receive(self, session_id: str, event: EventT_contra) -> None:
        """Take a message of a session; an error ends the session."""
        sequence = self._scheduler[session_id]
        if sequence.has_failed:
            return
        try:
            self._role.receive(sequence, event)
        except Exception as error:
            end_session(sequence, error, "receiving a message of")

    @property
    def sequences(self) -> list[SequenceT]:
        """All open sequences."""
        return self._scheduler.all()

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
            self._admitted(sequence)

    def close(self, session_id: str) -> None:
        """End a session and free its memory for the waiting ones."""
        try:
            self._role.close(self._scheduler[session_id])
        finally:
            for sequence in self._scheduler.remove(session_id):
                self._admitted(sequence)

    def _admitted(self, sequence: SequenceT) -> None:
        try:
            self._role.admitted(sequence)
        except Exception as error:
            end_session(sequence, error, "opening")

    def _prepare(self, sequences: list[SequenceT]) -> bool:
        """Do what needs no batch; return whether any message was sent."""
        try:
            return self._role.prepare(sequences)
        except Exception:
            log.debug("the preparation of %d sessions failed", len(sequences), exc_info=True)
        for sequence in sequences:
            try:
                self._role.prepare([sequence])
            except Exception as error:
                end_session(sequence, error, "preparing")
        return True

    def _settle(self, batch: list[Scheduled[SequenceT]], outcomes: list[Outcome]) -> None:
        """Give each sequence its predictions, or the error that ends it."""
        for one, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, AmusdError):
                one.sequence.fail(outcome)
            elif one.num_outputs and not one.sequence.has_failed:
                try:
                    self._role.settle(one.sequence, outcome)
                except Exception as error:
                    self._runner.drop(one.sequence)
                    end_session(one.sequence, error, "settling the pass of")


def _nothing() -> None:
    """Messages are sent as they come."""


AnyWorker = EngineWorker[Any, Any, Any]
