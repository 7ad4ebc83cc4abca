"""The device of a service, and its threads and cores on CPU."""

import os
import threading
from dataclasses import dataclass

from amusd.protocol.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """A device as PyTorch names it. With ``threads`` 0 PyTorch decides their number.

    ``cpus`` are the cores of the engine thread and the threads that it computes with. If it is
    empty, the operating system decides. The threads that serve gRPC are never bound to cores.
    """

    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    cpus: tuple[int, ...] = ()


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
            raise InvalidInputError(f"cannot read cpus {text!r}: write 0,2 or 4-7") from None
        if end < start:
            raise InvalidInputError(f"cpus {part!r} run backwards: write the lower one first")
        cpus.extend(range(start, end + 1))
    return tuple(cpus)


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
            f"cannot run on cpus {list(settings.cpus)}: this process may use {usable}"
        ) from None


def prepare_torch(settings: DeviceSettings) -> None:
    """Set the number of PyTorch's threads, and check that it can use the device.

    Raises:
        InvalidInputError: the device cannot be used.
    """
    # Importing torch takes seconds, so only engines that need it do so.
    import torch  # noqa: PLC0415

    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        torch.empty(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(
            f"device {settings.device!r} cannot be used: {reason}; choose another with --device"
        ) from None


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
