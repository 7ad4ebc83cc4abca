"""The speculation length: how many proposals a pass should check.

More proposals a pass yield more tokens, but on some devices they make the pass longer. Late
proposals are rarely right, and all sessions in the pass wait for them.
"""

import bisect
import itertools
from dataclasses import dataclass, field

from amusd.policy.performance_model import expected_tokens
from amusd.policy.place_acceptance import PlaceAcceptance
from amusd.protocol.draft_probabilities import MIN_USE_PROBABILITY
from amusd.protocol.events import Verdict

_TIME_WEIGHT = 0.2  # weight of the newest time in a running average


@dataclass(slots=True)
class StepTimes:
    """Seconds of a draft step, and of a verify pass by its number of tokens.

    ``rollback_seconds`` is the time from a rollback to the first token drafted after it, messages
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
        """Learn from the first token drafted after a rollback."""
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

    def seconds_of_lengths(self, max_length: int, num_sharing: float) -> list[float]:
        """Return the times of passes over 0 to ``max_length`` proposals of each sharing session.

        Empty if no time is known.
        """
        if not self._sizes:
            return []
        sizes, seconds = self._sizes, self._monotonic_seconds
        found: list[float] = []
        above = 0
        for length in range(max_length + 1):
            num_tokens = (length + 1) * num_sharing
            while above < len(sizes) and sizes[above] < num_tokens:
                above += 1
            if above == len(sizes):
                found += [seconds[-1]] * (max_length + 1 - length)
                break
            if above == 0:
                found.append(seconds[0])
                continue
            low, high = sizes[above - 1], sizes[above]
            share = (num_tokens - low) / (high - low)
            found.append(seconds[above - 1] + share * (seconds[above] - seconds[above - 1]))
        return found


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

    What follows from acceptance and pass times is computed once after each verdict of the session,
    not for each message. Times that other sessions learn count from the next verdict on.
    """

    max_checked: int
    times: StepTimes
    _places: PlaceAcceptance = field(default_factory=PlaceAcceptance)
    _own_tokens: float = 1.0
    _other_tokens: float = 0.0
    _outlook: "_Outlook | None" = None

    @property
    def acceptance(self) -> float:
        """Estimated probability that a proposal is right if those before it are right."""
        return self._places.acceptance

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
        self._places.observe(verdict)
        self._outlook = None

    def rolled_back(self, epoch: int) -> None:
        """Begin an epoch: the next proposal stands at the first place."""
        self._places.rejected(epoch)
        self._outlook = None

    def best(self) -> int:
        """Return how many proposals to check, 1 to ``max_checked``."""
        return self._current().best_length or self.max_checked

    def useful_lookahead(self) -> int:
        """Return how many tokens to draft beyond the verified position, 1 to ``max_checked``.

        A token is used only if all before it are right. Tokens with a probability below one in
        twenty are not drafted: they cost energy, and slow the verify model down where the two
        devices share memory or power.
        """
        return self._current().lookahead

    def best_start(self, num_ready: int, next_seconds: float) -> int:
        """Return with how many proposals an idle verify model should start, 0 or more.

        ``num_ready`` means: start now. More means: wait for them. The next proposal comes in
        ``next_seconds``, each further one a draft step later. 0 is a pass without proposals, now.

        The choice maximizes tokens per second over a whole cycle, from the wait to the next
        rejection: if the pass accepts all its proposals and the draft knows its next token, too,
        further passes follow without a wait, each over what was drafted during the one before.
        Counting one pass alone, as the look-ahead of drafting and verifying in turn is chosen
        (Leviathan et al., arXiv 2211.17192, section 3.5), waits for too many proposals.
        """
        outlook = self._current()
        if not outlook.seconds:
            return max(1, num_ready)  # no pass has been timed yet
        # The draft model may not write more than the look-ahead, so no more can be awaited.
        lookahead = outlook.lookahead
        if num_ready >= lookahead:
            return num_ready
        step_seconds = self.times.draft_seconds
        best_length, best_rate, wait = num_ready, 0.0, 0.0
        for length in range(num_ready, lookahead + 1):
            chance = outlook.chances[length]  # that the pass is followed by others
            tokens = outlook.tokens[length] + chance * outlook.run_tokens
            rate = tokens / (wait + outlook.seconds[length] + chance * outlook.run_seconds)
            if rate > best_rate:
                best_length, best_rate = length, rate
            wait = next_seconds + (length - num_ready) * step_seconds
        return best_length

    def _current(self) -> "_Outlook":
        if self._outlook is None or not self._outlook.seconds:
            seconds = self.times.seconds_of_lengths(self.max_checked, self.num_sharing)
            self._outlook = _Outlook.of(
                self._places, self.max_checked, seconds, self.times.draft_seconds
            )
        return self._outlook


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What a pass over each number of proposals yields on average, and the time it takes.

    ``chances``, ``tokens`` and ``seconds`` are indexed by the number of proposals, from 0. A chance
    is that of one more right token than there are proposals. ``seconds`` is empty as long as no
    pass time is known, and ``best_length`` is 0 then. A run of passes without a wait yields
    ``run_tokens`` in ``run_seconds`` until a proposal is rejected.
    """

    chances: list[float]
    tokens: list[float]
    seconds: list[float]
    lookahead: int
    best_length: int = 0
    run_tokens: float = 0.0
    run_seconds: float = 0.0

    @classmethod
    def of(
        cls,
        places: PlaceAcceptance,
        max_length: int,
        seconds: list[float],
        draft_seconds: float,
    ) -> "_Outlook":
        """Return the outlook of a session, for passes that take ``seconds``."""
        chances = places.chances(max_length + 1)
        tokens = list(itertools.accumulate(chances[:max_length], initial=1.0))
        lookahead = next(
            (
                number
                for number, chance in enumerate(chances[:max_length], 1)
                if chance <= MIN_USE_PROBABILITY
            ),
            max_length,
        )
        if len(seconds) < 2:
            return cls(chances, tokens, seconds, lookahead)
        best_length = max(range(1, len(seconds)), key=lambda n: tokens[n] / seconds[n])
        # Passes in a run check what the draft writes meanwhile.
        length = best_length
        if best_length * draft_seconds > seconds[1]:
            length = max(1, int(seconds[1] / draft_seconds))
        acceptance = places.late_acceptance
        run_tokens = expected_tokens(acceptance, length)
        num_passes = 1.0 / max(1e-6, 1.0 - acceptance ** (length + 1))
        return cls(
            chances,
            tokens,
            seconds,
            lookahead,
            best_length,
            num_passes * run_tokens,
            num_passes * seconds[length],
        )
