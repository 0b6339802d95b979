"""Attention of heads that share keys: by Numba for few queries, through ATen for many.

    out = softmax(scale * q @ k^T + mask) @ v

in float32 whatever the dtype. The rows of one head of keys are all the heads that read it, of every new token; keys are
taken in splits and chunks as in latent attention, and chunks that the mask hides are not read.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange

from dsopt.capture import known
from dsopt.kernels.numba.dots import ROWS, rows_dot
from dsopt.kernels.numba.mla_attention import (
    CHUNK,
    GROUP,
    SPLIT,
    add_4_rows,
    add_row,
    added_mask,
    mask_memory,
    merge,
    partial_sums,
    soften,
)
from dsopt.kernels.numba.runtime import DTYPES, flat, inner, kernel, run, unit_stride
from dsopt.kernels.torch.attention import attention as aten
from dsopt.kernels.torch.attention import visible_length
from dsopt.kernels.torch.gemm import is_slow
from dsopt.op import Kernel

# heads that share keys, times new tokens, up to which this kernel takes the call
FEW_ROWS = 32


@inner
def _mask_at(strides, b, kv_head, shared, row):
    """Where the mask of a row begins."""
    return b * strides[0] + (kv_head * shared + row % shared) * strides[1] + row // shared * strides[2]


@inner
def _all_hidden(add, strides, b, kv_head, shared, first, count, begin, end):
    """Whether all these keys are hidden from all these rows."""
    if add.size == 0:
        return False
    for row in range(first, first + count):
        at = _mask_at(strides, b, kv_head, shared, row)
        for t in range(at + begin, at + end):
            if add[t] != -np.inf:
                return False
    return True


@inner
def _attend(item, splits, sizes, queries, k, k_strides, v, v_strides, add, m_strides, partial):
    """Fills partial (sums, maxima, totals) for the rows of one group and the keys of one split."""
    _, kv_heads, shared, tokens, cached, width, value = sizes
    sums, maxima, totals = partial
    rows = shared * tokens
    groups = (rows + GROUP - 1) // GROUP
    index, group, split = item // (groups * splits), item // splits % groups, item % splits
    b, kv_head = index // kv_heads, index % kv_heads
    first = group * GROUP
    count = min(GROUP, rows - first)
    scores = np.zeros(GROUP * CHUNK, np.float32)
    dots = np.empty((count, ROWS), np.float32)
    queries_at = (index * rows + np.arange(first, first + count)) * width
    base = item * GROUP
    last = min(cached, (split + 1) * SPLIT)
    for begin in range(split * SPLIT, last, CHUNK):
        keys = min(CHUNK, last - begin)
        if _all_hidden(add, m_strides, b, kv_head, shared, first, count, begin, begin + keys):
            continue
        k_at = b * k_strides[0] + kv_head * k_strides[1] + begin * k_strides[2]
        v_at = b * v_strides[0] + kv_head * v_strides[1] + begin * v_strides[2]
        for t in range(0, keys, ROWS):
            n = min(ROWS, keys - t)
            rows_dot(k, k_at + t * k_strides[2], k_strides[2], n, queries, queries_at, width, dots)
            for r in range(count):
                for i in range(n):
                    scores[r * CHUNK + t + i] = dots[r, i]
        for r in range(count):
            add_at = _mask_at(m_strides, b, kv_head, shared, first + r) + begin
            before = maxima[base + r]
            best, total = soften(scores, r * CHUNK, keys, add, add_at, before)
            keep = np.float32(math.exp(before - best)) if best > before else np.float32(1)
            maxima[base + r] = best
            totals[base + r] = totals[base + r] * keep + total
            if keep != 1:
                for c in range((base + r) * value, (base + r + 1) * value):
                    sums[c] *= keep
        fours = keys // 4 * 4
        for r in range(0, count, 4):
            to, at, done = (base + r) * value, r * CHUNK, 0
            if count - r >= 4 and fours:
                add_4_rows(sums, to, value, scores, at, CHUNK, v, v_at, v_strides[2], fours, value)
                done = fours
            for i in range(min(4, count - r)):
                left, at = v_at + done * v_strides[2], (r + i) * CHUNK + done
                add_row(sums, to + i * value, scores, at, v, left, v_strides[2], keys - done, value)


@kernel
def _attention(sizes, queries, k, k_strides, v, v_strides, add, m_strides, sinks, out):
    """See the module. queries (batch, kv_heads, tokens, shared, width), scaled; add as of (batch, heads, tokens) by its
    strides, or empty; sinks (heads,) or empty; out (batch, kv_heads, tokens, shared, value) of float32."""
    batch, kv_heads, shared, tokens, cached, _, value = sizes
    splits = (cached + SPLIT - 1) // SPLIT
    groups = (shared * tokens + GROUP - 1) // GROUP
    items = batch * kv_heads * groups * splits
    partial = partial_sums(items, value)
    if sinks.size:
        # a score beside those of the first split's keys, whose value is zero
        for item in range(0, items, splits):
            group, kv_head = item // splits % groups, item // splits // groups % kv_heads
            for r in range(GROUP):
                partial[1][item * GROUP + r] = sinks[kv_head * shared + (group * GROUP + r) % shared]
                partial[2][item * GROUP + r] = 1
    for item in prange(items):
        _attend(item, splits, sizes, queries, k, k_strides, v, v_strides, add, m_strides, partial)
    for row in prange(batch * kv_heads * tokens * shared):
        merge(row, splits, (batch * kv_heads, shared, tokens, cached, value, 0, 0, 0), partial, out)


def few(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Numba kernel for any number of tokens; arguments and result as in `attention_reference`."""
    (batch, heads, tokens, width), (_, kv_heads, cached, value) = q.shape, v.shape
    shared = heads // kv_heads
    if 0 in (batch, tokens, cached, value):
        return torch.zeros((batch, tokens, heads, value), dtype=q.dtype)
    queries = (q.float() * scale).view(batch, kv_heads, shared, tokens, width).transpose(2, 3).contiguous()
    k, v = unit_stride(k), unit_stride(v)
    add, strides = mask_memory(added_mask(mask, tokens, cached, is_causal))
    out = torch.empty((batch, kv_heads, tokens, shared, value))
    sinks = torch.empty(0) if sinks is None else sinks.float().contiguous()
    sizes = (batch, kv_heads, shared, tokens, cached, width, value)
    work = batch * heads * tokens * cached * (width + value)
    memory = flat(k), k.stride()[:3], flat(v), v.stride()[:3], add, strides
    run(work, _attention, sizes, flat(queries), *memory, flat(sinks), flat(out))
    return out.transpose(1, 2).reshape(batch, tokens, heads, value).to(q.dtype).contiguous()


def _through_aten(q, k, v, mask, scale, is_causal, sinks) -> torch.Tensor:
    """ATen's attention over what is visible of the cache, in float32 where bfloat16 is slow."""
    length = visible_length(mask, q.shape[2], k.shape[2], is_causal)
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., :length]
    args = (q, k[:, :, :length], v[:, :, :length])
    if is_slow(q.dtype):
        args = tuple(x.float() for x in args)
    return aten(*args, mask, scale, is_causal, sinks).to(q.dtype)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = q.shape[1] // max(1, k.shape[1]) * q.shape[2]
    variant = few if rows <= FEW_ROWS or k.shape[2] == 0 else _through_aten
    return variant(q, k, v, mask, scale, is_causal, sinks)


def _check(q, k, v, mask, scale, is_causal=False, sinks=None):
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype != q.dtype or x.device != q.device or x.ndim != 4:
            return f"needs q, k and v of 4 dimensions, one dtype and device, got {name} {list(x.shape)} of {x.dtype}"
    (batch, heads, tokens, width), (_, kv_heads, cached, value) = q.shape, v.shape
    for name, x, shape in (
        ("k", k, (batch, kv_heads, cached, width)),
        ("v", v, (batch, kv_heads, cached, value)),
    ):
        if any(known(a != b) for a, b in zip(x.shape, shape)):
            return f"needs {name} of shape {list(shape)}, got {list(x.shape)}"
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or not kv_heads or heads % kv_heads:
        return f"needs a multiple of {kv_heads} heads of queries, got {heads}"
    if sinks is not None and (sinks.ndim != 1 or known(sinks.shape[0] != heads)):
        return f"needs sinks of {heads} floats, got {list(sinks.shape)}"
    if mask is None:
        return None
    if mask.device != q.device or (mask.dtype != torch.bool and not mask.dtype.is_floating_point):
        return f"needs a bool or float mask on {q.device}, got {mask.dtype} on {mask.device}"
    wanted = (batch, heads, tokens, cached)
    if mask.ndim > 4 or any(
        known(a != 1) and known(a != b) for a, b in zip(reversed(mask.shape), reversed(wanted))
    ):
        return f"needs a mask that broadcasts to {list(wanted)}, got {list(mask.shape)}"
    return None


KERNELS = (
    Kernel("attention", "numba", lambda *_: attention, _check, device="cpu", dtypes=DTYPES, priority=10),
)
