"""The verify service of a simulation: real verify sessions on a device with given pass times."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from amusd.performance.agreement import RIGHT
from amusd.performance.clocked_device import ClockedDevice
from amusd.performance.deployment import StepSeconds
from amusd.performance.event_queue import EventQueue
from amusd.protocol.events import Forward, Verdict
from amusd.protocol.verify_session import VerifySession


@dataclass(frozen=True, slots=True)
class PassRules:
    """What other systems do in a pass: the model is also compared with measurements of those.

    No pass starts with fewer than ``num_least`` proposals, except at the end of the output. Without
    ``takes_bonus`` a pass over n proposals makes at most n tokens final, not n + 1.
    """

    num_least: int
    takes_bonus: bool

    def is_enough(self, num_waiting: int, num_left: int) -> bool:
        """Whether a pass may start with the proposals that wait, ``num_left`` before the end."""
        return num_waiting >= min(self.num_least, num_left)


class VerifySide:
    """One session on the verify service."""

    def __init__(
        self,
        session: VerifySession,
        end: int,
        most: int,
        send: Callable[[Verdict], None],
        own_rules: PassRules | None = None,
    ) -> None:
        """Check at most ``most`` proposals a pass, up to position ``end``; send verdicts."""
        self.session = session
        self._end = end
        self._rules = own_rules
        self._most = self._max_checked = most
        self._send = send
        self.num_checking = 0

    @property
    def is_due(self) -> bool:
        """Whether the session takes part in the next pass."""
        session = self.session
        if self._rules is None or not session.pending or not session.is_due:
            return session.is_due
        num_left = self._end - session.verified_position
        return self._rules.is_enough(len(session.pending), num_left)

    def offer(self, forward: Forward) -> None:
        """Take tokens to check."""
        self.session.offer(forward.epoch, forward.position, forward.tokens, forward.branches)
        self._max_checked = min(forward.max_checked or self._most, self._most)

    def begin(self) -> int:
        """Begin a pass; return its number of tokens."""
        most = self._max_checked
        if self._rules is not None and not self._rules.takes_bonus:
            # The last proposal is compared with the token behind the others.
            most = min(most, max(0, len(self.session.pending) - 1))
        self.num_checking = len(self.session.begin_pass(most))
        return self.num_checking + 1

    def end(self, seconds: float, num_tokens: int) -> None:
        """Send the verdict of a pass over ``num_tokens`` of all sessions."""
        own = self.num_checking + 1
        predictions = [RIGHT] * own
        self._send(self.session.end_pass(predictions, seconds, seconds * own / num_tokens))


class VerifyDevice(ClockedDevice):
    """All sessions of the verify service: each that is due takes part in the next pass."""

    def __init__(self, queue: EventQueue, pass_seconds: StepSeconds) -> None:
        """Start without sessions."""
        super().__init__(queue, pass_seconds)
        self.sides: list[VerifySide] = []
        self._batch: list[VerifySide] = []
        self._num_tokens = 0

    def offer(self, side: VerifySide, forward: Forward) -> None:
        """Take a message for a session."""
        self.receive(partial(side.offer, forward))

    def _schedule(self) -> int:
        self._batch = [side for side in self.sides if side.is_due]
        self._num_tokens = sum(side.begin() for side in self._batch)
        return self._num_tokens

    def _settle(self, seconds: float) -> None:
        for side in self._batch:
            side.end(seconds, self._num_tokens)
