"""The recipe of a draft: everything that determines the result, in one frozen object."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a draft is cut and trained; token counts are those of answers."""

    verify: str
    fingerprint: str  # of the verify model
    layers: tuple[int, ...]
    draft_vocab: int  # rows of the output head, 0: the full vocabulary
    num_tokens: int  # written by the verify model
    epochs: int
    batch_rows: int
    peak_rate: float
    target_temperature: float
    max_sequence: int
    seed: int

    def to_json(self) -> str:
        """Return the recipe as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Parse the output of ``to_json``.

        Raises:
            ValueError: ``text`` is not JSON.
            TypeError: the fields are not those of a recipe.
        """
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "layers": tuple(values["layers"])})

    def difference(self, other: "Recipe") -> str:
        """Return the name of a setting that differs, or an empty string."""
        values, others = asdict(self), asdict(other)
        return next((name for name, value in values.items() if others[name] != value), "")
