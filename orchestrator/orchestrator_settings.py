"""Settings of an orchestrator, read once at its start."""

from dataclasses import dataclass

from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from amusd.rpc.server import Listen
from orchestrator.addresses import parse_entries


@dataclass(frozen=True, slots=True)
class OrchestratorSettings:
    """Which services an orchestrator drives, and within what limits.

    ``verify`` and ``draft`` are lists of ``host:port`` and ``file:///path``, separated by commas.
    ``draft`` empty: there is no draft, and everything is decoded by the verify model alone.
    ``tokenizer`` empty: the one that the verify service names. Contexts in tokens.
    """

    verify: str = "127.0.0.1:50052"
    draft: str = "127.0.0.1:50051"
    tokenizer: str = ""
    listen: Listen = Listen(port=50050)
    max_sessions: int = 64
    default_max_tokens: int = 256
    default_strategy: Strategy = Strategy.AMUSD
    speculative_lookahead: int = 5
    amusd_lookahead: int = 16
    startup_timeout_seconds: float = 300.0
    resolve_interval_seconds: float = 5.0
    verify_timeout_seconds: float = 120.0
    draft_timeout_seconds: float = 10.0
    client_write_timeout_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Refuse values under which nothing could run."""
        for name in (
            "max_sessions",
            "default_max_tokens",
            "speculative_lookahead",
            "amusd_lookahead",
        ):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}: use 1 or more")
        for name in (
            "startup_timeout",
            "resolve_interval",
            "verify_timeout",
            "draft_timeout",
            "client_write_timeout",
        ):
            seconds = getattr(self, f"{name}_seconds")
            if seconds <= 0:
                raise InvalidInputError(f"{name} is {seconds} s: use more than 0")
        if not parse_entries(self.verify):
            raise InvalidInputError("there is no verify service: give its host:port with --verify")
        if not parse_entries(self.draft) and self.default_strategy is not Strategy.AUTOREGRESSIVE:
            raise InvalidInputError(
                f"strategy {self.default_strategy.value} needs a draft: give its host:port with "
                "--draft, or make autoregressive the default"
            )
