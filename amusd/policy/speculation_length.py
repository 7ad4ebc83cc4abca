"""The speculation length: how many proposals a pass should check.

More proposals a pass yield more tokens, but on some devices they make the pass longer. Late
proposals are rarely right, and all sessions in the pass wait for them.
"""

import bisect
import itertools
import math
from dataclasses import dataclass, field

from amusd.policy.performance_model import expected_tokens
from amusd.protocol.events import Verdict

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 8.0
_DECAY = 0.97  # weight of earlier tokens after each compared token
_MIN_USE_PROBABILITY = 0.05  # a token that is used less often is not drafted
_TIME_WEIGHT = 0.2  # weight of the newest time in a running average


@dataclass(slots=True)
class StepTimes:
    """Seconds of a draft step, and of a verify pass by its number of tokens.

    ``rollback_seconds`` is the time from a rollback to the first proposal after it, messages
    included. All sessions share these times, because they are properties of the two devices.
    """

    draft_seconds: float = 0.0
    rollback_seconds: float = 0.0
    _seconds: dict[int, float] = field(default_factory=dict)
    _sizes: list[int] = field(default_factory=list)
    _monotonic_seconds: list[float] = field(default_factory=list)

    def observe_draft(self, step_seconds: float) -> None:
        """Learn from a draft step."""
        self.draft_seconds = _average(self.draft_seconds or step_seconds, step_seconds)

    def observe_rollback(self, seconds: float) -> None:
        """Learn from the first proposal after a rollback."""
        self.rollback_seconds = _average(self.rollback_seconds or seconds, seconds)

    def observe_pass(self, num_tokens: int, pass_seconds: float) -> None:
        """Learn from a pass over ``num_tokens``, those of all sessions in it."""
        size = _bucket(num_tokens)
        self._seconds[size] = _average(self._seconds.get(size, pass_seconds), pass_seconds)
        self._sizes = sorted(self._seconds)
        # A larger pass takes no less time. So a smaller pass that took longer was disturbed, and
        # the time of the larger one is used for it.
        seconds = [self._seconds[size] for size in self._sizes]
        self._monotonic_seconds = list(itertools.accumulate(reversed(seconds), min))[::-1]

    def pass_seconds(self, num_tokens: float) -> float | None:
        """Return the time of a pass, interpolated between known sizes; None if none is known.

        A size above the largest known one is assumed to take as long as that one, and a size below
        the smallest as long as the smallest. So untried sizes are tried while they may pay.
        """
        if not self._sizes:
            return None
        above = bisect.bisect_left(self._sizes, num_tokens)
        if above == len(self._sizes) or above == 0:
            return self._monotonic_seconds[min(above, len(self._sizes) - 1)]
        low, high = self._sizes[above - 1], self._sizes[above]
        share = (num_tokens - low) / (high - low)
        seconds = self._monotonic_seconds
        return seconds[above - 1] + share * (seconds[above] - seconds[above - 1])


def _average(known: float, newest: float) -> float:
    """Return a running average after one more value."""
    return known + _TIME_WEIGHT * (newest - known)


def _bucket(num_tokens: int) -> int:
    """Round to one of at most eight sizes between a power of two and the next."""
    step = 1 << max(0, num_tokens.bit_length() - 4)
    return (num_tokens + step // 2) // step * step


@dataclass(slots=True)
class SpeculationLength:
    """Learns the acceptance of one session, and chooses how many proposals a pass checks.

    Sessions that share passes wait for each other's tokens. Each session assumes that the others
    in its passes choose the same length, and maximizes the tokens per second of all of them. So
    the more sessions share passes, the fewer tokens each proposes, if larger passes take longer.
    """

    max_checked: int
    times: StepTimes
    _num_accepted: float = _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT
    _num_compared: float = _PRIOR_WEIGHT
    _own_tokens: float = 1.0
    _other_tokens: float = 0.0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a proposal is right if those before it are right."""
        return self._num_accepted / self._num_compared

    @property
    def num_sharing(self) -> float:
        """Estimated number of sessions in a pass, this one included; 1 or more."""
        return 1.0 + self._other_tokens / self._own_tokens

    def observe(self, verdict: Verdict) -> None:
        """Learn from a pass, except a session's first, which includes the prefill."""
        num_own = verdict.num_checked + 1
        # A session's share of the device time is its share of the pass's tokens. 0: not stated.
        has_share = 0.0 < verdict.device_seconds < verdict.pass_seconds
        num_sharing = verdict.pass_seconds / verdict.device_seconds if has_share else 1.0
        self.times.observe_pass(round(num_own * num_sharing), verdict.pass_seconds)
        self._own_tokens = _average(self._own_tokens, num_own)
        self._other_tokens = _average(self._other_tokens, num_own * (num_sharing - 1.0))
        num_compared = min(verdict.num_checked, verdict.num_accepted + 1)
        for index in range(num_compared):
            is_right = index < verdict.num_accepted
            self._num_accepted = self._num_accepted * _DECAY + is_right
            self._num_compared = self._num_compared * _DECAY + 1.0

    def best(self) -> int:
        """Return how many proposals to check, 1 to ``max_checked``."""
        lengths = range(1, self.max_checked + 1)
        return max(lengths, key=lambda length: self._tokens_per_second(length, 0.0))

    def useful_lookahead(self) -> int:
        """Return how many tokens to draft beyond the verified position, 1 to ``max_checked``.

        A token is used only if all before it are right. Tokens with a probability below one in
        twenty are not drafted: they cost energy, and slow the verify model down where the two
        devices share memory or power.
        """
        acceptance = min(max(self.acceptance, 0.01), 0.99)
        useful = math.ceil(math.log(_MIN_USE_PROBABILITY) / math.log(acceptance))
        return min(max(useful, 1), self.max_checked)

    def best_start(self, num_ready: int, next_seconds: float) -> int:
        """Return with how many proposals an idle verify model should start, 0 or more.

        ``num_ready`` means: start now. More means: wait for them. The next proposal comes in
        ``next_seconds``, each further one a draft step later. 0 is a pass without proposals, now.
        The choice maximizes the tokens per second from now to the end of the pass. Leviathan et
        al., arXiv 2211.17192, section 3.5, choose the look-ahead of speculative decoding so.
        """
        if self.times.pass_seconds(1) is None:
            return max(1, num_ready)  # no pass has been timed yet
        # The draft model may not write more than the look-ahead, so no more can be awaited.
        lengths = range(num_ready, max(num_ready, self.useful_lookahead()) + 1)

        def rate(length: int) -> float:
            num_awaited = length - num_ready
            wait = next_seconds + (num_awaited - 1) * self.times.draft_seconds
            return self._tokens_per_second(length, wait if num_awaited else 0.0)

        return max(lengths, key=rate)

    def _tokens_per_second(self, length: int, wait_seconds: float) -> float:
        """Return the rate over a wait and a pass that checks ``length`` proposals."""
        pass_seconds = self.times.pass_seconds((length + 1) * self.num_sharing) or 1.0
        return expected_tokens(self.acceptance, length) / (wait_seconds + pass_seconds)
