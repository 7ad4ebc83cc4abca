"""Services that our own commands start: with which settings, and what they import."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amusd.cli import local_services as local_services_module
from amusd.cli.local_services import LocalSettings, local_services, place
from amusd.cli.service_settings import SETTINGS
from amusd.client import Client, Options
from amusd.engine.interface import EngineOptions, Numerics, WeightFormat
from amusd.prompts import Prompt
from amusd.protocol.errors import UnavailableError
from amusd.settings import flags_of
from tests.process.synthetic_models import expected_output

MODEL = "synthetic:vocabulary=300,batch=4"
OPTIONS = EngineOptions(4, 64, False, Numerics.EXACT, WeightFormat.INT8)
MARK = "AMUSD_MARK_OF_TEST"
"""Variable that names the file to which a module of the tests writes who imported it."""
LEAVE_MARK = f"""\
import os, sys
with open(os.environ["{MARK}"], "a") as mark:
    mark.write(" ".join(sys.orig_argv) + "\\n")
"""


def test_only_a_verify_service_takes_numerics() -> None:
    common = ["--max-batch", "4", "--cache-mib", "64", "--no-reuse-prefixes"]
    weights = ["--weights", "int8"]
    assert flags_of(SETTINGS["draft"], OPTIONS) == [*common, *weights]
    assert flags_of(SETTINGS["verify"], OPTIONS) == [*common, "--numerics", "exact", *weights]


def test_draft_and_verify_share_the_cores_that_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    settings = LocalSettings(draft_device="cpu", verify_device="cpu")
    shares = {}
    for usable in (8, 3, 1):
        monkeypatch.setattr(local_services_module, "usable_cpus", lambda n=usable: n)
        shares[usable] = [one.values() for one in place(settings)]
    assert shares == {
        8: [
            {"device": "cpu", "cpus": (6, 7), "threads": 2},
            {"device": "cpu", "cpus": (0, 1, 2, 3, 4, 5), "threads": 6},
        ],
        3: [{"device": "cpu", "threads": 1}, {"device": "cpu", "threads": 2}],
        1: [{"device": "cpu"}, {"device": "cpu"}],
    }


@pytest.mark.process
def test_local_services_start_with_the_options_they_are_given() -> None:
    settings = LocalSettings(
        draft=MODEL, verify=MODEL, draft_options=OPTIONS, verify_options=OPTIONS
    )
    with local_services(settings) as services, Client(services.address, 60) as client:
        generation = client.generate(Prompt(tokens=(1, 2)), Options(max_tokens=20)).wait()
    assert generation.tokens == expected_output(MODEL, (1, 2), 20)


@pytest.mark.process
def test_settings_that_are_not_given_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AMUSD_MAX_SESSIONS", "0")
    with (
        pytest.raises(UnavailableError, match="the verify service did not start"),
        local_services(LocalSettings(draft="", verify=MODEL)),
    ):
        pass
    said = capfd.readouterr().err
    assert "error: AMUSD_MAX_SESSIONS (--max-sessions): 0 is out of range" in said


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[str]"]:
    """``amusd up`` in a folder whose modules leave a mark, with another such folder on its path."""
    here, on_path = tmp_path / "here", tmp_path / "on_path"
    for module in ("amusd/__init__.py", "draft_service/__init__.py", "grpc.py", "typer.py"):
        path = here / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LEAVE_MARK + "raise SystemExit('imported from the current folder')\n")
    on_path.mkdir()
    (on_path / "sitecustomize.py").write_text(LEAVE_MARK)
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(on_path), root)))
    ports = ("--port", "0", "--draft-port", "0", "--verify-port", "0", "--gateway-port", "0")
    models = ("--draft", MODEL, "--verify", MODEL)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "amusd", "up", *models, *ports],
        cwd=here, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.terminate()
    process.communicate(timeout=60)


@pytest.mark.process
def test_children_import_from_pythonpath_and_never_from_the_current_folder(
    up: "subprocess.Popen[str]",
) -> None:
    assert up.stdout is not None
    assert up.stdout.readline().startswith("serving on ")
    marks = Path(os.environ[MARK]).read_text().splitlines()
    assert len(marks) == 4  # sitecustomize, once in each process
    for role in ("draft", "orchestrator", "verify"):
        assert sum(f" serve {role} " in mark for mark in marks) == 1
