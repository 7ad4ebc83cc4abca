"""The command line: reads arguments, runs services and measurements, prints results."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from amusd.cli.process_end import end_at_signals, leave
from amusd.library_output import silence_bars, silence_log
from amusd.protocol.errors import AmusdError
from amusd.rpc.tuning import tune_grpc

_SERVING = ("serve", "up")


def main() -> NoReturn:
    """Run the command."""
    is_serving = sys.argv[1:2] in ([name] for name in _SERVING)
    if is_serving:
        end_at_signals()
    # Otherwise grpc logs connection failures that the errors of the commands explain better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    silence_bars()
    if not is_serving:
        silence_log()
    tune_grpc()
    leave(_exit_code(_run), runs_exit_handlers=not is_serving)


def reporting_errors(command: Callable[[], None]) -> None:
    """Run ``command``; an AmusdError is one line on standard error, and exit code 1."""
    try:
        command()
    except AmusdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> None:
    from amusd.cli.app import app  # noqa: PLC0415  # after the settings of ``main``
    from amusd.cli.usage_errors import run_app  # noqa: PLC0415

    sys.exit(run_app(app))


def _exit_code(command: Callable[[], None]) -> int:
    """Run ``command`` and return the exit code; nothing that it raises passes."""
    try:
        reporting_errors(command)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1  # the reader of the output has gone
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
