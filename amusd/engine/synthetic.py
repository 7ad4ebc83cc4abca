"""A synthetic model without weights. Its agreement and pass times are settings.

The next token is a hash of the position and the last two tokens. So it depends on the context, and
the continuation changes after a rollback, as with a real model. A draft of the same seed writes the
same token in a share ``agreement`` of all contexts. With a ``period`` the text instead repeats
itself after that many tokens, for any context. A pass sleeps for its time, so two engines on one
machine behave like two devices.

Sampled sequences have logits: a hash of the context, too, with that token ahead. A draft has the
same logits where it agrees; elsewhere its own token and the verify model's are exchanged.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amusd.engine.interface import (
    DEFAULT_OPTIONS,
    EngineOptions,
    Numerics,
    Outcome,
    ScheduledSequence,
    WeightFormat,
)
from amusd.engine.kv.cache_manager import KVCacheManager
from amusd.engine.sampling.noise import gumbel_of
from amusd.engine.sampling.reference_sampler import Sampled, sample_row
from amusd.engine.sampling.sequence_sampler import SequenceSampler, open_sampler
from amusd.fleet.model_description import BYTES_TOKENIZER, SYNTHETIC, CacheUsage, ModelDescription
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import GREEDY, SequenceSampling, TokenLogprobs

_NO_LIMIT = 1 << 40


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """A synthetic model: ``synthetic:agreement=0.75,pass_ms=20`` on the command line.

    ``pass_ms`` is the time of a pass over one token, ``row_ms`` the time of each further token.
    ``batch`` is the most sequences in a batch. A ``period`` of 0 repeats nothing. ``memory`` is
    the limit on the KV cache of all sequences, in tokens; 0: no limit.

    Beside its token, a draft gives ``alternatives`` next-best ones. Where its token is wrong, the
    verify model's is among them with the probability ``second_chance``, and each rank is half as
    likely as the one before.

    ``spread`` makes contexts differ: in a share ``agreement`` of them the draft's token is right
    with the probability ``agreement + spread * (1 - agreement)``, in the others with ``(1 - spread)
    * agreement``. The mean stays ``agreement``. The draft knows the probability of each context.
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
    alternatives: int = 0
    second_chance: float = 0.8
    spread: float = 0.0

    @classmethod
    def parse(cls, name: str) -> "SyntheticModel":
        """Parse ``synthetic[:key=value,...]``.

        Raises:
            InvalidInputError: a key is unknown, or a value has the wrong type or range.
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
        for key in ("agreement", "second_chance", "spread"):
            if not 0.0 <= getattr(model, key) <= 1.0:
                raise InvalidInputError(f"{key} is {getattr(model, key)}: use 0 to 1")
        if model.vocabulary < 2 or model.batch < 1 or model.context < 2:
            raise InvalidInputError("vocabulary and context need 2 or more, batch 1 or more")
        if not 0 <= model.alternatives < max(1, model.vocabulary // 2):
            raise InvalidInputError("alternatives need 0 to less than half of the vocabulary")
        if not (0 <= model.pass_ms < math.inf and 0 <= model.row_ms < math.inf):  # nor NaN
            raise InvalidInputError("pass_ms and row_ms need 0 or more")
        if model.period < 0 or model.memory < 0:
            raise InvalidInputError("period and memory need 0 or more")
        return model

    @property
    def fingerprint(self) -> str:
        """A hash of the settings that change its tokens, 32 hexadecimal digits."""
        settings = (self.vocabulary, self.seed, self.agreement, self.period, self.spread)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:32]

    def next_token(self, tokens: Sequence[int]) -> int:
        """Return the next token after ``tokens``."""
        return self.next_tokens(tokens)[0]

    def next_best(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that are likeliest next, after the one of ``next_token``."""
        return self.next_tokens(tokens)[1]

    def next_tokens(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """Return the next token after ``tokens``, and the next-best ones."""
        context, size = self._context(tokens), self.vocabulary
        token, chance = self._draw(context)
        others = [(token + 2 + rank) % size for rank in range(self.alternatives)]
        if chance < self._agreement_in(context):
            return token, others
        if others:
            _, share = self._draw(f"rank of {context}")
            if share < self.second_chance:
                # Rank r takes 1 / 2^(r + 1) of the chances, and the last rank what is left.
                rank = int(-math.log2(1 - share / self.second_chance))
                others[min(rank, self.alternatives - 1)] = token
        return (token + 1) % size, others

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after ``tokens``, [vocabulary]; the largest is that of ``next_token``.

        Others are Gumbel numbers of scale 2, so about as few tokens are likely as in text.
        """
        context = self._context(tokens)
        key = int.from_bytes(hashlib.blake2b(context.encode(), digest_size=16).digest(), "big")
        words = np.random.Philox(key=key).random_raw(self.vocabulary)
        values = (2.0 * gumbel_of(words >> np.uint64(32))).astype(np.float32)
        right, own = self._draw(context)[0], self.next_token(tokens)
        _exchange(values, right, int(values.argmax()))
        values[right] += 0.5  # no other one is equal
        _exchange(values, right, own)
        return values

    def probabilities(self, tokens: Sequence[int]) -> list[float]:
        """Return how likely its token and each alternative are right after ``tokens``."""
        agreement = self._agreement_in(self._context(tokens))
        shares = [0.5 ** (rank + 1) for rank in range(self.alternatives)]
        if shares:
            shares[-1] *= 2.0  # the last rank takes what is left
        wrong = (1.0 - agreement) * self.second_chance
        return [agreement, *(wrong * share for share in shares)]

    def _agreement_in(self, context: str) -> float:
        """Return the probability that its token is right in this context."""
        if not self.spread:
            return self.agreement
        _, draw = self._draw(f"spread of {context}")
        is_easy = draw < self.agreement
        return self.agreement + self.spread * (is_easy - self.agreement)

    def _context(self, tokens: Sequence[int]) -> str:
        if self.period:
            return f"{self.seed}/{len(tokens) % self.period}"
        return f"{self.seed}/{len(tokens)}/{tuple(tokens[-2:])}"

    def _draw(self, context: str) -> tuple[int, float]:
        """Return a token and a number of 0 to 1, both by chance."""
        digest = hashlib.blake2b(context.encode(), digest_size=16).digest()
        token = int.from_bytes(digest[:8], "big") % self.vocabulary
        return token, int.from_bytes(digest[8:], "big") / 2**64


def _exchange(values: npt.NDArray[np.float32], first: int, second: int) -> None:
    values[[first, second]] = values[[second, first]]


class SyntheticEngine:
    """Runs batches of a synthetic model. Its KV cache holds the tokens themselves."""

    def __init__(
        self,
        model: SyntheticModel,
        name: str = SYNTHETIC,
        options: EngineOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Run ``model`` under ``name``.

        It uses only ``reuse_prefixes`` and ``is_draft`` of the options.
        """
        self._model = model
        self._is_draft = options.is_draft
        self._samplers: dict[int, SequenceSampler] = {}  # of slots that need one
        self._sampled: dict[int, list[Sampled]] = {}  # of the last batch of each slot
        self._last_sampled: dict[int, Sampled] = {}  # of the last output of each slot
        self._cache: KVCacheManager[list[int]] = KVCacheManager(
            model.memory or _NO_LIMIT,
            model.context,
            allocate=lambda capacity: [],
            copy=_copy if options.reuse_prefixes else None,
        )
        self._alternatives: dict[int, list[int]] = {}
        self._probabilities: dict[int, list[float]] = {}
        self.max_batch = model.batch
        self.num_alternatives = model.alternatives
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
        """Number of open sequences."""
        return len(self._cache)

    @property
    def usage(self) -> CacheUsage:
        """How much of the KV cache is in use."""
        return self._cache.usage

    def prepare(self, sampling: SequenceSampling) -> object:
        """Do nothing: a synthetic model takes no constraint."""

    def open(self, capacity: int, sampling: SequenceSampling = GREEDY) -> int:
        """Return the slot of a new empty sequence for at most ``capacity`` tokens."""
        sampler = open_sampler(sampling, self._model.vocabulary, is_draft=self._is_draft)
        slot = self._cache.open(capacity)
        if sampler is not None:
            self._samplers[slot] = sampler
        return slot

    def length(self, slot: int) -> int:
        """Return how many tokens of the sequence are in the KV cache."""
        return self._cache.length(slot)

    def reuse(self, slot: int, tokens: Sequence[int]) -> int:
        """Reuse the longest cached prefix of ``tokens``, leaving at least one token to compute."""
        held, gained = self._cache.length(slot), self._cache.reuse(slot, tokens)
        if gained and slot in self._samplers:
            self._samplers[slot].extend(tokens[held : held + gained])
        return gained

    def run(self, batch: Sequence[ScheduledSequence]) -> list[Any]:
        """Return the ``Outcome`` of each sequence, after the time of a pass over all of them."""
        started = time.perf_counter()
        outputs: list[Outcome] = [self._run_one(scheduled) for scheduled in batch]
        num_rows = sum(len(scheduled.tokens) for scheduled in batch)
        pass_seconds = (self._model.pass_ms + self._model.row_ms * (num_rows - 1)) / 1e3
        remaining = started + pass_seconds - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)
        return outputs

    def alternatives(self, slot: int) -> Sequence[int]:
        """Return the next-best tokens beside the last output of a sequence, the best first."""
        if slot in self._samplers:
            return self._last(slot).tokens[1:]
        return self._alternatives.get(slot, ())

    def probabilities(self, slot: int) -> Sequence[float]:
        """Return how likely the last output and each alternative are the verify model's token.

        Of a sampled sequence, they are the probabilities that the sampler gives. A model without
        alternatives and without spread knows no probabilities.
        """
        if slot in self._samplers:
            return self._last(slot).probabilities if self.num_alternatives else ()
        return self._probabilities.get(slot, ())

    def logprobs(self, slot: int) -> Sequence[TokenLogprobs]:
        """Return the log-probabilities of a sequence's outputs in its last batch, in order."""
        found = (one.logprobs for one in self._sampled.get(slot, ()))
        return [one for one in found if one is not None]

    def truncate(self, slot: int, length: int) -> None:
        """Drop the sequence's tokens from position ``length`` on."""
        del self._cache[slot][length:]
        self._cache.truncate(slot, length)
        if slot in self._samplers:
            self._samplers[slot].truncate(length)

    def close(self, slot: int) -> None:
        """Close the sequence."""
        for by_slot in (
            self._alternatives,
            self._probabilities,
            self._samplers,
            self._sampled,
            self._last_sampled,
        ):
            by_slot.pop(slot, None)
        self._cache.close(slot)

    def _last(self, slot: int) -> Sampled:
        """Return what the last output of a sampled sequence was."""
        return self._last_sampled.get(slot, Sampled((), ()))

    def _sample(self, scheduled: ScheduledSequence, sampler: SequenceSampler) -> Outcome:
        """Return the tokens of a sequence that is sampled."""
        rows = sampler.append(scheduled)
        held, sampled = self._cache[scheduled.slot], []
        first_output = len(scheduled.tokens) - scheduled.num_outputs
        for index, token in enumerate(scheduled.tokens):
            held.append(token)
            if index >= first_output:
                row = rows[index - first_output]
                found = sample_row(self._model.logits(held), row, None, self.num_alternatives)
                sampled.append(found)
        self._sampled[scheduled.slot] = sampled
        if sampled:
            self._last_sampled[scheduled.slot] = sampled[-1]
        return sampler.outcome([one.tokens[0] for one in sampled])

    def _run_one(self, scheduled: ScheduledSequence) -> Outcome:
        self._cache.extend(scheduled.slot, scheduled.tokens, scheduled.is_prompt)
        sampler = self._samplers.get(scheduled.slot)
        if sampler is not None:
            return self._sample(scheduled, sampler)
        held = self._cache[scheduled.slot]
        outputs: list[int] = []
        others: list[int] = []
        first_output = len(scheduled.tokens) - scheduled.num_outputs
        for index, token in enumerate(scheduled.tokens):
            held.append(token)
            if index >= first_output:
                following, others = self._model.next_tokens(held)
                outputs.append(following)
        if others:
            self._alternatives[scheduled.slot] = others
        if outputs and (others or self._model.spread):
            self._probabilities[scheduled.slot] = self._model.probabilities(held)
        return outputs


def _copy(donor: list[int], target: list[int], length: int) -> None:
    target[:] = donor[:length]
