"""RoPE by Numba: one pass over each row, straight into the layout asked for."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from dsopt.capture import known
from dsopt.kernels.numba.runtime import DTYPES, flat, inner, kernel, run_rows, store, unit_stride, widen
from dsopt.op import Kernel


@inner
def _rotate(x, at, far_in, next_in, cos, c, sin, s, split, out, to, far_out, next_out, half):
    """One row. far: from one of a pair to the other; next: from one pair to the next; all indices unsigned."""
    for n in range(half):
        a, b = widen(x[at + n * next_in]), widen(x[at + n * next_in + far_in])
        store(out, to + n * next_out, a * widen(cos[c + n]) - b * widen(sin[s + n]))
        b = b * widen(cos[c + split + n]) + a * widen(sin[s + split + n])
        store(out, to + n * next_out + far_out, b)


@inner
def _some(
    begin, end, x, x_strides, cos, cos_strides, sin, sin_strides, out, sizes, dim, split, pairs_in, pairs_out
):  # fmt: skip
    half, one, two = np.uint64(dim // 2), np.uint64(1), np.uint64(2)
    split = half if split else np.uint64(0)
    for row in range(begin, end):
        i, j, k = row // (sizes[0] * sizes[1]), row // sizes[1] % sizes[0], row % sizes[1]
        at = np.uint64(i * x_strides[0] + j * x_strides[1] + k * x_strides[2])
        c = np.uint64(i * cos_strides[0] + j * cos_strides[1] + k * cos_strides[2])
        s = np.uint64(i * sin_strides[0] + j * sin_strides[1] + k * sin_strides[2])
        to = np.uint64(row * dim)
        # calls with constants, so that each is a loop over vectors
        if pairs_in and pairs_out:
            _rotate(x, at, one, two, cos, c, sin, s, split, out, to, one, two, half)
        elif pairs_in:
            _rotate(x, at, one, two, cos, c, sin, s, split, out, to, half, one, half)
        elif pairs_out:
            _rotate(x, at, half, one, cos, c, sin, s, split, out, to, one, two, half)
        else:
            _rotate(x, at, half, one, cos, c, sin, s, split, out, to, half, one, half)


@kernel
def _all(rows, x, x_strides, cos, cos_strides, sin, sin_strides, out, sizes, dim, split, pairs_in, pairs_out):
    for r in prange(rows):
        _some(
            r, r + 1, x, x_strides, cos, cos_strides, sin, sin_strides, out, sizes, dim, split, pairs_in, pairs_out
        )  # fmt: skip


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
        sizes = (1, 1, *x.shape[:-1])[-2:]
        operands = (*_rows(x), *_rows(cos), *_rows(sin), flat(out))
        how = (sizes, dim, split, interleaved_in, interleaved_out)
        run_rows(4 * x.numel(), _some, _all, x.numel() // dim, *operands, *how)
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
        if any(known(a != 1) and known(a != b) for a, b in zip(table.shape[-2::-1], x.shape[-2::-1])):
            return f"needs {name} that broadcasts to x, got {list(table.shape)} for {list(x.shape)}"
        if not known(table.shape[-1] == cos.shape[-1]):
            return f"needs tables of one width, got {cos.shape[-1]} and {table.shape[-1]}"
        if not (known(table.shape[-1] == x.shape[-1]) or known(table.shape[-1] * 2 == x.shape[-1])):
            return f"needs {name} as wide as x or half as wide, got {list(table.shape)} for {list(x.shape)}"
    return None


KERNELS = (Kernel("rope", "numba", lambda *_: rope, _check, device="cpu", dtypes=DTYPES, priority=10),)
