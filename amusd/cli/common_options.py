"""Options that several commands share, and the server they talk to."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amusd.cli.local_services import LocalSettings, local_services
from amusd.engine.interface import EngineOptions
from amusd.protocol.errors import InvalidInputError

errors = Console(stderr=True)

Address = Annotated[
    str,
    typer.Option(
        envvar="AMUSD_ADDRESS",
        help="Orchestrator as host:port; empty: start services of our own for this command.",
    ),
]
DraftModel = Annotated[
    str,
    typer.Option(
        "--draft",
        envvar="AMUSD_DRAFT_MODEL",
        help="Draft model of our own services: hub id, folder, smollm2, prompt-lookup or "
        "synthetic:...; empty: none.",
    ),
]
VerifyModel = Annotated[
    str,
    typer.Option(
        "--verify",
        envvar="AMUSD_VERIFY_MODEL",
        help="Verify model of our own services: hub id, folder, smollm2 or synthetic:...",
    ),
]
Lookup = Annotated[
    bool | None,
    typer.Option(
        "--lookup/--no-lookup",
        envvar="AMUSD_LOOKUP",
        help="Our own draft service proposes what followed the last tokens before, where they "
        "occurred; else the model's. [default: yes, beside a real model]",
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to write.")]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Continue the prompt as plain text, without the model's chat template."
    ),
]
Lookahead = Annotated[
    int | None,
    typer.Option(min=1, help="Proposed tokens beyond the verified ones; the server's default."),
]


def check_output(path: Path | None) -> None:
    """Raise InvalidInputError if a report cannot be written to ``path``, before it is made."""
    if path is not None and not path.parent.is_dir():
        raise InvalidInputError(f"there is no folder {path.parent} to write {path.name} to")
    if path is not None and path.is_dir():
        raise InvalidInputError(f"{path} is a folder: name a file in it to write to")


@contextlib.contextmanager
def server(address: str, draft: str, verify: str, lookup: bool | None) -> Iterator[str]:
    """Yield the address of an orchestrator, our own for as long as the block runs if none.

    Our own reads every prompt anew, so that ways of decoding compare that get the same one.
    """
    if address:
        yield address
        return
    with contextlib.ExitStack() as stack:
        with errors.status(f"starting services: verify {verify}, draft {draft or 'none'}"):
            options = EngineOptions(reuse_prefixes=False)
            settings = LocalSettings(
                draft=draft,
                verify=verify,
                lookup=lookup,
                draft_options=options,
                verify_options=options,
            )
            services = stack.enter_context(local_services(settings))
        yield services.address
