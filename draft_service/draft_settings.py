"""Settings of a draft service, read once at its start."""

from dataclasses import dataclass

from amusd.fleet.model_description import wants_lookup
from amusd.rpc.server import Listen
from amusd.serving.engine_settings import EngineServiceSettings
from amusd.settings import part, setting


@dataclass(frozen=True, slots=True)
class DraftServiceSettings:
    """The engine of a draft service, and whether n-gram lookup drafts beside it.

    Numerics are no setting of a draft service: they never change the output.
    """

    engine: EngineServiceSettings = part(
        EngineServiceSettings(listen=Listen(port=50051)), without=("numerics",)
    )
    lookup: bool | None = setting(
        None,
        "N-gram lookup: where the last tokens occurred earlier in the session, propose the tokens "
        "that followed them; elsewhere the model drafts.",
        default_text="on with a real model",
    )

    def __post_init__(self) -> None:
        """Refuse n-gram lookup without a draft model beside it."""
        wants_lookup(self.engine.model, self.lookup)

    @property
    def uses_lookup(self) -> bool:
        """Whether n-gram lookup drafts beside the model."""
        return wants_lookup(self.engine.model, self.lookup)
