"""Native RMS norm, alone and behind a residual add: one read of the row from memory, float32 inside.

x, residual (..., hidden) and weight (hidden,) of one dtype, float32, bfloat16 or float16; any strides (rows whose
elements are not next to each other are copied first).
"""

from __future__ import annotations

import torch

from dsopt.capture import known
from dsopt.kernels.cpu.native import DTYPES, NATIVE, _cpu, empty_like, plan, require, rows
from dsopt.op import Kernel


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


def run_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(normalised, total) with total = x + residual, or None without residual.

    Raises ValueError for operands that are not of one dtype, or of the shapes the module asks for.
    """
    if x.dtype not in DTYPES or not x.is_cpu or x.ndim == 0:
        raise ValueError(
            f"x must be rows of float32, bfloat16 or float16 on the CPU, got {x.dtype} on {x.device}"
        )
    if residual is not None:
        require("residual", residual, x.shape, x.dtype)
    if weight is not None:
        require("weight", weight, x.shape[-1:], x.dtype)
    out, total = empty_like(x), None if residual is None else empty_like(x)
    count, hidden = x.numel(), x.shape[-1]
    if not count:
        return out, total
    x, x_stride = rows(x)
    residual, residual_stride = (None, 0) if residual is None else rows(residual)
    if weight is not None and hidden > 1:
        weight = weight.contiguous()
    _cpu.rms_norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        out.data_ptr(),
        0 if total is None else total.data_ptr(),
        count // hidden,
        hidden,
        x_stride,
        residual_stride,
        eps,
        NATIVE[x.dtype],
    )
    return out, total


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return run_norm(x, None, weight, eps)[0]


def _check(x, weight, eps):
    return check_norm(x, weight)


KERNELS = (
    Kernel(
        "rms_norm", "cpu", plan(_rms_norm), _check, device="cpu", dtypes=DTYPES, priority=20, records=True
    ),
)
