"""The services as processes on loopback, each engine on its own cores or GPU.

The processes belong to the ``LocalServices`` that started them. They end with their standard
input, so none outlives this process, even if it is killed.
"""

import contextlib
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from amusd.cli.service_settings import SETTINGS
from amusd.client import Client
from amusd.engine.interface import EngineOptions
from amusd.engine.loading.device import DeviceSettings
from amusd.fleet.endpoint import dialled, parse_endpoint
from amusd.fleet.model_description import wants_lookup
from amusd.observe.logging_setup import LogLevel
from amusd.observe.metric_list import Role
from amusd.observe.observer import ObservationSettings
from amusd.policy.speculation_policy import AsynchronousPolicy
from amusd.protocol.errors import AmusdError, UnavailableError
from amusd.resource_limits import usable_cpus
from amusd.settings import flags_for, flags_of, like, setting
from draft_service.draft_settings import DraftServiceSettings

_LISTEN_SECONDS = 60.0
_STOP_SECONDS = 15.0
_ROLES: tuple[Role, ...] = ("orchestrator", "draft", "verify")  # in the order of the ports
# The interpreter without the current folder on its path; PYTHONPATH still counts.
_AMUSD = (sys.executable, "-P", "-m", "amusd")


@dataclass(frozen=True, slots=True)
class Placement:
    """The device of one engine; if that is the CPU, its cores and threads (none and 0: any)."""

    device: str = "cpu"
    cpus: tuple[int, ...] = ()
    threads: int = 0

    def values(self) -> dict[str, Any]:
        """Return the settings of ``amusd serve`` for this placement, by their names."""
        found: dict[str, Any] = {"device": self.device}
        if self.cpus:
            found["cpus"] = self.cpus
        if self.threads:
            found["threads"] = self.threads
        return found


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """What to start. A port of 0 is any free port; an empty draft starts no draft service.

    Options, a traces endpoint and a speculation policy of None leave the choice to the environment
    of each service, then to its defaults.
    """

    draft: str = setting(
        "smollm2",
        "Draft model: a hub id, a folder, smollm2, prompt-lookup or synthetic[:key=value,...]; "
        "empty: none.",
        unit="model",
        variable="AMUSD_DRAFT_MODEL",
    )
    verify: str = setting(
        "smollm2",
        "Verify model: a hub id, a folder, smollm2 or synthetic[:key=value,...].",
        unit="model",
        variable="AMUSD_VERIFY_MODEL",
    )
    lookup: bool | None = like(DraftServiceSettings, "lookup")
    draft_device: str = setting(
        "auto",
        "Device of the draft model: cpu, cuda:1, ..., or auto (a GPU if there is one).",
        variable="",
    )
    verify_device: str = setting(
        "auto",
        "Device of the verify model: cpu, cuda:0, ..., or auto (a GPU if there is one).",
        variable="",
    )
    dtype: str = like(DeviceSettings, "dtype", variable="")
    host: str = "127.0.0.1"  # of all services
    ports: tuple[int, int, int] = (0, 0, 0)  # orchestrator, draft, verify
    draft_options: EngineOptions | None = None
    verify_options: EngineOptions | None = None
    gateway_port: int = 0  # 0: no gateway
    metrics_ports: tuple[int, int, int] = (0, 0, 0)  # in the order of the ports; 0: none
    traces_endpoint: str | None = None
    log_level: LogLevel = like(
        ObservationSettings, "log_level", default=LogLevel.WARNING, variable=""
    )
    speculation_policy: AsynchronousPolicy | None = None
    route: Callable[[str], str] = str
    """How the orchestrator reaches a draft or verify service that listens at an address."""
    start_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Refuse n-gram lookup without a draft model beside it."""
        wants_lookup(self.draft, self.lookup)


@dataclass(slots=True)
class LocalService:
    """A running service process; its address is empty until it listens."""

    role: Role
    process: "subprocess.Popen[bytes]"
    address: str = ""


@dataclass(slots=True)
class LocalServices:
    """The running services, in the order in which they are stopped."""

    running: list[LocalService] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Address of the orchestrator."""
        return self._address_of("orchestrator")

    @property
    def http_address(self) -> str:
        """Address of the gateway; empty without one."""
        return self._address_of("gateway")

    def _address_of(self, role: Role) -> str:
        return next((one.address for one in self.running if one.role == role), "")

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
        """End all services, those that clients call first, and kill those that do not end."""
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
        UnavailableError: a service did not start; its own message is on standard error.
    """
    services = LocalServices()
    try:
        _start_all(services, settings)
        yield services
    finally:
        services.stop()


def place(settings: LocalSettings) -> tuple[Placement, Placement]:
    """Return where draft and verify run: on GPUs if there are any, else on disjoint CPU cores."""
    num_gpus = _count_gpus() if "auto" in (settings.draft_device, settings.verify_device) else 0
    verify_device, draft_device = settings.verify_device, settings.draft_device
    if verify_device == "auto":
        verify_device = "cuda:0" if num_gpus else "cpu"
    if draft_device == "auto":
        draft_device = f"cuda:{min(1, num_gpus - 1)}" if num_gpus else "cpu"
    if draft_device == verify_device == "cpu":
        return _share_cpu(sorted(os.sched_getaffinity(0)), usable_cpus())
    return Placement(draft_device), Placement(verify_device)


def _share_cpu(cpus: list[int], num_usable: int) -> tuple[Placement, Placement]:
    """Return the shares of draft and verify.

    Under a CPU quota they have threads and no cores of their own: others use the same cores.
    """
    if num_usable < 2:
        return Placement("cpu"), Placement("cpu")
    num_draft = max(1, num_usable // 4)
    num_verify = num_usable - num_draft
    if num_usable < len(cpus):
        return Placement("cpu", (), num_draft), Placement("cpu", (), num_verify)
    return (
        Placement("cpu", tuple(cpus[-num_draft:]), num_draft),
        Placement("cpu", tuple(cpus[:-num_draft]), num_verify),
    )


def _start_all(services: LocalServices, settings: LocalSettings) -> None:
    draft_place, verify_place = place(settings)
    verify = _start_engine(
        "verify", settings, verify_place, settings.verify_options, model=settings.verify
    )
    services.running.append(verify)
    draft = None
    if settings.draft:
        draft = _start_engine(
            "draft",
            settings,
            draft_place,
            settings.draft_options,
            model=settings.draft,
            lookup=wants_lookup(settings.draft, settings.lookup),
        )
        services.running.insert(0, draft)
    _wait_until_listening(verify)
    if draft is not None:
        _wait_until_listening(draft)
    values: dict[str, Any] = {}
    if settings.speculation_policy is not None:
        values["speculation_policy"] = settings.speculation_policy
    orchestrator = _start(
        "orchestrator",
        settings,
        verify=settings.route(verify.address),
        draft=settings.route(draft.address) if draft is not None else "",
        startup_timeout=settings.start_seconds,
        **values,
    )
    services.running.insert(0, orchestrator)
    _wait_until_listening(orchestrator)
    if settings.gateway_port:
        gateway = _start("gateway", settings, orchestrator=orchestrator.address)
        services.running.insert(0, gateway)
        _wait_until_listening(gateway)
    _wait_until_serving(services, settings.start_seconds)


def _start_engine(
    role: Role,
    settings: LocalSettings,
    placement: Placement,
    options: EngineOptions | None,
    **values: Any,
) -> LocalService:
    more = flags_of(SETTINGS[role], options) if options is not None else []
    return _start(role, settings, *more, dtype=settings.dtype, **placement.values(), **values)


def _start(role: Role, settings: LocalSettings, *flags: str, **values: Any) -> LocalService:
    """Start a service with ``flags`` and ``values``; it does not listen yet."""
    values |= {
        "host": settings.host,
        "log_level": settings.log_level,
        "end_with_stdin": True,
        **_values_of(role, settings),
    }
    process = subprocess.Popen(
        [*_AMUSD, "serve", role, *flags, *flags_for(SETTINGS[role], **values)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process, which ends the services in order
    )
    return LocalService(role, process)


def _values_of(role: Role, settings: LocalSettings) -> dict[str, Any]:
    """Return the ports of a service, and what only some services take."""
    if role == "gateway":
        return {"port": settings.gateway_port}
    number = _ROLES.index(role)
    values: dict[str, Any] = {
        "port": settings.ports[number],
        # Three services cannot share the port that the environment may name.
        "metrics_port": settings.metrics_ports[number],
    }
    if settings.traces_endpoint is not None:
        values["traces_endpoint"] = settings.traces_endpoint
    return values


def _wait_until_listening(service: LocalService) -> None:
    """Wait for the line in which a service says where it listens."""
    name, output = service.role, service.process.stdout
    assert output is not None
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        if not selector.select(_LISTEN_SECONDS):
            raise UnavailableError(f"the {name} service did not start in {_LISTEN_SECONDS:.0f} s")
    words = output.readline().decode().split()
    if not words:
        service.process.wait()
        raise UnavailableError(f"the {name} service did not start; its message above says why")
    service.address = str(dialled(parse_endpoint(words[-1])))


def _wait_until_serving(services: LocalServices, timeout_seconds: float) -> None:
    end = time.monotonic() + timeout_seconds
    with Client(services.address, max_attempts=1) as client:
        while True:
            services.check()
            try:
                client.server_info()
            except AmusdError as error:
                if time.monotonic() > end:
                    raise UnavailableError(
                        f"the services are not ready after {timeout_seconds:.0f} s: {error}"
                    ) from error
                time.sleep(0.1)
            else:
                return


def _count_gpus() -> int:
    """Return the number of GPUs that the driver lists, without loading torch."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0
    listed = subprocess.run(
        [command, "--list-gpus"], capture_output=True, text=True, timeout=30, check=False
    )
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
