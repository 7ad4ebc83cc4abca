"""From which drafted tokens were right to rates, their uncertainty, and predicted times.

A *hit* says that the draft's token at a position equals the verify model's, given the verify
model's own tokens before it. What passes would have accepted follows from the hits of an answer.
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

    Tokens of one answer are alike, so that answers count as clusters: the interval is that of a
    ratio estimator (Cochran, Sampling Techniques, 3rd edition, section 6.4), not a binomial one.
    With one answer nothing is known about the others, and the interval is 0 to 1.
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


def acceptance_by_place(
    answers: Sequence[Sequence[bool]], lookahead: int
) -> tuple[PositionAcceptance, ...]:
    """Return what passes over ``lookahead`` proposals would have accepted at each place.

    Each pass starts behind the verify model's own token of the pass before, as in the services.
    """
    checked, accepted = [0] * lookahead, [0] * lookahead
    for hits in answers:
        start = 0
        while start < len(hits):
            proposed = hits[start : start + lookahead]
            right = next((i for i, hit in enumerate(proposed) if not hit), len(proposed))
            for place in range(min(right + 1, len(proposed))):
                checked[place] += 1
                accepted[place] += place < right
            start += right + 1
    return tuple(map(PositionAcceptance, checked, accepted))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted seconds per token, and the proposals per pass that reach it."""

    seconds: float
    num_proposed: int


@dataclass(frozen=True, slots=True)
class Predictor:
    """Times per token that follow from step times and acceptance by place.

    ``draft_seconds`` is one draft step, ``pass_seconds(n)`` a pass over n proposals,
    ``message_seconds`` the way from a verdict to the draft and from its proposal to the next pass.
    """

    places: tuple[PositionAcceptance, ...]
    draft_seconds: float
    pass_seconds: PassSeconds
    message_seconds: float = 0.0015

    def speculative(self) -> Prediction:
        """Draft n tokens, then verify them, in turn, for the best n of 1 and more."""
        return min(map(self._in_turn, self._sizes), key=lambda found: found.seconds)

    def asynchronous(self) -> Prediction:
        """Both at once, for the best n, plain passes (n = 0) included.

        Without a rejection a pass takes its own time, or that of n + 1 draft steps where the
        draft is the slower one. After a rejection the draft first ends the step that runs, half
        of one on average, and drafts n tokens before the next pass starts.
        """
        plain = Prediction(self.pass_seconds(0), 0)
        return min([plain, *map(self._overlapped, self._sizes)], key=lambda found: found.seconds)

    @property
    def _sizes(self) -> range:
        return range(1, len(self.places) + 1)

    def _in_turn(self, num_proposed: int) -> Prediction:
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
        """Return the chance that the first ``num_proposed`` proposals of a pass are all right."""
        return math.prod(
            place.num_accepted / place.num_checked if place.num_checked else 0.0
            for place in self.places[:num_proposed]
        )
