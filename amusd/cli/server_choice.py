"""Which server a command asks, and how it reaches it: an address, or services of its own."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from amusd.cli.local_services import LocalSettings, local_services
from amusd.client import Client
from amusd.engine.interface import EngineOptions
from amusd.fleet.endpoint import parse_endpoint
from amusd.settings import like, setting

# Without markup, or the brackets of addresses and model names would be cut.
errors = Console(stderr=True, markup=False)

_MAX_TIMEOUT_SECONDS = 1e9  # beyond this, gRPC cannot add it to the time of day


def _read_address(text: str) -> str:
    """Return an address if it is one, or empty."""
    if text:
        parse_endpoint(text)
    return text


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """The server of a command. ``draft``, ``verify`` and ``lookup`` are for services of its own."""

    address: str = setting(
        "",
        "Address of an orchestrator, host:port; empty: start services for this command.",
        unit="host:port",
        read=_read_address,
    )
    use_proxy: bool = setting(
        False,
        "Reach the address through the proxy that grpc_proxy, https_proxy or http_proxy names.",
    )
    tls: bool = setting(False, "Encrypt the connection to the address.")
    ca: str = setting("", "File of the PEM certificates to trust; it implies --tls.", unit="file")
    api_key: str = setting(
        "",
        "Key that is sent with each request. Other users of this machine can read flags, but not "
        "variables.",
        unit="key",
    )
    draft: str = like(LocalSettings, "draft")
    verify: str = like(LocalSettings, "verify")
    lookup: bool | None = like(LocalSettings, "lookup")
    timeout_seconds: float = setting(
        600.0,
        "Timeout of a generation.",
        variable="",
        above=0,
        at_most=_MAX_TIMEOUT_SECONDS,
    )

    @contextlib.contextmanager
    def client(self, reuses_prefixes: bool = False) -> Iterator[Client]:
        """Yield a client of the server, which for services of its own ends with the block."""
        with (
            server(self.address, self.draft, self.verify, self.lookup, reuses_prefixes) as at,
            Client(
                at,
                self.timeout_seconds,
                self.use_proxy,
                tls=self.tls and bool(self.address),
                ca=(self.ca or None) if self.address else None,
                api_key=self.api_key,
            ) as client,
        ):
            yield client


@contextlib.contextmanager
def server(
    address: str, draft: str, verify: str, lookup: bool | None, reuses_prefixes: bool = False
) -> Iterator[str]:
    """Yield ``address``, or if it is empty that of services that run for the block.

    Without prefix caching, several runs of one prompt compare.
    """
    if address:
        yield address
        return
    with contextlib.ExitStack() as stack:
        started = f"starting services: verify {verify}, draft {draft or 'none'}"
        with errors.status(Text(started)):
            options = EngineOptions(reuse_prefixes=reuses_prefixes)
            settings = LocalSettings(
                draft=draft,
                verify=verify,
                lookup=lookup,
                draft_options=options,
                verify_options=options,
            )
            services = stack.enter_context(local_services(settings))
        yield services.address
