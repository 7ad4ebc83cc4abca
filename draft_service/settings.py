"""Settings of a draft service, read once at its start."""

from dataclasses import dataclass

from amusd.core.model import check_lookup
from amusd.settings import EngineServiceSettings


@dataclass(frozen=True, slots=True)
class DraftServiceSettings:
    """What a draft service runs, and whether it looks tokens up before it asks the model."""

    engine: EngineServiceSettings
    lookup: bool = False

    def __post_init__(self) -> None:
        """Refuse a look-up beside no model."""
        if self.lookup:
            check_lookup(self.engine.model)
