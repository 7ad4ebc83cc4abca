"""A process that tries out constraints: ``python -m amusd.engine.sampling.constraint_trial``.

A hostile grammar can take minutes, gigabytes or the whole stack of the library that compiles it.
Here it only ends this process. The first line of standard input describes the tokenizer, and each
further one is a grammar as JSON text. The answer to each line is a line of JSON: the reason why it
is refused, or an empty text. The process ends with its input.
"""

import json
import math
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import llguidance
import numpy as np

from amusd.engine.sampling.constraint_grammar import Mask, fill, new_matcher, new_row

COMPILE_STACK_BYTES = 64 << 20
"""Stack of a thread that compiles a grammar in a service."""

_TRIAL_COMPILE_STACK_BYTES = COMPILE_STACK_BYTES // 2
_TRIAL_MASK_STACK_BYTES = 512 << 10  # an engine thread has several MiB
_MAX_MEMORY_BYTES = 512 << 20  # beside the tokenizer
_MAX_CPU_SECONDS = 2  # of one grammar
_MAX_MASK_SECONDS = 0.1
_NUM_STEPS = 16  # tokens of the output that is tried

Result = TypeVar("Result")


def run_with_stack(size_bytes: int, work: Callable[[], Result]) -> Result:
    """Return ``work()``, computed on a thread whose stack has ``size_bytes``."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    with _stack_size:
        previous = threading.stack_size(size_bytes)
        try:
            thread = threading.Thread(target=run, name="constraint")
            thread.start()
        finally:
            threading.stack_size(previous)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


_stack_size = threading.Lock()


def try_out(tokenizer: llguidance.LLTokenizer, grammar: str) -> str:
    """Compile a grammar and begin an output of it; return why it is refused, or empty."""
    matcher = run_with_stack(_TRIAL_COMPILE_STACK_BYTES, lambda: new_matcher(tokenizer, grammar))
    if matcher.is_error():
        return matcher.get_error()
    return run_with_stack(_TRIAL_MASK_STACK_BYTES, lambda: _walk(matcher, tokenizer.vocab_size))


def _walk(matcher: llguidance.LLMatcher, num_ids: int) -> str:
    """Take random allowed tokens; return why a mask fails, or empty."""
    row, draw = new_row(num_ids), random.Random(0)
    for _ in range(_NUM_STEPS):
        started = time.thread_time()
        reason = fill(matcher, row)
        if reason:
            return reason
        if time.thread_time() - started > _MAX_MASK_SECONDS:
            return "it is too complex"
        if not matcher.try_consume_tokens([draw.choice(_allowed(row))]) or matcher.is_stopped():
            break
    return ""


def _allowed(row: Mask) -> list[int]:
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    found: list[int] = np.flatnonzero(bits).tolist()
    return found


def _limit_memory() -> None:
    """Let the process grow by ``_MAX_MEMORY_BYTES``; where the system says how large it is."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        most = size + _MAX_MEMORY_BYTES + COMPILE_STACK_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _allow_time() -> None:
    """Let the process compute for ``_MAX_CPU_SECONDS`` from now on; then the system ends it."""
    most = math.ceil(time.process_time()) + _MAX_CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    """Answer the lines of standard input."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    description = json.loads(sys.stdin.readline())
    tokenizer = llguidance.LLTokenizer(
        description["tokenizer"],
        n_vocab=description["num_ids"],
        eos_token=description["eos_token_ids"],
    )
    _limit_memory()
    os.nice(5)  # the engine thread comes first
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        _allow_time()
        print(json.dumps(try_out(tokenizer, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
