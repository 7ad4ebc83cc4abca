"""The command line: reads arguments, runs services and measurements, shows results."""

import os
import sys
from collections.abc import Callable

from amusd.protocol.errors import AmusdError


def main() -> None:
    """Run the command."""
    # grpc writes connection noise to stderr that our own errors say better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from amusd.cli.app import app  # noqa: PLC0415  # after the setting above

    reporting_errors(app)


def reporting_errors(command: Callable[[], None]) -> None:
    """Run ``command``; an error of ours is one line on standard error, and exit code 1."""
    try:
        command()
    except AmusdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
