"""How many proposals a pass should check: more tokens a pass against a longer pass.

On a device where a pass over n tokens costs more than one over a single token, checking all
that a quick draft has written is waste: late proposals are rarely right, and all pay for them.
"""

from dataclasses import dataclass, field

from amusd.core.events import Verdict
from amusd.core.performance import expected_tokens

_PRIOR_ACCEPTANCE = 0.7
_PRIOR_WEIGHT = 8.0
_MEMORY = 0.97  # weight of what was known before each compared token
_TIME_WEIGHT = 0.25  # weight of the newest pass time


@dataclass(slots=True)
class PassSizer:
    """Learns acceptance and pass times of one session, and picks the best number to check."""

    max_checked: int
    _accepted: float = _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT
    _compared: float = _PRIOR_WEIGHT
    _pass_seconds: dict[int, float] = field(default_factory=dict)

    @property
    def acceptance(self) -> float:
        """How often a proposal whose predecessors were right is right, as far as is known."""
        return self._accepted / self._compared

    def observe(self, verdict: Verdict) -> None:
        """Learn from a pass; not from a session's first, for that has read the prompt."""
        known = self._pass_seconds.get(verdict.num_checked, verdict.pass_seconds)
        self._pass_seconds[verdict.num_checked] = known + _TIME_WEIGHT * (
            verdict.pass_seconds - known
        )
        num_compared = min(verdict.num_checked, verdict.num_accepted + 1)
        for place in range(num_compared):
            self._accepted = self._accepted * _MEMORY + (place < verdict.num_accepted)
            self._compared = self._compared * _MEMORY + 1.0

    def best(self) -> int:
        """Return how many proposals to check, 1 to ``max_checked``.

        Sizes beyond the largest that was tried count as costing no more than that one, so they
        are tried as long as they may pay.
        """
        if not self._pass_seconds:
            return self.max_checked
        return max(range(1, self.max_checked + 1), key=self._tokens_per_second)

    def _tokens_per_second(self, size: int) -> float:
        return expected_tokens(self.acceptance, size) / max(self._time(size), 1e-9)

    def _time(self, size: int) -> float:
        """Return the time of a pass over ``size`` proposals, interpolated between known ones."""
        below = max((known for known in self._pass_seconds if known <= size), default=None)
        above = min((known for known in self._pass_seconds if known >= size), default=None)
        if below is None or above is None:
            nearest = above if below is None else below
            assert nearest is not None
            return self._pass_seconds[nearest]
        if below == above:
            return self._pass_seconds[below]
        share = (size - below) / (above - below)
        low, high = self._pass_seconds[below], self._pass_seconds[above]
        return low + share * (high - low)
