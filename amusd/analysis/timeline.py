"""The timeline of one generation: its messages in order, as the orchestrator sees them.

Rules of this file
- It has no clock: the caller passes every time. Absolute times are nanoseconds since 1970; relative
  times are seconds since the request arrived.
- A timeline is bounded. If it is full, all later events are left out, and ``is_truncated`` is set.
- The outcome of each drafted token is found by replaying the messages on a ledger.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from amusd.protocol.errors import PreconditionError
from amusd.protocol.events import Advance, Decision, Forward, Proposal, Rollback, Verdict
from amusd.protocol.ledger import Ledger

Message = Proposal | Verdict | Forward | Advance | Rollback

# Counts events, their tokens and their device times. Each takes less than 50 bytes in protobuf, and
# a gRPC message holds 4 MiB.
MAX_ENTRIES = 40_000


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """A message that the orchestrator processed or sent."""

    seconds: float
    message: Message

    @property
    def token_ids(self) -> set[int]:
        """The tokens in its message, those of branches included."""
        match self.message:
            case Proposal() | Forward():
                return set(self.message.all_tokens)
            case Verdict():
                return {self.message.next_token}
            case Advance():
                return set(self.message.tokens)
            case Rollback():
                return {self.message.corrected_token, *self.message.branch_tokens}


@dataclass(frozen=True, slots=True)
class Timeline:
    """The events of a generation in order; ``is_truncated``: later events were left out.

    The ledger forwarded at most ``max_branches`` branches at a time; the replay needs that, too.
    """

    started_unix_nanos: int
    events: tuple[TimelineEvent, ...]
    is_truncated: bool = False
    max_branches: int = 0


@dataclass(slots=True)
class TimelineRecorder:
    """Collects the timeline of a generation whose request arrived at ``started_unix_nanos``."""

    started_unix_nanos: int
    max_entries: int = MAX_ENTRIES
    max_branches: int = 0
    on_event: Callable[[TimelineEvent], None] | None = None
    """Takes each event as it is recorded."""
    _events: list[TimelineEvent] = field(default_factory=list)
    _num_entries: int = 0
    _is_truncated: bool = False

    def decided(self, event: object, decision: Decision, unix_nanos: int) -> None:
        """Record an event that was processed, and the messages that its decision sends."""
        if isinstance(event, Verdict):
            self._add(_recorded(event, decision.committed), unix_nanos)
        elif isinstance(event, Proposal):
            self._add(event, unix_nanos)
        for message in (decision.rollback, decision.advance, decision.forward):
            if message is not None:
                self._add(message, unix_nanos)

    def timeline(self) -> Timeline:
        """Return the timeline so far."""
        return Timeline(
            self.started_unix_nanos, tuple(self._events), self._is_truncated, self.max_branches
        )

    def _add(self, message: Message, unix_nanos: int) -> None:
        self._num_entries += _num_entries(message)
        # The replay needs every message up to the last one, so nothing follows a gap.
        if self._num_entries > self.max_entries:
            self._is_truncated = True
            return
        seconds = (unix_nanos - self.started_unix_nanos) * 1e-9
        event = TimelineEvent(seconds, message)
        self._events.append(event)
        if self.on_event is not None:
            self.on_event(event)


def _recorded(verdict: Verdict, committed: tuple[int, ...]) -> Verdict:
    """Return a verdict without log-probabilities and tokens behind the end of the output."""
    if verdict.logprobs:
        verdict = replace(verdict, logprobs=(), prompt_logprobs=())
    if not 0 < len(committed) <= verdict.num_accepted:
        return verdict
    return replace(verdict, num_accepted=len(committed) - 1, next_token=committed[-1])


class TokenOutcome(enum.Enum):
    """The outcome of a drafted token."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    WASTED = "wasted"


def num_prompt_tokens(timeline: Timeline) -> int:
    """Return the position of the first output token; 1 if there is no output."""
    positions = [
        event.message.position for event in timeline.events if isinstance(event.message, Verdict)
    ]
    return min(positions, default=1)


def token_outcomes(timeline: Timeline) -> list[tuple[TokenOutcome, ...]]:
    """Return the outcomes of the tokens of each proposal, in the order of the proposals.

    A token that was never compared is wasted: it follows a rejected token, belongs to an old epoch,
    or is still unverified at the end of the timeline.
    """
    # The values of the prompt's tokens are irrelevant: no proposal covers them.
    prompt = [0] * max(1, num_prompt_tokens(timeline))
    ledger = Ledger(prompt, max_branches=timeline.max_branches)
    proposals: list[tuple[Proposal, bool]] = []
    for event in timeline.events:
        match event.message:
            case Verdict() as verdict:
                ledger.verdict(verdict)
            case Proposal() as proposal:
                proposals.append((proposal, _is_taken(ledger, proposal)))
    ended: set[int] = set()  # epochs whose rejected token was found
    return [
        _outcomes(proposal, ledger.tokens, ended) if is_taken else _wasted(proposal)
        for proposal, is_taken in proposals
    ]


def _is_taken(ledger: Ledger, proposal: Proposal) -> bool:
    """Apply a proposal to the ledger; return whether it belongs to the current epoch."""
    is_current = proposal.epoch == ledger.epoch
    try:
        ledger.proposal(proposal)
    except PreconditionError:
        return False  # a protocol violation: the orchestrator dropped this draft
    return is_current


def _outcomes(
    proposal: Proposal, final: Sequence[int], ended: set[int]
) -> tuple[TokenOutcome, ...]:
    outcomes: list[TokenOutcome] = []
    for position, token in enumerate(proposal.tokens, proposal.position):
        if proposal.epoch in ended or position >= len(final):
            outcomes.append(TokenOutcome.WASTED)
        elif token == final[position]:
            outcomes.append(TokenOutcome.ACCEPTED)
        else:
            outcomes.append(TokenOutcome.REJECTED)
            ended.add(proposal.epoch)
    return tuple(outcomes)


def _wasted(proposal: Proposal) -> tuple[TokenOutcome, ...]:
    return (TokenOutcome.WASTED,) * len(proposal.tokens)


def _num_entries(message: Message) -> int:
    match message:
        case Proposal():
            return 1 + len(message.tokens) + len(message.steps) + _num_branch_tokens(message)
        case Verdict():
            return 1 + len(message.passes)
        case Forward():
            return 1 + len(message.tokens) + _num_branch_tokens(message)
        case Advance():
            return 1 + len(message.tokens)
        case Rollback():
            return 1 + len(message.branch_tokens)


def _num_branch_tokens(message: Proposal | Forward) -> int:
    return sum(1 + len(branch.tokens) for branch in message.branches)
