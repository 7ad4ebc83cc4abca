"""``amusd serve``: one service, as a container runs it. Every flag is an environment variable."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Annotated, Literal

import typer

from amusd.cli.engine_options import CacheMib, MaxBatch, NumericsChoice, ReusePrefixes, Weights
from amusd.cli.logging_setup import LogLevel, start_logging
from amusd.cli.observation import Format, MetricsPort, TracesEndpoint
from amusd.engine.interface import EngineOptions, Numerics, WeightFormat
from amusd.engine.loading.device import DeviceSettings, parse_cpus
from amusd.fleet.model_description import wants_lookup
from amusd.observe.log_format import LogFormat
from amusd.observe.observer import ObservationSettings, Observer, observing
from amusd.protocol.strategy import Strategy
from amusd.rpc.server import Listen
from amusd.serving.engine_settings import EngineServiceSettings
from draft_service.draft_main import run_draft_service
from draft_service.draft_settings import DraftServiceSettings
from orchestrator.orchestrator_main import run_orchestrator
from orchestrator.orchestrator_settings import OrchestratorSettings
from verify_service.verify_main import run_verify_service

serve = typer.Typer(help="Run one service until SIGINT or SIGTERM.", no_args_is_help=True)

Host = Annotated[str, typer.Option(envvar="AMUSD_HOST", help="Address to listen on.")]
Port = Annotated[
    int,
    typer.Option(envvar="AMUSD_PORT", min=0, max=65535, help="Port to listen on; 0: any free."),
]
Grace = Annotated[
    float,
    typer.Option(
        envvar="AMUSD_GRACE",
        min=0.0,
        help="Seconds that open sessions may take to end at a signal.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        envvar="AMUSD_MODEL",
        help="Hub id or folder of a causal language model; or smollm2, "
        "synthetic[:key=value,...], and as a draft prompt-lookup.",
    ),
]
Device = Annotated[
    str, typer.Option(envvar="AMUSD_DEVICE", help="The one device: cpu, cuda:0, ...")
]
Dtype = Annotated[
    str,
    typer.Option(
        envvar="AMUSD_DTYPE",
        help="Number format of the weights: float32, bfloat16, float16, or auto "
        "(float32 on CPU, bfloat16 elsewhere).",
    ),
]
Threads = Annotated[
    int, typer.Option(envvar="AMUSD_THREADS", min=0, help="Threads on CPU; 0 lets PyTorch choose.")
]
Cpus = Annotated[
    str, typer.Option(envvar="AMUSD_CPUS", help="Cores to compute on, as 0,2 or 4-7; empty: any.")
]
MaxSessions = Annotated[
    int, typer.Option(envvar="AMUSD_MAX_SESSIONS", min=1, help="Most sessions at once.")
]
MaxContext = Annotated[
    int,
    typer.Option(
        envvar="AMUSD_MAX_CONTEXT", min=0, help="Most tokens of prompt and output; 0: the model's."
    ),
]
MaxLookahead = Annotated[
    int,
    typer.Option(
        envvar="AMUSD_MAX_LOOKAHEAD", min=1, help="Most proposed tokens beyond the verified ones."
    ),
]
PrefillTokens = Annotated[
    int,
    typer.Option(
        envvar="AMUSD_PREFILL_TOKENS",
        min=0,
        help="Most tokens of prompts that one pass reads, over all sessions; 0: 64 on CPU, else "
        "512.",
    ),
]
MaxWaiting = Annotated[
    int,
    typer.Option(
        envvar="AMUSD_MAX_WAITING",
        min=0,
        help="Most sessions that wait for memory; 0: without memory they are refused at once.",
    ),
]
MaxWait = Annotated[
    float,
    typer.Option(
        envvar="AMUSD_MAX_WAIT", min=0.0, help="Seconds that a session waits for memory at most."
    ),
]
Lookup = Annotated[
    bool | None,
    typer.Option(
        "--lookup/--no-lookup",
        envvar="AMUSD_LOOKUP",
        help="Propose what followed the last tokens before, where they occurred; else the model's. "
        "[default: yes, beside a real model]",
    ),
]
Level = Annotated[LogLevel, typer.Option("--log-level", envvar="AMUSD_LOG_LEVEL")]
WithStdin = Annotated[
    bool,
    typer.Option(
        "--end-with-stdin", envvar="AMUSD_END_WITH_STDIN", help="End when standard input closes."
    ),
]


def _engine_command(role: Literal["draft", "verify"], default_port: int) -> Callable[..., None]:
    """Return the command of a service that runs a model.

    Only a draft looks tokens up, and only a verify model's numerics matter.
    """

    def command(
        model: Model = "smollm2",
        device: Device = "cpu",
        dtype: Dtype = "auto",
        threads: Threads = 0,
        cpus: Cpus = "",
        host: Host = "127.0.0.1",
        port: Port = default_port,
        max_sessions: MaxSessions = 64,
        max_context: MaxContext = 0,
        max_lookahead: MaxLookahead = 64,
        prefill_tokens: PrefillTokens = 0,
        max_batch: MaxBatch = 32,
        cache_mib: CacheMib = 0,
        reuse_prefixes: ReusePrefixes = True,
        numerics: NumericsChoice = Numerics.FAST,
        weights: Weights = WeightFormat.COMPACT,
        max_waiting: MaxWaiting = 16,
        max_wait: MaxWait = 30.0,
        lookup: Lookup = None,
        grace: Grace = 5.0,
        log_level: Level = LogLevel.INFO,
        log_format: Format = LogFormat.TEXT,
        metrics_port: MetricsPort = 0,
        traces_endpoint: TracesEndpoint = "",
        end_with_stdin: WithStdin = False,
    ) -> None:
        start_logging(role, log_level, log_format)
        settings = EngineServiceSettings(
            model=model,
            device=DeviceSettings(device, dtype, threads, parse_cpus(cpus)),
            listen=Listen(host, port, grace),
            max_sessions=max_sessions,
            max_context=max_context,
            max_lookahead=max_lookahead,
            prefill_tokens=prefill_tokens,
            max_waiting=max_waiting,
            max_wait_seconds=max_wait,
            options=EngineOptions(max_batch, cache_mib, reuse_prefixes, numerics, weights),
        )
        looks_up = role == "draft" and wants_lookup(model, lookup)
        with observing(role, ObservationSettings(host, metrics_port, traces_endpoint)) as observer:
            asyncio.run(_run_engine(settings, looks_up, observer, end_with_stdin))

    return _without_flag(command, "numerics" if role == "draft" else "lookup")


async def _run_engine(
    settings: EngineServiceSettings, looks_up: bool, observer: Observer, end_with_stdin: bool
) -> None:
    if observer.role == "draft":
        draft_settings = DraftServiceSettings(settings, looks_up)
        await run_draft_service(draft_settings, observer, end_with_stdin)
    else:
        await run_verify_service(settings, observer, end_with_stdin)


def _without_flag(command: Callable[..., None], name: str) -> Callable[..., None]:
    """Hide a parameter of ``command``, which keeps its default, from the command line."""
    signature = inspect.signature(command)
    kept = [one for one in signature.parameters.values() if one.name != name]
    command.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return command


serve.command("draft", help="Run the draft service: a small model that proposes tokens.")(
    _engine_command("draft", 50051)
)
serve.command("verify", help="Run the verify service: the model that alone decides the output.")(
    _engine_command("verify", 50052)
)


@serve.command()
def orchestrator(
    verify: Annotated[
        str,
        typer.Option(
            envvar="AMUSD_VERIFY",
            help="Verify services: host:port,... or file:///path with one a line. A name stands "
            "for all its addresses.",
        ),
    ] = "127.0.0.1:50052",
    draft: Annotated[
        str,
        typer.Option(envvar="AMUSD_DRAFT", help="Draft services, in the same way; empty: none."),
    ] = "127.0.0.1:50051",
    tokenizer: Annotated[
        str,
        typer.Option(
            envvar="AMUSD_TOKENIZER",
            help="Hub id or folder of the tokenizer; empty: the one the verify service names.",
        ),
    ] = "",
    host: Host = "127.0.0.1",
    port: Port = 50050,
    max_sessions: MaxSessions = 64,
    default_max_tokens: Annotated[
        int, typer.Option(envvar="AMUSD_DEFAULT_MAX_TOKENS", min=1, help="If a request says none.")
    ] = 256,
    default_strategy: Annotated[
        Strategy, typer.Option(envvar="AMUSD_DEFAULT_STRATEGY", help="If a request says none.")
    ] = Strategy.AMUSD,
    speculative_lookahead: Annotated[
        int, typer.Option(envvar="AMUSD_SPECULATIVE_LOOKAHEAD", min=1, help="Default look-ahead k.")
    ] = 5,
    amusd_lookahead: Annotated[
        int, typer.Option(envvar="AMUSD_AMUSD_LOOKAHEAD", min=1, help="Default run-ahead limit.")
    ] = 16,
    startup_timeout: Annotated[
        float,
        typer.Option(envvar="AMUSD_STARTUP_TIMEOUT", help="Seconds to wait for the services."),
    ] = 300.0,
    resolve_interval: Annotated[
        float,
        typer.Option(
            envvar="AMUSD_RESOLVE_INTERVAL",
            help="Seconds after which names and files of addresses are looked up again.",
        ),
    ] = 5.0,
    verify_timeout: Annotated[
        float, typer.Option(envvar="AMUSD_VERIFY_TIMEOUT", help="Seconds to wait for a verdict.")
    ] = 120.0,
    draft_timeout: Annotated[
        float, typer.Option(envvar="AMUSD_DRAFT_TIMEOUT", help="Seconds to wait for the draft.")
    ] = 10.0,
    max_connection_age: Annotated[
        float,
        typer.Option(
            envvar="AMUSD_MAX_CONNECTION_AGE",
            min=0.0,
            help="Seconds until a client connects anew, perhaps to another replica; 0: never.",
        ),
    ] = 0.0,
    grace: Grace = 5.0,
    log_level: Level = LogLevel.INFO,
    log_format: Format = LogFormat.TEXT,
    metrics_port: MetricsPort = 0,
    traces_endpoint: TracesEndpoint = "",
    end_with_stdin: WithStdin = False,
) -> None:
    """Run the orchestrator: what clients call."""
    start_logging("orchestrator", log_level, log_format)
    settings = OrchestratorSettings(
        verify=verify,
        draft=draft,
        tokenizer=tokenizer,
        listen=Listen(host, port, grace, max_connection_age),
        max_sessions=max_sessions,
        default_max_tokens=default_max_tokens,
        default_strategy=default_strategy if draft else Strategy.AUTOREGRESSIVE,
        speculative_lookahead=speculative_lookahead,
        amusd_lookahead=amusd_lookahead,
        startup_timeout_seconds=startup_timeout,
        resolve_interval_seconds=resolve_interval,
        verify_timeout_seconds=verify_timeout,
        draft_timeout_seconds=draft_timeout,
    )
    observation = ObservationSettings(host, metrics_port, traces_endpoint)
    with observing("orchestrator", observation) as observer:
        asyncio.run(run_orchestrator(settings, observer, end_with_stdin))
