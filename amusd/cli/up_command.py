"""``amusd up``: all services on this machine until Ctrl-C."""

import contextlib
import dataclasses
import signal
import time
from dataclasses import dataclass
from types import FrameType

from amusd.cli.declared_options import settings_command
from amusd.cli.local_services import LocalSettings, local_services
from amusd.cli.server_choice import errors
from amusd.engine.interface import EngineOptions, WeightFormat
from amusd.fleet.endpoint import Endpoint
from amusd.observe.logging_setup import LogLevel
from amusd.protocol.errors import InvalidInputError
from amusd.rpc.listening import check_free
from amusd.rpc.server import Listen
from amusd.settings import check_bounds, like, part, setting

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class UpSettings:
    """What ``amusd up`` starts, and on which ports."""

    local: LocalSettings = part(LocalSettings(log_level=LogLevel.INFO))
    options: EngineOptions = part(EngineOptions(), without=("weights",))
    draft_weights: WeightFormat = like(
        EngineOptions,
        "weights",
        variable="",
        help="Weight format of the draft model; see amusd serve draft.",
    )
    verify_weights: WeightFormat = like(
        EngineOptions,
        "weights",
        variable="",
        help="Weight format of the verify model; int8 changes the output.",
    )
    host: str = like(Listen, "host")
    port: int = setting(50050, "Port of the orchestrator.", variable="", at_least=0, at_most=65535)
    draft_port: int = setting(
        50051, "Port of the draft service.", variable="", at_least=0, at_most=65535
    )
    verify_port: int = setting(
        50052, "Port of the verify service.", variable="", at_least=0, at_most=65535
    )
    gateway_port: int = setting(
        8000,
        "Port of the gateway, the OpenAI-compatible HTTP API; 0: no gateway.",
        variable="",
        at_least=0,
        at_most=65535,
    )
    metrics_port: int = setting(
        0,
        "First of three ports that serve Prometheus metrics at /metrics: those of orchestrator, "
        "draft and verify service; 0: no metrics.",
        variable="",
        at_least=0,
        at_most=65533,
    )

    def __post_init__(self) -> None:
        """Refuse values out of range, and a port that is named twice."""
        check_bounds(self)
        for number, flags in self.flags_of_ports().items():
            if len(flags) > 1:
                raise InvalidInputError(
                    f"port {number} is named by {' and '.join(flags)}: choose different ports"
                )

    def flags_of_ports(self) -> dict[int, list[str]]:
        """Return the ports that the services are to have, each with the flags that name it."""
        named = [("--port", self.port), ("--verify-port", self.verify_port)]
        if self.local.draft:
            named.append(("--draft-port", self.draft_port))
        if self.gateway_port:
            named.append(("--gateway-port", self.gateway_port))
        if self.metrics_port:
            named += [("--metrics-port", self.metrics_port + number) for number in range(3)]
        found: dict[int, list[str]] = {}
        for flag, number in named:
            if number:
                found.setdefault(number, []).append(flag)
        return found

    def local_settings(self) -> LocalSettings:
        """Return the settings of the services to start."""
        first = self.metrics_port
        return dataclasses.replace(
            self.local,
            draft_options=dataclasses.replace(self.options, weights=self.draft_weights),
            verify_options=dataclasses.replace(self.options, weights=self.verify_weights),
            host=self.host,
            ports=(self.port, self.draft_port, self.verify_port),
            gateway_port=self.gateway_port,
            metrics_ports=(first, first + 1, first + 2) if first else (0, 0, 0),
        )


def _serve(settings: UpSettings) -> None:
    for port, (flag, *_) in settings.flags_of_ports().items():
        check_free(Endpoint(settings.host, port), f"choose others with --host and {flag}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with (
        contextlib.suppress(KeyboardInterrupt),
        local_services(settings.local_settings()) as services,
    ):
        if services.http_address:
            print(f"OpenAI-compatible API on http://{services.http_address}/v1", flush=True)
        print(f"serving on {services.address}; stop with Ctrl-C", flush=True)
        while True:
            services.check()
            time.sleep(_POLL_SECONDS)
    errors.print("all services have stopped")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


UP = UpSettings()
up = settings_command("up", "Run all services on this machine until Ctrl-C.", UP, _serve)
