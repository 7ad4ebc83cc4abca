"""Addresses of the replicas of a pool: the configured entries, and the endpoints they resolve to.

An entry is a ``host:port``, or a ``file:///path`` that lists one ``host:port`` a line. A host name
stands for all its addresses, as the name of a headless Service in Kubernetes does. Nothing here
knows what is served at an address.
"""

import asyncio
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from amusd.fleet.endpoint import Endpoint, parse_endpoint
from amusd.protocol.errors import InvalidInputError, UnavailableError

_FILE = "file://"
_RESOLVE_SECONDS = 10.0
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class AddressFile:
    """A file with one endpoint a line; ``#`` starts a comment."""

    path: str

    def __str__(self) -> str:
        """Return the entry as it was configured."""
        return f"{_FILE}{self.path}"


Entry = Endpoint | AddressFile


class Resolver(Protocol):
    """Finds the IP addresses of a host name."""

    async def __call__(self, host: str) -> tuple[str, ...]:
        """Return one IP address or more.

        Raises:
            OSError: the name has no address, or no name server answers.
        """


def checked_entries(text: str) -> str:
    """Return ``text`` if it is a list of entries.

    Raises:
        InvalidInputError: as ``parse_entries``.
    """
    parse_entries(text)
    return text


def parse_entries(text: str) -> tuple[Entry, ...]:
    """Return the entries of a comma-separated list.

    Raises:
        InvalidInputError: one of them is neither ``host:port`` nor ``file:///path``.
    """
    parts = [part.strip() for part in text.split(",")]
    return tuple(dict.fromkeys(_parse(part) for part in parts if part))


def _parse(text: str) -> Entry:
    if not text.startswith(_FILE):
        try:
            return parse_endpoint(text)
        except InvalidInputError as error:
            raise InvalidInputError(f"{error}, or file:///path") from None
    path = text.removeprefix(_FILE)
    if not path.startswith("/"):
        raise InvalidInputError(f"{text!r} is not a file URL: write file:///path/to/addresses")
    return AddressFile(path)


class SystemResolver:
    """Asks the resolver of the operating system, on a thread; at most one query a name."""

    def __init__(self) -> None:
        """Start without running queries."""
        self._queries: dict[str, asyncio.Task[tuple[str, ...]]] = {}

    async def __call__(self, host: str) -> tuple[str, ...]:
        """Return the addresses of one family, IPv4 if there are any.

        A replica with an IPv4 and an IPv6 address would otherwise count twice.

        Raises:
            OSError: the name has no address, or there is no answer in 10 s.
        """
        query = self._queries.get(host)
        if query is None:
            query = self._queries[host] = asyncio.create_task(_query(host))
            query.add_done_callback(lambda _: self._queries.pop(host, None))
        done, _ = await asyncio.wait({query}, timeout=_RESOLVE_SECONDS)
        if not done:
            raise TimeoutError(f"no answer in {_RESOLVE_SECONDS:.0f} s")
        return query.result()


async def _query(host: str) -> tuple[str, ...]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    for family in (socket.AF_INET, socket.AF_INET6):
        addresses = {str(address[0]) for kind, _, _, _, address in found if kind is family}
        if addresses:
            return tuple(sorted(addresses))
    raise OSError("it has no IP address")


async def resolve(entry: Entry, resolver: Resolver) -> tuple[Endpoint, ...]:
    """Return the endpoints that ``entry`` stands for now, one or more.

    Raises:
        UnavailableError: there is none, or a name or file cannot be resolved or read.
    """
    if isinstance(entry, Endpoint):
        return await _resolve_endpoint(entry, resolver)
    endpoints = await asyncio.to_thread(_read, entry)
    resolved = [await _resolve_endpoint(endpoint, resolver) for endpoint in endpoints]
    if not resolved:
        raise UnavailableError(f"{entry} lists no address: write one host:port on each line")
    return tuple(endpoint for each in resolved for endpoint in each)


async def _resolve_endpoint(endpoint: Endpoint, resolver: Resolver) -> tuple[Endpoint, ...]:
    if endpoint.is_ip_address or endpoint.is_loopback:
        return (endpoint,)  # gRPC tries both families of localhost
    try:
        addresses = await resolver(endpoint.host)
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
        without_comments = [line.partition("#")[0].strip() for line in lines]
        return tuple(parse_endpoint(line) for line in without_comments if line)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(
            f"{file} cannot be read ({reason}): write the addresses there"
        ) from error
    except InvalidInputError as error:
        raise UnavailableError(f"{file}: {error}") from error
