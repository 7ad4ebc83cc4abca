"""How far a session drafts ahead: limits that its open sets."""

from dataclasses import dataclass

from amusd.protocol.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """How far a session drafts ahead, in tokens, and how many branches it may hold.

    It stops earlier where a further token is used less often than ``min_use_probability``.
    """

    lookahead: int
    max_position: int
    tokens_per_proposal: int = 1
    max_branches: int = 0
    min_use_probability: float = 0.0

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could be proposed."""
        if self.lookahead < 1:
            raise InvalidInputError(f"lookahead is {self.lookahead}: ask for 1 or more")
        if not 1 <= self.tokens_per_proposal <= self.lookahead:
            raise InvalidInputError(
                f"tokens_per_proposal is {self.tokens_per_proposal}: "
                f"ask for 1 to lookahead ({self.lookahead})"
            )
        if not 0.0 <= self.min_use_probability < 1.0:  # nor NaN
            raise InvalidInputError(
                f"min_use_probability is {self.min_use_probability}: ask for 0 to below 1"
            )
