"""What a draft is made with: everything that decides the result, in one frozen object."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a draft is cut and trained; tokens are those of answers."""

    verify: str
    fingerprint: str  # of the verify model
    layers: tuple[int, ...]
    draft_vocab: int  # rows of the output head, 0: the whole vocabulary
    num_tokens: int  # written by the verify model
    epochs: int
    batch_rows: int
    peak_rate: float
    target_temperature: float
    max_sequence: int
    seed: int

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read it again.

        Raises:
            ValueError: it is not a recipe.
            TypeError: likewise.
        """
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "layers": tuple(values["layers"])})

    def difference(self, other: "Recipe") -> str:
        """Return the name of a setting that differs, or an empty string."""
        ours, theirs = asdict(self), asdict(other)
        return next((name for name, value in ours.items() if theirs[name] != value), "")
