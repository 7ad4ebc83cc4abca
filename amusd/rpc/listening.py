"""The local addresses of a listener, and whether its port is free.

Both wildcards, ``::`` and ``0.0.0.0``, mean all addresses of both families, as for gRPC itself. A
name means all its addresses, and localhost both loopback addresses. An address of a family that
this machine does not have is left out.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from amusd.fleet.endpoint import Endpoint, is_wildcard
from amusd.protocol.errors import UnavailableError

_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """One socket address to listen on, as the ``socket`` module has it."""

    family: socket.AddressFamily
    address: Any


def local_addresses(host: str, port: int) -> tuple[LocalAddress, ...]:
    """Return all addresses that a listener on ``host`` has, one or more.

    Raises:
        OSError: the name has no address.
    """
    if is_wildcard(host):
        return (
            LocalAddress(socket.AF_INET6, ("::", port, 0, 0)),
            LocalAddress(socket.AF_INET, ("0.0.0.0", port)),
        )
    if host.lower() == "localhost":  # always both, whatever the hosts file says
        return (
            LocalAddress(socket.AF_INET, ("127.0.0.1", port)),
            LocalAddress(socket.AF_INET6, ("::1", port, 0, 0)),
        )
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(LocalAddress(family, address) for family, *_, address in found))


def bind_all(endpoint: Endpoint) -> list[socket.socket]:
    """Return sockets that are bound to all addresses of ``endpoint``, and do not listen yet.

    Raises:
        OSError: a port is taken, or no address belongs to this machine.
    """
    missing: OSError | None = None
    with contextlib.ExitStack() as closing:
        bound = []
        for local in local_addresses(endpoint.host, endpoint.port):
            try:
                bound.append(closing.enter_context(_bind(local)))
            except OSError as error:
                if error.errno not in _NO_FAMILY:
                    raise
                missing = error
        if not bound and missing is not None:
            raise missing
        closing.pop_all()
        return bound


@contextlib.contextmanager
def reported(endpoint: Endpoint, purpose: str, advice: str) -> Iterator[None]:
    """Turn an OSError into an UnavailableError that says what cannot be done at ``endpoint``."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"cannot {purpose} {endpoint}: {_reason(error)}; {advice}") from None


def check_free(endpoint: Endpoint, advice: str) -> None:
    """Check that a service can listen at ``endpoint``, at once and without serving there.

    Raises:
        UnavailableError: the port is taken, or the host is not this machine; it ends with
            ``advice``.
    """
    with reported(endpoint, "listen on", advice):
        for bound in bind_all(endpoint):
            bound.close()


def _bind(local: LocalAddress) -> socket.socket:
    made = socket.socket(local.family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if local.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(local.address)
    except OSError:
        made.close()
        raise
    return made


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use"
    if isinstance(error, socket.gaierror) or error.errno in _NO_FAMILY:
        return "the host is not this machine"
    if error.errno == errno.EACCES:
        return "ports below 1024 need a privilege"
    return error.strerror or str(error)
