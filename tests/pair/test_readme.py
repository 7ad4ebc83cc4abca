"""The commands and the program of the README run unchanged, except for the port."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from amusd.cli.local_services import LocalServices

pytestmark = [pytest.mark.pair, pytest.mark.process]

README = Path(__file__).parents[2] / "README.md"
ADDRESS = "localhost:50050"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def grpcurl_commands() -> list[list[str]]:
    joined = "\n".join(blocks("sh")).replace("\\\n", " ")
    commands = [shlex.split(line) for line in joined.splitlines() if line.startswith("grpcurl")]
    assert len(commands) >= 5
    return commands


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", grpcurl_commands(), ids=lambda command: command[-1])
def test_a_grpcurl_call_of_the_readme_works(
    command: list[str], pair_services: LocalServices
) -> None:
    grpcurl = str(Path(sys.executable).with_name("grpcurl"))
    output = run([grpcurl, *(part.replace(ADDRESS, pair_services.address) for part in command[1:])])
    if command[-1].endswith("/Generate"):
        assert '"chunk"' in output
        assert '"tokens_per_pass"' in output
    else:
        assert "amusd.v1" in output or "SERVING" in output or "verify_model" in output


def test_the_python_client_of_the_readme_works(pair_services: LocalServices) -> None:
    program, _ = blocks("python")
    output = run([sys.executable, "-c", program.replace(ADDRESS, pair_services.address)])
    assert output.strip()


def test_the_stub_client_of_the_readme_works(pair_services: LocalServices) -> None:
    _, program = blocks("python")
    output = run([sys.executable, "-c", program.replace(ADDRESS, pair_services.address)])
    text, _, statistics = output.rpartition("tokens per pass:")
    assert text.strip()
    assert float(statistics) >= 1.0
