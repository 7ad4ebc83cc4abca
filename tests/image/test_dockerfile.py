"""The Dockerfile: linters, and rules of this project."""

import re
import tomllib

import pytest

from tests.image.dockerfile import ROOT, copy_context, lineage, read_stages
from tests.k8s.tools import run_tool

TARGETS = ("cpu", "cuda")


def test_hadolint_finds_nothing() -> None:
    run_tool("hadolint", str(ROOT / "Dockerfile"))


def test_checkov_finds_nothing() -> None:
    settings = str(ROOT / "k8s/.checkov.yaml")
    run_tool("checkov", "--config-file", settings, "--file", str(ROOT / "Dockerfile"))


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_without_privileges(target: str) -> None:
    stages = read_stages()
    users = [user for stage in lineage(stages, target) for user in stage.all("USER")]
    assert users[-1] == "10001:10001"
    assert stages[target].instructions[-1] == ("USER", users[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_has_no_sources_and_no_compiler(target: str) -> None:
    for stage in lineage(read_stages(), target):
        assert all("--from=dependencies" in copied for copied in stage.all("COPY"))
        assert not any("apt-get" in command for command in stage.commands())
    assert lineage(read_stages(), target)[0].base.endswith("-slim-bookworm")


def test_wheel_and_images_use_the_same_interpreter() -> None:
    bases = {stage.base for stage in read_stages().values() if stage.base.startswith("python:")}
    assert {re.sub("-slim", "", base) for base in bases} == {"python:${PYTHON}-bookworm"}


def test_every_install_is_pinned() -> None:
    for stage in read_stages().values():
        for command in stage.commands():
            for install in re.findall(r"pip (?:install|wheel) [^&]*", command):
                pinned = ("constraints.txt", "${TORCH}", "${PAIR}", "/wheels/amusd-")
                assert any(one in install for one in pinned), install
    arguments = [one for stage in read_stages().values() for one in stage.all("ARG") if "=" in one]
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, _, value = argument.partition("=")
        assert f"{name} ?= {value}" in makefile  # the tested versions


def test_the_image_has_the_version_of_the_project() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for target in TARGETS:
        settings = (ROOT / "Dockerfile").read_text()
        assert f"--target {target}" in settings
        assert f"-t amusd:{version[1]}-{target} ." in settings


def test_the_build_context_has_only_the_sources_of_the_wheel(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    context = tmp_path_factory.mktemp("context")
    copy_context(context)
    names = {path.name for path in context.iterdir()}
    assert names == {
        "amusd", "draft_service", "verify_service", "orchestrator", "gateway",
        "pyproject.toml", "constraints.txt", "README.md", "LICENSE",
    }  # fmt: skip
    assert not list(context.rglob("*.so"))
    assert not list(context.rglob("__pycache__"))


def test_the_wheel_has_every_package_of_the_build_context() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    included = {name.removesuffix("*") for name in settings["packages"]["find"]["include"]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    folders = {line[1:] for line in ignored if line[:1] == "!" and (ROOT / line[1:]).is_dir()}
    assert (
        folders == included == {path.parent.name for path in ROOT.glob("*/*_main.py")} | {"amusd"}
    )


def test_the_wheel_has_the_files_of_the_page() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["gateway"]
    data = {path for pattern in patterns for path in (ROOT / "gateway").glob(pattern)}
    files = {path for path in (ROOT / "gateway/static").rglob("*") if path.is_file()}
    assert files
    assert files <= data
