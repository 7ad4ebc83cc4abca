"""Settings of a draft or verify service, read once at its start."""

from dataclasses import dataclass, replace

from amusd.engine.interface import EngineOptions
from amusd.engine.loading.device import DeviceSettings
from amusd.fleet.model_description import ModelDescription, ServiceLimits
from amusd.observe.observer import ObservationSettings
from amusd.protocol.errors import InvalidInputError
from amusd.rpc.server import Listen
from amusd.serving.engine_health import HealthSettings
from amusd.settings import check_bounds, part, setting

# Few tokens saturate a CPU core, so a larger chunk of prefill only delays the other sessions.
_PREFILL_ON_CPU = 64
_PREFILL_ELSEWHERE = 512


@dataclass(frozen=True, slots=True)
class EngineServiceSettings:
    """The model of a service, its device and engine, and its limits."""

    model: str = setting(
        "smollm2",
        "Model to serve: a hub id, a folder, smollm2 or synthetic[:key=value,...]; as a draft "
        "also prompt-lookup.",
    )
    device: DeviceSettings = part(DeviceSettings())
    # Only orchestrators have clients that move to other replicas.
    listen: Listen = part(Listen(), without=("max_connection_age",))
    max_sessions: int = setting(64, "Maximum number of open sessions.", unit="sessions", at_least=1)
    max_context: int = setting(
        0,
        "Maximum length of a session, prompt and output; 0: the context length of the model.",
        unit="tokens",
        at_least=0,
    )
    max_lookahead: int = setting(
        64,
        "Maximum speculation length: proposed tokens beyond the verified position.",
        unit="tokens",
        at_least=1,
    )
    max_branches: int = setting(
        128,
        "Maximum number of branches of a session: continuations for other outcomes of a pass; "
        "0: none.",
        unit="branches",
        at_least=0,
    )
    prefill_tokens: int = setting(
        0,
        "Maximum number of prefill tokens in a batch, over all sessions; 0: 64 on CPU, 512 "
        "elsewhere.",
        unit="tokens",
        at_least=0,
    )
    options: EngineOptions = part(EngineOptions())
    max_waiting: int = setting(
        16,
        "Maximum number of sessions in the waiting queue for KV cache memory; 0: no queue, a "
        "session that finds no memory is refused.",
        unit="sessions",
        at_least=0,
    )
    max_wait_seconds: float = setting(
        30.0, "Maximum time of a session in the waiting queue.", at_least=0
    )
    health: HealthSettings = part(HealthSettings())
    observation: ObservationSettings = part(ObservationSettings())

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_bounds(self)

    @property
    def prefill_budget(self) -> int:
        """Maximum number of prefill tokens in a batch."""
        on_cpu = self.device.device == "cpu"
        return self.prefill_tokens or (_PREFILL_ON_CPU if on_cpu else _PREFILL_ELSEWHERE)

    @property
    def engine_options(self) -> EngineOptions:
        """The options of the engine, with the longest session that the service takes."""
        return replace(self.options, max_context=self.max_context)

    def limits(self, model: ModelDescription) -> ServiceLimits:
        """Return the limits of a service that runs ``model``.

        Raises:
            InvalidInputError: ``max_context`` is above the context length of the model.
        """
        if self.max_context > model.context_length:
            raise InvalidInputError(
                f"max_context is {self.max_context}: the context length of {model.name} is "
                f"{model.context_length}"
            )
        context = self.max_context or model.context_length
        return ServiceLimits(
            self.max_sessions, context, self.max_lookahead, self.max_waiting, self.max_branches
        )
