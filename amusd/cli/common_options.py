"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from amusd.cli.server_choice import ServerChoice
from amusd.fleet.endpoint import parse_endpoint
from amusd.protocol.errors import InvalidInputError
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


def check_output(path: Path | None) -> None:
    """Raise InvalidInputError if ``path`` is no place to write a report to."""
    if path is not None and not path.parent.is_dir():
        raise InvalidInputError(f"there is no folder {path.parent} to write {path.name} to")
    if path is not None and path.is_dir():
        raise InvalidInputError(f"{path} is a folder: name a file in it to write to")
