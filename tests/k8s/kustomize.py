"""The subset of kustomize that k8s/ uses, for machines without kubectl.

A test compares it with kubectl where kubectl is installed. An unknown feature raises an error.
Unlike kustomize, it adds no hash to the names of ConfigMaps.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())

_KNOWN = {
    "apiVersion", "kind", "namespace", "resources", "components", "images", "configMapGenerator",
    "patches",
}  # fmt: skip
_KNOWN_OF_GENERATOR = {"name", "namespace", "behavior", "envs", "literals", "files", "options"}
# Lists whose entries a strategic merge finds by a key; every other list is replaced.
_MERGE_KEYS = {"containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath"}


def render(folder: Path, given: list[Manifest] | None = None) -> list[Manifest]:
    """Return the manifests of a kustomization; a component starts from ``given``."""
    settings = _load(folder / "kustomization.yaml")[0]
    _refuse_unknown(settings, _KNOWN, folder)
    manifests = list(given or ())
    for name in settings.get("resources", ()):
        path = folder / name
        manifests += render(path) if path.is_dir() else _load(path)
    for name in settings.get("components", ()):
        manifests = render(folder / name, manifests)
    for generator in settings.get("configMapGenerator", ()):
        _generate(folder, generator, manifests)
    for patch in settings.get("patches", ()):
        _refuse_unknown(patch, {"path"}, folder)
        for change in _load(folder / patch["path"]):
            target = _find(manifests, change["kind"], change["metadata"]["name"])
            manifests[manifests.index(target)] = _merged(target, change)
    for manifest in manifests:
        if "namespace" in settings and manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = settings["namespace"]
    for image in settings.get("images", ()):
        _set_image(manifests, image)
    return manifests


def containers(manifests: list[Manifest]) -> list[Manifest]:
    """Return the containers of all deployments."""
    deployments = [one for one in manifests if one["kind"] == "Deployment"]
    return [one for each in deployments for one in each["spec"]["template"]["spec"]["containers"]]


def environment(manifests: list[Manifest], container: Manifest) -> dict[str, str]:
    """Return the environment variables of a container."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values |= _find(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
    for entry in container.get("env", ()):
        values[entry["name"]] = entry.get("value", "")
    return values


def _load(path: Path) -> list[Manifest]:
    # The copy separates values that YAML anchors share.
    return [
        copy.deepcopy(one)
        for one in yaml.load_all(path.read_text(), _WithoutAnchors)
        if one is not None
    ]


class _WithoutAnchors(yaml.SafeLoader):
    """Constructs a separate value for each alias."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        self.constructed_objects.pop(node, None)
        return super().construct_object(node, deep=True)


def _refuse_unknown(settings: Manifest, known: set[str], folder: Path) -> None:
    if unknown := settings.keys() - known:
        raise NotImplementedError(f"{folder}: teach tests/k8s/kustomize.py {sorted(unknown)}")


def _generate(folder: Path, generator: Manifest, manifests: list[Manifest]) -> None:
    _refuse_unknown(generator, _KNOWN_OF_GENERATOR, folder)
    data: dict[str, str] = {}
    for name in generator.get("envs", ()):
        lines = (folder / name).read_text().splitlines()
        data |= dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    data |= dict(literal.split("=", 1) for literal in generator.get("literals", ()))
    for file in generator.get("files", ()):
        key, _, name = file.partition("=")
        data[key] = (folder / name).read_text()
    if generator.get("behavior") == "merge":
        _find(manifests, "ConfigMap", generator["name"])["data"] |= data
        return
    metadata: Manifest = {"name": generator["name"]}
    if "namespace" in generator:
        metadata["namespace"] = generator["namespace"]
    if labels := generator.get("options", {}).get("labels"):
        metadata["labels"] = labels
    manifests.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def _find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (one for one in manifests if (one["kind"], one["metadata"]["name"]) == (kind, name))
    return found


def _merged(old: Any, change: Any, key: str = "") -> Any:
    """Return ``old`` with a strategic merge patch applied; null removes an entry."""
    if isinstance(old, dict) and isinstance(change, dict):
        result = dict(old)
        for name, value in change.items():
            if value is None:
                result.pop(name, None)
            else:
                result[name] = _merged(old.get(name), value, name)
        return result
    if isinstance(old, list) and key in _MERGE_KEYS:
        by = _MERGE_KEYS[key]
        changes = {one[by]: one for one in change}
        kept = [_merged(one, changes.pop(one[by], {})) for one in old]
        return [*changes.values(), *kept]
    return change


def _set_image(manifests: list[Manifest], image: Manifest) -> None:
    _refuse_unknown(image, {"name", "newTag"}, ROOT)
    for container in containers(manifests):
        if container["image"].partition(":")[0] == image["name"]:
            container["image"] = f"{image['name']}:{image['newTag']}"
