"""Weights in the form of the native engine: panels in one arena, as small as possible.

A forward pass reads panels of 48 outputs in one stream. Weights that bfloat16 or float16 holds
without loss, or that were dequantised from Q8_0 or Q4_1 of GGUF, are stored in that format and
widened to float32 when they are read. A pass reads half or a quarter of the bytes, and the
results stay the same.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amusd.engine.interface import WeightFormat
from amusd.engine.native.library import (
    BFLOAT16,
    BLOCK,
    FLOAT16,
    FLOAT32,
    INT8,
    PANEL,
    Matrix,
    padded,
)

FORMAT_NAMES = ("float32", "bfloat16", "float16", "int8")
"""The names of the formats of ``native.h``, by number."""

_HUGE_PAGE = 1 << 21  # bytes
_MADV_HUGEPAGE = 14
_SLACK = 1 << 16  # bytes after the last weight, which the processor prefetches


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in panels: its bytes and their format."""

    data: Tensor  # [bytes] uint8
    bias: Tensor | None  # [padded outputs] float32
    format: int
    num_outputs: int
    num_inputs: int


def pack(weight: Tensor, bias: Tensor | None, wanted: WeightFormat, functions: Any) -> Packed:
    """Pack ``weight`` [outputs, inputs] into panels, in the format that ``wanted`` asks for."""
    weight = weight.detach()
    num_outputs, num_inputs = weight.shape
    kind, data = FLOAT32, None
    if wanted is WeightFormat.INT8:
        kind, data = INT8, _int8(weight.float(), False, functions)
    elif wanted is WeightFormat.COMPACT:
        kind, data = _smallest(weight, functions)
    if data is None:
        data = _panels(weight.float())
    if bias is not None:
        bias = torch.nn.functional.pad(
            bias.detach().float(), (0, padded(num_outputs) - num_outputs)
        )
    return Packed(data, bias, kind, num_outputs, num_inputs)


def _smallest(weight: Tensor, functions: Any) -> tuple[int, Tensor | None]:
    """Return the smallest lossless format, and the panels in it; None: not packed yet."""
    full = weight.float()
    int8 = _int8(full, True, functions)
    if int8 is not None:
        return INT8, int8
    for kind, dtype in ((BFLOAT16, torch.bfloat16), (FLOAT16, torch.float16)):
        smaller = full.to(dtype)
        if torch.equal(smaller.float(), full):
            return kind, _panels(smaller)
    return FLOAT32, None


def _int8(full: Tensor, exactly: bool, functions: Any) -> Tensor | None:
    num_outputs, num_inputs = full.shape
    if num_inputs % BLOCK:
        return None
    full = full.contiguous()
    num_blocks = padded(num_outputs) // PANEL * num_inputs // BLOCK
    data = torch.empty(num_blocks * (4 * PANEL + BLOCK * PANEL), dtype=torch.uint8)
    same = functions.amusd_pack_int8(
        full.data_ptr(), num_outputs, num_inputs, int(exactly), data.data_ptr()
    )
    return data if same or not exactly else None


def _panels(weight: Tensor) -> Tensor:
    """Return [outputs, inputs] as the bytes of [panels, inputs, 48], padded with zeros."""
    num_outputs, num_inputs = weight.shape
    whole = torch.nn.functional.pad(weight, (0, 0, 0, padded(num_outputs) - num_outputs))
    panels = whole.view(-1, PANEL, num_inputs).transpose(1, 2).contiguous()
    return panels.view(-1).view(torch.uint8)


class Arena:
    """One block of memory for all weights, in huge pages where the system has them.

    Small pages cost a third of the reading speed.
    """

    def __init__(self, parts: Sequence[Packed]) -> None:
        """Copy the parts into the arena, in this order."""
        self.num_bytes = sum(len(part.data) for part in parts)
        self._biases = [part.bias for part in parts]
        sizes = [-(-len(part.data) // 64) * 64 for part in parts]
        memory = torch.empty(sum(sizes) + _HUGE_PAGE + _SLACK, dtype=torch.uint8)
        start = -(-memory.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        # The call fails without harm on a system that has no huge pages.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(sum(sizes)), _MADV_HUGEPAGE
        )
        self._memory = memory
        offset = start - memory.data_ptr()
        self.matrices = []
        for part, size in zip(parts, sizes, strict=True):
            place = memory[offset : offset + len(part.data)]
            place.copy_(part.data)
            bias = 0 if part.bias is None else part.bias.data_ptr()
            shape = (part.format, part.num_outputs, part.num_inputs)
            self.matrices.append(Matrix(place.data_ptr(), bias, *shape))
            offset += size
