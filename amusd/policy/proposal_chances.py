"""How likely each proposal of a session is accepted: by the draft's own probability if it is known.

Otherwise by the place of the proposal since the last rejection. Each way learns from its own
proposals, so an n-gram lookup and a draft model in one session are told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from amusd.policy.calibration import Calibration
from amusd.policy.place_acceptance import PlaceAcceptance
from amusd.protocol.events import Verdict
from amusd.protocol.verify_session import Compared

SHARED_RATE = 0.02
"""Of the calibration of all sessions of a service."""
_SESSION_RATE = 0.05


@dataclass(slots=True)
class ProposalChances:
    """Learns from the proposals of one session, and begins with what ``shared`` knows."""

    shared: Calibration
    _places: PlaceAcceptance = field(default_factory=PlaceAcceptance)
    _own: Calibration = field(init=False)

    def __post_init__(self) -> None:
        """Begin with what other sessions have taught."""
        self._own = self.shared.begin(_SESSION_RATE)

    def observe(self, verdict: Verdict, compared: Sequence[Compared]) -> None:
        """Learn from a pass, which compared proposals from ``verdict.position`` on."""
        self._places.observe(
            verdict, [None if one.probability else one.is_right for one in compared]
        )
        for one in compared:
            if one.probability:
                self._own.observe(one.probability, one.is_right)
                self.shared.observe(one.probability, one.is_right)

    def rejected(self, epoch: int) -> None:
        """Begin ``epoch`` at the verified position: the next proposal has place 0."""
        self._places.rejected(epoch)

    def chances(self, probabilities: Sequence[float]) -> list[float]:
        """Return for each of the next proposals the probability that a pass accepts it.

        ``probabilities`` are the draft's own, 0 where not known. A proposal is accepted only if all
        before it are right. So the values never rise.
        """
        found, chance = [], 1.0
        for probability, of_place in zip(
            probabilities, self._places.conditional(len(probabilities)), strict=True
        ):
            chance *= self._own.chance(probability) if probability else of_place
            found.append(chance)
        return found
