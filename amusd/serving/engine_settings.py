"""Settings of a draft or verify service, read once at its start."""

from dataclasses import dataclass

from amusd.engine.interface import EngineOptions
from amusd.engine.loading.device import DeviceSettings
from amusd.fleet.model_description import ModelDescription, ServiceLimits
from amusd.protocol.errors import InvalidInputError
from amusd.rpc.server import Listen

# A core's arithmetic is used up by few tokens, so more of them only make the others wait.
_PREFILL_ON_CPU = 64
_PREFILL_ELSEWHERE = 512


@dataclass(frozen=True, slots=True)
class EngineServiceSettings:
    """What a service runs, where, and within what limits (in tokens, and in sessions).

    ``max_context`` 0 means as much as the model takes. ``max_waiting`` sessions wait for memory at
    once, each for ``max_wait_seconds`` at most. A pass reads ``prefill_tokens`` of prompts; 0: as
    many as suit the device.
    """

    model: str
    device: DeviceSettings = DeviceSettings()
    listen: Listen = Listen()
    max_sessions: int = 64
    max_context: int = 0
    max_lookahead: int = 64
    prefill_tokens: int = 0
    max_waiting: int = 16
    max_wait_seconds: float = 30.0
    options: EngineOptions = EngineOptions()

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run."""
        for name in ("max_sessions", "max_lookahead"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}: use 1 or more")
        for name in ("max_context", "prefill_tokens", "max_waiting", "max_wait_seconds"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} is {getattr(self, name)}: use 0 or more")

    @property
    def prefill_budget(self) -> int:
        """Most tokens of prompts that a pass reads."""
        on_cpu = self.device.device == "cpu"
        return self.prefill_tokens or (_PREFILL_ON_CPU if on_cpu else _PREFILL_ELSEWHERE)

    def limits(self, model: ModelDescription) -> ServiceLimits:
        """Return the limits of a service that runs ``model``.

        Raises:
            InvalidInputError: a longer context is asked for than the model takes.
        """
        if self.max_context > model.context_length:
            raise InvalidInputError(
                f"max_context is {self.max_context}: {model.name} takes {model.context_length}"
            )
        context = self.max_context or model.context_length
        return ServiceLimits(self.max_sessions, context, self.max_lookahead, self.max_waiting)
