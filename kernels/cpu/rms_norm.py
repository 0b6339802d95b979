"""Native RMS norm, alone and behind a residual add: one read of the row from memory, float32 inside.

x, residual (..., hidden) and weight (hidden,) of one dtype, float32 or bfloat16; any strides (rows whose
elements are not next to each other are copied first).
"""

from __future__ import annotations

import torch

from dsopt.capture import known
from dsopt.kernels.cpu.native import _cpu
from dsopt.op import Kernel

DTYPES = frozenset({torch.float32, torch.bfloat16})


def check_norm(x: torch.Tensor, weight: torch.Tensor | None) -> str | None:
    """Why the native norm does not take these, or None."""
    if x.ndim == 0:
        return "needs at least one dimension"
    if weight is not None and weight.dtype != x.dtype:
        return f"needs a weight of x's dtype {x.dtype}, got {weight.dtype}"
    if weight is not None and weight.device != x.device:
        return f"needs a weight on {x.device}, got {weight.device}"
    if weight is not None and (weight.ndim != 1 or known(weight.shape[0] != x.shape[-1])):
        return f"needs a weight as wide as x's rows, got {list(weight.shape)} for {list(x.shape)}"
    return None


def require(name: str, got: torch.Tensor, shape: tuple, dtype: torch.dtype) -> None:
    """Native code trusts its pointers: ValueError for a tensor that it would read beyond or misread."""
    if got.shape != shape or got.dtype != dtype or not got.is_cpu:
        raise ValueError(
            f"{name} must be {list(shape)} of {dtype} on the CPU, "
            f"got {list(got.shape)} of {got.dtype} on {got.device}"
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as rows x hidden with elements of a row next to each other."""
    hidden = x.shape[-1]
    rows = x if x.ndim == 2 else x.reshape(x.numel() // hidden if hidden else 0, hidden)
    return rows if rows.stride(1) == 1 or hidden == 1 else rows.contiguous()


def run_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(normalised, total) with total = x + residual, or None without residual.

    Raises ValueError for operands that are not of one dtype, or of the shapes the module asks for.
    """
    if x.dtype not in DTYPES or not x.is_cpu or x.ndim == 0:
        raise ValueError(f"x must be rows of float32 or bfloat16 on the CPU, got {x.dtype} on {x.device}")
    if residual is not None:
        require("residual", residual, x.shape, x.dtype)
    if weight is not None:
        require("weight", weight, x.shape[-1:], x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    if out.numel() == 0:
        return out, total
    x = _rows(x)
    rows, hidden = x.shape
    if residual is not None:
        residual = _rows(residual)
    if weight is not None and hidden > 1:
        weight = weight.contiguous()
    _cpu.rms_norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        out.data_ptr(),
        0 if total is None else total.data_ptr(),
        rows,
        hidden,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        x.dtype == torch.bfloat16,
    )
    return out, total


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return run_norm(x, None, weight, eps)[0]


def _plan(x, weight, eps):
    _cpu.isa()  # a bad DSOPT_ISA is reported here rather than in the middle of a model
    return _rms_norm


def _check(x, weight, eps):
    return check_norm(x, weight)


KERNELS = (Kernel("rms_norm", "cpu", _plan, _check, device="cpu", dtypes=DTYPES, priority=20),)
