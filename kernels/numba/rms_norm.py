"""RMS norm by Numba: a row is read twice, from cache the second time; float32 inside."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from dsopt.capture import known
from dsopt.kernels.numba.runtime import DTYPES, flat, inner, kernel, nothing, run_rows, store, widen
from dsopt.op import Kernel


@inner
def _some(begin, end, x, x_stride, weight, out, hidden, eps):
    for r in range(begin, end):
        row = x[r * x_stride : r * x_stride + hidden]
        to = out[r * hidden : (r + 1) * hidden]
        squares = np.float32(0)
        for j in range(hidden):
            squares += widen(row[j]) * widen(row[j])
        scale = np.float32(1) / np.sqrt(squares / np.float32(hidden) + np.float32(eps))
        if weight.size:
            for j in range(hidden):
                store(to, j, widen(row[j]) * scale * widen(weight[j]))
        else:
            for j in range(hidden):
                store(to, j, widen(row[j]) * scale)


@kernel
def _all(rows, x, x_stride, weight, out, hidden, eps):
    for r in prange(rows):
        _some(r, r + 1, x, x_stride, weight, out, hidden, eps)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as rows x hidden with elements of a row next to each other."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def flat_weight(weight: torch.Tensor | None, dtype: torch.dtype) -> np.ndarray:
    return nothing(dtype) if weight is None else flat(weight.contiguous())


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        rows = rows_of(x)
        operands = (flat(rows), rows.stride(0), flat_weight(weight, x.dtype), flat(out))
        run_rows(4 * x.numel(), _some, _all, rows.shape[0], *operands, x.shape[-1], eps)
    return out


def check_norm(x: torch.Tensor, weight: torch.Tensor | None) -> str | None:
    """Why these kernels do not take these, or None."""
    if x.ndim == 0:
        return "needs at least one dimension"
    if weight is not None and (weight.dtype != x.dtype or weight.device != x.device):
        return f"needs a weight of x's dtype and device, got {weight.dtype} on {weight.device}"
    if weight is not None and (weight.ndim != 1 or known(weight.shape[0] != x.shape[-1])):
        return f"needs a weight as wide as x's rows, got {list(weight.shape)} for {list(x.shape)}"
    return None


def _check(x, weight, eps):
    return check_norm(x, weight)


KERNELS = (
    Kernel("rms_norm", "numba", lambda *_: rms_norm, _check, device="cpu", dtypes=DTYPES, priority=10),
)
