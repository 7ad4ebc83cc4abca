"""Responsiveness: whether a replica answers, and when one that did not is tried again.

Rules of this file
- It has no clock: every event comes with the time, in seconds of one monotonic clock.
- Only answers of a replica's engine count. A service whose engine hangs still reports its health.
- A replica that answers nothing looks idle. So it is late after a short time, and then used only if
  no other replica is on time. After the whole timeout it gets no sessions until it answers.
- A replica that answers calls but serves no session is tried again with one session at a time, at
  growing intervals.
"""

import math

_LATE_SECONDS = 2.0  # info calls are made once a second
_LATE_SHARE = 0.5  # of the timeout, if that is shorter
_MIN_PAUSE_SECONDS = 1.0
_MAX_DOUBLINGS = 6  # 64 s


class Trials:
    """Pauses a replica after a session that it did not serve, for twice as long each time."""

    __slots__ = ("_num_failures", "_paused_until")

    def __init__(self) -> None:
        """Start without failures."""
        self._num_failures = 0
        self._paused_until = 0.0

    @property
    def is_on_trial(self) -> bool:
        """Whether no session was served since the last failure."""
        return self._num_failures > 0

    def is_paused(self, now_seconds: float) -> bool:
        """Whether no session may be tried now."""
        return self.is_on_trial and now_seconds < self._paused_until

    def failed(self, now_seconds: float) -> None:
        """Pause; failures during a pause are of sessions opened before it, and do not count."""
        if self.is_paused(now_seconds):
            return
        pause = _MIN_PAUSE_SECONDS * 2 ** min(self._num_failures, _MAX_DOUBLINGS)
        self._num_failures += 1
        self._paused_until = now_seconds + pause

    def opened(self, now_seconds: float, timeout_seconds: float) -> None:
        """Let no other session in until this one is served, or ``timeout_seconds`` are over."""
        if self.is_on_trial:
            self._paused_until = now_seconds + timeout_seconds

    def served(self) -> None:
        """Forget all failures."""
        self._num_failures = 0


class Responsiveness:
    """What one replica has answered, and when."""

    __slots__ = ("_asked_seconds", "_heard_seconds", "_reason", "_rollbacks", "_served_seconds",
                 "_sessions", "timeout_seconds")  # fmt: skip

    def __init__(self, timeout_seconds: float) -> None:
        """Stop using a replica that answers nothing for ``timeout_seconds``."""
        self.timeout_seconds = timeout_seconds
        self.reset()

    def reset(self) -> None:
        """Start anew: the replica has just come up."""
        self._asked_seconds: float | None = None
        self._heard_seconds = -math.inf
        self._served_seconds = -math.inf
        self._reason = ""
        self._sessions = Trials()
        self._rollbacks = Trials()

    def asked(self, now_seconds: float) -> None:
        """Record a call to the engine, unless an earlier one is without an answer."""
        if self._asked_seconds is None:
            self._asked_seconds = now_seconds

    def replied(self, now_seconds: float) -> None:
        """Record the answer to a call.

        A late one ends a hang of the whole engine, which explains the sessions that failed.
        """
        if self.is_late(now_seconds):
            self._sessions.served()
            self._rollbacks.served()
        self._asked_seconds = None
        self._heard_seconds = now_seconds

    def served(self, now_seconds: float) -> None:
        """Record a message of the engine to any session."""
        self._heard_seconds = self._served_seconds = now_seconds
        self._sessions.served()

    def rolled_back(self) -> None:
        """Record the answer to a rollback."""
        self._rollbacks.served()

    def session_opened(self, now_seconds: float) -> None:
        """Record that a session is opened on the replica."""
        self._sessions.opened(now_seconds, self.timeout_seconds)
        self._rollbacks.opened(now_seconds, self.timeout_seconds)

    def session_failed(self, since_seconds: float, now_seconds: float, reason: str) -> None:
        """Record a session that has had no answer since then, or whose pass failed.

        It says nothing about the replica if other sessions were served meanwhile.
        """
        if self._served_seconds < since_seconds:
            self._sessions.failed(now_seconds)
            self._reason = reason

    def rollback_failed(self, since_seconds: float, now_seconds: float, reason: str) -> None:
        """Record a rollback that was sent then and has had no answer in time.

        If sessions were served meanwhile, it is rollbacks alone that are not answered.
        """
        is_serving = self._served_seconds >= since_seconds
        (self._rollbacks if is_serving else self._sessions).failed(now_seconds)
        self._reason = reason

    def is_late(self, now_seconds: float) -> bool:
        """Whether a call waits for its answer for unusually long."""
        late = min(_LATE_SECONDS, _LATE_SHARE * self.timeout_seconds)
        return self._silent_seconds(now_seconds) > late

    def is_usable(self, now_seconds: float) -> bool:
        """Whether the replica may get sessions."""
        return not self.problem(now_seconds)

    def problem(self, now_seconds: float) -> str:
        """Return why the replica gets no sessions; empty if it gets some."""
        silent_seconds = self._silent_seconds(now_seconds)
        if silent_seconds > self.timeout_seconds:
            return f"it has not answered for {silent_seconds:.0f} s"
        trials = (self._sessions, self._rollbacks)
        is_paused = any(one.is_paused(now_seconds) for one in trials)
        if is_paused or (any(one.is_on_trial for one in trials) and self.is_late(now_seconds)):
            return self._reason
        return ""

    def _silent_seconds(self, now_seconds: float) -> float:
        """Return how long a call has waited while the engine answered nothing at all."""
        if self._asked_seconds is None:
            return 0.0
        return now_seconds - max(self._asked_seconds, self._heard_seconds)
