"""A model without weights whose agreement and step times are dialled in.

Its next token is a hash of the position and the last two tokens, so that it depends on the
context as a real one does: after a rollback the continuation is another. A draft of the same
seed writes the same token at a share ``agreement`` of contexts. With a ``period`` its text repeats
itself every so many tokens instead, whatever stands before them. Passes take their time asleep,
so two of them on one machine behave like two devices.
"""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from amusd.engine.interface import (
    DEFAULT_OPTIONS,
    EngineOptions,
    Numerics,
    ScheduledSequence,
    WeightFormat,
)
from amusd.engine.kv.cache_manager import KVCacheManager
from amusd.fleet.model_description import BYTES_TOKENIZER, SYNTHETIC, CacheUsage, ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.errors import InvalidInputError

_NO_LIMIT = 1 << 40


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """A synthetic model: ``synthetic:agreement=0.75,pass_ms=20`` on the command line.

    ``pass_ms`` is the time of a pass over one token, ``row_ms`` that of each further token;
    ``batch`` is the most sessions that share a pass; a ``period`` of 0 repeats nothing.
    ``memory`` is the room for keys and values of all sessions, in tokens; 0: without limit.
    """

    vocabulary: int = 256
    seed: int = 0
    agreement: float = 1.0
    pass_ms: float = 0.0
    row_ms: float = 0.0
    context: int = 8192
    batch: int = 1
    period: int = 0
    memory: int = 0

    @classmethod
    def parse(cls, name: str) -> "SyntheticModel":
        """Read ``synthetic[:key=value,...]``.

        Raises:
            InvalidInputError: an unknown key, or a value of the wrong kind or range.
        """
        values: dict[str, int | float] = {}
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        for part in filter(None, name.removeprefix(SYNTHETIC).removeprefix(":").split(",")):
            key, _, text = part.partition("=")
            if key not in kinds:
                raise InvalidInputError(
                    f"unknown setting {key!r} of a synthetic model: use {', '.join(kinds)}"
                )
            try:
                values[key] = int(text) if kinds[key] is int else float(text)
            except ValueError:
                raise InvalidInputError(f"setting {key}={text!r} is not a number") from None
        model = cls(**values)  # type: ignore[arg-type]
        if not 0.0 <= model.agreement <= 1.0:
            raise InvalidInputError(f"agreement is {model.agreement}: use 0 to 1")
        if model.vocabulary < 2 or model.batch < 1 or model.context < 2:
            raise InvalidInputError("vocabulary and context need 2 or more, batch 1 or more")
        if model.pass_ms < 0 or model.row_ms < 0:
            raise InvalidInputError("pass_ms and row_ms need 0 or more")
        if model.period < 0 or model.memory < 0:
            raise InvalidInputError("period and memory need 0 or more")
        return model

    @property
    def fingerprint(self) -> str:
        """A hash of the settings that change what it writes, 32 hexadecimal digits."""
        settings = (self.vocabulary, self.seed, self.agreement, self.period)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:32]

    def next_token(self, tokens: Sequence[int]) -> int:
        """Return the token this model writes after ``tokens``."""
        context = f"{self.seed}/{len(tokens)}/{tuple(tokens[-2:])}"
        if self.period:
            context = f"{self.seed}/{len(tokens) % self.period}"
        digest = hashlib.blake2b(context.encode(), digest_size=16).digest()
        token = int.from_bytes(digest[:8], "big") % self.vocabulary
        chance = int.from_bytes(digest[8:], "big") / 2**64
        if chance < self.agreement:
            return token
        return (token + 1) % self.vocabulary


class SyntheticEngine:
    """Passes of a synthetic model; holds tokens where others hold keys and values."""

    def __init__(
        self,
        model: SyntheticModel,
        name: str = SYNTHETIC,
        options: EngineOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Serve ``model`` under ``name``; of the options only the reuse of prefixes counts."""
        self._model = model
        self._slots: KVCacheManager[list[int]] = KVCacheManager(
            model.memory or _NO_LIMIT,
            model.context,
            allocate=lambda capacity: [],
            copy=_copy if options.reuse_prefixes else None,
        )
        self.max_batch = model.batch
        self.description = ModelDescription(
            name=name,
            device="cpu",
            dtype="none",
            num_parameters=0,
            context_length=model.context,
            output_size=model.vocabulary,
            vocabulary=Vocabulary.of([str(token) for token in range(model.vocabulary)]),
            tokenizer=BYTES_TOKENIZER if model.vocabulary >= 256 else "",
            numerics=Numerics.EXACT.value,
            weight_format=WeightFormat.PLAIN.value,
            weights_fingerprint=model.fingerprint,
            runner=SYNTHETIC,
            runner_reason="the model has no weights and computes nothing",
        )

    @property
    def num_open(self) -> int:
        """Number of open slots."""
        return len(self._slots)

    @property
    def usage(self) -> CacheUsage:
        """How much memory is in use, as if tokens were keys and values."""
        return self._slots.usage

    def open(self, capacity: int) -> int:
        """Return a new empty slot for at most ``capacity`` tokens."""
        return self._slots.open(capacity)

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return self._slots.length(slot)

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Take over what another slot holds of the beginning of ``tokens``, but the last one."""
        return self._slots.reuse(slot, tokens)

    def run(self, feeds: Sequence[ScheduledSequence]) -> list[list[int]]:
        """Answer each feed, and take the time that a pass over all of them takes."""
        started = time.perf_counter()
        outputs = [self._run_one(feed) for feed in feeds]
        num_rows = sum(len(feed.tokens) for feed in feeds)
        pass_seconds = (self._model.pass_ms + self._model.row_ms * (num_rows - 1)) / 1e3
        remaining = started + pass_seconds - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)
        return outputs

    def truncate(self, slot: int, length: int) -> None:
        """Forget what the slot holds beyond ``length`` tokens."""
        del self._slots[slot][length:]
        self._slots.truncate(slot, length)

    def close(self, slot: int) -> None:
        """Free the slot."""
        self._slots.close(slot)

    def _run_one(self, feed: ScheduledSequence) -> list[int]:
        self._slots.extend(feed.slot, feed.tokens, feed.is_prompt)
        held = self._slots[feed.slot]
        outputs = []
        first_output = len(feed.tokens) - feed.num_outputs
        for index, token in enumerate(feed.tokens):
            held.append(token)
            if index >= first_output:
                outputs.append(self._model.next_token(held))
        return outputs


def _copy(donor: list[int], target: list[int], length: int) -> None:
    target[:] = donor[:length]
