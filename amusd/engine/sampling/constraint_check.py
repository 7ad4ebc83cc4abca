"""Whether a constraint is harmless, found out in a process of its own.

The process starts with the first constraint. It ends with this one, or when it is closed.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import amusd
from amusd.protocol.errors import AmusdError

_START_SECONDS = 60.0
_TRIAL_SECONDS = 20.0  # the process itself ends after 2 s of computing
TOO_COMPLEX = "it takes too much time or memory"


class ConstraintCheck:
    """Tries out grammars one at a time. Any thread may use it."""

    def __init__(self, tokenizer: str, num_ids: int, eos_token_ids: Sequence[int]) -> None:
        """Try out grammars over the ids of a tokenizer, the text of a ``tokenizer.json``."""
        self._description = {
            "tokenizer": tokenizer,
            "num_ids": num_ids,
            "eos_token_ids": list(eos_token_ids),
        }
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize[..., ConstraintCheck] | None = None

    def reason_against(self, grammar: str) -> str:
        """Return why a grammar cannot be used; empty: it can.

        It computes for 2 to 3 seconds at most. On a busy machine it takes at most 20, and at most a
        minute more if the process has to start.

        Raises:
            AmusdError: the process cannot start.
        """
        with self._lock:
            if self._process is None:
                self._start()
            reason = self._ask(json.dumps(grammar), _TRIAL_SECONDS)
            if reason is None:
                self._stop()
                return TOO_COMPLEX
            return reason

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        root = str(Path(amusd.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, "-m", "amusd.engine.sampling.constraint_trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            encoding="utf-8",
        )
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        if self._ask(json.dumps(self._description), _START_SECONDS) is None:
            self._stop()
            raise AmusdError("the process that checks constraints does not start: try again")

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = None

    def _ask(self, line: str, seconds: float) -> str | None:
        """Return the answer to a line; None if the process ends before, or is too slow."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            return None
        finally:
            timer.cancel()
        return str(json.loads(answer)) if answer.endswith("\n") else None


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with contextlib.suppress(OSError):  # what is left in the buffer of a broken pipe
        process.communicate()
