"""Settings of a draft service, read once at its start."""

from dataclasses import dataclass

from amusd.serving.engine_settings import EngineServiceSettings


@dataclass(frozen=True, slots=True)
class DraftServiceSettings:
    """What a draft service runs, and whether it looks tokens up before it asks the model."""

    engine: EngineServiceSettings
    lookup: bool
