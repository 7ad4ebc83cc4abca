"""The manifests of every overlay, rendered once."""

import functools

import pytest

from tests.k8s.kustomize import OVERLAYS, ROOT, Manifest, render


@functools.cache
def _rendered(overlay: str) -> list[Manifest]:
    return render(ROOT / "k8s/overlays" / overlay)


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """Name of each overlay in turn."""
    return str(request.param)


@pytest.fixture
def manifests(overlay: str) -> list[Manifest]:
    """Manifests of the overlay; tests must not modify them."""
    return _rendered(overlay)
