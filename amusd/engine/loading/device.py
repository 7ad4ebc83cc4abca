"""The device of a service, and its threads and cores on CPU."""

import logging
import os
import threading
from dataclasses import dataclass

from amusd.protocol.errors import InvalidInputError
from amusd.resource_limits import usable_cpus
from amusd.settings import check_bounds, setting

log = logging.getLogger(__name__)


def parse_cpus(text: str) -> tuple[int, ...]:
    """Parse core numbers such as ``0``, ``0,2`` or ``4-7``.

    Raises:
        InvalidInputError: the text has another form.
    """
    cpus: list[int] = []
    for part in filter(None, (item.strip() for item in text.split(","))):
        first, dash, last = part.partition("-")
        try:
            start = int(first)
            end = int(last) if dash else start
        except ValueError:
            raise InvalidInputError(
                f"cannot read CPU cores {text!r}, use a list such as 0,2 or 4-7"
            ) from None
        if end < start:
            raise InvalidInputError(
                f"CPU cores {part!r} end before they start, put the lower one first"
            )
        cpus.extend(range(start, end + 1))
    return tuple(cpus)


def format_cpus(cpus: tuple[int, ...]) -> str:
    """Return the text that ``parse_cpus`` reads as ``cpus``."""
    return ",".join(str(cpu) for cpu in cpus)


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """The device of an engine as PyTorch names it, and its share of a CPU.

    ``cpus`` bind the engine thread and the threads that it computes with; the threads that serve
    gRPC are never bound.
    """

    device: str = setting("cpu", "Device to run on: cpu, cuda:0, ...")
    dtype: str = setting(
        "auto",
        "Model dtype: float32, bfloat16, float16, or auto (float32 on CPU, bfloat16 elsewhere).",
    )
    threads: int = setting(
        0,
        "Number of compute threads on CPU, at most the cores that the service may use; 0: chosen "
        "by PyTorch, within affinity and CPU quota.",
        unit="threads",
        at_least=0,
    )
    cpus: tuple[int, ...] = setting(
        (),
        "CPU cores to compute on, such as 0,2 or 4-7; empty: any.",
        unit="cores",
        read=parse_cpus,
        write=format_cpus,
    )

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_bounds(self)


def bind_engine_thread(settings: DeviceSettings) -> None:
    """Bind the calling thread, and the threads that it starts, to the cores of the settings.

    Raises:
        InvalidInputError: this process may not use one of the cores.
    """
    if not settings.cpus:
        return
    try:
        os.sched_setaffinity(threading.get_native_id(), settings.cpus)
    except OSError:
        usable = sorted(os.sched_getaffinity(0))
        raise InvalidInputError(
            f"cannot run on CPU cores {list(settings.cpus)}: this process may use {usable}"
        ) from None


def prepare_torch(settings: DeviceSettings) -> None:
    """Set the number of compute threads, and check that PyTorch can use the device.

    Raises:
        InvalidInputError: the device cannot be used.
    """
    # Importing torch takes seconds, so only engines that need it do so.
    import torch  # noqa: PLC0415

    torch.set_num_threads(_num_threads(settings.threads, torch.get_num_threads()))
    try:
        torch.empty(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(
            f"device {settings.device!r} cannot be used: {reason}; choose another with --device"
        ) from None


def _num_threads(requested: int, default: int) -> int:
    """Return the number of compute threads: as requested, within what the thread may use.

    More threads than cores take turns, and each waits for all others many times in a pass.
    """
    usable = usable_cpus()
    if requested > usable:
        log.warning(
            "--threads %d exceeds the %d CPU cores that this service may use (affinity, CPU "
            "quota): it computes with %d threads",
            requested,
            usable,
            usable,
        )
    return min(requested or default, usable)


def gpu_uuid(device: str) -> str | None:
    """Return the driver's id of a GPU; None if the device is not an NVIDIA GPU.

    PyTorch numbers only the GPUs that this process may use. The driver numbers all of them.
    """
    if not device.startswith("cuda"):
        return None
    import torch  # noqa: PLC0415

    try:
        properties = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError):
        return None
    uuid = getattr(properties, "uuid", None)
    return None if uuid is None or torch.version.hip else f"GPU-{uuid}"
