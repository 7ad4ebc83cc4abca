"""Atomic writes of files and folders, and one error for writes that fail."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from amusd.protocol.errors import UnavailableError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write ``path`` atomically: under a temporary name first, then renamed.

    Raises:
        UnavailableError: the write failed; the previous content is unchanged.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.chmod(0o755 if unfinished.is_dir() else 0o644)  # safetensors makes it private
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        _remove(unfinished)
        raise UnavailableError(
            f"cannot write {path} ({error}): free some space or choose another folder, and run "
            "the same command again; all earlier files are kept"
        ) from error


def write_text_whole(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically as ``write_whole`` does."""

    def write(unfinished: Path) -> None:
        unfinished.write_text(text, encoding="utf-8")

    write_whole(path, write)


def _remove(path: Path) -> None:
    # A failing clean-up must not hide the error that is being reported.
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
