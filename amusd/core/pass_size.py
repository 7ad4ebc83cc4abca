"""How many proposals a pass should check: more tokens a pass against a longer pass.

On a device where a pass over n tokens costs more than one over a single token, checking all
that a quick draft has written is waste: late proposals are rarely right, and all pay for them.
"""

import math
from dataclasses import dataclass, field

from amusd.core.events import Verdict
from amusd.core.performance import expected_tokens

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 8.0
_MEMORY = 0.97  # weight of what was known before each compared token
_LEAST_CHANCE = 0.05  # of being used, for a token to be drafted at all
_TIME_WEIGHT = 0.2  # weight of the newest pass time


@dataclass(slots=True)
class StepTimes:
    """Time of a draft step, and of a verify pass by the number of proposals it checks.

    ``rollback_seconds`` pass from a rollback to the first proposal after it, messages included.

    Learned from all sessions, for they are properties of the two devices.
    """

    draft_seconds: float = 0.0
    rollback_seconds: float = 0.0
    _seconds: dict[int, float] = field(default_factory=dict)

    def observe_draft(self, step_seconds: float) -> None:
        """Learn from a draft step."""
        known = self.draft_seconds or step_seconds
        self.draft_seconds = known + _TIME_WEIGHT * (step_seconds - known)

    def observe_rollback(self, seconds: float) -> None:
        """Learn from the first proposal after a rollback."""
        known = self.rollback_seconds or seconds
        self.rollback_seconds = known + _TIME_WEIGHT * (seconds - known)

    def observe_pass(self, num_checked: int, pass_seconds: float) -> None:
        """Learn from a pass."""
        known = self._seconds.get(num_checked, pass_seconds)
        self._seconds[num_checked] = known + _TIME_WEIGHT * (pass_seconds - known)

    def pass_seconds(self, num_checked: int) -> float | None:
        """Return the time of a pass, interpolated between known ones; None if none is known.

        A size beyond the largest known counts as costing no more than that one, and one below
        the smallest no less, so that both are tried as long as they may pay.
        """
        if not self._seconds:
            return None
        below = max((size for size in self._seconds if size <= num_checked), default=None)
        above = min((size for size in self._seconds if size >= num_checked), default=None)
        if below is None:
            below = min(self._seconds)
        if above is None or above == below:
            return self._seconds[below]
        share = max(0.0, (num_checked - below) / (above - below))
        low, high = self._seconds[below], self._seconds[above]
        return low + share * (high - low)


@dataclass(slots=True)
class PassSizer:
    """Learns the acceptance of one session, and picks the best number of proposals to check."""

    max_checked: int
    times: StepTimes
    _accepted: float = _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT
    _compared: float = _PRIOR_WEIGHT

    @property
    def acceptance(self) -> float:
        """How often a proposal whose predecessors were right is right, as far as is known."""
        return self._accepted / self._compared

    def observe(self, verdict: Verdict) -> None:
        """Learn from a pass; not from a session's first, for that has read the prompt."""
        self.times.observe_pass(verdict.num_checked, verdict.pass_seconds)
        num_compared = min(verdict.num_checked, verdict.num_accepted + 1)
        for place in range(num_compared):
            self._accepted = self._accepted * _MEMORY + (place < verdict.num_accepted)
            self._compared = self._compared * _MEMORY + 1.0

    def best(self) -> int:
        """Return how many proposals to check, 1 to ``max_checked``."""
        return max(range(1, self.max_checked + 1), key=lambda size: self._rate(size, 0.0))

    def useful_lookahead(self) -> int:
        """Return how far to draft: tokens beyond are used in less than one case in twenty.

        A token is of use only if all before it are right. What is drafted in vain costs energy,
        and slows the verify model down where the two devices share memory or power.
        """
        acceptance = min(max(self.acceptance, 0.01), 0.99)
        useful = math.ceil(math.log(_LEAST_CHANCE) / math.log(acceptance))
        return min(max(useful, 1), self.max_checked)

    def best_start(self, num_ready: int, next_seconds: float) -> int:
        """Return with how many proposals an idle verify model should start, 0 or more.

        With those that are ready, or with more that have to be waited for: the next one comes
        in ``next_seconds``, each further one a draft step later. 0 is a plain pass, at once.
        The best is what yields most tokens for the time from now to the end of the pass, as
        the look-ahead of drafting and verifying in turn is chosen (Leviathan et al.,
        arXiv 2211.17192, section 3.5).
        """
        if self.times.pass_seconds(num_ready) is None:
            return max(1, num_ready)  # nothing is known yet
        # The draft is let write no more than this, so more would never come.
        sizes = range(num_ready, max(num_ready, self.useful_lookahead()) + 1)

        def rate(size: int) -> float:
            num_awaited = size - num_ready
            wait = next_seconds + (num_awaited - 1) * self.times.draft_seconds
            return self._rate(size, wait if num_awaited else 0.0)

        return max(sizes, key=rate)

    def _rate(self, size: int, wait_seconds: float) -> float:
        """Return tokens per second of waiting and a pass over ``size`` proposals."""
        pass_seconds = self.times.pass_seconds(size) or 1.0
        return expected_tokens(self.acceptance, size) / (wait_seconds + pass_seconds)
