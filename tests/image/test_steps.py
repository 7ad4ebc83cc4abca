"""The Dockerfile's commands, run in clean folders without a container engine.

Two things differ from a build: the base images are not used, and the project's dependencies are
not downloaded but taken from the interpreter that runs the tests.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.strategy import Strategy
from tests.image.dockerfile import ROOT, copy_context, read_stages
from tests.process.services import DRAFT_MODEL, VERIFY_MODEL, Service, listening
from tests.process.synthetic_models import expected_output

pytestmark = [pytest.mark.process, pytest.mark.slow]


class Image:
    """Folders that replace those of a build, and the commands that fill them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = {name: folder / name.strip("/") for name in ("/src", "/wheels", "/opt/amusd")}
        for path in self.paths.values():
            path.mkdir(parents=True)

    def run(self, command: str) -> None:
        for name, path in self.paths.items():
            command = command.replace(name, str(path))
        search_path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=self.paths["/src"], capture_output=True, text=True, timeout=240, check=False,
            env=os.environ | {"PATH": search_path, "PYTHONPATH": ""},
        )  # fmt: skip
        if "Could not find a version" in done.stderr + done.stdout:
            pytest.skip("no package index with setuptools, which builds the wheel, can be reached")
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a container, without variables of this machine."""
        (self.folder / "tmp").mkdir(exist_ok=True)
        return {
            "PATH": str(self.paths["/opt/amusd"] / "bin"),
            "HOME": str(self.folder / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "AMUSD_CACHE_DIR": str(self.folder / "cache"),
        }

    def start(self, role: str, *flags: str) -> Service:
        """Run the image's entry point as in a container."""
        log = self.folder / f"{role}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                ["amusd", "serve", role, "--port", "0", *flags],
                executable=self.paths["/opt/amusd"] / "bin" / "amusd",
                cwd=self.folder / "tmp", env=self.environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        return listening(role, process, log)

    def files(self) -> dict[str, int]:
        """Return the files of the virtual environment with their modification times."""
        paths = self.paths["/opt/amusd"].rglob("*")
        return {str(path): path.lstat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The folders after the Dockerfile's commands."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler, which the stage of the wheel needs")
    stages = read_stages()
    built = Image(tmp_path_factory.mktemp("image"))
    copy_context(built.paths["/src"])
    for command in stages["wheel"].commands():
        built.run(command)
    shutil.rmtree(built.paths["/src"])  # the last stage has no sources
    built.paths["/src"].mkdir()
    built.run("python -m venv /opt/amusd")
    built.run(stages["cpu"].commands()[-1])
    third_party = sysconfig.get_path("purelib")
    (site_packages,) = built.paths["/opt/amusd"].glob("lib/python*/site-packages")
    # This adds only the folder, and not an editable installation of the project in it.
    (site_packages / "third-party.pth").write_text(f"{third_party}\n")
    return built


@pytest.fixture
def services(image: Image) -> Iterator[list[Service]]:
    """Verify, draft, orchestrator and gateway from the image."""
    running = [image.start("verify", "--model", VERIFY_MODEL)]
    try:
        running.append(image.start("draft", "--model", DRAFT_MODEL))
        verify, draft = (one.address for one in running)
        running.append(image.start("orchestrator", "--verify", verify, "--draft", draft))
        running[-1].wait_until_serving()
        running.append(image.start("gateway", "--orchestrator", running[-1].address))
        yield running
    finally:
        for service in reversed(running):
            service.end()


def test_the_dependencies_are_pinned(tmp_path: Path) -> None:
    image = Image(tmp_path)
    stage = read_stages()["dependencies"]
    for name in stage.all("COPY")[0].split()[:-1]:
        shutil.copy(ROOT / name, image.paths["/src"])
    image.run(stage.commands()[0])
    lines = (image.paths["/src"] / "requirements.txt").read_text().splitlines()
    constraints = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    for line in lines:
        name = line.partition(">=")[0].lower().replace("_", "-")
        assert name == "torch" or f"\n{name}==" in constraints
    assert len(lines) > 10


def test_the_services_run_from_the_wheel_alone(image: Image, services: list[Service]) -> None:
    before = image.files()
    _, _, orchestrator, gateway = services
    with Client(orchestrator.address, timeout_seconds=60) as client:
        generation = client.generate(Prompt(tokens=(1, 2)), Options(Strategy.AMUSD, 30)).wait()
    assert generation.tokens == expected_output(VERIFY_MODEL, (1, 2), 30)
    assert not generation.summary().fallback_reason
    assert httpx.get(f"http://{gateway.address}/v1/models").json()["data"]
    assert image.files() == before  # the root filesystem of the pods is read-only


def test_the_wheel_is_complete(image: Image) -> None:
    code = (
        "import amusd, amusd.pair.draft_model, gateway; from amusd.engine.native import library; "
        "assert amusd.pair.draft_model.ASSET_PATH.is_file(); print(amusd.__file__)"
    )
    done = subprocess.run(
        [image.paths["/opt/amusd"] / "bin" / "python", "-c", code],
        env=image.environment, cwd=image.folder, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(image.paths["/opt/amusd"]))
    package = Path(done.stdout.strip()).parent
    assert list(package.glob("engine/native/_library*.so"))
    assert (package / "py.typed").is_file()
    pages = (path.name for path in (ROOT / "gateway/static").iterdir())
    assert {path.name for path in (package.parent / "gateway/static").iterdir()} == set(pages)
