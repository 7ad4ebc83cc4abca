"""How many proposals a pass should check: more tokens a pass against a longer pass.

On a device where a pass over n tokens costs more than one over a single token, checking all
that a quick draft has written is waste: late proposals are rarely right, and all pay for them.
"""

import bisect
import itertools
import math
from dataclasses import dataclass, field

from amusd.policy.performance_model import expected_tokens
from amusd.protocol.events import Verdict

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 8.0
_MEMORY = 0.97  # weight of what was known before each compared token
_LEAST_CHANCE = 0.05  # of being used, for a token to be drafted at all
_TIME_WEIGHT = 0.2  # weight of the newest pass time


@dataclass(slots=True)
class StepTimes:
    """Time of a draft step, and of a verify pass by the number of its tokens.

    ``rollback_seconds`` pass from a rollback to the first proposal after it, messages included.

    Learned from all sessions, for they are properties of the two devices.
    """

    draft_seconds: float = 0.0
    rollback_seconds: float = 0.0
    _seconds: dict[int, float] = field(default_factory=dict)
    _sizes: list[int] = field(default_factory=list)
    _least_seconds: list[float] = field(default_factory=list)

    def observe_draft(self, step_seconds: float) -> None:
        """Learn from a draft step."""
        self.draft_seconds = _moved(self.draft_seconds or step_seconds, step_seconds)

    def observe_rollback(self, seconds: float) -> None:
        """Learn from the first proposal after a rollback."""
        self.rollback_seconds = _moved(self.rollback_seconds or seconds, seconds)

    def observe_pass(self, num_tokens: int, pass_seconds: float) -> None:
        """Learn from a pass over ``num_tokens``, those of all sessions in it."""
        size = _rounded(num_tokens)
        self._seconds[size] = _moved(self._seconds.get(size, pass_seconds), pass_seconds)
        self._sizes = sorted(self._seconds)
        # A pass over more tokens takes no less: what disturbed one is not held against its size.
        seconds = [self._seconds[size] for size in self._sizes]
        self._least_seconds = list(itertools.accumulate(reversed(seconds), min))[::-1]

    def pass_seconds(self, num_tokens: float) -> float | None:
        """Return the time of a pass, interpolated between known ones; None if none is known.

        A size beyond the largest known counts as costing no more than that one, and one below
        the smallest no less, so that both are tried as long as they may pay.
        """
        if not self._sizes:
            return None
        above = bisect.bisect_left(self._sizes, num_tokens)
        if above == len(self._sizes) or above == 0:
            return self._least_seconds[min(above, len(self._sizes) - 1)]
        low, high = self._sizes[above - 1], self._sizes[above]
        share = (num_tokens - low) / (high - low)
        least = self._least_seconds
        return least[above - 1] + share * (least[above] - least[above - 1])


def _moved(known: float, newest: float) -> float:
    """Return a running average with one more value in it."""
    return known + _TIME_WEIGHT * (newest - known)


def _rounded(num_tokens: int) -> int:
    """Return one of at most eight sizes between a power of two and the next."""
    step = 1 << max(0, num_tokens.bit_length() - 4)
    return (num_tokens + step // 2) // step * step


@dataclass(slots=True)
class SpeculationLength:
    """Learns the acceptance of one session, and picks the best number of proposals to check.

    Sessions that share passes pay for each other's tokens. Each chooses as if the others in its
    passes chose the same, so that together they get most tokens a second: the more there are, the
    less each proposes once a pass over more tokens takes longer.
    """

    max_checked: int
    times: StepTimes
    _accepted: float = _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT
    _compared: float = _PRIOR_WEIGHT
    _own_tokens: float = 1.0
    _other_tokens: float = 0.0

    @property
    def acceptance(self) -> float:
        """How often a proposal whose predecessors were right is right, as far as is known."""
        return self._accepted / self._compared

    @property
    def num_sharing(self) -> float:
        """How many sessions like this one share its passes, 1 or more."""
        return 1.0 + self._other_tokens / self._own_tokens

    def observe(self, verdict: Verdict) -> None:
        """Learn from a pass; not from a session's first, for that has read the prompt."""
        num_own = verdict.num_checked + 1
        # A session's share of a pass is that of its tokens; 0 if the service does not tell.
        is_told = 0.0 < verdict.device_seconds < verdict.pass_seconds
        shares = verdict.pass_seconds / verdict.device_seconds if is_told else 1.0
        self.times.observe_pass(round(num_own * shares), verdict.pass_seconds)
        self._own_tokens = _moved(self._own_tokens, num_own)
        self._other_tokens = _moved(self._other_tokens, num_own * (shares - 1.0))
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
        if self.times.pass_seconds(1) is None:
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
        pass_seconds = self.times.pass_seconds((size + 1) * self.num_sharing) or 1.0
        return expected_tokens(self.acceptance, size) / (wait_seconds + pass_seconds)
