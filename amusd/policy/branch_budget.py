"""How many branches a batch of the draft model takes beside the runs of its sessions. Pure.

Branches are worth what they save: after a rejection for which a branch is there, the next pass
does not wait for new draft steps. They cost what their rows add to the draft steps of all sessions.
Where rows are nearly free, as on a GPU, all branches are drafted. Where a step takes longer with
each row, as on a CPU, few or none are.

Rules of this file
- The time of a step by its rows is a running estimate over all batches, prefill included. A step
  without branches is measured first. Between measured sizes the time is interpolated. Rows beyond
  them count as free, and sizes that did not occur for long are forgotten. So rows that seem to cost
  too much are tried again, rarely.
- The time of a step includes the host's work until the next one.
- The chance that a branch is there counts from the rollbacks, against what is usual for as many
  branches. Old rollbacks are forgotten, so branches that did not pay are tried again.
"""

from dataclasses import dataclass

_SAVED_STEPS = 2.0
"""Draft steps that the verify model waits for after a rejection without a branch."""
_USUAL_STEPS = 8.0
"""Draft steps of a session from one rollback to the next, until it is measured."""
_MOST_HITS = 0.5
_FURTHER = 0.85
"""With n branches at a time, ``_MOST_HITS * (1 - _FURTHER**n)`` of the rejections find one."""
_PRIOR_HITS = 4.0
_KEPT = 0.995  # of the counts, at each rollback
_MIN_WEIGHT = 0.1  # of the last batch in the average of its size
_MAX_BATCHES = 2048
"""Batches after which a size that does not occur is forgotten; a size that has seldom occurred is
forgotten sooner, for a single late batch says little."""
_BATCHES_TO_TRY = 512
_MESSAGE_SECONDS = 1e-3
"""The wait after a rejection without a branch, apart from draft steps."""
_MESSAGE_INTERVAL_SECONDS = 1.5e-3
"""Least time between two messages with branches of a session."""
_IDLE_WEIGHT = 0.3
"""Weight of a step's time if no run takes part: it only delays what arrives meanwhile."""
_LEAST_SECONDS = 1e-4  # a step that takes less is as good as free
_FEW_ROWS, _DEAR_ROW = 8, 0.05
"""Where each of a few rows takes a larger share of a step, there are no branches. Such a device is
a CPU: it shares cores and memory with the verify model, and its time to spare is not free."""
_KEPT_DECISIONS = 16  # batches
_MAX_RISE = 1.25  # of an average, by one batch: a thread may lose its core for a while
_TOLERANCE = 0.02  # share of a step by which measured times differ by chance
_EXACT_ROWS = 16  # larger batches are counted by powers of two


@dataclass(slots=True)
class _Average:
    seconds: float
    num_batches: int
    last_batch: int


class RowTimes:
    """Seconds of a batch by its number of rows, a running average for each size."""

    def __init__(self) -> None:
        """Start without any batch."""
        self._averages: dict[int, _Average] = {}
        self._num_batches = 0

    def ran(self, num_rows: int, seconds: float) -> bool:
        """Count a batch over ``num_rows`` tokens, 1 or more.

        Return whether the time of its size was unknown.
        """
        self._num_batches += 1
        size = _size(num_rows)
        found = self._averages.get(size)
        if found is None:
            self._averages[size] = _Average(seconds, 1, self._num_batches)
            return True
        was_old = self._is_old(found)
        found.num_batches += 1
        weight = 1.0 if was_old else max(1 / found.num_batches, _MIN_WEIGHT)
        if found.num_batches > 2 and not was_old:
            seconds = min(seconds, _MAX_RISE * found.seconds)
        found.seconds += weight * (seconds - found.seconds)
        found.last_batch = self._num_batches
        return was_old

    def seconds(self, num_rows: int) -> float:
        """Return the time of a batch over ``num_rows`` tokens; 0: none as small has run."""
        return self.curve(num_rows, num_rows)[0]

    def curve(self, first: int, last: int) -> list[float]:
        """Return the times of batches over ``first`` to ``last`` tokens, as ``seconds`` does."""
        known = sorted(
            (size, one.seconds) for size, one in self._averages.items() if not self._is_old(one)
        )
        found, above = [], 0
        for num_rows in range(first, last + 1):
            wanted = _size(num_rows)
            while above < len(known) and known[above][0] <= wanted:
                above += 1
            if not above:
                found.append(0.0)
                continue
            low, seconds = known[above - 1]
            if low < wanted and above < len(known):
                high, more = known[above]
                seconds += (wanted - low) / (high - low) * (more - seconds)
            found.append(seconds)
        return found

    def _is_old(self, average: _Average) -> bool:
        most = min(_MAX_BATCHES, _BATCHES_TO_TRY * average.num_batches**2)
        return self._num_batches - average.last_batch > most


class BranchBudget:
    """Decides how many branches take part in the next batch of a draft service."""

    def __init__(self, most: int) -> None:
        """Allow at most ``most`` branches in a batch."""
        self._most = most
        self._times = RowTimes()
        self._allowed = 0
        self._decisions: dict[int, int] = {}  # by the number of runs, for a few batches
        self._num_decided = 0
        self._hits = self._usual_hits = 0.0
        self._steps = self._rollbacks = 0.0

    @property
    def steps_per_rollback(self) -> float:
        """Steps of a session's run from one rollback to the next."""
        return (self._steps + _USUAL_STEPS) / (self._rollbacks + 1.0)

    @property
    def steps_between(self) -> int:
        """Least number of steps between two messages with branches of a session.

        Such a message takes each of the services some tenths of a millisecond.
        """
        return 1 + int(_MESSAGE_INTERVAL_SECONDS / max(self._times.seconds(1), 1e-5))

    def hit_chance(self, num_branches: int) -> float:
        """Return the share of rollbacks that find a branch if so many are drafted at a time."""
        quality = (self._hits + _PRIOR_HITS) / (self._usual_hits + _PRIOR_HITS)
        return min(1.0, quality * _usual_hit_chance(num_branches))

    def ran(self, num_rows: int, num_runs: int, seconds: float) -> None:
        """Count a batch over ``num_rows`` tokens, with a step of ``num_runs`` sessions' runs.

        ``seconds`` is the time until the next batch begins, the host's work included.
        """
        if self._times.ran(num_rows, seconds):
            self._decisions.clear()
        self._steps += num_runs

    def rolled_back(self, has_branch: bool) -> None:
        """Count a rollback, and whether there was a branch for its outcome."""
        self._hits = _KEPT * self._hits + has_branch
        self._usual_hits = _KEPT * self._usual_hits + _usual_hit_chance(self._allowed)
        self._steps *= _KEPT
        self._rollbacks = _KEPT * self._rollbacks + 1.0

    def places(self, num_runs: int) -> int:
        """Return how many branches may take part in a batch with ``num_runs`` other sequences."""
        self._num_decided += 1
        if self._num_decided >= _KEPT_DECISIONS:
            self._num_decided = 0
            self._decisions.clear()
        if num_runs not in self._decisions:
            self._decisions[num_runs] = self._decide(num_runs)
        self._allowed = self._decisions[num_runs]
        return self._allowed

    def _decide(self, num_runs: int) -> int:
        num_rows = max(1, num_runs)
        times = self._times.curve(num_rows, num_rows + self._most)
        # Without a run there may be nothing to measure first: sessions may always step together.
        alone = times[0] if num_runs else next((one for one in times if one), 0.0)
        if not alone:
            return 0  # it is measured first
        wait = (_SAVED_STEPS * alone + _MESSAGE_SECONDS) / self.steps_per_rollback
        few = min(_FEW_ROWS, self._most)
        if times[few] - alone > few * _DEAR_ROW * max(alone, _LEAST_SECONDS):
            return 0
        weight = 1.0 if num_runs else _IDLE_WEIGHT
        best, best_gain = 0, 0.0
        for num_branches in range(1, self._most + 1):
            cost = max(0.0, times[num_branches] - (1.0 + _TOLERANCE) * alone)
            gain = self.hit_chance(num_branches) * wait - weight * cost
            # Of equal gains the most branches: where rows are free, none is left out.
            if gain >= best_gain:
                best, best_gain = num_branches, gain
        return best


def _size(num_rows: int) -> int:
    """Return the number of rows that batches of about this size are counted under."""
    return num_rows if num_rows <= _EXACT_ROWS else 1 << (num_rows - 1).bit_length()


def _usual_hit_chance(num_branches: int) -> float:
    return _MOST_HITS * (1.0 - float(_FURTHER**num_branches))
