"""Where a service listens or is dialled: a host and a port, read from every usual spelling.

Accepted are ``host:port``, ``[IPv6]:port`` with or without a zone, and the gRPC targets
``dns:``, ``ipv4:`` and ``ipv6:`` with one address. Inside, an IPv6 address has no brackets.
"""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import unquote

from amusd.protocol.errors import InvalidInputError

_EXPECTED = "write host:port, such as localhost:50050, 10.0.0.7:50050 or [::1]:50050"
_EXPECTED_HOST = "write a name or an IP address, such as localhost, 10.0.0.7, ::1, or :: for all"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TARGET = re.compile(r"(?:dns:///|dns:(?!//)|ipv4:|ipv6:)(?=.*:)", re.IGNORECASE)
_NAME = re.compile(r"[\w.-]+")
_WILDCARDS = ("::", "0.0.0.0")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host name or IP address, and a port; to listen on, port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return ``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_ip_address(self) -> bool:
        """Whether the host is an address that needs no lookup."""
        return _ip_address(self.host) is not None

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine itself."""
        if self.host.lower() == "localhost" or is_wildcard(self.host):
            return True
        address = _ip_address(self.host)
        return address is not None and address.is_loopback


def is_wildcard(host: str) -> bool:
    """Whether a listener on ``host`` takes connections on all addresses of the machine."""
    address = _ip_address(host)
    return address is not None and str(address) in _WILDCARDS


def dialled(endpoint: Endpoint) -> Endpoint:
    """Return where a client on this machine reaches a listener at ``endpoint``."""
    return Endpoint("127.0.0.1", endpoint.port) if is_wildcard(endpoint.host) else endpoint


def parse_endpoint(text: str) -> Endpoint:
    """Return the endpoint that ``text`` names, to be dialled.

    Raises:
        InvalidInputError: it names none; the message says how to write it.
    """
    bare = _without_scheme(text, _EXPECTED)
    host, colon, port = bare.rpartition(":")
    if _ip_address(bare) is not None and ":" in bare:
        raise InvalidInputError(f"{text!r} has an IPv6 address without brackets: {_EXPECTED}")
    if not colon or bare.endswith("]"):
        raise InvalidInputError(f"{text!r} has no port: {_EXPECTED}")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidInputError(f"{text!r} has no port from 1 to 65535: {_EXPECTED}")
    if ":" in host and not host.startswith("["):
        raise InvalidInputError(f"{text!r} has an IPv6 address without brackets: {_EXPECTED}")
    found = _host(host)
    if found is None:
        raise InvalidInputError(f"{text!r} is not an address: {_EXPECTED}")
    return Endpoint(found, int(port))


def parse_host(text: str) -> str:
    """Return the host to listen on that ``text`` names, without brackets.

    Raises:
        InvalidInputError: it names none; the message says how to write it.
    """
    bare = _without_scheme(text, _EXPECTED_HOST)
    host = _host(bare)
    if host is not None:
        return host
    before, colon, port = bare.rpartition(":")
    if colon and port.isdigit() and _host(before) is not None:
        raise InvalidInputError(
            f"{text!r} is a host with a port: write the port with --port, and only "
            f"{_host(before)} here"
        )
    raise InvalidInputError(f"{text!r} is not a host: {_EXPECTED_HOST}")


def _without_scheme(text: str, expected: str) -> str:
    """Return ``text`` without spaces around it and without the scheme of a gRPC target."""
    text = text.strip()
    target = _TARGET.match(text)
    if target:
        return (
            unquote(text[target.end() :]) if "ipv6" in target[0].lower() else text[target.end() :]
        )
    url = _URL.match(text)
    if url:
        raise InvalidInputError(f"{text!r} is a URL: {expected}, without {url[0]}")
    return text


def _host(text: str) -> str | None:
    """Return a name or IP address without brackets; None if it is neither."""
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else ""
    address = _ip_address(inside or text)
    if address is not None and (not inside or address.version == 6):
        return str(address)
    return text if _NAME.fullmatch(text) else None


def _ip_address(text: str) -> "ipaddress.IPv4Address | ipaddress.IPv6Address | None":
    try:
        return ipaddress.ip_address(text.replace("%25", "%"))  # as URLs write the mark of a zone
    except ValueError:
        return None
