"""Rotary position embedding in Triton: one pass over x of any strides and layout of pairs, float32 inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from dsopt.capture import known
from dsopt.op import Kernel

DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
MAX_DIM = 1024
# elements of x that one program rotates
ROTATED = 1024


@triton.jit(do_not_specialize=["rows", "size_1", "size_2"])
def rope_kernel(
    x, cos, sin, out, rows, size_1, size_2, half,
    x_0, x_1, x_2, x_dim, cos_0, cos_1, cos_2, cos_dim, sin_0, sin_1, sin_2, sin_dim,
    SPLIT: tl.constexpr, PAIRS_IN: tl.constexpr, PAIRS_OUT: tl.constexpr,
    BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Some rows of out (rows, 2 * half), a row of x being [i0, i1, i2]. SPLIT: cos and sin differ for a and b."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    i = tl.arange(0, HALF)[None, :]
    inside = (row < rows) & (i < half)
    i2, i1, i0 = row % size_2, row // size_2 % size_1, row // size_2 // size_1
    x += i0 * x_0 + i1 * x_1 + i2 * x_2
    cos += i0 * cos_0 + i1 * cos_1 + i2 * cos_2
    sin += i0 * sin_0 + i1 * sin_1 + i2 * sin_2
    first, second = (2 * i, 2 * i + 1) if PAIRS_IN else (i, i + half)
    a = tl.load(x + first.to(tl.int64) * x_dim, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + second.to(tl.int64) * x_dim, mask=inside, other=0.0).to(tl.float32)
    cos_a = tl.load(cos + i * cos_dim, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + i * sin_dim, mask=inside, other=0.0).to(tl.float32)
    cos_b, sin_b = cos_a, sin_a
    if SPLIT:
        cos_b = tl.load(cos + (i + half) * cos_dim, mask=inside, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + (i + half) * sin_dim, mask=inside, other=0.0).to(tl.float32)
    first, second = (2 * i, 2 * i + 1) if PAIRS_OUT else (i, i + half)
    out += row * (2 * half)
    tl.store(out + first, (a * cos_a - b * sin_a).to(out.dtype.element_ty), mask=inside)
    tl.store(out + second, (b * cos_b + a * sin_b).to(out.dtype.element_ty), mask=inside)


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved_in: bool, interleaved_out: bool
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    half = x.shape[-1] // 2
    x = x[(None,) * (4 - x.ndim)]
    cos, sin = (t.expand(*x.shape[:-1], t.shape[-1]) for t in (cos, sin))
    padded = triton.next_power_of_2(half)
    block, rows = max(1, ROTATED // (2 * padded)), x.shape[:-1].numel()
    with torch.cuda.device_of(x):
        rope_kernel[(triton.cdiv(rows, block),)](
            x, cos, sin, out, rows, *x.shape[1:3], half, *x.stride(), *cos.stride(), *sin.stride(),
            SPLIT=cos.shape[-1] != half, PAIRS_IN=interleaved_in, PAIRS_OUT=interleaved_out,
            BLOCK=block, HALF=padded,
        )  # fmt: skip
    return out


def _check(x, cos, sin, interleaved_in, interleaved_out):
    if not 1 <= x.ndim <= 4:
        return f"needs x of 1 to 4 dimensions, got {x.ndim}"
    dim = x.shape[-1]
    if not known(dim <= MAX_DIM) or not known(dim % 2 == 0):
        return f"needs an even width of at most {MAX_DIM}, got {dim}"
    for name, t in (("cos", cos), ("sin", sin)):
        if t.device != x.device or t.dtype not in (*DTYPES, torch.float64):
            return f"needs {name} of a float dtype on {x.device}, got {t.dtype} on {t.device}"
        wide = not known(t.shape[-1] == dim // 2)
        if t.shape[-1:] != cos.shape[-1:] or (wide and not known(t.shape[-1] == dim)):
            return (
                f"needs cos and sin of width {dim} or {dim // 2}, got {list(cos.shape)} and {list(sin.shape)}"
            )
        sizes = zip(reversed(t.shape[:-1]), reversed(x.shape[:-1]), strict=False)
        if t.ndim > x.ndim or any(known(a != b) and known(a != 1) for a, b in sizes):
            return f"needs {name} that broadcasts to {list(x.shape)}, got {list(t.shape)}"
    return None


def ahead_of_time(tensor: Callable) -> Iterator[tuple]:
    """Queries and keys of V2 and V3 while decoding, in the layouts that transformers asks for."""
    for heads, layout in ((128, (True, False)), (1, (False, False)), (16, (True, True))):
        x = tensor(1, 1, heads, 192)[..., 128:].transpose(1, 2)
        table = tensor(1, 1, 1, 64, dtype=torch.float32)
        yield x, table, table, *layout


KERNELS = (Kernel("rope", "triton", lambda *_: rope, _check, device="cuda", dtypes=DTYPES, priority=30),)
