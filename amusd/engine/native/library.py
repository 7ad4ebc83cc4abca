"""Loads the native engine's C functions; ``native.h`` defines them and the structures.

The structures exist twice, here for ctypes and in C. The library is refused if their sizes
differ, because a library of other sources would read memory at wrong places.
"""

import ctypes
import functools
import importlib.util
from ctypes import (
    POINTER,
    Structure,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
    sizeof,
)
from typing import Any

_MODULE = "amusd.engine.native._library"

LANES = 16
PANEL = 48
BLOCK = 32
FLOAT32, BFLOAT16, FLOAT16, INT8 = range(4)
PLAIN, STREAMED, STORED = range(3)


class NativeUnavailableError(Exception):
    """The native engine cannot run here. The message says why, in one line."""


class Matrix(Structure):
    """Weights in panels."""

    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("format", c_int64),
        ("outputs", c_int64),
        ("inputs", c_int64),
    ]


class Layer(Structure):
    """The weights of one layer."""

    _fields_ = [
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
    ]


class Model(Structure):
    """A model: its layers and sizes."""

    _fields_ = [
        ("layers", POINTER(Layer)),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("head", Matrix),
        ("vocabulary", c_int64),
        ("embedding_format", c_int64),
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("num_outputs", c_int64),
        ("eps", c_float),
        ("scale", c_float),
    ]


class Chunk(Structure):
    """The tokens of one sequence in a batch, and the addresses of its KV cache."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("start", c_int64),
        ("num_tokens", c_int64),
        ("num_outputs", c_int64),
    ]


class Token(Structure):
    """One token of a pass; C fills it."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("position", c_int64),
    ]


class Sampling(Structure):
    """How the token of one output is chosen."""

    _fields_ = [
        ("temperature", c_double),
        ("top_p", c_double),
        ("log_min_p", c_double),
        ("seed", c_uint64),
        ("ids", c_void_p),
        ("is_repeated", c_void_p),
        ("offsets", c_void_p),
        ("allowed", c_void_p),
        ("position", c_int64),
        ("top_k", c_int64),
        ("num_edits", c_int64),
        ("num_words", c_int64),
        ("num_logprobs", c_int64),
        ("target", c_int64),
        ("repetition_penalty", c_float),
        ("is_processed", c_int32),
        ("kind", c_int32),
        ("unused", c_int32),
    ]


class SamplingBatch(Structure):
    """The sampling of all outputs of a pass, and the buffers of its results."""

    _fields_ = [
        ("rows", c_void_p),
        ("head_ids", c_void_p),
        ("head_rows", c_void_p),
        ("logits", c_void_p),
        ("scratch", c_void_p),
        ("tokens", c_void_p),
        ("probabilities", c_void_p),
        ("logprob_tokens", c_void_p),
        ("logprobs", c_void_p),
        ("num_ids", c_int64),
        ("head", c_int64),
        ("num_top", c_int64),
        ("group", c_int64),
        ("scratch_size", c_int64),
    ]


class Pass(Structure):
    """The buffers of one forward pass."""

    _fields_ = [
        ("chunks", c_void_p),
        ("ids", c_void_p),
        ("tokens", c_void_p),
        ("output_rows", c_void_p),
        ("hidden", c_void_p),
        ("normed", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("gate_up", c_void_p),
        ("mixed", c_void_p),
        ("scratch", c_void_p),
        ("top_logits", c_void_p),
        ("top_rows", c_void_p),
        ("top_sums", c_void_p),
        ("probabilities", c_void_p),
        ("logits", c_void_p),
        ("sampling", c_void_p),
        ("num_chunks", c_int64),
        ("num_tokens", c_int64),
        ("num_outputs", c_int64),
        ("num_top", c_int64),
        ("scratch_size", c_int64),
    ]


STRUCTURES: tuple[type[Structure], ...] = (
    Matrix,
    Layer,
    Model,
    Chunk,
    Token,
    Sampling,
    SamplingBatch,
    Pass,
)
"""In the order of ``amusd_structure_sizes``."""


def padded(width: int) -> int:
    """Return the width of a buffer's rows, in whole panels."""
    return -(-width // PANEL) * PANEL


@functools.cache
def library() -> Any:
    """Return the C functions.

    Raises:
        NativeUnavailableError: the library is not built, is built from other sources, or the
            processor lacks AVX-512.
    """
    found = importlib.util.find_spec(_MODULE)
    if found is None or found.origin is None:
        raise NativeUnavailableError(
            "it was not built at installation, perhaps without a C compiler"
        )
    try:
        functions: Any = ctypes.CDLL(found.origin)
        if not functions.amusd_native_supported():
            raise NativeUnavailableError("the processor lacks AVX-512")
        _declare(functions)
    except OSError as error:
        raise NativeUnavailableError(f"its library cannot be opened: {error}") from error
    except AttributeError as error:
        raise NativeUnavailableError(f"{_STALE}: {error}") from error
    _check_sizes(functions)
    return functions


def unavailable_reason() -> str | None:
    """Return why the native engine cannot run here; None if it can."""
    try:
        library()
    except NativeUnavailableError as error:
        return str(error)
    return None


_STALE = "its library is built from other sources, build it again"


def _declare(functions: Any) -> None:
    functions.amusd_structure_sizes.argtypes = [POINTER(c_size_t), c_int]
    functions.amusd_structure_sizes.restype = c_int
    functions.amusd_team_open.argtypes = [c_int]
    functions.amusd_team_open.restype = c_void_p
    functions.amusd_team_close.argtypes = [c_void_p]
    functions.amusd_team_close.restype = None
    functions.amusd_forward.argtypes = [c_void_p, c_void_p, c_void_p]
    functions.amusd_forward.restype = c_int
    functions.amusd_pack_int8.argtypes = [c_void_p, c_size_t, c_size_t, c_int, c_void_p]
    functions.amusd_pack_int8.restype = c_int
    functions.amusd_sampling_scratch.argtypes = [c_size_t, c_size_t]
    functions.amusd_sampling_scratch.restype = c_size_t
    functions.amusd_sample.argtypes = [c_void_p, c_size_t]
    functions.amusd_sample.restype = None
    functions.amusd_noise.argtypes = [c_uint64, c_uint64, c_void_p, c_size_t, c_void_p]
    functions.amusd_noise.restype = None


def _check_sizes(functions: Any) -> None:
    """Raise NativeUnavailableError if a structure has another size in C than here."""
    count = len(STRUCTURES)
    sizes = (c_size_t * count)()
    num_known = functions.amusd_structure_sizes(sizes, count)
    if num_known != count:
        raise NativeUnavailableError(f"{_STALE}: it has {num_known} structures, not {count}")
    for structure, size in zip(STRUCTURES, sizes, strict=True):
        if size != sizeof(structure):
            name, expected = structure.__name__, sizeof(structure)
            raise NativeUnavailableError(
                f"{_STALE}: its {name} has {size} bytes instead of {expected}"
            )
