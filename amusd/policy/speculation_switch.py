"""The speculation switch: whether the sessions of a verify device speculate at all.

Rules of this file
- Measured speed decides, not a model: a draft that shares cores or memory with the verify model
  slows it down, and no pass time shows by how much.
- All sessions of a device speculate, or none does: each one affects the passes of all others.
- Both ways are measured for each number of sessions. The way that is not in use is tried now and
  then, for a few tokens. A trial costs time, also because the draft first computes what it has
  missed. The intervals between trials grow until a trial costs 1 % of the time at most.
- Where even a good draft cannot make up for its rows, by the pass times, nothing is tried.
- A single session decides for itself: it starts with speculation, whatever the session before did.
- It has no clock: every event comes with the time, in seconds of one monotonic clock.
"""

import math
from dataclasses import dataclass, field

from amusd.policy.performance_model import expected_tokens
from amusd.policy.speculation_length import StepTimes
from amusd.protocol.events import Verdict

# Tokens of a single session. Of n sessions each writes 1/sqrt(n) as many, and together they show
# more.
_FIRST_TOKENS = 24.0  # before the first trial
_TRIAL_TOKENS = 16.0
_DECIDING_TOKENS = 24.0  # that show that speculation does not pay
# Tokens of each session.
_MIN_INTERVAL = 64.0  # between two trials
_MAX_FIRST_INTERVAL = 512.0  # after a change
_MAX_INTERVAL = 4096.0
_MAX_TRIAL = 4.0  # times as long as its tokens usually take
_TRIAL_COST = 0.01  # of the tokens between two trials
_MARGIN = 0.02  # by which the other way has to be faster
_DOUBT = 0.3  # the same for plain decoding, over the square root of the verdicts that show it
_MAX_SLOWDOWN = 1.5  # of a pass, by a draft beside it
_GOOD_ACCEPTANCE = 0.8  # few drafts are right more often
_LEAST_GAIN = 1.05  # that is worth a trial
_MAX_WEIGHED = 8  # proposals of a pass that are weighed
_HORIZON_TOKENS = 128.0  # that a speed is averaged over
_KEPT_TOKENS = 8.0  # weight of what another session, or an earlier trial, has shown
_MAX_STALL = 4.0  # an interval counts as at most so many usual ones
_MAX_SETTLING = 8  # verdicts after a change that do not count
_SETTLED_PLAIN = 2  # the same for the change to plain decoding


@dataclass(slots=True)
class _Speed:
    """Tokens per second of one session, averaged over recent tokens of all sessions."""

    tokens: float = 0.0
    seconds: float = 0.0
    verdicts: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second; 0 if none is known."""
        return self.tokens / self.seconds if self.seconds > 0.0 else 0.0

    def observe(self, num_tokens: int, seconds: float, horizon: float) -> None:
        """Learn from the interval between two verdicts; a stall counts in part."""
        if self.verdicts >= _SETTLED_PLAIN:
            seconds = min(seconds, _MAX_STALL * self.seconds / self.verdicts)
        self.keep(horizon - num_tokens)
        self.tokens += num_tokens
        self.seconds += seconds
        self.verdicts += 1.0

    def keep(self, num_tokens: float) -> None:
        """Give what is known the weight of at most ``num_tokens``."""
        if self.tokens > num_tokens:
            share = max(0.0, num_tokens) / self.tokens
            self.tokens *= share
            self.seconds *= share
            self.verdicts *= share


@dataclass(slots=True)
class _Level:
    """What is known for one number of sessions, and what is done there."""

    num_sessions: int = 1
    is_on: bool = True
    is_trial: bool = False  # the other way is in use, for a few tokens
    num_left: float = 0.0  # tokens of each session until the phase ends
    interval: float = _MIN_INTERVAL
    trial_started: float = 0.0
    trial_tokens: int = 0  # of all sessions
    on: _Speed = field(default_factory=_Speed)
    off: _Speed = field(default_factory=_Speed)

    def __post_init__(self) -> None:
        self.num_left = self.shared(_FIRST_TOKENS)

    @property
    def speculates(self) -> bool:
        return self.is_on != self.is_trial

    def shared(self, num_tokens: float) -> float:
        """Return the tokens of each session that show as much as ``num_tokens`` of a single one."""
        return num_tokens / math.sqrt(self.num_sessions)

    @property
    def is_known(self) -> bool:
        """Whether either way has been measured."""
        return self.on.tokens + self.off.tokens > 0.0

    @property
    def used(self) -> _Speed:
        """The speed of the usual way."""
        return self.on if self.is_on else self.off

    @property
    def other(self) -> _Speed:
        """The speed of the other way."""
        return self.off if self.is_on else self.on

    @property
    def doubt(self) -> float:
        """By how much plain decoding has to be faster: little, if much is known."""
        return max(_MARGIN, _DOUBT / math.sqrt(max(1.0, self.on.verdicts)))

    def begin_trial(self, now_seconds: float) -> None:
        self.is_trial, self.num_left = True, self.shared(_TRIAL_TOKENS)
        self.other.keep(_KEPT_TOKENS)  # what it showed at the last trial may be over
        self.trial_started, self.trial_tokens = now_seconds, 0

    def is_long_trial(self, now_seconds: float) -> bool:
        """Whether a trial takes much longer than its tokens usually do."""
        if not self.is_trial or not self.used.rate:
            return False
        usual_seconds = self.shared(_TRIAL_TOKENS) / self.used.rate
        return now_seconds - self.trial_started > _MAX_TRIAL * usual_seconds

    def change(self, is_on: bool) -> None:
        """Use a way from now on."""
        self.is_on, self.is_trial = is_on, False
        slower = self.used.rate / self.other.rate if self.other.rate else 1.0
        by_cost = self.shared(_TRIAL_TOKENS) * (slower - 1.0) / _TRIAL_COST
        self.interval = min(max(_MIN_INTERVAL, by_cost), _MAX_FIRST_INTERVAL)
        self.num_left = self.interval

    def end_trial(self, now_seconds: float) -> None:
        """Use the faster way, and try the other one again later."""
        margin = self.doubt if self.is_on else _MARGIN
        if self.other.rate > self.used.rate * (1.0 + margin):
            self.change(not self.is_on)
            return
        usual_tokens = self.used.rate * (now_seconds - self.trial_started)
        num_lost = usual_tokens - self.trial_tokens / self.num_sessions
        self.interval = min(max(2.0 * self.interval, num_lost / _TRIAL_COST), _MAX_INTERVAL)
        self.is_trial, self.num_left = False, self.interval


class SpeculationSwitch:
    """Decides for all sessions of one verify device, and learns from their verdicts."""

    def __init__(self, times: StepTimes) -> None:
        """Start with speculation; ``times`` are the pass times of the device."""
        self._times = times
        self._levels: dict[int, _Level] = {1: _Level()}
        self._level = self._levels[1]
        self.num_sessions = 0
        """Sessions that are open on the device, of every strategy."""
        self.num_changes = 0
        """How often sessions had to begin or to stop speculating."""

    @property
    def speculates(self) -> bool:
        """Whether sessions speculate now."""
        return self._level.speculates

    def join(self) -> "SwitchMember":
        """Return the place of a new session."""
        self._resize(self.num_sessions + 1)
        if self.num_sessions == 1:
            self._begin_single()
        return SwitchMember(self)

    def leave(self) -> None:
        """Count a session that has ended."""
        self._resize(self.num_sessions - 1)

    def passed(self, num_tokens: int, seconds: float | None, now_seconds: float) -> None:
        """Take a verdict that made ``num_tokens`` of a session final.

        ``seconds`` is the time since the verdict before; None: it does not show the usual speed.
        """
        level, before = self._level, self._level.speculates
        level.trial_tokens += num_tokens
        if seconds is not None:
            speed = level.on if before else level.off
            speed.observe(num_tokens, seconds, _HORIZON_TOKENS * level.num_sessions)
            level.num_left -= num_tokens / level.num_sessions
        if level.num_left <= 0.0 or level.is_long_trial(now_seconds):
            self._next_phase(level, now_seconds)
        elif before and not level.is_trial and self._loses(level):
            level.change(is_on=False)
        self.num_changes += before != level.speculates

    def _next_phase(self, level: _Level, now_seconds: float) -> None:
        if level.is_trial:
            level.end_trial(now_seconds)
        elif self._may_pay(level):
            level.begin_trial(now_seconds)
        else:
            level.num_left = level.interval

    def _loses(self, level: _Level) -> bool:
        """Whether speculation is known to be slower, or cannot be faster by the pass times."""
        if not level.off.tokens:
            return not self._can_speed_up(level.num_sessions)
        is_known = level.on.tokens >= level.shared(_DECIDING_TOKENS) * level.num_sessions
        return is_known and level.on.rate * (1.0 + level.doubt) < level.off.rate

    def _may_pay(self, level: _Level) -> bool:
        """Whether the other way can be faster, by the pass times.

        A plain pass is faster than one beside a draft only by what the draft slows it down.
        """
        plain_seconds = self._times.pass_seconds(level.num_sessions)
        if plain_seconds is None:
            return True
        if level.is_on:
            return level.on.rate * plain_seconds < _MAX_SLOWDOWN
        return self._can_speed_up(level.num_sessions)

    def _can_speed_up(self, num_sessions: int) -> bool:
        """Whether a good draft makes passes of so many sessions worth their rows."""
        seconds = self._times.seconds_of_lengths(_MAX_WEIGHED, num_sessions)
        return not seconds or any(
            expected_tokens(_GOOD_ACCEPTANCE, length) * seconds[0] > _LEAST_GAIN * seconds[length]
            for length in range(1, _MAX_WEIGHED + 1)
        )

    def _begin_single(self) -> None:
        """Forget most of what the session before has shown: its text was another one."""
        level, before = self._level, self._level.speculates
        level.on.keep(_KEPT_TOKENS)
        if not level.is_on or level.is_trial:
            level.change(is_on=True)
        self.num_changes += before != level.speculates

    def _resize(self, num_sessions: int) -> None:
        before = self._level.speculates
        self.num_sessions = max(0, num_sessions)
        self._level = self._level_of(max(1, self.num_sessions))
        self.num_changes += before != self._level.speculates

    def _level_of(self, num_sessions: int) -> _Level:
        """Return what is known for a number of sessions; else do as with the nearest number."""
        step = 1 << max(0, num_sessions.bit_length() - 4)
        size = num_sessions // step * step
        level = self._levels.get(size)
        if level is None or not level.is_known:
            known = [one for one in self._levels.values() if one.is_known]
            nearest = min(known, key=lambda one: abs(one.num_sessions - size), default=_Level())
            is_on = nearest.is_on and self._can_speed_up(size)
            level = self._levels[size] = _Level(size, is_on)
        return level


class SwitchMember:
    """One session at the switch of its verify device."""

    def __init__(self, switch: SpeculationSwitch) -> None:
        """Take a place that ``switch`` has counted."""
        self._switch = switch
        self._seen = (-1, 0)  # changes and sessions at the last verdict
        self._last_seconds: float | None = None
        self._num_settling = 0  # verdicts that do not count yet
        self._has_left = False

    @property
    def speculates(self) -> bool:
        """Whether the session has to speculate now."""
        return self._switch.speculates

    @property
    def is_alone(self) -> bool:
        """Whether no other session is open on the device."""
        return self._switch.num_sessions <= 1

    def passed(self, verdict: Verdict, num_tokens: int, now_seconds: float, is_first: bool) -> None:
        """Report a verdict that made ``num_tokens`` final; the first one includes the prefill."""
        switch, last_seconds = self._switch, self._last_seconds
        seen = (switch.num_changes, switch.num_sessions)
        is_steady, has_changed = seen == self._seen, seen[0] != self._seen[0]
        self._seen, self._last_seconds = seen, now_seconds
        if has_changed:
            self._num_settling = _MAX_SETTLING if switch.speculates else _SETTLED_PLAIN
        seconds = None
        if self._num_settling:
            # The draft first computes what it has missed.
            is_back = switch.speculates and verdict.num_checked > 0
            self._num_settling = 0 if is_back else self._num_settling - 1
        elif is_steady and not is_first and last_seconds is not None:
            seconds = max(0.0, now_seconds - last_seconds)
        switch.passed(num_tokens, seconds, now_seconds)

    def leave(self) -> None:
        """End the session's part; further calls change nothing."""
        if not self._has_left:
            self._has_left = True
            self._switch.leave()
