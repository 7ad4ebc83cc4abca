"""Statistics of one generation: a recorder of its events, and their summary.

It has no clock: the caller passes every time, in seconds of one monotonic clock.
"""

from dataclasses import dataclass, field

from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Proposal, Verdict
from amusd.protocol.ledger import Ledger


@dataclass(frozen=True, slots=True)
class PositionAcceptance:
    """Drafted tokens at one position within a pass: how many were compared, how many accepted."""

    num_checked: int = 0
    num_accepted: int = 0


@dataclass(frozen=True, slots=True)
class SourceAcceptance:
    """Tokens of one draft source: how many were drafted, compared and accepted."""

    source: DraftSource
    num_drafted: int = 0
    num_checked: int = 0
    num_accepted: int = 0


@dataclass(frozen=True, slots=True)
class Statistics:
    """Summary of a generation; ``Statistics`` in the protocol documents the fields."""

    num_prompt_tokens: int
    num_output_tokens: int
    wall_seconds: float
    time_to_first_token_seconds: float
    num_passes: int
    num_drafted: int
    num_accepted: int
    num_rejected: int
    num_wasted: int
    num_rollbacks: int
    acceptance_per_position: tuple[PositionAcceptance, ...]
    draft_busy_seconds: float
    verify_busy_seconds: float
    fallback_reason: str = ""
    acceptance_per_source: tuple[SourceAcceptance, ...] = ()
    num_cached_prompt_tokens: int = 0
    num_branches: int = 0
    num_branch_hits: int = 0
    num_in_passes: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Output tokens per pass of the verify model."""
        return self.num_output_tokens / self.num_passes if self.num_passes else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of accepted tokens among those that were compared, 0 to 1."""
        compared = self.num_accepted + self.num_rejected
        return self.num_accepted / compared if compared else 0.0


@dataclass(slots=True)
class StatisticsRecorder:
    """Collects what the ledger does not count: times, and acceptance per position in a pass."""

    started_seconds: float
    first_token_seconds: float | None = None
    draft_busy_seconds: float = 0.0
    verify_busy_seconds: float = 0.0
    num_cached_prompt_tokens: int = 0
    num_in_passes: int = 0
    fallback_reason: str = ""
    _checked: list[int] = field(default_factory=list)
    _accepted: list[int] = field(default_factory=list)

    def proposal(self, proposal: Proposal) -> None:
        """Record the time that a proposal took."""
        # Without a reported share the whole step counts for this session.
        self.draft_busy_seconds += proposal.device_seconds or proposal.draft_seconds

    def verdict(self, verdict: Verdict, num_output: int | None = None) -> None:
        """Record a pass: its time, and how many of its tokens were accepted.

        The output holds ``num_output`` of the tokens that it made final; None: all of them.
        """
        self.verify_busy_seconds += verdict.device_seconds or verdict.pass_seconds
        self.num_cached_prompt_tokens += verdict.num_cached
        self.num_in_passes += verdict.num_checked
        # Tokens after the first rejected one were not compared, and those after the output's end
        # do not count.
        num_final = verdict.num_accepted + 1
        num_compared = min(verdict.num_checked, num_final if num_output is None else num_output)
        while len(self._checked) < num_compared:
            self._checked.append(0)
            self._accepted.append(0)
        for position in range(num_compared):
            self._checked[position] += 1
            self._accepted[position] += position < verdict.num_accepted

    def tokens(self, now_seconds: float) -> None:
        """Record that tokens became final."""
        if self.first_token_seconds is None:
            self.first_token_seconds = now_seconds

    def summary(self, ledger: Ledger, num_output_tokens: int, now_seconds: float) -> Statistics:
        """Return the summary of a session that has ended and whose ledger is closed."""
        first = self.first_token_seconds if self.first_token_seconds is not None else now_seconds
        counts = ledger.counts
        return Statistics(
            num_prompt_tokens=ledger.num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            wall_seconds=now_seconds - self.started_seconds,
            time_to_first_token_seconds=first - self.started_seconds,
            num_passes=counts.passes,
            num_drafted=counts.drafted,
            num_accepted=counts.accepted,
            num_rejected=counts.rejected,
            num_wasted=counts.wasted,
            num_rollbacks=counts.rollbacks,
            acceptance_per_position=tuple(
                PositionAcceptance(checked, accepted)
                for checked, accepted in zip(self._checked, self._accepted, strict=True)
            ),
            draft_busy_seconds=self.draft_busy_seconds,
            verify_busy_seconds=self.verify_busy_seconds,
            fallback_reason=self.fallback_reason,
            acceptance_per_source=tuple(
                SourceAcceptance(
                    source, outcome.drafted, outcome.accepted + outcome.rejected, outcome.accepted
                )
                for source, outcome in counts.by_source.items()
                if outcome.drafted
            ),
            num_cached_prompt_tokens=self.num_cached_prompt_tokens,
            num_branches=counts.branches,
            num_branch_hits=counts.branch_hits,
            num_in_passes=self.num_in_passes,
        )
