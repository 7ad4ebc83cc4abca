"""Where the replicas of a pool are: entries as the operator wrote them, and what they stand for.

An entry is a ``host:port`` or a ``file:///path`` with one of these on each line. A host name
stands for each of its addresses, as that of a headless Service in Kubernetes does. Nothing here
knows what is served there.
"""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from amusd.protocol.errors import InvalidInputError, UnavailableError

_FILE = "file://"
_LOOKUP_SECONDS = 10.0
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host, by name or address, and a port of it."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return ``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class AddressFile:
    """A file with an endpoint on each line; what follows a ``#`` is not read."""

    path: str

    def __str__(self) -> str:
        """Return the entry as it was written."""
        return f"{_FILE}{self.path}"


Entry = Endpoint | AddressFile


class Lookup(Protocol):
    """Finds the addresses of a host name."""

    async def __call__(self, host: str) -> tuple[str, ...]:
        """Return IP addresses, one or more.

        Raises:
            OSError: there are none, or nobody answers.
        """


def parse_entries(text: str) -> tuple[Entry, ...]:
    """Return the entries of a comma-separated list.

    Raises:
        InvalidInputError: one of them is neither ``host:port`` nor ``file:///path``.
    """
    parts = [part.strip() for part in text.split(",")]
    return tuple(dict.fromkeys(_parse(part) for part in parts if part))


def _parse(text: str) -> Entry:
    if not text.startswith(_FILE):
        return _parse_endpoint(text)
    path = text.removeprefix(_FILE)
    if not path.startswith("/"):
        raise InvalidInputError(f"{text!r} names no file: write file:///path/to/addresses")
    return AddressFile(path)


def _parse_endpoint(text: str) -> Endpoint:
    host, _, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    well_formed = host and port.isascii() and port.isdigit() and 0 < int(port) < 65536
    if not well_formed or (":" in host and not is_bracketed) or "/" in host:
        raise InvalidInputError(
            f"{text!r} is no address: write host:port, [IPv6 address]:port or file:///path"
        )
    return Endpoint(host.strip("[]"), int(port))


class SystemLookup:
    """Asks the system's resolver, on a thread; one question a name at a time."""

    def __init__(self) -> None:
        """Start with no question open."""
        self._open: dict[str, asyncio.Task[tuple[str, ...]]] = {}

    async def __call__(self, host: str) -> tuple[str, ...]:
        """Return the addresses of one family, IPv4 if there are any.

        A replica with an address of each family would count twice.
        """
        question = self._open.get(host)
        if question is None:
            question = self._open[host] = asyncio.create_task(_ask(host))
            question.add_done_callback(lambda _: self._open.pop(host, None))
        done, _ = await asyncio.wait({question}, timeout=_LOOKUP_SECONDS)
        if not done:
            raise TimeoutError(f"no answer in {_LOOKUP_SECONDS:.0f} s")
        return question.result()


async def _ask(host: str) -> tuple[str, ...]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    for family in (socket.AF_INET, socket.AF_INET6):
        addresses = {str(where[0]) for kind, _, _, _, where in found if kind is family}
        if addresses:
            return tuple(sorted(addresses))
    raise OSError("it has no IP address")


async def resolve(entry: Entry, lookup: Lookup) -> tuple[Endpoint, ...]:
    """Return the endpoints that ``entry`` stands for now, one or more.

    Raises:
        UnavailableError: there are none, or they cannot be found out; says what to do.
    """
    if isinstance(entry, Endpoint):
        return await _resolve_endpoint(entry, lookup)
    endpoints = await asyncio.to_thread(_read, entry)
    found = [await _resolve_endpoint(endpoint, lookup) for endpoint in endpoints]
    if not found:
        raise UnavailableError(f"{entry} lists no address: write one host:port a line")
    return tuple(endpoint for some in found for endpoint in some)


async def _resolve_endpoint(endpoint: Endpoint, lookup: Lookup) -> tuple[Endpoint, ...]:
    try:
        ipaddress.ip_address(endpoint.host)
    except ValueError:
        pass
    else:
        return (endpoint,)
    try:
        addresses = await lookup(endpoint.host)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(
            f"the name {endpoint.host!r} resolves to nothing ({reason}): check its spelling, and "
            "that the service behind it has a ready replica"
        ) from error
    return tuple(Endpoint(address, endpoint.port) for address in addresses)


def _read(file: AddressFile) -> tuple[Endpoint, ...]:
    try:
        with Path(file.path).open(encoding="utf-8") as opened:
            lines = opened.read(_MAX_FILE_BYTES).splitlines()
        wanted = [line.partition("#")[0].strip() for line in lines]
        return tuple(_parse_endpoint(line) for line in wanted if line)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(f"{file} cannot be read ({reason}): write it") from error
    except InvalidInputError as error:
        raise UnavailableError(f"{file}: {error}") from error
