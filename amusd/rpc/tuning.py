"""Process-wide settings that make messages quicker; set once, when a service starts."""

import gc
import os

_EXPERIMENTS = (
    "-event_engine_client,-event_engine_listener,"
    "-event_engine_for_all_other_endpoints,-event_engine_callback_cq"
)


def tune_grpc() -> None:
    """Let gRPC read sockets on the thread that hands messages to the event loop.

    gRPC's event engine passes each message through threads of a pool first. That doubles the
    wake-ups and adds 0.05 to 0.1 ms a message (``python -m benchmarks.hot_path``). It takes effect
    before the first server or channel of the process is made. A value in the environment wins.
    """
    os.environ.setdefault("GRPC_EXPERIMENTS", _EXPERIMENTS)


def freeze_garbage() -> None:
    """Exempt all objects that exist now from garbage collection.

    A loaded model brings about a million objects, and a full collection over them stops all
    threads for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
