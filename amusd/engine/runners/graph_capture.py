"""How a pass of a fixed shape is run: called as it is, or captured as a CUDA graph and replayed.

A graph starts all kernels of a pass with one call, where Python would take longer to start them
than a small model takes to run them. It reads and writes the same addresses each time, so whatever
changes from pass to pass goes through ``inputs``.

The CUDA part has not run on a GPU yet: where this was written there is none.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
Replay = Callable[[], tuple[Tensor, Tensor]]

_WARM_UP_CALLS = 2  # libraries choose kernels and take memory at the first ones


class Capture(Protocol):
    """Makes something that runs a function over the same tensors again and again."""

    def __call__(self, function: Function, inputs: Tensor) -> Replay:
        """Return what runs ``function(inputs)`` over whatever ``inputs`` holds by then."""


def direct(function: Function, inputs: Tensor) -> Replay:
    """Call the function each time; the way on CPU."""
    return lambda: function(inputs)


class CudaGraphs:
    """Captures functions as CUDA graphs that share their memory, for only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        """Make ``device`` the one that this thread, the engine's, works on."""
        torch.cuda.set_device(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function, inputs: Tensor) -> Replay:
        """Warm up on a stream of its own, as capturing needs it, then capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                function(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a service may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function(inputs)

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return outputs

        return replay
