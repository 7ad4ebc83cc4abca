"""How a client reaches an orchestrator: address, TLS, key, retries; and what failures mean."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from amusd.fleet.endpoint import Endpoint, parse_endpoint
from amusd.protocol.errors import AmusdError, InvalidInputError, UnavailableError
from amusd.rpc import faults
from amusd.rpc.channel import channel_options

MAX_ATTEMPTS = 5
"""Most attempts that gRPC makes for a call."""

_UNREACHABLE = "failed to connect to all addresses"
_TLS_WORDS = ("ssl", "tls", "certificate", "handshake")
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclass(frozen=True, slots=True)
class Connection:
    """Where an orchestrator is, and how it is reached.

    ``ca`` is a file of PEM certificates, or its content; it implies TLS. Without it, TLS trusts
    the authorities that gRPC brings along. A call is made up to ``max_attempts`` times while
    nothing of its answer has come.

    Raises:
        InvalidInputError: one of them is of no use; the error says why.
    """

    address: str
    use_proxy: bool = False
    tls: bool = False
    ca: str | Path | bytes | None = None
    api_key: str = field(default="", repr=False)
    max_attempts: int = 3

    def __post_init__(self) -> None:
        """Refuse values that cannot be used."""
        parse_endpoint(self.address)
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise InvalidInputError(f"max_attempts is {self.max_attempts}: use 1 to {MAX_ATTEMPTS}")
        if not (self.api_key.isascii() and (self.api_key.isprintable() or not self.api_key)):
            raise InvalidInputError(
                "api_key has characters that no header holds: use printable ASCII, on one line"
            )

    @property
    def endpoint(self) -> Endpoint:
        """The host and port of the address."""
        return parse_endpoint(self.address)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries beside its message."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def open(self) -> grpc.Channel:
        """Return a channel for callers without an event loop."""
        options, credentials = self._options(), self._credentials()
        if credentials is None:
            return grpc.insecure_channel(str(self.endpoint), options)
        return grpc.secure_channel(str(self.endpoint), credentials, options)

    def open_async(self) -> grpc.aio.Channel:
        """Return the same for the running event loop."""
        options, credentials = self._options(), self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(str(self.endpoint), options)
        return grpc.aio.secure_channel(str(self.endpoint), credentials, options)

    def error_of(self, call_error: grpc.RpcError) -> AmusdError:
        """Return what a failed call means to its caller."""
        service = f"orchestrator at {self.address}"
        details = call_error.details() or ""
        if call_error.code() in _REFUSED:
            hint = "check api_key" if self.api_key else "set api_key"
            return InvalidInputError(faults.status_details(f"{service}: {details}; {hint}"))
        if call_error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnavailableError(
                f"{service}: the timeout has passed: raise it, or ask for fewer tokens"
            )
        if _UNREACHABLE not in details:
            return faults.error_of(call_error, service)
        is_tls = any(word in details.lower() for word in _TLS_WORDS)
        hint = "check tls and ca" if is_tls else "start one with amusd up, or check the address"
        return UnavailableError(faults.status_details(f"{service}: {details}; {hint}"))

    def _options(self) -> list[tuple[str, Any]]:
        """Return the options of a channel, which reads ahead 64 KiB at most.

        Without the limit gRPC reads ever further ahead, and the server cannot see that nobody reads
        a generation.
        """
        options = [*channel_options(self.endpoint, self.use_proxy), ("grpc.http2.bdp_probe", 0)]
        if self.max_attempts > 1:
            options.append(("grpc.service_config", _service_config(self.max_attempts)))
        return options

    def _credentials(self) -> grpc.ChannelCredentials | None:
        """Return the credentials for TLS; None without it."""
        if self.ca is None:
            return grpc.ssl_channel_credentials() if self.tls else None
        if isinstance(self.ca, bytes):
            return grpc.ssl_channel_credentials(self.ca)
        try:
            return grpc.ssl_channel_credentials(Path(self.ca).read_bytes())
        except OSError as error:
            raise InvalidInputError(
                f"cannot read certificates from {self.ca}: {error.strerror}"
            ) from None


def _service_config(max_attempts: int) -> str:
    """Return the configuration by which gRPC repeats calls of which nothing has come yet."""
    policy = {
        "maxAttempts": max_attempts,
        "initialBackoff": "0.2s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    name = [{"service": "amusd.v1.OrchestratorService"}]
    return json.dumps({"methodConfig": [{"name": name, "retryPolicy": policy}]})
