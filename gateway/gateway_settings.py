"""Settings of a gateway, read once at its start."""

from dataclasses import dataclass

from amusd.fleet.endpoint import parse_endpoint
from amusd.observe.observer import ObservationSettings
from amusd.protocol.errors import InvalidInputError
from amusd.rpc.server import Listen
from amusd.settings import check_bounds, part, setting


def _checked_address(text: str) -> str:
    return str(parse_endpoint(text))


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The orchestrator that a gateway calls, its limits, and what a request gets by default."""

    orchestrator: str = setting(
        "127.0.0.1:50050",
        "Orchestrator: host:port. The addresses of a host name share the requests.",
        unit="address",
        read=_checked_address,
    )
    use_proxy: bool = setting(
        False,
        "Reach the orchestrator through the proxy of grpc_proxy, https_proxy or http_proxy.",
    )
    served_model_name: str = setting(
        "",
        "Names of the model, separated by commas; the first one is in answers. Empty: the name of "
        "the verify model.",
        unit="names",
    )
    default_temperature: float = setting(
        1.0,
        "Temperature of a request that sets none; 0: greedy decoding.",
        at_least=0,
        at_most=100,
    )
    listen: Listen = part(Listen(port=8000), without=("max_connection_age",))
    max_requests: int = setting(
        256, "Maximum number of open requests.", unit="requests", at_least=1
    )
    max_body_mib: int = setting(
        8, "Maximum size of the body of a request.", unit="MiB", at_least=1, at_most=1024
    )
    prompt_concurrency: int = setting(
        4,
        "Prompts of one request that are generated at the same time.",
        unit="prompts",
        at_least=1,
    )
    request_timeout_seconds: float = setting(600.0, "Maximum time of a generation.", above=0)
    client_write_timeout_seconds: float = setting(
        30.0, "Time for a client to read a chunk before its connection is closed.", above=0
    )
    observation: ObservationSettings = part(
        ObservationSettings(), without=("metrics_port", "traces_endpoint")
    )

    def __post_init__(self) -> None:
        """Refuse values out of range, and a temperature that no request may have."""
        check_bounds(self)
        if 0 < self.default_temperature < 0.01:
            raise InvalidInputError(
                f"default_temperature is {self.default_temperature:g}: use 0 or 0.01 to 100"
            )

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of the model; empty: the name of the verify model."""
        return tuple(filter(None, (one.strip() for one in self.served_model_name.split(","))))
