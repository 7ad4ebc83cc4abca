"""What became of the proposed tokens of one session, by their source."""

from dataclasses import dataclass, field

from amusd.protocol.draft_source import DraftSource


@dataclass(slots=True)
class SourceOutcomes:
    """Proposed tokens of one source, and the outcomes of those that were compared."""

    drafted: int = 0
    accepted: int = 0
    rejected: int = 0


def _no_outcomes() -> dict[DraftSource, SourceOutcomes]:
    return {source: SourceOutcomes() for source in DraftSource}


@dataclass(slots=True)
class LedgerCounts:
    """What became of proposed tokens: ``drafted == accepted + rejected + wasted + tail``.

    Tokens of a branch count as drafted when the branch is taken. ``branches`` were held
    or came just too late for that, ``branch_hits`` of them began an epoch.
    """

    by_source: dict[DraftSource, SourceOutcomes] = field(default_factory=_no_outcomes)
    branches: int = 0
    branch_hits: int = 0
    wasted: int = 0
    rollbacks: int = 0
    passes: int = 0

    @property
    def drafted(self) -> int:
        """Proposed tokens of all sources."""
        return sum(outcome.drafted for outcome in self.by_source.values())

    @property
    def accepted(self) -> int:
        """Accepted tokens of all sources."""
        return sum(outcome.accepted for outcome in self.by_source.values())

    @property
    def rejected(self) -> int:
        """Rejected tokens of all sources."""
        return sum(outcome.rejected for outcome in self.by_source.values())
