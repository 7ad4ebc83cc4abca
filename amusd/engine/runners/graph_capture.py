"""Runs a forward pass of a fixed shape: a direct call, or a captured CUDA graph.

A graph starts all kernels of a forward pass with one call. Python takes longer to start them than
a small model takes to run them. A graph reads and writes the same addresses each time, so all
that changes between passes goes through ``inputs``.

The CUDA part is not tested on a GPU.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
Replay = Callable[[], tuple[Tensor, Tensor]]

_WARM_UP_CALLS = 2  # libraries choose kernels and allocate memory in the first calls


class Capture(Protocol):
    """Makes a function of fixed inputs repeatable."""

    def __call__(self, function: Function, inputs: Tensor) -> Replay:
        """Return a call that runs ``function(inputs)`` on the current content of ``inputs``."""


def direct(function: Function, inputs: Tensor) -> Replay:
    """Call the function each time, as on CPU."""
    return lambda: function(inputs)


class CudaGraphs:
    """Captures functions as CUDA graphs. The graphs share memory, so only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        """Make ``device`` the current one of the calling thread, which is the engine's."""
        torch.cuda.set_device(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function, inputs: Tensor) -> Replay:
        """Warm up on a side stream, which capturing requires, then capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                function(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a service may use the device at the same time.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function(inputs)

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return outputs

        return replay
