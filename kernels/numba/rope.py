"""RoPE by Numba: one pass over each row, straight into the layout asked for."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from dsopt.capture import known
from dsopt.kernels.numba.runtime import DTYPES, flat, kernel, run, store, unit_stride, widen
from dsopt.op import Kernel


@kernel
def _rope(
    x,
    x_strides,
    cos,
    cos_strides,
    sin,
    sin_strides,
    out,
    sizes,
    dim,
    split,
    pairs_in,
    pairs_out,
):
    half = dim // 2
    # from one of a pair to the other, and from one pair to the next
    far_in, next_in = (1, 2) if pairs_in else (half, 1)
    far_out, next_out = (1, 2) if pairs_out else (half, 1)
    second = half if split else 0
    for row in prange(sizes[0] * sizes[1] * sizes[2]):
        i, j, k = row // (sizes[1] * sizes[2]), row // sizes[2] % sizes[1], row % sizes[2]
        at = i * x_strides[0] + j * x_strides[1] + k * x_strides[2]
        c = i * cos_strides[0] + j * cos_strides[1] + k * cos_strides[2]
        s = i * sin_strides[0] + j * sin_strides[1] + k * sin_strides[2]
        for n in range(half):
            a, b = widen(x[at + n * next_in]), widen(x[at + n * next_in + far_in])
            to = row * dim + n * next_out
            store(out, to, a * widen(cos[c + n]) - b * widen(sin[s + n]))
            store(out, to + far_out, b * widen(cos[c + second + n]) + a * widen(sin[s + second + n]))


def _rows(x: torch.Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The memory of x and three strides of its leading dimensions, 0 where there is one row for all."""
    x = unit_stride(x)
    strides = tuple(0 if n == 1 else s for n, s in zip(x.shape[:-1], x.stride()))
    return flat(x), (0,) * (3 - len(strides)) + strides


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved_in: bool, interleaved_out: bool
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        if cos.dtype != sin.dtype:
            cos, sin = cos.float(), sin.float()
        dim, split = x.shape[-1], cos.shape[-1] == x.shape[-1]
        sizes = (1,) * (4 - x.ndim) + tuple(x.shape[:-1])
        operands = (*_rows(x), *_rows(cos), *_rows(sin), flat(out))
        run(4 * x.numel(), _rope, *operands, sizes, dim, split, interleaved_in, interleaved_out)
    return out


def _check(x, cos, sin, interleaved_in, interleaved_out):
    if x.ndim == 0 or not known(x.shape[-1] % 2 == 0):
        return f"needs an even width, got {list(x.shape)}"
    if x.ndim > 4:
        return f"needs at most 4 dimensions, got {list(x.shape)}"
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in DTYPES or table.device != x.device:
            return f"needs {name} of float32 or bfloat16 on {x.device}, got {table.dtype} on {table.device}"
        if table.ndim == 0 or table.ndim > x.ndim:
            return f"needs {name} of at most {x.ndim} dimensions, got {list(table.shape)}"
        if not known(table.shape[-1] == cos.shape[-1]):
            return f"needs tables of one width, got {cos.shape[-1]} and {table.shape[-1]}"
        if not (known(table.shape[-1] == x.shape[-1]) or known(table.shape[-1] * 2 == x.shape[-1])):
            return f"needs {name} as wide as x or half as wide, got {list(table.shape)} for {list(x.shape)}"
    return None


KERNELS = (Kernel("rope", "numba", lambda *_: rope, _check, device="cpu", dtypes=DTYPES, priority=10),)
