"""Finds the programs that check manifests; a test without its program is skipped."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def find_tool(name: str) -> str:
    """Return the path of a program of ``make check-tools``, or skip the test."""
    folders = (Path(sys.prefix, "check-tools", "bin"), Path(sys.prefix, "bin"))
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    return shutil.which(name) or pytest.skip(f"{name} is not installed: make check-tools")


def run_tool(name: str, *arguments: str) -> None:
    """Run a program of ``make check-tools``, and fail if it reports anything."""
    done = subprocess.run(
        [find_tool(name), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
