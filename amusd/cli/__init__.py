"""The command line: reads arguments, runs services and measurements, prints results."""

import os
import sys
from collections.abc import Callable

from amusd.protocol.errors import AmusdError


def main() -> None:
    """Run the command."""
    # Otherwise grpc logs connection failures that the errors of the commands explain better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from amusd.cli.app import app  # noqa: PLC0415  # after the setting above

    reporting_errors(app)


def reporting_errors(command: Callable[[], None]) -> None:
    """Run ``command``; an AmusdError is one line on standard error, and exit code 1."""
    try:
        command()
    except AmusdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
