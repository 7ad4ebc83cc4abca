"""Common ground of the AMUSD services; importing it pulls in neither torch nor grpc."""

from importlib.metadata import version

__version__ = version("amusd")
