"""Folders in the user's cache, written atomically, each with a manifest of its files.

A folder is written under a temporary name and renamed into place under a file lock. So a crash
leaves no partial folder, and two processes never build the same folder twice. This module does not
know what the files mean.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_dir

from amusd.pair.pair_error import CacheError

CACHE_VARIABLE = "AMUSD_CACHE_DIR"
MANIFEST_NAME = "manifest.json"
# Increase this whenever the written files change, so that existing caches are rebuilt.
MANIFEST_VERSION = 1


def cache_root() -> Path:
    """Return the folder of all caches: $AMUSD_CACHE_DIR, else the user's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("amusd"))


def ensure_folder(folder: Path, source: str, write: Callable[[Path], None]) -> Path:
    """Return ``folder``; build it with ``write`` unless it is current.

    ``source`` identifies the input of the folder, for instance by a checksum. A folder with another
    source, another manifest version or a wrong file size is replaced. ``write`` fills an empty
    folder.

    Raises:
        CacheError: the cache cannot be written.
        PairError: from ``write``.
    """
    if is_current(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            # Another process may have built it while this one waited for the lock.
            if not is_current(folder, source):
                _build(folder, source, write)
    except OSError as error:
        raise CacheError(
            f"cannot write the model cache {folder} ({error.strerror or error}): free some space, "
            f"or set {CACHE_VARIABLE} to a writable folder"
        ) from error
    return folder


def is_current(folder: Path, source: str) -> bool:
    """Whether version, source and file sizes match the manifest; reads no other file."""
    manifest = _read_manifest(folder)
    if (manifest.get("version"), manifest.get("source")) != (MANIFEST_VERSION, source):
        return False
    files = manifest.get("files") or {}
    return bool(files) and all(_size(folder / f) == entry["bytes"] for f, entry in files.items())


def damaged_files(folder: Path) -> list[str]:
    """Return the names of files whose SHA-256 differs from the manifest; reads every byte.

    If the manifest is not readable, the result is the manifest itself.
    """
    files = _read_manifest(folder).get("files")
    if files is None:
        return [MANIFEST_NAME]
    return [
        name
        for name, entry in files.items()
        if not (folder / name).is_file() or sha256_of(folder / name) != entry["sha256"]
    ]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, source: str, write: Callable[[Path], None]) -> None:
    for stale in folder.parent.glob(f".{folder.name}-*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    # In the same parent folder, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
    ) as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir()
        write(fresh)
        _write_manifest(fresh, source)
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        fresh.rename(folder)


def _write_manifest(folder: Path, source: str) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"version": MANIFEST_VERSION, "source": source, "files": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
