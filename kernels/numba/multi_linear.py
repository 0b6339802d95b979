"""Sibling projections in bfloat16: weights streamed once for few tokens, ATen's GEMM for many.

In float32 ATen reads weights as fast as memory gives them; there is nothing to gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange

from dsopt.capture import known
from dsopt.kernels.numba.dots import ROWS, rows_dot
from dsopt.kernels.numba.runtime import flat, inner, kernel, nothing, run, store, widen
from dsopt.kernels.torch import gemm
from dsopt.op import Kernel
from dsopt.ops.quant import refuse_scales

# tokens up to which this kernel is faster than ATen's GEMM
FEW_TOKENS = 32

DTYPES = frozenset({torch.bfloat16})


@inner
def _block(first, x, at, w, w_stride, bias, out, n, k):
    """Outputs first, ..., first + ROWS - 1 of each token."""
    rows = min(ROWS, n - first)
    dots = np.empty((at.size, ROWS), np.float32)
    rows_dot(w, first * w_stride, w_stride, rows, x, at, k, dots)
    for t in range(at.size):
        for i in range(rows):
            b = widen(bias[first + i]) if bias.size else np.float32(0)
            store(out, t * n + first + i, dots[t, i] + b)


@kernel
def _linear(x, at, w, w_stride, bias, out, n, k):
    for block in prange((n + ROWS - 1) // ROWS):
        _block(block * ROWS, x, at, w, w_stride, bias, out, n, k)


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T + bias, x (..., in_features) and w (out_features, in_features) bfloat16; see the module."""
    tokens = x.shape[:-1].numel()
    n, k = w.shape
    if not 0 < tokens <= FEW_TOKENS or n == 0 or k == 0:
        return gemm.linear(x, w, bias)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    b = nothing(x.dtype) if bias is None else flat(bias.contiguous())
    at = np.arange(tokens) * k
    run(tokens * n * k, _linear, flat(x.float().contiguous()), at, flat(w), w.stride(0), b, flat(out), n, k)
    return out


def multi_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    dtype: torch.dtype | None = None,
    *_,
) -> list[torch.Tensor]:
    return [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


def check_weight(name: str, w: torch.Tensor, x: torch.Tensor, shape: Sequence[int]) -> str | None:
    """Why these kernels do not read a weight or bias of x's dtype and this shape where it lies, or None."""
    if w.dtype != x.dtype or w.device != x.device:
        return f"needs {name} of x's dtype and device, got {w.dtype} on {w.device}"
    if w.ndim != len(shape) or any(known(a != b) for a, b in zip(w.shape, shape)):
        return f"needs {name} of shape {list(shape)}, got {list(w.shape)}"
    if w.ndim > 1 and not known(w.stride(-1) == 1) and not known(w.shape[-1] <= 1):
        return f"needs rows of {name} whose elements are neighbours, got strides {list(w.stride())}"
    return None


def _check(x, weights, biases, dtype=None, *scales_and_block):
    if reason := refuse_scales(*scales_and_block[:-1]):
        return reason
    if dtype not in (None, x.dtype):
        return f"computes in x's dtype {x.dtype}, got dtype {dtype}"
    reasons = [
        check_weight(f"weights[{i}]", w, x, (w.shape[0], x.shape[-1]))
        for i, w in enumerate(weights)
        if w.ndim
    ]
    reasons += [
        check_weight(f"biases[{i}]", b, x, w.shape[:1])
        for i, (w, b) in enumerate(zip(weights, biases))
        if b is not None
    ]
    return next(filter(None, reasons), None)


KERNELS = (
    Kernel(
        "multi_linear", "numba", lambda *_: multi_linear, _check, device="cpu", dtypes=DTYPES, priority=10
    ),
)
