"""The options of ``amusd serve`` and ``amusd up``: names, values, help and refusals."""

import dataclasses
import socket
from typing import Any

import pytest
from typer.testing import CliRunner

from amusd.cli import up_command
from amusd.cli.app import app
from amusd.cli.declared_options import settings_command
from amusd.cli.local_services import LocalSettings
from amusd.cli.service_settings import DRAFT, GATEWAY, ORCHESTRATOR, SETTINGS, VERIFY
from amusd.cli.up_command import UP
from amusd.engine.interface import EngineOptions, Numerics, WeightFormat
from amusd.engine.loading.device import DeviceSettings
from amusd.observe.log_format import LogFormat
from amusd.observe.logging_setup import LogLevel
from amusd.observe.observer import ObservationSettings
from amusd.policy.speculation_policy import AsynchronousPolicy
from amusd.protocol.errors import InvalidInputError, UnavailableError
from amusd.protocol.strategy import Strategy
from amusd.rpc.server import Listen
from amusd.serving.engine_settings import EngineServiceSettings
from amusd.settings import Setting, Settings, flags_for, settings_in
from draft_service.draft_settings import DraftServiceSettings
from gateway.gateway_settings import GatewaySettings
from orchestrator.orchestrator_settings import OrchestratorSettings

OBSERVATION = {
    ("--log-level", "AMUSD_LOG_LEVEL", LogLevel.INFO),
    ("--log-format", "AMUSD_LOG_FORMAT", LogFormat.TEXT),
    ("--metrics-port", "AMUSD_METRICS_PORT", 0),
    ("--traces-endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT", ""),
}
LISTEN = {
    ("--host", "AMUSD_HOST", "127.0.0.1"),
    ("--grace", "AMUSD_GRACE", 5.0),
    ("--end-with-stdin", "AMUSD_END_WITH_STDIN", False),
}
OPTIONS = {
    ("--max-batch", "AMUSD_MAX_BATCH", 32),
    ("--cache-mib", "AMUSD_CACHE_MIB", 0),
    ("--reuse-prefixes/--no-reuse-prefixes", "AMUSD_REUSE_PREFIXES", True),
}
NUMERICS = {("--numerics", "AMUSD_NUMERICS", Numerics.FAST)}
LOOKUP = {("--lookup/--no-lookup", "AMUSD_LOOKUP", None)}
ENGINE = OBSERVATION | LISTEN | OPTIONS | {
    ("--model", "AMUSD_MODEL", "smollm2"),
    ("--device", "AMUSD_DEVICE", "cpu"),
    ("--dtype", "AMUSD_DTYPE", "auto"),
    ("--threads", "AMUSD_THREADS", 0),
    ("--cpus", "AMUSD_CPUS", ()),
    ("--max-sessions", "AMUSD_MAX_SESSIONS", 64),
    ("--max-context", "AMUSD_MAX_CONTEXT", 0),
    ("--max-lookahead", "AMUSD_MAX_LOOKAHEAD", 64),
    ("--max-branches", "AMUSD_MAX_BRANCHES", 128),
    ("--prefill-tokens", "AMUSD_PREFILL_TOKENS", 0),
    ("--weights", "AMUSD_WEIGHTS", WeightFormat.COMPACT),
    ("--max-waiting", "AMUSD_MAX_WAITING", 16),
    ("--max-wait", "AMUSD_MAX_WAIT", 30.0),
    ("--max-failed-passes", "AMUSD_MAX_FAILED_PASSES", 5),
    ("--hang-factor", "AMUSD_HANG_FACTOR", 20.0),
    ("--hang-floor", "AMUSD_HANG_FLOOR", 15.0),
    ("--restart-after", "AMUSD_RESTART_AFTER", 30.0),
}  # fmt: skip
EXPECTED = {
    "draft": ENGINE | LOOKUP | {("--port", "AMUSD_PORT", 50051)},
    "verify": ENGINE | NUMERICS | {("--port", "AMUSD_PORT", 50052)},
    "orchestrator": OBSERVATION | LISTEN | {
        ("--verify", "AMUSD_VERIFY", "127.0.0.1:50052"),
        ("--draft", "AMUSD_DRAFT", "127.0.0.1:50051"),
        ("--use-proxy", "AMUSD_USE_PROXY", False),
        ("--tokenizer", "AMUSD_TOKENIZER", ""),
        ("--port", "AMUSD_PORT", 50050),
        ("--max-sessions", "AMUSD_MAX_SESSIONS", 64),
        ("--default-max-tokens", "AMUSD_DEFAULT_MAX_TOKENS", 256),
        ("--default-strategy", "AMUSD_DEFAULT_STRATEGY", Strategy.AMUSD),
        ("--speculative-lookahead", "AMUSD_SPECULATIVE_LOOKAHEAD", 5),
        ("--amusd-lookahead", "AMUSD_AMUSD_LOOKAHEAD", 32),
        ("--speculation-policy", "AMUSD_SPECULATION_POLICY", AsynchronousPolicy.ADAPTIVE),
        ("--adaptive-speculation/--no-adaptive-speculation", "AMUSD_ADAPTIVE_SPECULATION", True),
        ("--startup-timeout", "AMUSD_STARTUP_TIMEOUT", 300.0),
        ("--resolve-interval", "AMUSD_RESOLVE_INTERVAL", 5.0),
        ("--replica-timeout", "AMUSD_REPLICA_TIMEOUT", 10.0),
        ("--verify-timeout", "AMUSD_VERIFY_TIMEOUT", 120.0),
        ("--draft-timeout", "AMUSD_DRAFT_TIMEOUT", 10.0),
        ("--max-connection-age", "AMUSD_MAX_CONNECTION_AGE", 0.0),
        ("--client-write-timeout", "AMUSD_CLIENT_WRITE_TIMEOUT", 30.0),
    },
    "gateway": LISTEN | {
        ("--orchestrator", "AMUSD_ORCHESTRATOR", "127.0.0.1:50050"),
        ("--use-proxy", "AMUSD_USE_PROXY", False),
        ("--served-model-name", "AMUSD_SERVED_MODEL_NAME", ""),
        ("--default-temperature", "AMUSD_DEFAULT_TEMPERATURE", 1.0),
        ("--port", "AMUSD_PORT", 8000),
        ("--max-requests", "AMUSD_MAX_REQUESTS", 256),
        ("--max-body-mib", "AMUSD_MAX_BODY_MIB", 8),
        ("--prompt-concurrency", "AMUSD_PROMPT_CONCURRENCY", 4),
        ("--request-timeout", "AMUSD_REQUEST_TIMEOUT", 600.0),
        ("--client-write-timeout", "AMUSD_CLIENT_WRITE_TIMEOUT", 30.0),
        ("--log-level", "AMUSD_LOG_LEVEL", LogLevel.INFO),
        ("--log-format", "AMUSD_LOG_FORMAT", LogFormat.TEXT),
    },
    "up": OPTIONS | NUMERICS | LOOKUP | {
        ("--host", "AMUSD_HOST", "127.0.0.1"),
        ("--draft", "AMUSD_DRAFT_MODEL", "smollm2"),
        ("--verify", "AMUSD_VERIFY_MODEL", "smollm2"),
        ("--draft-device", "", "auto"),
        ("--verify-device", "", "auto"),
        ("--dtype", "", "auto"),
        ("--draft-weights", "", WeightFormat.COMPACT),
        ("--verify-weights", "", WeightFormat.COMPACT),
        ("--port", "", 50050),
        ("--draft-port", "", 50051),
        ("--verify-port", "", 50052),
        ("--gateway-port", "", 8000),
        ("--metrics-port", "", 0),
        ("--log-level", "", LogLevel.INFO),
    },
}  # fmt: skip
"""Flags, variables and defaults of each command, on which deployments rely."""

COMMANDS: dict[str, tuple[Setting, ...]] = {
    **{str(role): settings for role, settings in SETTINGS.items()},
    "up": settings_in(UP),
}


def arguments(command: str) -> list[str]:
    return ["up"] if command == "up" else ["serve", command]


def parsed(defaults: Settings, *words: str) -> Settings:
    """Return the settings with which a command would run."""
    seen: list[Settings] = []
    settings_command("test", "", defaults, seen.append).main(list(words), standalone_mode=False)
    (settings,) = seen
    return settings


def refusal(*words: str, **environment: str) -> str:
    """Run a command that is refused, and return its line on standard error."""
    done = CliRunner().invoke(app, list(words), env=environment)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def without_spaces(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_names_and_defaults_are_those_that_deployments_rely_on(command: str) -> None:
    found = [
        ("/".join(filter(None, (one.flag, one.off_flag))), one.variable, one.default)
        for one in COMMANDS[command]
    ]
    assert len(found) == len(EXPECTED[command])
    assert set(found) == EXPECTED[command]


CHANGED: list[tuple[Any, Any]] = [
    (
        DRAFT,
        DraftServiceSettings(
            EngineServiceSettings(
                model="some/model",
                device=DeviceSettings("cuda:1", "bfloat16", 3, (0, 2, 5)),
                listen=Listen("0.0.0.0", 7, 0.5, end_with_stdin=True),
                max_sessions=1,
                options=EngineOptions(2, 3, False, weights=WeightFormat.INT8),
                max_wait_seconds=0.25,
                observation=ObservationSettings(LogLevel.ERROR, LogFormat.JSON, 8, "http://x:1"),
            ),
            lookup=False,
        ),
    ),
    (VERIFY, EngineServiceSettings(options=EngineOptions(numerics=Numerics.EXACT))),
    (
        ORCHESTRATOR,
        OrchestratorSettings(
            verify="a:1,b:2",
            draft="",
            listen=Listen(max_connection_age_seconds=30.0),
            default_strategy=Strategy.AUTOREGRESSIVE,
            draft_timeout_seconds=1e-3,
        ),
    ),
    (
        GATEWAY,
        GatewaySettings(
            orchestrator="a:1",
            served_model_name="x,y",
            default_temperature=0.0,
            listen=Listen("::", 7, end_with_stdin=True),
        ),
    ),
    (UP, dataclasses.replace(UP, draft_weights=WeightFormat.PLAIN, metrics_port=65533)),
]


@pytest.mark.parametrize(("defaults", "changed"), CHANGED)
def test_settings_written_as_flags_are_read_as_they_were(defaults: Any, changed: Any) -> None:
    values = {one.name: one.default for one in settings_in(changed)}
    assert parsed(defaults, *flags_for(settings_in(defaults), **values)) == changed
    assert parsed(defaults) == defaults


@pytest.mark.parametrize(("defaults", "changed"), CHANGED)
def test_settings_in_the_environment_are_read_as_flags_are(
    defaults: Any, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = {one.name: one for one in settings_in(changed)}
    flags: list[str] = []
    for one in settings_in(defaults):
        value = after[one.name].default
        if one.variable and value not in ("", None):  # an empty variable counts as unset
            monkeypatch.setenv(one.variable, one.write(value))
        else:
            flags += one.flags(value)
    assert parsed(defaults, *flags) == changed


def test_a_flag_wins_over_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMUSD_MAX_SESSIONS", "3")
    monkeypatch.setenv("AMUSD_REUSE_PREFIXES", "false")
    assert parsed(VERIFY) == dataclasses.replace(
        VERIFY, max_sessions=3, options=EngineOptions(reuse_prefixes=False)
    )
    words = ("--max-sessions", "4", "--reuse-prefixes")
    assert parsed(VERIFY, *words) == dataclasses.replace(VERIFY, max_sessions=4)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AMUSD_PORT", "AMUSD_MODEL", "AMUSD_CPUS", "AMUSD_REUSE_PREFIXES"):
        monkeypatch.setenv(variable, "")
    assert parsed(VERIFY) == VERIFY


def test_without_a_draft_service_decoding_is_autoregressive() -> None:
    settings = parsed(ORCHESTRATOR, "--draft", "", "--default-strategy", "speculative")
    assert isinstance(settings, OrchestratorSettings)
    assert settings.default_strategy is Strategy.AUTOREGRESSIVE


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("serve", "draft", "--max-batch", "0"),
            "error: --max-batch (AMUSD_MAX_BATCH): 0 is out of range, use 1 or more",
        ),
        (
            ("serve", "verify", "--port", "70000"),
            "error: --port (AMUSD_PORT): 70000 is out of range, use 0 to 65535",
        ),
        (
            ("serve", "verify", "--numerics", "exactly"),
            "error: --numerics (AMUSD_NUMERICS): 'exactly' is not one of fast, exact",
        ),
        (
            ("serve", "verify", "--max-wait", "-1"),
            "error: --max-wait (AMUSD_MAX_WAIT): -1 is out of range, use 0 or more",
        ),
        (
            ("serve", "verify", "--cpus", "zero"),
            "error: --cpus (AMUSD_CPUS): cannot read CPU cores 'zero', use a list such as 0,2 or "
            "4-7",
        ),
        (
            ("serve", "orchestrator", "--startup-timeout", "0"),
            "error: --startup-timeout (AMUSD_STARTUP_TIMEOUT): 0 is out of range, use more than 0",
        ),
        (("up", "--draft-port", "x"), "error: --draft-port: 'x' is not a whole number"),
        (("up", "--cache-mib", "-1"), "error: --cache-mib (AMUSD_CACHE_MIB): -1 is out of range, "
         "use 0 or more"),
        (
            ("serve", "orchestrator", "--verify", "verify-host"),
            "error: --verify (AMUSD_VERIFY): 'verify-host' has no port: write host:port, such as "
            "localhost:50050, 10.0.0.7:50050 or [::1]:50050, or file:///path",
        ),
        (
            ("serve", "orchestrator", "--draft", "a:1,http://b:2"),
            "error: --draft (AMUSD_DRAFT): 'http://b:2' is a URL: write host:port, such as "
            "localhost:50050, 10.0.0.7:50050 or [::1]:50050, without http://, or file:///path",
        ),
        (
            ("serve", "verify", "--host", "[::]:0"),
            "error: --host (AMUSD_HOST): '[::]:0' is a host with a port: write the port with "
            "--port, and only :: here",
        ),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_refused_in_one_line(words: tuple[str, ...], line: str) -> None:
    command = " ".join(word for word in words[:2] if not word.startswith("-"))
    assert refusal(*words) == f"{line}; see amusd {command} --help"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("serve", "verify", "--port", "9464", "--metrics-port", "9464"),
            "--port and --metrics-port are both 9464: choose different ports",
        ),
        (
            ("up", "--port", "7000", "--metrics-port", "6999"),
            "port 7000 is named by --port and --metrics-port: choose different ports",
        ),
        (
            ("up", "--port", "7000", "--verify-port", "7000", "--draft-port", "0"),
            "port 7000 is named by --port and --verify-port: choose different ports",
        ),
    ],
)
def test_a_port_is_named_only_once(words: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, list(words))
    assert isinstance(done.exception, InvalidInputError)
    assert str(done.exception) == message


def test_up_finds_a_taken_port_before_it_starts_a_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(settings: LocalSettings) -> None:
        raise AssertionError("a service was started")

    monkeypatch.setattr(up_command, "local_services", start)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag, first in (
            ("--port", port),
            ("--draft-port", port),
            ("--verify-port", port),
            ("--gateway-port", port),
            ("--metrics-port", port - 2),
        ):
            names = ("--port", "--draft-port", "--verify-port", "--gateway-port")
            words = dict.fromkeys(names, 0) | {flag: first}
            flags = [str(word) for pair in words.items() for word in pair]
            done = CliRunner().invoke(app, ["up", *flags])
            assert isinstance(done.exception, UnavailableError), done.exception
            assert f":{port}: the port is in use; choose others with --host and {flag}" in str(
                done.exception
            )


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("AMUSD_MAX_BATCH", "many", "(--max-batch): 'many' is not a whole number"),
        ("AMUSD_REUSE_PREFIXES", "maybe", "(--reuse-prefixes): 'maybe' is not one of on, off"),
        ("AMUSD_LOG_LEVEL", "loud", "(--log-level): 'loud' is not one of debug, info, "
         "warning, error"),
        ("AMUSD_GRACE", "-0.5", "(--grace): -0.5 is out of range, use 0 or more"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_refused_in_one_line(variable: str, value: str, line: str) -> None:
    expected = f"error: {variable} {line}; see amusd serve draft --help"
    assert refusal("serve", "draft", **{variable: value}) == expected


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("serve", "verify", "--lookup"), ("'--lookup'", "see amusd serve verify --help")),
        (("serve", "draft", "--numerics", "fast"), ("'--numerics'", "see amusd serve draft")),
        (("serve", "draft", "--max-connection-age", "1"), ("'--max-connection-age'",)),
        (("serve", "draft", "--port"), ("'--port' requires an argument", "see amusd serve --help")),
        (("serve", "nothing"), ("'nothing'", "see amusd serve --help")),
        (("up", "more"), ("(more)", "see amusd up --help")),
    ],
)
def test_what_a_command_does_not_take_is_refused_in_one_line(
    words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    line = refusal(*words)
    assert line.startswith("error: ")
    for one in parts:
        assert one in line


@pytest.mark.parametrize("command", [*COMMANDS, "generate", "chat", "compare", ""])
def test_the_short_flag_shows_the_same_help(command: str) -> None:
    words = arguments(command) if command in COMMANDS else command.split()
    short, long = (CliRunner().invoke(app, [*words, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == 0
    assert short.stdout == long.stdout
    assert "Usage:" in short.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_setting_within_80_columns(command: str) -> None:
    done = CliRunner().invoke(app, [*arguments(command), "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    text = without_spaces(done.stdout)  # lines may break anywhere between two words
    for one in COMMANDS[command]:
        assert one.flag in done.stdout
        assert one.variable in done.stdout
        assert without_spaces(one.declaration.help) in text
        assert f"default:{without_spaces(one.default_text)}" in text


def test_serve_without_a_service_lists_the_services() -> None:
    done = CliRunner().invoke(app, ["serve"])
    assert done.exit_code == 2
    for role in SETTINGS:
        assert f"  {role} " in done.stderr
