"""The row budget of a verify pass: how many proposals of each session it checks.

Each token of a pass takes a row of the batch. More rows yield more tokens, but make the pass longer
for all sessions in it. The most promising proposals come first, and none if none pays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from amusd.policy.speculation_length import StepTimes

MAX_ROWS = 256
"""Most proposals that are weighed for a pass, over all its sessions."""


@dataclass(slots=True)
class RowBudget:
    """Learns the pass times of a verify model, and divides the rows of its passes."""

    times: StepTimes = field(default_factory=StepTimes)

    def observe(self, num_rows: int, pass_seconds: float) -> None:
        """Learn from a pass over ``num_rows`` tokens of all sessions."""
        self.times.observe_pass(num_rows, pass_seconds)

    def allot(self, chances: Sequence[Sequence[float]], num_others: int = 0) -> list[int]:
        """Return how many proposals of each session the next pass checks, [sessions].

        ``chances`` has for each session in the pass the probabilities that its next proposals are
        accepted, in order; they never rise. ``num_others`` more rows take part in any case. The
        choice maximizes tokens per second: a pass yields one token for each session, and one more
        for each accepted proposal.
        """
        ranked = sorted(
            (
                (chance, -number)
                for number, of_session in enumerate(chances)
                for chance in of_session
            ),
            reverse=True,
        )[:MAX_ROWS]
        num_sessions = len(chances)
        num_rows = num_sessions + num_others
        seconds = self.times.seconds_of_lengths(num_rows + len(ranked) - 1, 1.0)
        if not seconds:
            return [len(of_session) for of_session in chances]
        tokens = float(num_sessions)
        best_rate, num_best = tokens / seconds[num_rows - 1], 0
        for index, (chance, _) in enumerate(ranked):
            tokens += chance
            rate = tokens / seconds[num_rows + index]
            if rate > best_rate:
                best_rate, num_best = rate, index + 1
        allotted = [0] * num_sessions
        for _, negative in ranked[:num_best]:
            allotted[-negative] += 1
        return allotted
