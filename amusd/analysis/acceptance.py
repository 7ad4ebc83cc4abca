"""Acceptance rates with confidence intervals, and the times per token that they predict.

A *hit* is a position where the draft's token equals the verify model's, given the verify model's
own tokens before it. The hits of an answer determine what each verify pass would have accepted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from amusd.analysis.generation_statistics import PositionAcceptance
from amusd.policy.performance_model import PassSeconds

_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Share:
    """A share of tokens with the ends of its 95 % confidence interval, each 0 to 1."""

    value: float
    low: float
    high: float
    num_tokens: int


def share_of_hits(answers: Sequence[Sequence[bool]]) -> Share:
    """Return the share of hits over all tokens of ``answers``.

    Tokens of one answer are correlated, so each answer is a cluster. The interval is that of a
    ratio estimator (Cochran, Sampling Techniques, 3rd edition, section 6.4). One answer alone gives
    no spread: the interval is then 0 to 1.
    """
    num_tokens = sum(map(len, answers))
    if not num_tokens:
        return Share(0.0, 0.0, 1.0, 0)
    value = sum(map(sum, answers)) / num_tokens
    if len(answers) < 2:
        return Share(value, 0.0, 1.0, num_tokens)
    spread = sum((sum(hits) - value * len(hits)) ** 2 for hits in answers)
    error = math.sqrt(spread * len(answers) / (len(answers) - 1)) / num_tokens
    low, high = value - _NORMAL_95 * error, value + _NORMAL_95 * error
    return Share(value, max(0.0, low), min(1.0, high), num_tokens)


def acceptance_per_position(
    answers: Sequence[Sequence[bool]], lookahead: int
) -> tuple[PositionAcceptance, ...]:
    """Return what passes over ``lookahead`` tokens would have accepted at each position of a pass.

    Positions count from 0 within a pass. As in the services, each pass starts after the token that
    the verify model added in the pass before.
    """
    checked, accepted = [0] * lookahead, [0] * lookahead
    for hits in answers:
        start = 0
        while start < len(hits):
            proposed = hits[start : start + lookahead]
            right = next((i for i, hit in enumerate(proposed) if not hit), len(proposed))
            for position in range(min(right + 1, len(proposed))):
                checked[position] += 1
                accepted[position] += position < right
            start += right + 1
    return tuple(map(PositionAcceptance, checked, accepted))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted seconds per token, and the speculation length that reaches it."""

    seconds: float
    num_proposed: int


@dataclass(frozen=True, slots=True)
class Predictor:
    """Predicts times per token from step times and the acceptance per position of a pass.

    ``draft_seconds`` is the time of one draft step, ``pass_seconds(n)`` that of a pass over n
    drafted tokens. ``message_seconds`` is the latency from a verdict to the draft, plus that from
    its proposal to the next pass.
    """

    positions: tuple[PositionAcceptance, ...]
    draft_seconds: float
    pass_seconds: PassSeconds
    message_seconds: float = 0.0015

    def speculative(self) -> Prediction:
        """Predict lockstep: draft n tokens, then verify them, for the best n of at least 1."""
        return min(map(self._lockstep, self._sizes), key=lambda found: found.seconds)

    def asynchronous(self) -> Prediction:
        """Predict both devices at once for the best n; n = 0 is autoregressive decoding.

        Without a rejection a cycle takes as long as the pass, or as n + 1 draft steps if that is
        longer. After a rejection the draft first finishes the running step, which takes half a
        step on average. It then drafts n tokens before the next pass starts.
        """
        autoregressive = Prediction(self.pass_seconds(0), 0)
        return min(
            [autoregressive, *map(self._overlapped, self._sizes)], key=lambda found: found.seconds
        )

    @property
    def _sizes(self) -> range:
        return range(1, len(self.positions) + 1)

    def _lockstep(self, num_proposed: int) -> Prediction:
        drafting = num_proposed * self.draft_seconds + self.message_seconds
        return self._prediction(num_proposed, drafting + self.pass_seconds(num_proposed))

    def _overlapped(self, num_proposed: int) -> Prediction:
        cycle = max(self.pass_seconds(num_proposed), (num_proposed + 1) * self.draft_seconds)
        refill = (num_proposed + 0.5) * self.draft_seconds + self.message_seconds
        rejected = 1.0 - self._right(num_proposed)
        return self._prediction(num_proposed, cycle + rejected * refill)

    def _prediction(self, num_proposed: int, cycle_seconds: float) -> Prediction:
        tokens = 1.0 + sum(self._right(n) for n in range(1, num_proposed + 1))
        return Prediction(cycle_seconds / tokens, num_proposed)

    def _right(self, num_proposed: int) -> float:
        """Return the probability that the first ``num_proposed`` tokens of a pass are accepted."""
        return math.prod(
            position.num_accepted / position.num_checked if position.num_checked else 0.0
            for position in self.positions[:num_proposed]
        )
