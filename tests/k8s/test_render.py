"""Every overlay renders, and Kubernetes and checkov accept it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.kustomize import OVERLAYS, ROOT, Manifest, render
from tests.k8s.tools import run_tool

validator = pytest.importorskip("kubernetes_validate.utils", reason="not installed: make setup")
# The three newest versions that the validator knows.
VERSIONS = list(dict.fromkeys(map(validator.major_minor, validator.all_versions())))[-3:]
# Custom resources, which the validator does not know.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}


def identity(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def test_kubectl_renders_the_same(overlay: str, manifests: list[Manifest]) -> None:
    kubectl = shutil.which("kubectl") or pytest.skip("kubectl is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(ROOT / "k8s/overlays" / overlay)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    without_hash = re.sub(
        r"(amusd-(draft|verify|orchestrator|gateway))-[a-z0-9]{10}\b", r"\1", done.stdout
    )
    theirs = sorted(yaml.safe_load_all(without_hash), key=identity)
    assert sorted(manifests, key=identity) == theirs


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_it(version: str, manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            validator.validate(manifest, version, strict=True)


def test_no_two_resources_share_a_name(manifests: list[Manifest]) -> None:
    names = [identity(one) for one in manifests]
    assert len(names) == len(set(names))


def test_checkov_finds_nothing(tmp_path: Path) -> None:
    for overlay in OVERLAYS:
        manifests = render(ROOT / "k8s/overlays" / overlay)
        (tmp_path / f"{overlay}.yaml").write_text(yaml.safe_dump_all(manifests))
    settings = str(ROOT / "k8s/.checkov.yaml")
    run_tool("checkov", "--config-file", settings, "--directory", str(tmp_path))
