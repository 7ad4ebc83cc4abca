"""Faster layers for passes over a few tokens on one CPU thread, in float32.

PyTorch's linear layers take 1.7 times as long over 4 tokens as over one, 2.3 times over 8; here
a pass over up to 8 costs little more than reading the weights once. The kernel (``rows.c``) is
built with this package where there is a C compiler, and used where the processor has AVX-512. Its
results do not depend on the number of rows that share a pass.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_MODULE = "amusd.engine._rows"
_LANES = 16  # the kernel's steps along the input, in values
_MAX_ROWS = 16  # above, PyTorch is as fast or faster
_HUGE_PAGE = 1 << 21  # bytes
_MADV_HUGEPAGE = 14
# Norms that are weight * x / rms(x), and nothing else.
_PLAIN_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})


class Kernels(Protocol):
    """The functions of ``rows.c``; addresses of float32 values, then sizes."""

    def amusd_rows(self, x: int, w: int, y: int, rows: int, n: int, k: int) -> None:
        """Write x w^T."""

    def amusd_rms_norm(self, x: int, weight: int, y: int, rows: int, k: int, eps: float) -> None:
        """Write the norm of each row of x."""


@functools.cache
def kernels() -> Kernels | None:
    """Return the kernels, or None where they were not built or cannot run."""
    found = importlib.util.find_spec(_MODULE)
    if found is None or found.origin is None:
        return None
    library: Any = ctypes.CDLL(found.origin)
    if not library.amusd_rows_supported():
        return None
    addresses, size = [ctypes.c_void_p] * 3, ctypes.c_size_t
    library.amusd_rows.argtypes = [*addresses, size, size, size]
    library.amusd_rows.restype = None
    library.amusd_rms_norm.argtypes = [*addresses, size, size, ctypes.c_float]
    library.amusd_rms_norm.restype = None
    return library  # type: ignore[no-any-return]


class RowsLinear(nn.Linear):
    """A linear layer that runs the kernel where it is the faster one."""

    run: Kernels

    def forward(self, values: Tensor) -> Tensor:
        """Values [..., in] -> [..., out]."""
        num_rows = values.numel() // self.in_features
        if not 0 < num_rows <= _MAX_ROWS:
            return super().forward(values)
        values = values.contiguous()
        output = values.new_empty((*values.shape[:-1], self.out_features))
        self.run.amusd_rows(
            values.data_ptr(),
            self.weight.data_ptr(),
            output.data_ptr(),
            num_rows,
            self.out_features,
            self.in_features,
        )
        return output if self.bias is None else output.add_(self.bias)


class RowsNorm(nn.Module):
    """A root mean square norm (arXiv 1910.07467) as one operation instead of six."""

    def __init__(self, weight: Tensor, eps: float, run: Kernels) -> None:
        """Normalise by ``weight`` [D]."""
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self._eps = eps
        self._run = run

    def forward(self, values: Tensor) -> Tensor:
        """Values [..., D] -> [..., D]."""
        values = values.contiguous()
        output = torch.empty_like(values)
        size = values.shape[-1]
        weight: Any = self.weight
        self._run.amusd_rms_norm(
            values.data_ptr(),
            weight.data_ptr(),
            output.data_ptr(),
            values.numel() // size,
            size,
            self._eps,
        )
        return output


def use_rows_kernels(model: nn.Module) -> int:
    """Let ``model`` use the kernels where they fit; return the number of linear layers that do.

    They fit weights in float32 on CPU that one thread works on, and inputs of a multiple of 16.
    The model is for inference from then on.
    """
    run = kernels()
    if torch.get_num_threads() != 1 or run is None:
        return 0
    fitting = [m for m in model.modules() if isinstance(m, nn.Linear) and _fits(m)]
    if fitting:
        _move_together([module.weight for module in fitting])
        _replace_norms(model, run)
    for module in fitting:
        module.__class__ = RowsLinear
        module.run = run  # type: ignore[assignment]
    return len(fitting)


def _fits(module: nn.Linear) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.dtype is torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.is_contiguous()
        and module.in_features % _LANES == 0
    )


def _move_together(weights: Sequence[Tensor]) -> None:
    """Move weights from the mapped file into memory of their own, in huge pages if possible.

    Reading the pages of a mapped file is a third slower: a pass of the embedded verify model over
    one token takes 62 ms from the file, 49 ms from ordinary memory, 47 ms from huge pages.
    """
    unique = {id(weight): weight for weight in weights}.values()
    sizes = [-(-weight.numel() // _LANES) * _LANES for weight in unique]
    spare = _HUGE_PAGE // 4
    arena = torch.empty(sum(sizes) + spare)
    start = -(-arena.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    offset = (start - arena.data_ptr()) // 4
    # Where the system has no huge pages this fails, and does no harm.
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(4 * sum(sizes)), _MADV_HUGEPAGE
    )
    for weight, size in zip(unique, sizes, strict=True):
        place = arena[offset : offset + weight.numel()].view(weight.shape)
        weight.data = place.copy_(weight.data)
        offset += size


def _replace_norms(model: nn.Module, run: Kernels) -> None:
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            weight: Any = getattr(module, "weight", None)
            if type(module).__name__ in _PLAIN_NORMS and weight.shape[0] % _LANES == 0:
                eps: Any = module.variance_epsilon
                setattr(parent, name, RowsNorm(weight.float(), eps, run))
