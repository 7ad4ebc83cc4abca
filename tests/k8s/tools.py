"""Finds the programs that check manifests; what lacks one is skipped and says how to get it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def find_tool(name: str) -> str:
    """Return where a program of ``make check-tools`` is, or skip the test."""
    folders = (Path(sys.prefix, "check-tools", "bin"), Path(sys.prefix, "bin"))
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    return shutil.which(name) or pytest.skip(f"{name} is not installed: make check-tools")


def run_tool(name: str, *arguments: str) -> None:
    """Run a program of ``make check-tools``, which has to find nothing."""
    done = subprocess.run(
        [find_tool(name), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
