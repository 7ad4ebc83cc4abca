"""Settings of an orchestrator, read once at its start."""

from dataclasses import dataclass

from amusd.observe.observer import ObservationSettings
from amusd.policy.speculation_policy import AsynchronousPolicy
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.strategy import Strategy
from amusd.rpc.server import Listen
from amusd.settings import check_bounds, part, setting
from orchestrator.addresses import checked_entries, parse_entries


@dataclass(frozen=True, slots=True)
class OrchestratorSettings:
    """The services that an orchestrator uses, its limits, and what a request gets by default.

    ``verify`` and ``draft`` are lists of ``host:port`` and ``file:///path``, separated by commas.
    An empty ``draft`` makes ``default_strategy`` autoregressive.
    """

    verify: str = setting(
        "127.0.0.1:50052",
        "Verify services: host:port,... or file:///path with one host:port a line. A host name "
        "stands for all of its addresses.",
        unit="addresses",
        read=checked_entries,
    )
    draft: str = setting(
        "127.0.0.1:50051",
        "Draft services, in the same form; empty: none.",
        unit="addresses",
        read=checked_entries,
    )
    use_proxy: bool = setting(
        False,
        "Reach draft and verify services through the proxy that grpc_proxy, https_proxy or "
        "http_proxy names. Otherwise these variables have no effect on gRPC.",
    )
    tokenizer: str = setting(
        "",
        "Hub id or folder of the tokenizer; empty: the one that the verify service names.",
    )
    listen: Listen = part(Listen(port=50050))
    max_sessions: int = setting(64, "Maximum number of open sessions.", unit="sessions", at_least=1)
    default_max_tokens: int = setting(
        256, "Maximum output of a request that sets no maximum.", unit="tokens", at_least=1
    )
    default_strategy: Strategy = setting(
        Strategy.AMUSD,
        "Strategy of a request that names none; without draft services always autoregressive.",
    )
    speculative_lookahead: int = setting(
        5,
        "Speculation length of a request with the strategy speculative that sets none.",
        unit="tokens",
        at_least=1,
    )
    amusd_lookahead: int = setting(
        32,
        "Maximum look-ahead of the draft for a request with the strategy amusd that sets none.",
        unit="tokens",
        at_least=1,
    )
    speculation_policy: AsynchronousPolicy = setting(
        AsynchronousPolicy.ADAPTIVE,
        "Policy of the strategy amusd: adaptive, or as in the AMUSD paper to compare with. That "
        "one drafts up to the services' max-lookahead and uses no branches.",
    )
    adaptive_speculation: bool = setting(
        True,
        "Adaptive speculation: sessions of the strategy amusd decode without proposals while that "
        "is faster.",
    )
    startup_timeout_seconds: float = setting(
        300.0, "Time to wait for the other services at startup.", above=0
    )
    resolve_interval_seconds: float = setting(
        5.0, "Time between two lookups of host names and address files.", above=0
    )
    replica_timeout_seconds: float = setting(
        10.0,
        "Time for a replica's engine to answer before it gets no new sessions. Longer than any "
        "pass.",
        above=0,
    )
    verify_timeout_seconds: float = setting(
        120.0, "Time to wait for a verdict, before another replica is tried.", above=0
    )
    draft_timeout_seconds: float = setting(
        10.0, "Time to wait for the draft service, rollbacks included.", above=0
    )
    client_write_timeout_seconds: float = setting(
        30.0, "Time for a client to read a chunk before its request fails.", above=0
    )
    observation: ObservationSettings = part(ObservationSettings())

    def __post_init__(self) -> None:
        """Refuse values out of range, and a default strategy that cannot run."""
        check_bounds(self)
        if not parse_entries(self.verify):
            raise InvalidInputError("there is no verify service: give its host:port with --verify")
        if not self.draft:
            object.__setattr__(self, "default_strategy", Strategy.AUTOREGRESSIVE)
        if not parse_entries(self.draft) and self.default_strategy is not Strategy.AUTOREGRESSIVE:
            raise InvalidInputError(
                f"strategy {self.default_strategy.value} needs a draft service: give its host:port "
                "with --draft, or make autoregressive the default"
            )
