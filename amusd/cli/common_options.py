"""Options that several commands share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from amusd.cli.server_choice import ServerChoice, errors
from amusd.fleet.endpoint import parse_endpoint
from amusd.protocol.errors import InvalidInputError, UnavailableError
from amusd.settings import settings_in

_DECLARED = {one.name: one for one in settings_in(ServerChoice())}


def _option(name: str, **details: Any) -> Any:
    """Return the option for a setting of the server, as it is declared."""
    found = _DECLARED[name]
    flags = "/".join(filter(None, (found.flag, found.off_flag)))
    default = found.declaration.default_text
    note = f" [default: {default}]" if default else ""
    return typer.Option(
        flags, envvar=found.variable or None, help=f"{found.declaration.help}{note}", **details
    )


def _check_address(address: str) -> str:
    """Refuse an address that is none before anything starts."""
    if address:
        try:
            parse_endpoint(address)
        except InvalidInputError as error:
            raise typer.BadParameter(str(error)) from None
    return address


Address = Annotated[str, _option("address", callback=_check_address)]
UseProxy = Annotated[bool, _option("use_proxy")]
Tls = Annotated[bool, _option("tls")]
Ca = Annotated[str, _option("ca", metavar="FILE")]
ApiKey = Annotated[str, _option("api_key", metavar="KEY")]
DraftModel = Annotated[str, _option("draft")]
VerifyModel = Annotated[str, _option("verify")]
Lookup = Annotated[bool | None, _option("lookup")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum number of output tokens.")]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Continue the prompt as plain text, without the chat template of the model."
    ),
]
Lookahead = Annotated[
    int | None,
    typer.Option(min=1, help="Speculation length. [default: the server's]"),
]


Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]


def check_output(path: Path | None, force: bool = True) -> None:
    """Raise InvalidInputError if ``path`` is no place to write a report to.

    Without ``force``, a file that exists is none.
    """
    if path is not None and not path.parent.is_dir():
        raise InvalidInputError(f"there is no folder {path.parent} to write {path.name} to")
    if path is not None and path.is_dir():
        raise InvalidInputError(f"{path} is a folder: name a file in it to write to")
    if path is not None and path.exists() and not force:
        raise InvalidInputError(f"{path} exists: choose another name, or use --force")


def write_report(path: Path, report: Any) -> None:
    """Write a report as JSON.

    Raises:
        UnavailableError: it cannot be written.
    """
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UnavailableError(
            f"cannot write {path} ({error.strerror}): the figures are only in the table above"
        ) from None


def progress_bar() -> Progress:
    """Return a progress bar that shows how many steps are done, and how long the rest takes."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
    )
