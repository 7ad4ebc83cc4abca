"""A synthetic engine that reports how its sequences are sampled, and gives log-probabilities."""

from collections.abc import Sequence

from amusd.engine.interface import NO_TOKEN, ScheduledSequence
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.sampling.parameters import GREEDY, SequenceSampling, TokenLogprobs


def logprobs_at(position: int, token: int) -> TokenLogprobs:
    """Return what the engine says of a token at an absolute position."""
    return TokenLogprobs(token, -float(position), ((token, -0.5),))


class SamplingEngine(SyntheticEngine):
    """Records the sampling of each opening, and of each batch what it scheduled."""

    def __init__(self, model: SyntheticModel) -> None:
        super().__init__(model)
        self.opened: list[SequenceSampling] = []
        self.scheduled: list[ScheduledSequence] = []
        self._samplings: dict[int, SequenceSampling] = {}
        self._logprobs: dict[int, list[TokenLogprobs]] = {}

    def open(self, capacity: int, sampling: SequenceSampling = GREEDY) -> int:
        slot = super().open(capacity, sampling)
        self.opened.append(sampling)
        self._samplings[slot] = sampling
        return slot

    def run(self, batch: Sequence[ScheduledSequence]) -> list[list[int]]:
        self.scheduled.extend(batch)
        outputs = super().run(batch)
        for one, tokens in zip(batch, outputs, strict=True):
            first = self.length(one.slot) - one.num_outputs + 1  # the position of an output
            targets = one.targets or [NO_TOKEN] * len(tokens)
            self._logprobs[one.slot] = [
                logprobs_at(position, output if target == NO_TOKEN else target)
                for position, (target, output) in enumerate(
                    zip(targets, tokens, strict=True), first
                )
            ]
        return outputs

    def logprobs(self, slot: int) -> Sequence[TokenLogprobs]:
        return self._logprobs[slot] if self._samplings[slot].logprobs is not None else ()
