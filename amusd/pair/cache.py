"""Folders in the user's cache that are either whole or absent, each with a manifest of its files.

A folder is written under a temporary name and renamed into place while a file lock is held, so a
crash leaves nothing half done and two processes cannot build the same folder twice. What the files
mean is not known here.
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
# Raise this whenever the files that are written change, so that older caches are rebuilt.
MANIFEST_VERSION = 1


def cache_root() -> Path:
    """The folder that holds everything AMUSD caches: $AMUSD_CACHE_DIR, else the user's cache."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("amusd"))


def ensure_folder(folder: Path, source: str, write: Callable[[Path], None]) -> Path:
    """Return `folder`, built by `write` unless it is there already.

    `source` names what the folder is made from (a checksum); a folder made from another source, by
    an older version of this code or with files of a wrong size is replaced. `write` gets an empty
    folder to fill.

    Raises CacheError when the cache cannot be written, and whatever PairError `write` raises.
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
            f"or set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return folder


def is_current(folder: Path, source: str) -> bool:
    """Whether version, source and file sizes are as recorded; reads no file but the manifest."""
    manifest = _read_manifest(folder)
    if (manifest.get("version"), manifest.get("source")) != (MANIFEST_VERSION, source):
        return False
    files = manifest.get("files") or {}
    return bool(files) and all(_size(folder / f) == entry["bytes"] for f, entry in files.items())


def damaged_files(folder: Path) -> list[str]:
    """The names of files whose SHA-256 differs from the manifest's; reads every byte.

    A folder without a readable manifest reports the manifest itself.
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
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, source: str, write: Callable[[Path], None]) -> None:
    for stale in folder.parent.glob(f".{folder.name}-*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    # Beside the target, because a rename is atomic only within one file system.
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
