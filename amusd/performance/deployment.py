"""What the performance model knows of a deployment: step times, messages, acceptance, sessions."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from amusd.protocol.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of a batch by its number of tokens, ``sizes`` ascending.

    Between two sizes it is interpolated. Beyond the largest it grows as between the last two, and
    below the smallest it is constant.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse times that are no times, and sizes that do not ascend.

        Raises:
            InvalidInputError: the values are out of range.
        """
        if not self.sizes or len(self.sizes) != len(self.seconds):
            raise InvalidInputError("give the time of at least one batch size")
        if self.sizes[0] < 1 or any(low >= high for low, high in pairwise(self.sizes)):
            raise InvalidInputError(f"batch sizes are {self.sizes}: give ascending ones from 1 on")
        if not all(0.0 < one < math.inf for one in self.seconds):
            raise InvalidInputError("the time of a batch needs to be above 0 and finite")
        if any(low > high for low, high in pairwise(self.seconds)):
            raise InvalidInputError("a larger batch cannot take less time than a smaller one")

    @classmethod
    def constant(cls, seconds: float) -> "StepSeconds":
        """Return the same time for every size."""
        return cls((1,), (seconds,))

    def of(self, num_tokens: int) -> float:
        """Return the seconds of a batch over ``num_tokens``."""
        above = bisect.bisect_left(self.sizes, num_tokens)
        if above == 0 or len(self.sizes) == 1:
            return self.seconds[0]
        above = min(above, len(self.sizes) - 1)
        low, high = self.sizes[above - 1], self.sizes[above]
        share = (num_tokens - low) / (high - low)
        return self.seconds[above - 1] + share * (self.seconds[above] - self.seconds[above - 1])

    def scaled(self, factor: float) -> "StepSeconds":
        """Return the times of a device that is slower by ``factor``."""
        return StepSeconds(self.sizes, tuple(factor * one for one in self.seconds))


@dataclass(frozen=True, slots=True)
class MessageSeconds:
    """Seconds of each message, from the end of its cause to its effect, one way.

    A verdict and a forward travel between verify service and orchestrator. A rollback, an advance
    and a proposal travel between orchestrator and draft service.
    """

    verdict: float = 0.0
    forward: float = 0.0
    rollback: float = 0.0
    proposal: float = 0.0

    def __post_init__(self) -> None:
        """Refuse times below 0.

        Raises:
            InvalidInputError: a time is negative or not finite.
        """
        for one in (self.verdict, self.forward, self.rollback, self.proposal):
            if not 0.0 <= one < math.inf:
                raise InvalidInputError(f"a message takes {one} s: use 0 or more")

    @classmethod
    def by_hop(cls, draft_hop: float, verify_hop: float, overhead: float = 0.0) -> "MessageSeconds":
        """Return the times for one-way seconds of each hop, and the work for each message."""
        return cls(
            verdict=verify_hop + overhead,
            forward=verify_hop + overhead,
            rollback=draft_hop + overhead,
            proposal=draft_hop + overhead,
        )


@dataclass(frozen=True, slots=True)
class Branching:
    """Branches that the draft prepares beside its run.

    ``chances[r]`` is the probability that the verify model's token is the draft's next-best one of
    rank r, where the draft's own token is wrong. Up to ``num_rows`` branches are extended in each
    draft step.
    """

    chances: tuple[float, ...]
    num_rows: int = 32

    def __post_init__(self) -> None:
        """Refuse chances that are no probabilities.

        Raises:
            InvalidInputError: the values are out of range.
        """
        if not self.chances or min(self.chances) < 0.0 or sum(self.chances) > 1.0 + 1e-9:
            raise InvalidInputError(f"branch chances are {self.chances}: they add up to 0 to 1")
        if self.num_rows < 1:
            raise InvalidInputError("branches need at least one row")

    @classmethod
    def of_total(cls, chance: float, num_ranks: int = 4) -> "Branching":
        """Return ranks that hold ``chance`` together, each half as likely as the one before."""
        if not 0.0 <= chance <= 1.0:
            raise InvalidInputError(f"branch chance is {chance}: use 0 to 1")
        shares = [0.5 ** (rank + 1) for rank in range(num_ranks - 1)]
        return cls(tuple(chance * share for share in (*shares, 1.0 - sum(shares))))


@dataclass(frozen=True, slots=True)
class Deployment:
    """Two devices, the messages between them, and a pair of models.

    ``acceptance[i]`` is the probability that the draft's token at place i of a run is right if the
    tokens before it are. A run begins behind a token of the verify model. The last value holds for
    all later places. ``num_sessions`` share both devices, and every batch.
    """

    draft: StepSeconds
    verify: StepSeconds
    acceptance: tuple[float, ...]
    messages: MessageSeconds = MessageSeconds()
    num_sessions: int = 1
    branching: Branching | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            InvalidInputError: an acceptance is no probability, or there is no session.
        """
        if not self.acceptance or not all(0.0 <= one <= 1.0 for one in self.acceptance):
            raise InvalidInputError(f"acceptance is {_listed(self.acceptance)}: use 0 to 1")
        if self.num_sessions < 1:
            raise InvalidInputError(f"num_sessions is {self.num_sessions}: use 1 or more")

    def acceptance_at(self, place: int) -> float:
        """Return the probability that the token at ``place`` of a run is right."""
        return self.acceptance[min(place, len(self.acceptance) - 1)]


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values) or "empty"
