"""The three services as processes on loopback, on cores or GPUs of their own.

Who owns what: the processes belong to the ``LocalServices`` that started them. They end with
their standard input, so none outlives this process, whatever becomes of it.
"""

import contextlib
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from amusd.cli.engine_options import flags_of
from amusd.cli.logging_setup import LogLevel
from amusd.client import Client
from amusd.engine.interface import EngineOptions
from amusd.fleet.model_description import wants_lookup
from amusd.protocol.errors import AmusdError, UnavailableError

_LISTEN_SECONDS = 60.0
_STOP_SECONDS = 15.0
_ROLES = ("orchestrator", "draft", "verify")  # in the order of the ports


@dataclass(frozen=True, slots=True)
class Placement:
    """The device of one service, and its cores and threads if that is the CPU."""

    device: str = "cpu"
    cpus: tuple[int, ...] = ()

    def flags(self) -> list[str]:
        """Return the flags of ``amusd serve`` for this placement."""
        if self.device != "cpu" or not self.cpus:
            return ["--device", self.device]
        cpus = ",".join(str(cpu) for cpu in self.cpus)
        return ["--device", "cpu", "--cpus", cpus, "--threads", str(len(self.cpus))]


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """What to start. Ports of 0 take free ones; an empty draft starts no draft service.

    Options of None leave the choice to each service: its environment, else its defaults.
    """

    draft: str = "smollm2"
    verify: str = "smollm2"
    lookup: bool | None = None
    draft_device: str = "auto"
    verify_device: str = "auto"
    dtype: str = "auto"
    ports: tuple[int, int, int] = (0, 0, 0)  # orchestrator, draft, verify
    draft_options: EngineOptions | None = None
    verify_options: EngineOptions | None = None
    metrics_ports: tuple[int, int, int] = (0, 0, 0)  # in the same order; 0: none
    traces_endpoint: str | None = None
    log_level: LogLevel = LogLevel.WARNING
    start_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Refuse a look-up beside no model."""
        wants_lookup(self.draft, self.lookup)


@dataclass(frozen=True, slots=True)
class LocalService:
    """A running service process."""

    role: str
    process: "subprocess.Popen[bytes]"
    address: str


@dataclass(slots=True)
class LocalServices:
    """The services that were started, in the order in which to stop them."""

    running: list[LocalService] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Address of the orchestrator."""
        return self.running[0].address

    def check(self) -> None:
        """Raise UnavailableError if one of the services has ended."""
        for service in self.running:
            code = service.process.poll()
            if code is not None:
                raise UnavailableError(
                    f"the {service.role} service has ended with exit code {code}; "
                    "its log above says why"
                )

    def stop(self) -> None:
        """End all services, the orchestrator first; those that do not end are killed."""
        for service in self.running:
            if service.process.stdin is not None:
                with contextlib.suppress(OSError):
                    service.process.stdin.close()
            try:
                service.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                service.process.kill()
                service.process.wait()
            if service.process.stdout is not None:
                service.process.stdout.close()
        self.running.clear()


@contextlib.contextmanager
def local_services(settings: LocalSettings) -> Iterator[LocalServices]:
    """Start the services, wait until they serve, and stop them at the end.

    Raises:
        UnavailableError: one of them did not start; it has said why on standard error.
    """
    services = LocalServices()
    try:
        _start_all(services, settings)
        yield services
    finally:
        services.stop()


def place(settings: LocalSettings) -> tuple[Placement, Placement]:
    """Return where draft and verify run: on GPUs if there are, else on cores of their own."""
    num_gpus = _count_gpus() if "auto" in (settings.draft_device, settings.verify_device) else 0
    verify_device, draft_device = settings.verify_device, settings.draft_device
    if verify_device == "auto":
        verify_device = "cuda:0" if num_gpus else "cpu"
    if draft_device == "auto":
        draft_device = f"cuda:{min(1, num_gpus - 1)}" if num_gpus else "cpu"
    cpus = sorted(os.sched_getaffinity(0))
    if draft_device == verify_device == "cpu" and len(cpus) > 1:
        num_draft = max(1, len(cpus) // 4)
        return (
            Placement("cpu", tuple(cpus[-num_draft:])),
            Placement("cpu", tuple(cpus[:-num_draft])),
        )
    return Placement(draft_device), Placement(verify_device)


def _start_all(services: LocalServices, settings: LocalSettings) -> None:
    draft_place, verify_place = place(settings)
    port, draft_port, verify_port = settings.ports
    flags = ["--model", settings.verify, "--port", str(verify_port)]
    flags += flags_of("verify", settings.verify_options)
    verify = _start_engine("verify", settings, verify_place, flags)
    services.running.append(verify)
    draft_address = ""
    if settings.draft:
        flags = ["--model", settings.draft, "--port", str(draft_port)]
        flags += flags_of("draft", settings.draft_options)
        looks_up = wants_lookup(settings.draft, settings.lookup)
        flags.append("--lookup" if looks_up else "--no-lookup")
        draft = _start_engine("draft", settings, draft_place, flags)
        services.running.insert(0, draft)
        draft_address = draft.address
    flags = ["--verify", verify.address, "--draft", draft_address, "--port", str(port)]
    flags += ["--startup-timeout", str(settings.start_seconds)]
    services.running.insert(0, _start("orchestrator", settings, flags))
    _wait_until_serving(services, settings.start_seconds)


def _start_engine(
    role: str, settings: LocalSettings, placement: Placement, flags: list[str]
) -> LocalService:
    return _start(role, settings, [*flags, "--dtype", settings.dtype, *placement.flags()])


def _start(role: str, settings: LocalSettings, flags: list[str]) -> LocalService:
    command = [sys.executable, "-m", "amusd", "serve", role, "--end-with-stdin", *flags]
    # Three services cannot share the port that the environment may name.
    metrics_port = settings.metrics_ports[_ROLES.index(role)]
    command += ["--metrics-port", str(metrics_port)]
    if settings.traces_endpoint is not None:
        command += ["--traces-endpoint", settings.traces_endpoint]
    process = subprocess.Popen(
        [*command, "--log-level", settings.log_level],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us; we end them in order
    )
    try:
        return LocalService(role, process, _read_address(role, process))
    except BaseException:
        process.kill()
        process.wait()
        raise


def _read_address(role: str, process: "subprocess.Popen[bytes]") -> str:
    """Wait for the line in which a service says where it listens."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(_LISTEN_SECONDS):
            raise UnavailableError(f"the {role} service did not start in {_LISTEN_SECONDS:.0f} s")
    words = process.stdout.readline().decode().split()
    if not words:
        process.wait()
        raise UnavailableError(f"the {role} service did not start; its message above says why")
    return words[-1]


def _wait_until_serving(services: LocalServices, timeout_seconds: float) -> None:
    end = time.monotonic() + timeout_seconds
    with Client(services.address) as client:
        while True:
            services.check()
            try:
                client.server_info()
            except AmusdError as error:
                if time.monotonic() > end:
                    raise UnavailableError(f"the services do not get ready: {error}") from error
                time.sleep(0.1)
            else:
                return


def _count_gpus() -> int:
    """Return how many GPUs the driver lists, without loading torch for it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    listed = subprocess.run(
        [command, "--list-gpus"], capture_output=True, text=True, timeout=30, check=False
    )
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
