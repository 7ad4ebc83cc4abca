"""A sequence: what a service knows of one session while it is open.

Pure: no torch, grpc, asyncio or clock. The engine thread owns every sequence.

Intervals, for C computed tokens and n tokens in all:

    [0 ......... C)[C ........... n)
     in the KV cache to be computed
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from amusd.protocol.errors import AmusdError
from amusd.protocol.events import DeviceTime
from amusd.sampling.parameters import GREEDY, SequenceSampling

Send = Callable[[Any], None]
"""Sends a message, or the error that ends the session, to the session's stream."""


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """What the batches of a session cost since its last message.

    ``seconds`` is the whole time of its ``num_batches`` batches, ``share_seconds`` the session's
    share of it, and of batches that drafted its branches. ``times`` says when the batches of the
    session itself ran, if it records a timeline.
    """

    seconds: float = 0.0
    share_seconds: float = 0.0
    num_batches: int = 0
    times: tuple[DeviceTime, ...] = ()


@dataclass(slots=True)
class BatchClock:
    """Adds up the batches of one session between two of its messages."""

    records_times: bool = False
    _seconds: float = 0.0
    _share_seconds: float = 0.0
    _num_batches: int = 0
    _times: list[DeviceTime] = field(default_factory=list)

    def add(self, started_unix_nanos: int, seconds: float, share_seconds: float) -> None:
        """Count a batch that took ``seconds``, ``share_seconds`` of it for this session."""
        self._seconds += seconds
        self._share_seconds += share_seconds
        self._num_batches += 1
        if self.records_times:
            self._times.append(DeviceTime(started_unix_nanos, seconds))

    def add_branch(self, share_seconds: float) -> None:
        """Count the share of a batch that branches of this session took."""
        self._share_seconds += share_seconds

    def take(self) -> BatchTimes:
        """Return the sums and start again."""
        times = BatchTimes(
            self._seconds, self._share_seconds, self._num_batches, tuple(self._times)
        )
        self._seconds = self._share_seconds = 0.0
        self._num_batches = 0
        self._times.clear()
        return times


@dataclass(slots=True, eq=False)
class Sequence(ABC):
    """One session on a service: its tokens, its place in the KV cache, and its stream.

    ``capacity`` is the number of tokens that the KV cache reserves for it. ``slot`` is its handle
    there; None while the sequence waits for memory. ``sampling`` says how its tokens are chosen.
    ``num_cached_tokens`` of its prompt were copied from other sequences.
    """

    session_id: str
    num_prompt_tokens: int
    capacity: int
    send: Send
    clock: BatchClock
    sampling: SequenceSampling = GREEDY
    slot: int | None = None
    num_cached_tokens: int = 0
    has_failed: bool = False

    @property
    @abstractmethod
    def tokens(self) -> list[int]:
        """The tokens to compute, known ones only; not to be changed by the caller."""

    @property
    @abstractmethod
    def is_due(self) -> bool:
        """Whether it wants a part in the next batch; there is a token to compute then."""

    @property
    def owner(self) -> "Sequence":
        """The sequence of the session that this one belongs to: itself, or that of its branch."""
        return self

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether the tokens of its prompt get log-probabilities."""
        return self.sampling.logprobs is not None and self.sampling.logprobs.has_prompt

    @property
    def is_runnable(self) -> bool:
        """Whether it can take part in a batch at all."""
        return self.slot is not None and not self.has_failed

    def begin_batch(self) -> tuple[int, ...]:
        """Return the proposed tokens that the batch checks behind ``tokens``.

        Called when a batch computes the last of ``tokens``.
        """
        return ()

    def fail(self, error: AmusdError) -> None:
        """End the session with an error. Its id stays taken until its stream has closed."""
        self.has_failed = True
        self.send(error)
