"""Residual add and RMS norm by Numba, in one pass over each row; see `rms_norm`."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from dsopt.capture import known
from dsopt.kernels.numba.rms_norm import check_norm, flat_weight, rows_of
from dsopt.kernels.numba.runtime import DTYPES, flat, inner, kernel, run_rows, store, widen
from dsopt.op import Kernel


@inner
def _some(begin, end, x, x_stride, residual, residual_stride, weight, out, total, hidden, eps):
    for r in range(begin, end):
        a = x[r * x_stride : r * x_stride + hidden]
        b = residual[r * residual_stride : r * residual_stride + hidden]
        to = out[r * hidden : (r + 1) * hidden]
        both = total[r * hidden : (r + 1) * hidden]
        for j in range(hidden):
            store(both, j, widen(a[j]) + widen(b[j]))
        squares = np.float32(0)
        for j in range(hidden):
            squares += widen(both[j]) * widen(both[j])
        scale = np.float32(1) / np.sqrt(squares / np.float32(hidden) + np.float32(eps))
        if weight.size:
            for j in range(hidden):
                store(to, j, widen(both[j]) * scale * widen(weight[j]))
        else:
            for j in range(hidden):
                store(to, j, widen(both[j]) * scale)


@kernel
def _all(rows, x, x_stride, residual, residual_stride, weight, out, total, hidden, eps):
    for r in prange(rows):
        _some(r, r + 1, x, x_stride, residual, residual_stride, weight, out, total, hidden, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        a, b = rows_of(x), rows_of(residual)
        inputs = (flat(a), a.stride(0), flat(b), b.stride(0), flat_weight(weight, x.dtype))
        run_rows(5 * x.numel(), _some, _all, a.shape[0], *inputs, flat(out), flat(total), a.shape[1], eps)
    return out, total


def _check(x, residual, weight, eps):
    if residual.dtype != x.dtype or residual.device != x.device:
        return f"needs a residual of x's dtype and device, got {residual.dtype} on {residual.device}"
    if residual.ndim != x.ndim or any(known(a != b) for a, b in zip(residual.shape, x.shape)):
        return f"needs a residual of x's shape {list(x.shape)}, got {list(residual.shape)}"
    return check_norm(x, weight)


KERNELS = (
    Kernel(
        "add_rms_norm", "numba", lambda *_: add_rms_norm, _check, device="cpu", dtypes=DTYPES, priority=10
    ),
)
