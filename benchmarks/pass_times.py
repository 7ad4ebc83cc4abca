"""What a pass costs by the number of its tokens, alone and beside a draft that never rests.

Run it on an idle machine: ``python benchmarks/pass_times.py``.
"""

import subprocess
import sys
import time
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from amusd.cli import reporting_errors
from amusd.cli.local import LocalSettings, place
from amusd.core.errors import UnavailableError
from amusd.engine.device import DeviceSettings
from amusd.engine.interface import Engine
from amusd.engine.loading import load_model
from amusd.engine.timing import median_pass_seconds

_BUSY_SECONDS = 600.0  # the draft ends by itself after that
_LOADED, _START, _STARTED = "loaded", "start", "started"


def main(
    verify: Annotated[str, typer.Option(help="Verify model.")] = "smollm2",
    draft: Annotated[str, typer.Option(help="Draft model.")] = "smollm2",
    rows: Annotated[str, typer.Option(help="Numbers of tokens of a pass.")] = "1,2,3,4,6,9",
    repeat: Annotated[int, typer.Option(min=1, help="Passes of each size.")] = 10,
    keep_drafting: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure passes of the verify model, in turns, and print their median times."""
    if keep_drafting:
        _draft_until_told(draft, verify)
        return
    sizes = [int(size) for size in rows.split(",")]
    command = [sys.executable, __file__, "--keep-drafting", "--draft", draft, "--verify", verify]
    # Started before this thread is bound to its core, for a child inherits that.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as drafting:
        try:
            _wait_for_line(drafting, _LOADED)
            engine = _load("verify", draft, verify)
            alone = _median_ms(engine, sizes, repeat)
            assert drafting.stdin is not None
            print(_START, file=drafting.stdin, flush=True)
            _wait_for_line(drafting, _STARTED)
            beside = _median_ms(engine, sizes, repeat)
        finally:
            drafting.terminate()
    _show(alone, beside)


def _wait_for_line(process: "subprocess.Popen[str]", line: str) -> None:
    """Wait until ``line`` comes; a process that ends has said why on standard error."""
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip() == line:
            return
    raise UnavailableError("the drafting process has ended; its message above says why")


def _load(role: Literal["draft", "verify"], draft: str, verify: str) -> Engine:
    draft_place, verify_place = place(LocalSettings(draft=draft, verify=verify))
    where = draft_place if role == "draft" else verify_place
    device = DeviceSettings(where.device, "auto", len(where.cpus), where.cpus)
    return load_model(draft if role == "draft" else verify, role, device)


def _median_ms(engine: Engine, sizes: list[int], repeat: int) -> dict[int, float]:
    found = median_pass_seconds(engine, sizes, repeat)
    return {size: 1e3 * seconds for size, seconds in found.items()}


def _draft_until_told(draft: str, verify: str) -> None:
    engine = _load("draft", draft, verify)
    print(f"a draft step takes {_median_ms(engine, [1], 50)[1]:.1f} ms alone", file=sys.stderr)
    print(_LOADED, flush=True)
    sys.stdin.readline()
    print(_STARTED, flush=True)
    end = time.monotonic() + _BUSY_SECONDS
    while time.monotonic() < end:
        _median_ms(engine, [1], 20)


def _show(alone: dict[int, float], beside: dict[int, float]) -> None:
    table = Table(title="ms of a verify pass", box=box.SIMPLE_HEAD)
    for heading in ("tokens", "alone", "beside a busy draft"):
        table.add_column(heading, justify="right")
    for size, milliseconds in alone.items():
        table.add_row(str(size), f"{milliseconds:.1f}", f"{beside[size]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    reporting_errors(lambda: typer.run(main))
