"""Acceptance by place: how likely a proposal is right, by its place since the last rejection.

The first places are right less often than later ones, because a rejection marks a difficult text.
"""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from amusd.protocol.events import Verdict

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 8.0
_DECAY = 0.97  # weight of earlier tokens after each compared token
_PLACE_WEIGHT = 6.0  # of the acceptance of all places in the estimate for one place, in tokens
_PLACE_DECAY = 0.95  # weight of earlier tokens of a place after each compared token there
_NUM_CLASSES = 5  # places 0, 1, 2 to 3, 4 to 7, and 8 or later
_LEAST, _MOST = 0.01, 0.999  # no estimate excludes either outcome


def _zeros() -> list[float]:
    return [0.0] * _NUM_CLASSES


def _class_of(place: int) -> int:
    return min(place.bit_length(), _NUM_CLASSES - 1)


@dataclass(slots=True)
class PlaceAcceptance:
    """Learns the acceptance of one session from its verdicts.

    The estimate for a place is drawn towards the acceptance of all places as long as few tokens of
    that place are known.
    """

    _num_accepted: float = _PRIOR_ACCEPTANCE * _PRIOR_WEIGHT
    _num_compared: float = _PRIOR_WEIGHT
    _accepted_at: list[float] = field(default_factory=_zeros)
    _compared_at: list[float] = field(default_factory=_zeros)
    _epoch: int = -1
    _run_start: int = 0  # position of the first token after the last rejection
    _position: int = 0  # the verified position

    @property
    def acceptance(self) -> float:
        """Estimated probability that a proposal is right if those before it are right."""
        return self._num_accepted / self._num_compared

    @property
    def late_acceptance(self) -> float:
        """The same for a token that stands far behind the last rejection."""
        return self._at_class(_NUM_CLASSES - 1)

    def observe(self, verdict: Verdict, outcomes: Sequence[bool | None] | None = None) -> None:
        """Learn from the proposals that a pass compared.

        ``outcomes`` says of each of them whether it was right, and None of those to leave out.
        Without it they are those that the verdict tells.
        """
        if verdict.epoch != self._epoch:
            self._epoch, self._run_start = verdict.epoch, verdict.position
        first_place = max(0, verdict.position - self._run_start)
        if outcomes is None:
            num_compared = min(verdict.num_checked, verdict.num_accepted + 1)
            outcomes = [index < verdict.num_accepted for index in range(num_compared)]
        for place, is_right in enumerate(outcomes, first_place):
            if is_right is not None:
                self._compared(place, is_right)
        self._position = verdict.position + verdict.num_accepted + 1
        if verdict.num_accepted < verdict.num_checked:
            self.rejected(verdict.epoch + 1)

    def rejected(self, epoch: int) -> None:
        """Begin ``epoch`` at the verified position: the next proposal has place 0."""
        self._epoch, self._run_start = epoch, self._position

    def chances(self, num_proposals: int) -> list[float]:
        """Return for each of the next proposals the probability that a pass accepts it.

        A proposal is accepted only if all before it are right. So the values never rise.
        """
        return list(itertools.accumulate(self.conditional(num_proposals), operator.mul))

    def conditional(self, num_proposals: int) -> list[float]:
        """Return the same for each of them if all proposals before it are right."""
        by_class = [self._at_class(number) for number in range(_NUM_CLASSES)]
        place = max(0, self._position - self._run_start)
        return [by_class[_class_of(index)] for index in range(place, place + num_proposals)]

    def _at_class(self, number: int) -> float:
        accepted = self._accepted_at[number] + _PLACE_WEIGHT * self.acceptance
        return min(max(accepted / (self._compared_at[number] + _PLACE_WEIGHT), _LEAST), _MOST)

    def _compared(self, place: int, is_right: bool) -> None:
        self._num_accepted = self._num_accepted * _DECAY + is_right
        self._num_compared = self._num_compared * _DECAY + 1.0
        number = _class_of(place)
        self._accepted_at[number] = self._accepted_at[number] * _PLACE_DECAY + is_right
        self._compared_at[number] = self._compared_at[number] * _PLACE_DECAY + 1.0
