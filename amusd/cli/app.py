"""All commands of the command line; each is defined in its own file."""

from typing import Annotated

import typer

import amusd
from amusd.cli.acceptance_command import acceptance
from amusd.cli.bench_command import bench
from amusd.cli.chat_command import chat
from amusd.cli.compare_command import compare
from amusd.cli.consistency_command import consistency
from amusd.cli.declared_options import HELP_NAMES, mount
from amusd.cli.distill_command import distill
from amusd.cli.generate_command import generate
from amusd.cli.plan_command import plan
from amusd.cli.serve_command import serve
from amusd.cli.timeline_command import timeline
from amusd.cli.up_command import up

app = typer.Typer(
    name="amusd",
    help="Asynchronous multi-device speculative decoding as gRPC services.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP_NAMES,
)
mount(app, serve)
mount(app, up)
mount(app, generate)
mount(app, chat)
app.command()(compare)
app.command()(bench)
app.command()(distill)
app.command()(acceptance)
app.command()(consistency)
app.command()(timeline)
app.command()(plan)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"amusd {amusd.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Asynchronous multi-device speculative decoding as gRPC services."""
