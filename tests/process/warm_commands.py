"""Runs commands in forks of a process that has imported their libraries already.

Each command is a process of its own with its own arguments, environment and output. Only the
imports are done once, because they take longer than most commands. The first process holds no
threads, so that a fork is safe; it ends with the process that started it.
"""

import atexit
import functools
import importlib
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

WIDTH = {"COLUMNS": "120"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SECONDS = 120
"""After these seconds, SIGALRM ends a command."""


class Command(TypedDict):
    """The arguments for ``python -m`` and the rest of a process, as sent to the first process."""

    number: int
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    stdout: str
    stderr: str


class WarmCommands:
    """Starts the first process, which imports ``modules``, and ends it at exit."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2], env=os.environ | WIDTH | ONE_THREAD,
        )  # fmt: skip
        self._numbers = itertools.count()
        atexit.register(self._end)

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run ``python -m`` with the arguments, and the folder and variables of this process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            output, errors = Path(folder) / "stdout", Path(folder) / "stderr"
            command = Command(
                number=next(self._numbers), arguments=list(arguments),
                environment=os.environ | WIDTH, folder=str(Path.cwd()),
                stdout=str(output), stderr=str(errors),
            )  # fmt: skip
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                number, code = map(int, line.split())
                if number == command["number"]:  # not that of a test that has not waited for it
                    return subprocess.CompletedProcess(
                        arguments, code, output.read_text(), errors.read_text()
                    )
        raise AssertionError("the first process has ended")

    def _end(self) -> None:
        self._process.communicate(timeout=10)


@functools.cache
def command_line() -> WarmCommands:
    """Commands that load no model."""
    return WarmCommands("amusd.cli.app")


@functools.cache
def command_line_with_torch() -> WarmCommands:
    """Commands that load models in their own process."""
    return WarmCommands(
        "benchmarks.__main__", "amusd.distill.distillation", "amusd.distill.draft_measurement"
    )


def serve(modules: list[str]) -> None:
    """Import ``modules``, and run the commands of standard input until it ends."""
    for module in modules:
        importlib.import_module(module)
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    assert num_threads == 1, f"{num_threads} threads, which a fork does not copy"
    for line in sys.stdin:
        command: Command = json.loads(line)
        process = os.fork()
        if process == 0:
            become(command)
            return
        _, status = os.waitpid(process, 0)
        print(command["number"], os.waitstatus_to_exitcode(status), flush=True)


def become(command: Command) -> None:
    """Run a command in this process."""
    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, command["stdout"], os.O_WRONLY | os.O_CREAT),
        (2, command["stderr"], os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    module, *sys.argv[1:] = command["arguments"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
