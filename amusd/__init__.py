"""Common ground of the AMUSD services; importing it pulls in neither torch nor grpc."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amusd.async_client import AsyncClient as AsyncClient
    from amusd.client import Client as Client

__version__ = version("amusd")

_CLIENTS = {"Client": "amusd.client", "AsyncClient": "amusd.async_client"}


def __getattr__(name: str) -> Any:
    """Return a client; its module, and grpc with it, is imported where it is asked for."""
    if name in _CLIENTS:
        return getattr(import_module(_CLIENTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
