"""Weights as the native engine reads them: in panels, in one arena, as small as without loss.

Panels of 48 outputs are read in one stream. Numbers that float16 or bfloat16 hold, or that were
dequantised from GGUF's Q8_0 or Q4_1, are stored as such and widened to float32 while they are read:
a pass takes the time of half or a quarter of the bytes, and the results stay the same.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amusd.engine.interface import WeightFormat
from amusd.engine.native.library import BLOCK, PANEL, Matrix, padded

_PLAIN, _BFLOAT16, _FLOAT16, _INT8 = range(4)
FORMAT_NAMES = ("float32", "bfloat16", "float16", "int8")
"""What the formats of ``native.h`` are called, by their numbers."""

_HUGE_PAGE = 1 << 21  # bytes
_MADV_HUGEPAGE = 14
_SLACK = 1 << 16  # bytes behind the last weight that may be fetched, never used


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in panels, not in its place yet: bytes, and what they are."""

    data: Tensor  # [bytes] uint8
    bias: Tensor | None  # [padded outputs] float32
    format: int
    num_outputs: int
    num_inputs: int


def pack(weight: Tensor, bias: Tensor | None, wanted: WeightFormat, functions: Any) -> Packed:
    """Bring ``weight`` [outputs, inputs] into panels, in the format that ``wanted`` leads to."""
    weight = weight.detach()
    num_outputs, num_inputs = weight.shape
    kind, data = _PLAIN, None
    if wanted is WeightFormat.INT8:
        kind, data = _INT8, _int8(weight.float(), False, functions)
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
    """Return the smallest format that holds the weights without loss, and the panels in it."""
    plain = weight.float()
    packed = _int8(plain, True, functions)
    if packed is not None:
        return _INT8, packed
    for kind, dtype in ((_BFLOAT16, torch.bfloat16), (_FLOAT16, torch.float16)):
        smaller = plain.to(dtype)
        if torch.equal(smaller.float(), plain):
            return kind, _panels(smaller)
    return _PLAIN, None


def _int8(plain: Tensor, exactly: bool, functions: Any) -> Tensor | None:
    num_outputs, num_inputs = plain.shape
    if num_inputs % BLOCK:
        return None
    plain = plain.contiguous()
    num_blocks = padded(num_outputs) // PANEL * num_inputs // BLOCK
    data = torch.empty(num_blocks * (4 * PANEL + BLOCK * PANEL), dtype=torch.uint8)
    same = functions.amusd_pack_int8(
        plain.data_ptr(), num_outputs, num_inputs, int(exactly), data.data_ptr()
    )
    return data if same or not exactly else None


def _panels(weight: Tensor) -> Tensor:
    """Return [outputs, inputs] as the bytes of [panels, inputs, 48], zeros behind the last."""
    num_outputs, num_inputs = weight.shape
    whole = torch.nn.functional.pad(weight, (0, 0, 0, padded(num_outputs) - num_outputs))
    panels = whole.view(-1, PANEL, num_inputs).transpose(1, 2).contiguous()
    return panels.view(-1).view(torch.uint8)


class Arena:
    """One piece of memory for all weights, in huge pages where the system has them.

    Small pages cost a third of the reading speed.
    """

    def __init__(self, parts: Sequence[Packed]) -> None:
        """Copy the parts into the arena, in their order."""
        self.num_bytes = sum(len(part.data) for part in parts)
        self._biases = [part.bias for part in parts]
        sizes = [-(-len(part.data) // 64) * 64 for part in parts]
        memory = torch.empty(sum(sizes) + _HUGE_PAGE + _SLACK, dtype=torch.uint8)
        start = -(-memory.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        # Where the system has no huge pages this fails, and does no harm.
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
