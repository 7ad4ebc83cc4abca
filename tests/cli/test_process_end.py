"""How the process of a command ends: exit code, output, and never an abort or a wait."""

import signal
import subprocess
import sys

import pytest

# The command line with another app in place of the real one, so that nothing large is imported.
PRELUDE = """
import sys, threading, time, types
from amusd.protocol.errors import UnavailableError
def run(standalone_mode):
    {body}
sys.modules["amusd.cli.app"] = types.SimpleNamespace(app=run)
sys.argv = ["amusd", {command!r}]
from amusd.cli import main
main()
"""
WAITS = "print('started', flush=True); time.sleep(60)"
ENDS_BESIDE_THREADS = (
    "threading.Thread(target=time.sleep, args=(60,)).start(); print('done', end='')"
)


def started(body: str, command: str = "serve") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE.format(body=body, command=command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_signal_before_a_service_serves_is_a_normal_end_with_one_line(
    number: signal.Signals, command: str
) -> None:
    process = started(WAITS, command)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == f"ending at {number.name}, before serving\n"


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (ENDS_BESIDE_THREADS, 0, ""),
        ("return 7", 7, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('words')", 1, "words"),
        ("raise UnavailableError('try later')", 1, "error: try later"),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise ZeroDivisionError('a defect')", 1, "ZeroDivisionError: a defect"),
        ("sys.stdout.write('x' * 99999); sys.stdout.close()", 0, ""),
    ],
)
def test_every_end_has_its_exit_code_whatever_still_runs(body: str, code: int, words: str) -> None:
    process = started(body, "generate")
    output, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert words in errors
    if "done" in body:
        assert output == "done"


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    process = started("print('x' * 99999, flush=True)", "generate")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(20) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_exit_handlers_run_at_the_end_of_a_command_within_a_bound() -> None:
    body = (
        "import atexit; atexit.register(print, 'handled'); atexit.register(time.sleep, 0);"
        "threading.Thread(target=time.sleep, args=(60,)).start()"
    )
    output, _ = started(body, "generate").communicate(timeout=20)
    assert output == "handled\n"
