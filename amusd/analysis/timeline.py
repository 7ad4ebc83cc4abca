"""What happened when in one generation: its messages, recorded as the orchestrator sees them.

Rules of this file
- It has no clock: every time is given to it. Absolute times are nanoseconds since 1970, relative
  ones seconds since the request arrived.
- A timeline is bounded: what does not fit is left out from some event on, and the timeline says so.
- What became of each drafted token is found by the ledger, from the same messages.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from amusd.protocol.errors import PreconditionError
from amusd.protocol.events import Advance, Decision, Forward, Proposal, Rollback, Verdict
from amusd.protocol.ledger import Ledger

Message = Proposal | Verdict | Forward | Advance | Rollback

# Events, tokens and times of work together; as messages they take less than 50 bytes each, and
# a gRPC message may have 4 MiB.
MAX_ENTRIES = 40_000


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """A message that the orchestrator took up or sent."""

    seconds: float
    message: Message


@dataclass(frozen=True, slots=True)
class Timeline:
    """The events of a generation in order; ``is_truncated``: it went on after the last one."""

    started_unix_nanos: int
    events: tuple[TimelineEvent, ...]
    is_truncated: bool = False


@dataclass(slots=True)
class TimelineRecorder:
    """Collects the timeline of a generation whose request arrived at ``started_unix_nanos``."""

    started_unix_nanos: int
    max_entries: int = MAX_ENTRIES
    _events: list[TimelineEvent] = field(default_factory=list)
    _num_entries: int = 0
    _is_truncated: bool = False

    def decided(self, event: object, decision: Decision, unix_nanos: int) -> None:
        """Take note of what was taken up, and of what is sent for it."""
        if isinstance(event, Proposal | Verdict):
            self._add(event, unix_nanos)
        for message in (decision.rollback, decision.advance, decision.forward):
            if message is not None:
                self._add(message, unix_nanos)

    def timeline(self) -> Timeline:
        """Return what was recorded."""
        return Timeline(self.started_unix_nanos, tuple(self._events), self._is_truncated)

    def _add(self, message: Message, unix_nanos: int) -> None:
        self._num_entries += _num_entries(message)
        # Nothing may follow what was left out, or the rest could not be understood.
        if self._num_entries > self.max_entries:
            self._is_truncated = True
            return
        seconds = (unix_nanos - self.started_unix_nanos) * 1e-9
        self._events.append(TimelineEvent(seconds, message))


class TokenOutcome(enum.Enum):
    """What became of a drafted token."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    WASTED = "wasted"


def num_prompt_tokens(timeline: Timeline) -> int:
    """Return where the output begins, or 1 if there was none."""
    positions = [
        event.message.position for event in timeline.events if isinstance(event.message, Verdict)
    ]
    return min(positions, default=1)


def token_outcomes(timeline: Timeline) -> list[tuple[TokenOutcome, ...]]:
    """Return what became of the tokens of each proposal, in the order of the proposals.

    A token that was never compared is wasted: it followed a wrong one, came too late, or was left
    over at the end of the timeline.
    """
    # The prompt's own tokens do not matter: nothing is proposed there.
    ledger = Ledger([0] * max(1, num_prompt_tokens(timeline)))
    proposals: list[tuple[Proposal, bool]] = []
    for event in timeline.events:
        match event.message:
            case Verdict() as verdict:
                ledger.verdict(verdict)
            case Proposal() as proposal:
                proposals.append((proposal, _is_taken(ledger, proposal)))
    ended: set[int] = set()  # epochs whose wrong token was found
    return [
        _fates(proposal, ledger.tokens, ended) if is_taken else _wasted(proposal)
        for proposal, is_taken in proposals
    ]


def _is_taken(ledger: Ledger, proposal: Proposal) -> bool:
    """Give a proposal to the ledger; return whether it is of its epoch."""
    is_current = proposal.epoch == ledger.epoch
    try:
        ledger.proposal(proposal)
    except PreconditionError:
        return False  # the orchestrator gave up a draft that proposes such
    return is_current


def _fates(proposal: Proposal, final: Sequence[int], ended: set[int]) -> tuple[TokenOutcome, ...]:
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
            return 1 + len(message.tokens) + len(message.steps)
        case Verdict():
            return 1 + len(message.passes)
        case Forward() | Advance():
            return 1 + len(message.tokens)
        case Rollback():
            return 1
