"""Settings of a verify service, read once at its start."""

from dataclasses import dataclass

from amusd.core.errors import InvalidInputError
from amusd.engine.device import DeviceSettings
from amusd.rpc.server import Listen


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """What a verify service runs, where, and within what limits (contexts in tokens)."""

    model: str = "smollm2"
    device: DeviceSettings = DeviceSettings()
    listen: Listen = Listen(port=50052)
    max_sessions: int = 64
    max_context: int = 0
    max_lookahead: int = 64
    prefill_tokens: int = 256

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run; ``max_context`` 0 means the model's."""
        for name in ("max_sessions", "max_lookahead", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}: use 1 or more")
        if self.max_context < 0:
            raise InvalidInputError(f"max_context is {self.max_context}: use 0 or more")
