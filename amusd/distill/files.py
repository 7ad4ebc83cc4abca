"""Files and folders that are whole or absent, and one error for a disk that does not take them."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from amusd.protocol.errors import UnavailableError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write ``path`` under another name first, so that a crash never leaves half of it.

    Raises:
        UnavailableError: it cannot be written; what was there before is still there.
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
            "the same command again; nothing that was written before is lost"
        ) from error


def write_text_whole(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, as ``write_whole`` does."""

    def write(unfinished: Path) -> None:
        unfinished.write_text(text, encoding="utf-8")

    write_whole(path, write)


def _remove(path: Path) -> None:
    # The error that is being reported matters more than what cannot be cleaned up.
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
