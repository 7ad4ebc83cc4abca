"""The speculation policy of a session: when a pass starts, and how many proposals it checks.

It decides about time only, never about tokens. Times are seconds of one monotonic clock.
"""

import enum
import math
from typing import Protocol

from amusd.policy.published_policy import Published
from amusd.policy.speculation_length import SpeculationLength, StepTimes
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Proposal, Verdict
from amusd.protocol.strategy import Strategy

_MIN_DRAFT_WAIT_SECONDS = 0.002
_MAX_EXPIRED_WAITS = 2
_MAX_STEP_OVERHEAD = 1.5  # of the interval between two tokens over a step; more is a pause
_WRITTEN_SHARE = 0.65  # of a pass, within which all tokens have to arrive after a rollback
_COLLECTED_SHARE = 1 / 10  # of a pass, for which drafted tokens are collected while it runs


class AsynchronousPolicy(enum.Enum):
    """How the strategy amusd decides when a pass starts, and how far the draft runs ahead."""

    ADAPTIVE = "adaptive"
    PUBLISHED = "published"


class SpeculationPolicy(Protocol):
    """What a session asks its policy, and the events that it reports to it."""

    @property
    def max_checked(self) -> int:
        """Most proposals that the next pass should check; 0: the verify service's own limit."""

    @property
    def lookahead(self) -> int:
        """Look-ahead of the draft from now on, in tokens; 0: as the session was opened."""

    @property
    def tokens_per_proposal(self) -> int:
        """Tokens that the draft collects into one proposal; 0: as the session was opened."""

    def first_proposal(self, now_seconds: float) -> int:
        """Return the tokens of the first proposal after a rollback; 0: as many as of any other."""

    def start_size(self, num_ready: int, now_seconds: float) -> int:
        """Return with how many proposals an idle verify model should start a pass.

        ``num_ready`` or fewer: start now with all that are ready; 0: without proposals. More than
        ``num_ready``: wait for more.
        """

    def draft_wait_seconds(self) -> float:
        """Return how long to wait for a proposal before a pass without proposals starts."""

    def draft_wait_expired(self) -> None:
        """Handle a draft wait that ended without a proposal."""

    def proposed(self, proposal: Proposal, now_seconds: float) -> None:
        """Handle a proposal."""

    def rolled_back(self, epoch: int, now_seconds: float) -> None:
        """Handle a rollback that starts ``epoch``."""

    def passed(self, verdict: Verdict, is_first: bool) -> None:
        """Handle the verdict of a pass; the first one of a session includes the prefill."""


class Lockstep:
    """Draft, then verify: the draft sends one proposal, and a pass checks it."""

    max_checked = 0
    lookahead = 0
    tokens_per_proposal = 0

    def __init__(self, draft_timeout_seconds: float) -> None:
        """Wait for a proposal for at most ``draft_timeout_seconds``."""
        self._draft_timeout_seconds = draft_timeout_seconds

    def first_proposal(self, now_seconds: float) -> int:
        """Return 0: all proposals have the same size."""
        return 0

    def start_size(self, num_ready: int, now_seconds: float) -> int:
        """Start with what is ready, and wait if nothing is."""
        return max(1, num_ready)

    def draft_wait_seconds(self) -> float:
        """Return the draft timeout."""
        return self._draft_timeout_seconds

    def draft_wait_expired(self) -> None:
        """Nothing to learn: after the draft timeout the session gives the draft up."""

    def proposed(self, proposal: Proposal, now_seconds: float) -> None:
        """Nothing to learn."""

    def rolled_back(self, epoch: int, now_seconds: float) -> None:
        """Nothing to learn."""

    def passed(self, verdict: Verdict, is_first: bool) -> None:
        """Nothing to learn."""


class Asynchronous:
    """Draft and verify at the same time: wait, and check proposals, only as far as it pays.

    The draft never pauses, so its step time tells when the next proposal comes. After a rollback
    the draft first finishes the running step, whose result is wasted, and then takes one more.
    """

    def __init__(
        self,
        lookahead: int,
        times: StepTimes,
        draft_timeout_seconds: float,
        draft_stops: bool = False,
    ) -> None:
        """Check at most ``lookahead`` proposals a pass; ``times`` are shared by all sessions.

        ``draft_stops``: a draft that knows probabilities stops where tokens are unlikely used.
        """
        self._times = times
        self._most_ahead = lookahead
        self._draft_stops = draft_stops
        self._length = SpeculationLength(lookahead, times)
        self._draft_timeout_seconds = draft_timeout_seconds
        self._last_pass_seconds: float | None = None
        self._next_proposal_seconds = math.inf  # unknown until the draft has prefilled the prompt
        self._is_prefilled = False
        self._num_expired_waits = 0
        self._epoch = 0
        self._has_probabilities = False  # of the draft's tokens
        self._last_proposal = (-1, 0.0)  # its epoch, and when it arrived
        self._rolled_back_seconds: float | None = None  # None: no rollback awaits its proposal

    @property
    def max_checked(self) -> int:
        """Return the number of proposals that yields the most tokens per second.

        If proposals have probabilities, the verify service knows better which of them pay.
        """
        return self.lookahead if self._has_probabilities else self._length.best()

    @property
    def lookahead(self) -> int:
        """Return how many drafted tokens are likely enough to be used.

        A draft that stops on its own may go further where it is sure.
        """
        lookahead = self._length.useful_lookahead()
        if self._has_probabilities and self._draft_stops:
            return min(2 * lookahead, self._most_ahead)
        return lookahead

    @property
    def tokens_per_proposal(self) -> int:
        """Return all tokens up to the look-ahead if they arrive well within a pass.

        Else return as many as it writes in a tenth of a pass. Each message costs time on both
        hosts, and tokens that arrive while a pass runs are of no use before its end.
        """
        step_seconds = self._times.draft_seconds
        if self._last_pass_seconds is None or not step_seconds:
            return 1
        lookahead = self._length.useful_lookahead()
        rollback_seconds = self._times.rollback_seconds
        written_seconds = rollback_seconds + (lookahead - 1) * step_seconds
        if rollback_seconds and written_seconds <= self._last_pass_seconds * _WRITTEN_SHARE:
            return lookahead
        num_tokens = int(self._last_pass_seconds * _COLLECTED_SHARE / step_seconds)
        return min(max(1, num_tokens), lookahead)

    def first_proposal(self, now_seconds: float) -> int:
        """Return as many tokens as the next pass waits for, so that they come in one message."""
        return self.start_size(0, now_seconds)

    def start_size(self, num_ready: int, now_seconds: float) -> int:
        """Weigh the tokens that waiting yields against the time it takes."""
        if self._num_expired_waits >= _MAX_EXPIRED_WAITS:
            return num_ready  # the draft seems stuck: do not wait for it
        next_seconds = max(0.0, self._next_proposal_seconds - now_seconds)
        return self._length.best_start(num_ready, next_seconds)

    def draft_wait_seconds(self) -> float:
        """Return the time of a pass.

        If the draft becomes slower than it was, this costs at most twice as much as the best
        choice in hindsight (ski-rental argument).
        """
        if self._last_pass_seconds is None:
            return self._draft_timeout_seconds
        draft_wait = max(self._last_pass_seconds, _MIN_DRAFT_WAIT_SECONDS)
        return min(draft_wait, self._draft_timeout_seconds)

    def draft_wait_expired(self) -> None:
        """Count it; after a few in a row, no pass waits until the next proposal arrives."""
        self._num_expired_waits += 1

    def proposed(self, proposal: Proposal, now_seconds: float) -> None:
        """Learn the draft's time for a token, and expect the next proposal one token later."""
        self._has_probabilities = self._has_probabilities or bool(proposal.probabilities)
        # N-gram lookup takes no model step, and the model's first proposal includes the prefill.
        if proposal.num_steps and proposal.source is DraftSource.MODEL:
            if self._is_prefilled:
                self._times.observe_draft(self._seconds_per_token(proposal, now_seconds))
            self._is_prefilled = True
        self._last_proposal = (proposal.epoch, now_seconds)
        self._num_expired_waits = 0
        self._next_proposal_seconds = now_seconds + self._times.draft_seconds
        if self._rolled_back_seconds is not None and proposal.epoch >= self._epoch:
            # Up to the first token: the others of the proposal took a step each.
            collecting = max(0, len(proposal.tokens) - 1) * self._times.draft_seconds
            waited = now_seconds - self._rolled_back_seconds
            self._times.observe_rollback(max(0.0, waited - collecting))
            self._rolled_back_seconds = None

    def _seconds_per_token(self, proposal: Proposal, now_seconds: float) -> float:
        """Return the time between two tokens of the draft: a step, and the work around it.

        It is seen in the interval to the proposal before, unless the draft paused in between.
        """
        step_seconds = proposal.draft_seconds / proposal.num_steps
        last_epoch, last_seconds = self._last_proposal
        if last_epoch == proposal.epoch and proposal.tokens:
            interval = (now_seconds - last_seconds) / len(proposal.tokens)
            if interval <= _MAX_STEP_OVERHEAD * step_seconds:
                return max(step_seconds, interval)
        return step_seconds

    def rolled_back(self, epoch: int, now_seconds: float) -> None:
        """Expect the next proposal after as long as it took after earlier rollbacks.

        Before the first one is measured, that is the rest of the running step and one more step.
        """
        step_ends = max(now_seconds, self._next_proposal_seconds)
        by_steps = step_ends + self._times.draft_seconds - now_seconds
        self._next_proposal_seconds = now_seconds + (self._times.rollback_seconds or by_steps)
        self._epoch = epoch
        self._rolled_back_seconds = now_seconds
        self._length.rolled_back(epoch)

    def passed(self, verdict: Verdict, is_first: bool) -> None:
        """Learn the acceptance and the pass times."""
        self._last_pass_seconds = verdict.pass_seconds
        if not is_first:
            self._length.observe(verdict)


def make_policy(
    strategy: Strategy,
    lookahead: int,
    times: StepTimes,
    draft_timeout_seconds: float,
    asynchronous: AsynchronousPolicy = AsynchronousPolicy.ADAPTIVE,
    draft_stops: bool = False,
) -> SpeculationPolicy:
    """Return the speculation policy of a strategy; ``asynchronous`` is that of amusd.

    ``draft_stops`` as in ``Asynchronous``.
    """
    if strategy is not Strategy.AMUSD:
        return Lockstep(draft_timeout_seconds)
    if asynchronous is AsynchronousPolicy.PUBLISHED:
        return Published(draft_timeout_seconds)
    return Asynchronous(lookahead, times, draft_timeout_seconds, draft_stops)
