"""The native engine's C functions, as ctypes sees them; ``native.h`` says what they do."""

import ctypes
import functools
import importlib.util
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

_MODULE = "amusd.engine.native._library"

LANES = 16
PANEL = 48
BLOCK = 32


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
        ("norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("head", Matrix),
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


class Pass(Structure):
    """The buffers of one pass."""

    _fields_ = [
        ("tokens", c_void_p),
        ("hidden", c_void_p),
        ("normed", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("gate_up", c_void_p),
        ("mixed", c_void_p),
        ("scratch", c_void_p),
        ("best", c_void_p),
        ("ids", c_void_p),
        ("logits", c_void_p),
        ("wanted", c_void_p),
        ("num_tokens", c_int64),
        ("num_wanted", c_int64),
        ("scratch_size", c_int64),
    ]


def padded(width: int) -> int:
    """Return the width of a buffer's rows, whole panels."""
    return -(-width // PANEL) * PANEL


@functools.cache
def library() -> Any | None:
    """Return the C functions, or None where they were not built or the processor lacks AVX-512."""
    found = importlib.util.find_spec(_MODULE)
    if found is None or found.origin is None:
        return None
    functions: Any = ctypes.CDLL(found.origin)
    if not functions.amusd_native_supported():
        return None
    functions.amusd_team_open.argtypes = [c_int]
    functions.amusd_team_open.restype = c_void_p
    functions.amusd_team_close.argtypes = [c_void_p]
    functions.amusd_team_close.restype = None
    functions.amusd_forward.argtypes = [c_void_p, POINTER(Model), POINTER(Pass)]
    functions.amusd_forward.restype = None
    functions.amusd_pack_int8.argtypes = [c_void_p, c_size_t, c_size_t, c_int, c_void_p]
    functions.amusd_pack_int8.restype = c_int
    return functions
