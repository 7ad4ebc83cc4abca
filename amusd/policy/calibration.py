"""Calibration: how often a token is right, by the draft model's own probability of it. Pure.

A draft may be over- or underconfident, more in one text than in another. So its log-odds are scaled
and shifted (Platt scaling, 1999), and both numbers are learned online, by gradient steps on the
logarithmic loss. They begin at the draft's own probabilities.
"""

import math
from dataclasses import dataclass

_LEAST, _MOST = 0.01, 0.999  # no probability excludes either outcome
_SCALE_RATE = 0.3  # of the step of the shift, because log-odds are larger than 1
_LEAST_SCALE, _MOST_SCALE = 0.05, 4.0  # a likelier token is never taken for a less likely one
_MOST_SHIFT = 6.0


@dataclass(slots=True)
class Calibration:
    """Learns from tokens that were compared; ``rate`` is the size of a step.

    A small rate suits many sessions together, a larger one follows a single text.
    """

    rate: float
    _scale: float = 1.0
    _shift: float = 0.0

    def begin(self, rate: float) -> "Calibration":
        """Return a calibration of its own that begins with what this one knows."""
        return Calibration(rate, self._scale, self._shift)

    def chance(self, probability: float) -> float:
        """Return how likely a token of the draft's ``probability`` is right.

        The tokens before it are taken to be right.
        """
        return self._chance(_log_odds(probability))

    def observe(self, probability: float, is_right: bool) -> None:
        """Learn from a token of the draft's ``probability``."""
        log_odds = _log_odds(probability)
        step = self.rate * (is_right - self._chance(log_odds))
        shift, scale = self._shift + step, self._scale + _SCALE_RATE * step * log_odds
        self._shift = min(max(shift, -_MOST_SHIFT), _MOST_SHIFT)
        self._scale = min(max(scale, _LEAST_SCALE), _MOST_SCALE)

    def _chance(self, log_odds: float) -> float:
        chance = 1.0 / (1.0 + math.exp(-(self._shift + self._scale * log_odds)))
        return min(max(chance, _LEAST), _MOST)


def _log_odds(probability: float) -> float:
    within = min(max(probability, _LEAST), _MOST)
    return math.log(within / (1.0 - within))
