"""The pace of a session: when the verify model starts a pass, and over how many proposals.

It decides about time only, never about tokens. Times are seconds of one monotonic clock.
"""

import math
from typing import Protocol

from amusd.policy.speculation_length import SpeculationLength, StepTimes
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Proposal, Verdict
from amusd.protocol.strategy import Strategy

_MIN_DRAFT_WAIT_SECONDS = 0.002
_MAX_EXPIRED_WAITS = 3


class SpeculationPolicy(Protocol):
    """What a session asks and tells as it goes."""

    @property
    def max_checked(self) -> int:
        """Most proposals that the next pass should check; 0 leaves it to the service."""

    @property
    def lookahead(self) -> int:
        """How far the draft should run ahead; 0 leaves it as the session was opened."""

    def start_size(self, num_ready: int, now_seconds: float) -> int:
        """Return with how many proposals an idle verify model should start.

        ``num_ready`` or less: at once with what there is, and 0 is a plain pass. More: wait.
        """

    def draft_wait_seconds(self) -> float:
        """Return how long to wait for a proposal before the verify model goes on by itself."""

    def draft_wait_expired(self) -> None:
        """Take note that no proposal has come in time."""

    def proposed(self, proposal: Proposal, now_seconds: float) -> None:
        """Take note of a proposal."""

    def rolled_back(self, epoch: int, now_seconds: float) -> None:
        """Take note of a rollback of the draft to ``epoch``."""

    def passed(self, verdict: Verdict, is_first: bool) -> None:
        """Take note of a pass; the first one has read the prompt."""


class Lockstep:
    """Draft, then verify: a pass starts when the draft has said all it has to say."""

    max_checked = 0
    lookahead = 0

    def __init__(self, draft_timeout_seconds: float) -> None:
        """Wait for a proposal for at most ``draft_timeout_seconds``."""
        self._draft_timeout_seconds = draft_timeout_seconds

    def start_size(self, num_ready: int, now_seconds: float) -> int:
        """Start with whatever is there, and wait while nothing is."""
        return max(1, num_ready)

    def draft_wait_seconds(self) -> float:
        """Return the time that the draft's turn may take."""
        return self._draft_timeout_seconds

    def draft_wait_expired(self) -> None:
        """Nothing to learn."""

    def proposed(self, proposal: Proposal, now_seconds: float) -> None:
        """Nothing to learn."""

    def rolled_back(self, epoch: int, now_seconds: float) -> None:
        """Nothing to learn."""

    def passed(self, verdict: Verdict, is_first: bool) -> None:
        """Nothing to learn."""


class Asynchronous:
    """Draft and verify at once: no pass waits for longer, or checks more, than pays.

    The draft never pauses, so when its next proposal will come is known from its step time:
    after a rollback it finishes the step that runs, for nothing, and then takes one more.
    """

    def __init__(self, lookahead: int, times: StepTimes, draft_timeout_seconds: float) -> None:
        """Check at most ``lookahead`` proposals a pass; ``times`` are shared by all sessions."""
        self._times = times
        self._length = SpeculationLength(lookahead, times)
        self._draft_timeout_seconds = draft_timeout_seconds
        self._last_pass_seconds: float | None = None
        self._next_proposal_seconds = math.inf  # the draft reads the prompt, for who knows how long
        self._has_read_prompt = False
        self._num_expired_waits = 0
        self._epoch = 0
        self._rolled_back_seconds: float | None = None  # until the draft has answered

    @property
    def max_checked(self) -> int:
        """Return the number of proposals whose pass yields most tokens a second."""
        return self._length.best()

    @property
    def lookahead(self) -> int:
        """Return how many drafted tokens still have a chance to be used."""
        return self._length.useful_lookahead()

    def start_size(self, num_ready: int, now_seconds: float) -> int:
        """Weigh the tokens that waiting brings against the time it takes."""
        if self._num_expired_waits >= _MAX_EXPIRED_WAITS:
            return num_ready  # the draft hangs: what it still writes is taken as it comes
        next_seconds = max(0.0, self._next_proposal_seconds - now_seconds)
        return self._length.best_start(num_ready, next_seconds)

    def draft_wait_seconds(self) -> float:
        """Return the time of a pass.

        Waiting as long as a pass takes costs at most twice what the best choice would have cost
        (the ski-rental argument), should the draft be slower than it was.
        """
        if self._last_pass_seconds is None:
            return self._draft_timeout_seconds
        draft_wait = max(self._last_pass_seconds, _MIN_DRAFT_WAIT_SECONDS)
        return min(draft_wait, self._draft_timeout_seconds)

    def draft_wait_expired(self) -> None:
        """Stop waiting after a few times, until the draft shows that it lives."""
        self._num_expired_waits += 1

    def proposed(self, proposal: Proposal, now_seconds: float) -> None:
        """Learn the draft's step time; its next proposal is one step away."""
        # A look-up takes no step of the model, and the model's first proposal has read the prompt.
        if proposal.num_steps and proposal.source is DraftSource.MODEL:
            if self._has_read_prompt:
                self._times.observe_draft(proposal.draft_seconds / proposal.num_steps)
            self._has_read_prompt = True
        self._num_expired_waits = 0
        self._next_proposal_seconds = now_seconds + self._times.draft_seconds
        if self._rolled_back_seconds is not None and proposal.epoch >= self._epoch:
            self._times.observe_rollback(now_seconds - self._rolled_back_seconds)
            self._rolled_back_seconds = None

    def rolled_back(self, epoch: int, now_seconds: float) -> None:
        """Expect a proposal as long after it as after earlier ones.

        Before any it takes the step that runs and one more.
        """
        step_ends = max(now_seconds, self._next_proposal_seconds)
        by_steps = step_ends + self._times.draft_seconds - now_seconds
        self._next_proposal_seconds = now_seconds + (self._times.rollback_seconds or by_steps)
        self._epoch = epoch
        self._rolled_back_seconds = now_seconds

    def passed(self, verdict: Verdict, is_first: bool) -> None:
        """Learn acceptance and pass times."""
        self._last_pass_seconds = verdict.pass_seconds
        if not is_first:
            self._length.observe(verdict)


def make_policy(
    strategy: Strategy, lookahead: int, times: StepTimes, draft_timeout_seconds: float
) -> SpeculationPolicy:
    """Return the pace of a strategy."""
    if strategy is Strategy.AMUSD:
        return Asynchronous(lookahead, times, draft_timeout_seconds)
    return Lockstep(draft_timeout_seconds)
