"""Runs the typer app; a wrong command line is one line on standard error, and exit code 2."""

import sys

import typer

# typer has its own copy of click's errors, or uses click's, by its version.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
BAD_USAGE = 2


def run_app(app: typer.Typer) -> int:
    """Run the command that the process was started with, and return its exit code."""
    try:
        code = app(standalone_mode=False)
    except _USAGE_ERROR as error:
        return _report(error)
    return code if isinstance(code, int) else 0


def one_line(text: str) -> str:
    """Return the words of an error on one line, without a full stop."""
    return " ".join(text.split()).rstrip(".")


def _report(error: Exception) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # its text is the whole help
        error.show()  # type: ignore[attr-defined]
        return BAD_USAGE
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "amusd"
    print(f"error: {one_line(_message(error))}; see {where} --help", file=sys.stderr)
    return BAD_USAGE


def _message(error: Exception) -> str:
    """Return what is wrong; a wrong value has its flag, and its variable if there is one."""
    parameter, message = getattr(error, "param", None), getattr(error, "message", "")
    if parameter is None or not message:
        text: str = error.format_message()  # type: ignore[attr-defined]
        return text
    variable = f" ({parameter.envvar})" if parameter.envvar else ""
    return f"{parameter.opts[0]}{variable}: {message.removeprefix('Value error, ')}"
