"""What is special in verifying: the verify service's role in the serving loop.

A batch checks, for each of its sequences, all proposals that have arrived since its last one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from amusd.engine.interface import NO_TOKEN, Engine
from amusd.engine.not_finite import not_finite
from amusd.fleet.model_description import ServiceLimits
from amusd.observe.pass_listener import OnPass, ignore_pass
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.events import Forward
from amusd.protocol.verify_session import VerifySession
from amusd.serving.engine_health import EngineHealth
from amusd.serving.engine_worker import EngineWorker
from amusd.serving.scheduler import Scheduled
from amusd.serving.sequence import BatchClock, Send, Sequence


@dataclass(frozen=True, slots=True)
class VerifyOpening:
    """What a session is opened with."""

    session_id: str
    tokens: list[int]
    max_position: int
    epoch: int = 0
    vocabulary_fingerprint: str = ""
    records_times: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class VerifySequence(Sequence):
    """A sequence that is verified. A batch checks at most ``max_checked`` of its proposals."""

    session: VerifySession
    max_checked: int

    @property
    def tokens(self) -> list[int]:
        """The final tokens."""
        return self.session.tokens

    @property
    def is_due(self) -> bool:
        """Whether there is something to check, or a pass without proposals was asked for."""
        return self.session.is_due

    def begin_batch(self) -> tuple[int, ...]:
        """Return the proposals that the batch checks."""
        return self.session.begin_pass(self.max_checked)


class Verifying:
    """Opens and verifies the sequences of a verify service."""

    def __init__(self, engine: Engine, limits: ServiceLimits) -> None:
        """Verify with ``engine`` within ``limits``."""
        self._engine = engine
        self._limits = limits

    def open(self, opening: VerifyOpening, send: Send) -> VerifySequence:
        """Return the sequence of a new session."""
        self._check(opening)
        most = self._limits.max_lookahead
        return VerifySequence(
            session_id=opening.session_id,
            num_prompt_tokens=len(opening.tokens),
            capacity=opening.max_position,
            send=send,
            clock=BatchClock(opening.records_times),
            session=VerifySession(
                opening.tokens,
                opening.max_position,
                most,
                opening.epoch,
                self._limits.max_branches,
            ),
            max_checked=most,
        )

    def admitted(self, sequence: VerifySequence) -> None:
        """Nothing to do: the first pass is due as soon as there is memory."""

    def receive(self, sequence: VerifySequence, event: Forward) -> None:
        """Take tokens to check."""
        self._engine.description.check_tokens(event.all_tokens)
        sequence.session.offer(event.epoch, event.position, event.tokens, event.branches)
        most = self._limits.max_lookahead
        sequence.max_checked = min(event.max_checked or most, most)

    def prepare(self, sequences: list[VerifySequence]) -> bool:
        """Nothing can be verified without a batch."""
        return False

    def fill(self, num_places: int) -> "Iterable[Scheduled[VerifySequence]]":
        """Return nothing: only sessions are verified."""
        return ()

    def settle(self, sequence: VerifySequence, predictions: list[int]) -> None:
        """Send the verdict on what the batch checked."""
        times = sequence.clock.take()
        verdict = sequence.session.end_pass(
            predictions, times.seconds, times.share_seconds, sequence.num_cached_tokens, times.times
        )
        sequence.num_cached_tokens = 0
        assert sequence.slot is not None  # it took part in a batch
        if verdict.next_token == NO_TOKEN:
            raise not_finite(self._engine.description)
        # The verify model's own next token has not been computed yet.
        self._engine.truncate(sequence.slot, sequence.session.verified_position - 1)
        sequence.send(verdict)

    def close(self, sequence: VerifySequence) -> None:
        """Nothing is kept outside the sequence."""

    def _check(self, opening: VerifyOpening) -> None:
        model = self._engine.description
        theirs = opening.vocabulary_fingerprint
        if theirs and theirs != model.vocabulary.fingerprint:
            raise InvalidInputError(
                f"the session's vocabulary is not that of {model.name}: the verify model has "
                "changed, restart the orchestrator"
            )
        model.check_tokens(opening.tokens)
        if opening.max_position > self._limits.max_context:
            raise InvalidInputError(
                f"max_position is {opening.max_position}: the verify service takes up to "
                f"{self._limits.max_context} tokens"
            )


class VerifyWorker(EngineWorker[VerifySequence, VerifyOpening, Forward]):
    """The serving loop of a verify service."""

    def __init__(
        self,
        engine: Engine,
        limits: ServiceLimits,
        prefill_budget: int,
        reuses_prefixes: bool = True,
        on_pass: OnPass = ignore_pass,
        health: EngineHealth | None = None,
    ) -> None:
        """Verify with ``engine`` within ``limits``."""
        role = Verifying(engine, limits)
        super().__init__(engine, role, limits, prefill_budget, reuses_prefixes, on_pass, health)
