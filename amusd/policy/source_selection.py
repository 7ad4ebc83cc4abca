"""Which draft sources are worth using in a session, by how often their tokens are right.

N-gram lookup takes no time of the draft device. But a wrong token costs the same from every
source: a rollback, and the wait for the next proposal. So lookup must be right as often as the
model, and the model must be right often enough to be used at all.

- A proposer such as ``LOOKUP`` is off while it is right less often than the model. Both rates are
  smoothed with the same prior, so the prior favours neither. The rule holds from 8 compared tokens
  on. A lookup that is never right costs at most 8 rollbacks. A lookup that is right nine times in
  ten, beside a model that is right six times in ten, is switched off in one session of a hundred.
- ``MODEL`` is off while less than one in twenty of its tokens is right. Drafting with such a model
  yields at most 5 % more tokens a pass, and its rollbacks cost as much. The rule holds from 48
  compared tokens on, with the rate that is not smoothed, because the prior favours the model. A
  model that is right one time in five is switched off in two sessions of a thousand.

A source that is off is not tried again at random. While lookup is off, the model is still counted,
so lookup comes back if the model gets worse. While the model is off, nothing changes its counts.
"""

from dataclasses import dataclass, field

from amusd.protocol.draft_source import DraftSource

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 8.0
_MIN_CHECKED = 8
_MIN_CHECKED_MODEL = 48
_MIN_ACCEPTANCE_MODEL = 0.05


@dataclass(slots=True)
class SourceCounts:
    """Tokens of one source that were compared with the verify model's, and how many were right."""

    num_checked: int = 0
    num_accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the compared tokens that were right, 0 to 1."""
        return self.num_accepted / self.num_checked if self.num_checked else 0.0

    @property
    def smoothed_acceptance(self) -> float:
        """Estimate of the acceptance, 0 to 1; the prior if nothing was compared yet."""
        accepted = self.num_accepted + _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT
        return accepted / (self.num_checked + _PRIOR_WEIGHT)


def _no_counts() -> dict[DraftSource, SourceCounts]:
    return {source: SourceCounts() for source in DraftSource}


@dataclass(slots=True)
class SourceTracker:
    """Counts right and wrong tokens by source in one session, and says which sources pay."""

    counts: dict[DraftSource, SourceCounts] = field(default_factory=_no_counts)

    def compared(self, source: DraftSource, is_right: bool) -> None:
        """Count a token of ``source`` that was compared with the verify model's token."""
        counts = self.counts[source]
        counts.num_checked += 1
        counts.num_accepted += is_right

    def pays(self, source: DraftSource) -> bool:
        """Return whether ``source`` is worth using."""
        model, counts = self.counts[DraftSource.MODEL], self.counts[source]
        if source is DraftSource.MODEL:
            is_known = model.num_checked >= _MIN_CHECKED_MODEL
            return not is_known or model.acceptance >= _MIN_ACCEPTANCE_MODEL
        is_known = counts.num_checked >= _MIN_CHECKED
        return not is_known or counts.smoothed_acceptance >= model.smoothed_acceptance

    @property
    def paying(self) -> frozenset[DraftSource]:
        """All sources that pay; empty if the verify model is faster without proposals."""
        return frozenset(source for source in DraftSource if self.pays(source))
