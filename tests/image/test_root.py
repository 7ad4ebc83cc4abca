"""The Dockerfile's instructions, executed in a clean root folder without a container engine.

Debian comes from debootstrap. Commands run with chroot in the order of the stages. Packages come
from a folder of wheels, because the root folder has no network. Services run as in a pod: without
privileges, on a root that is read-only except for ``/tmp`` and ``/cache``. Two things differ from a
build: the base images are not used, and all stages share one root.
"""

import os
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from amusd.client import Client, Options
from amusd.prompts import Prompt
from amusd.protocol.strategy import Strategy
from tests.image.dockerfile import ROOT, Stage, copy_context, lineage, read_stages
from tests.process.services import Service, listening

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(900)]

DEBIAN = "bookworm"  # as in the base images
PACKAGES = "python3,python3-venv,python-is-python3"
TARGET = "cpu"
WHEELS, PACKAGE_INDEX = "/wheels", "/package-index"

# Does what a container runtime does; the mounts end with the process.
CONTAINER = """
set -e
mount --bind "$1" "$1"
mount -t tmpfs tmpfs "$1/tmp"
mount -t tmpfs -o uid=10001,gid=10001 tmpfs "$1/cache"
mount -t proc proc "$1/proc"
mount -o remount,bind,ro "$1"
root=$1 user=$2 folder=$3
shift 3
exec chroot --userspec="$user" "$root" sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
"""


def missing_requirement() -> str:
    """Return why no root folder can be made here, or an empty string."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root can change the root folder"
    for program in ("debootstrap", "chroot", "unshare", "cc"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        return "mounting is not permitted"
    return ""


class Container:
    """A root folder, and the state that the executed instructions have set."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.variables = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.folder = "/"
        self.user = "0:0"
        self.entry_point: list[str] = []

    def path(self, path: str) -> Path:
        """Return the path on this machine of a path in the container."""
        return self.root / path.lstrip("/")

    def execute(self, stage: Stage) -> None:
        """Execute the instructions of a stage."""
        for keyword, rest in stage.instructions:
            match keyword:
                case "ENV" | "ARG":
                    self.set(rest)
                case "WORKDIR":
                    self.folder = rest
                    self.path(rest).mkdir(parents=True, exist_ok=True)
                case "COPY" if not rest.startswith("--from"):
                    *names, target = rest.split()
                    for name in names:
                        shutil.copy(ROOT / name, self.path(self.folder) / target)
                case "RUN":
                    self.run(rest.partition("/wheels ")[2] if "--mount" in rest else rest)
                case "USER":
                    self.user = rest
                case "ENTRYPOINT":
                    self.entry_point = shlex.split(rest.strip("[]").replace(",", " "))

    def set(self, rest: str) -> None:
        """Set variables; a build argument without a default stays unset."""
        for name, _, value in (word.partition("=") for word in shlex.split(rest)):
            if value:
                self.variables[name] = string.Template(value).safe_substitute(self.variables)

    def run(self, command: str) -> None:
        """Run a shell command in the current folder with the current variables."""
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": PACKAGE_INDEX}
        script = f"cd {shlex.quote(self.folder)} && {command}"
        done = subprocess.run(
            ["chroot", str(self.root), "sh", "-c", script],
            env=self.variables | offline, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def start(self, log: Path, role: str, *flags: str) -> Service:
        """Run the entry point as in a pod."""
        arguments = [*self.entry_point, "serve", role, "--port", "0", *flags]
        command = ["unshare", "--mount", "sh", "-c", CONTAINER, "container", str(self.root)]
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, self.user, self.folder, *arguments],
                env=self.variables | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        service = listening(role, process, log)
        assert service.address, log.read_text()
        return service


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A root folder that the Dockerfile's commands have filled."""
    if reason := missing_requirement():
        pytest.skip(f"no clean root folder for the Dockerfile's steps: {reason}")
    folder = tmp_path_factory.mktemp("root")
    stages = read_stages()
    container = Container(folder / "root")
    make_root(container.root)
    try:
        make_wheel(stages["wheel"], container, folder / "src")
        fetch_packages(stages, container, folder / "src")
        for stage in (stages["dependencies"], *lineage(stages, TARGET)):
            container.execute(stage)
        for path in ("/src", WHEELS, PACKAGE_INDEX):  # of earlier stages
            shutil.rmtree(container.path(path))
        yield container
    finally:
        shutil.rmtree(folder)


def make_root(root: Path) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or [""])[-1]
        pytest.skip(f"no clean root folder for the Dockerfile's steps: {last}")


def make_wheel(stage: Stage, container: Container, source: Path) -> None:
    """Build the wheel on this machine, which has a compiler."""
    source.mkdir()
    copy_context(source)
    wheels = container.path(WHEELS)
    wheels.mkdir()
    for command in stage.commands():
        pip(command.replace(WHEELS, str(wheels)), source)


def fetch_packages(stages: dict[str, Stage], container: Container, source: Path) -> None:
    """Download the packages that the stages install."""
    index = container.path(PACKAGE_INDEX)
    index.mkdir()
    arguments = Container(container.root)
    for stage in (stages["dependencies"], stages[TARGET]):
        for rest in stage.all("ARG"):
            arguments.set(rest)
    torch, pair = (shlex.quote(arguments.variables[name]) for name in ("TORCH", "PAIR"))
    pip(stages["dependencies"].commands()[0], source)
    fetch = f"pip download --dest {index} --only-binary=:all: --python-version 3.11"
    pip(f"{fetch} {torch} --requirement requirements.txt --constraint constraints.txt", source)
    pip(f"{fetch} --no-deps {pair}", source)


def pip(command: str, folder: Path) -> None:
    """Run a command with the interpreter of the tests; skip if it finds no package index."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=folder, capture_output=True, text=True,
        timeout=400, check=False, env=os.environ | {"PATH": path, "PYTHONPATH": ""},
    )  # fmt: skip
    if "Could not find a version" in done.stderr + done.stdout:
        pytest.skip(f"no package index has what the image needs: {done.stderr.strip()}")
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_all_services_run_from_the_image(container: Container, tmp_path: Path) -> None:
    assert container.user == "10001:10001"
    services: list[Service] = []
    try:
        services.append(container.start(tmp_path / "verify", "verify"))
        services.append(container.start(tmp_path / "draft", "draft"))
        addresses = "--verify", services[0].address, "--draft", services[1].address
        services.append(container.start(tmp_path / "orchestrator", "orchestrator", *addresses))
        # The models are converted first, on a read-only root without compiled modules.
        orchestrator = services[-1]
        orchestrator.wait_until_serving(within_seconds=300)
        chosen = "--orchestrator", orchestrator.address
        services.append(container.start(tmp_path / "gateway", "gateway", *chosen))
        for service in services:
            check_rights(service.process.pid)
        with Client(orchestrator.address, timeout_seconds=60) as client:
            options = Options(Strategy.AMUSD, max_tokens=12)
            generation = client.generate(Prompt.chat("Name three colours."), options).wait()
        assert len(generation.tokens) == 12
        assert generation.text
        assert not generation.summary().fallback_reason
        assert httpx.get(f"http://{services[-1].address}/health").status_code == 200
    finally:
        for service in reversed(services):
            service.end()
    assert [service.process.returncode for service in services] == [0, 0, 0, 0]


def check_rights(process: int) -> None:
    """Check that a process has no more privileges than in a pod."""
    status = Path(f"/proc/{process}/status").read_text()
    assert "Uid:\t10001\t10001" in status
    assert "CapEff:\t0000000000000000" in status
    mounts = Path(f"/proc/{process}/mounts").read_text().splitlines()
    options = {line.split()[1]: line.split()[3].split(",") for line in mounts}
    assert "ro" in options["/"]
    assert "rw" in options["/cache"]


def test_the_image_has_no_compiler(container: Container) -> None:
    for name in ("cc", "gcc", "c++", "g++", "make"):
        assert not list(container.root.glob(f"usr/bin/{name}*"))
