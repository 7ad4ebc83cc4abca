"""Where drafted tokens come from, and which source pays in a session.

A look-up takes no time of the draft device, but every wrong token costs the same, whoever wrote
it: a rollback, and the wait until there is something to check again. So a look-up has to be right
as often as the model would be, and the model often enough to be worth asking at all.

- ``LOOKUP`` is off while it is right less often than the model. Both are smoothed by one prior,
  so that it favours neither before there are counts. It is judged from 8 compared tokens on: a
  look-up that is never right costs 8 rollbacks at most, and one that is right nine times in ten,
  beside a model that is right six times in ten, is switched off in one session of a hundred.
- ``MODEL`` is off while less than one in twenty of its tokens is right: drafting with it then
  yields at most 5 % more tokens a pass, which its rollbacks cost as well. It is judged from 48
  compared tokens on, by its plain share, for the prior speaks in its favour: a model that is
  right one time in five is switched off in two sessions of a thousand.

A source that is off is not tried again for a change: it stays judged on its counts. Those of the
model go on while the look-up is off, so that the look-up comes back when the model gets worse.
"""

from dataclasses import dataclass, field

from amusd.protocol.draft_source import DraftSource

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 8.0
_MIN_CHECKED_LOOKUP = 8
_MIN_CHECKED_MODEL = 48
_LEAST_ACCEPTANCE_MODEL = 0.05


@dataclass(slots=True)
class SourceCounts:
    """Tokens of one source that were compared with the verify model's, and the right ones."""

    num_checked: int = 0
    num_accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the compared tokens that were right, 0 to 1."""
        return self.num_accepted / self.num_checked if self.num_checked else 0.0

    @property
    def smoothed_acceptance(self) -> float:
        """How often the source is right, as far as is known."""
        accepted = self.num_accepted + _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT
        return accepted / (self.num_checked + _PRIOR_WEIGHT)


def _no_counts() -> dict[DraftSource, SourceCounts]:
    return {source: SourceCounts() for source in DraftSource}


@dataclass(slots=True)
class SourceTracker:
    """Counts how the sources of one session fare, and says which of them pay."""

    counts: dict[DraftSource, SourceCounts] = field(default_factory=_no_counts)

    def compared(self, source: DraftSource, is_right: bool) -> None:
        """Take note that a token of ``source`` was compared with the verify model's."""
        counts = self.counts[source]
        counts.num_checked += 1
        counts.num_accepted += is_right

    def pays(self, source: DraftSource) -> bool:
        """Whether ``source`` should draft."""
        model, lookup = self.counts[DraftSource.MODEL], self.counts[DraftSource.LOOKUP]
        if source is DraftSource.MODEL:
            is_known = model.num_checked >= _MIN_CHECKED_MODEL
            return not is_known or model.acceptance >= _LEAST_ACCEPTANCE_MODEL
        is_known = lookup.num_checked >= _MIN_CHECKED_LOOKUP
        return not is_known or lookup.smoothed_acceptance >= model.smoothed_acceptance

    @property
    def paying(self) -> frozenset[DraftSource]:
        """All sources that pay; none if the verify model is best left alone."""
        return frozenset(source for source in DraftSource if self.pays(source))
