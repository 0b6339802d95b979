"""Latent attention: absorbed by Numba for few queries, through ATen for many.

Absorbed, a query of each head meets the latent cache as it is:

    q' = q_nope @ w_uk
    out = (softmax(scale * (q' @ latent^T + q_rope @ k_rope^T) + mask) @ latent) @ w_uv^T

in float32 whatever the dtype. Keys are taken in splits of fixed size and these in chunks, which stay in cache for
a group of rows (a row is one head of one new token); chunks that the mask hides are not read, so time
follows the visible part of a static cache. Splits are merged in order: nothing depends on the number of threads.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange

from dsopt.capture import known
from dsopt.kernels.numba.dots import ROWS, U2, U3, rows_dot
from dsopt.kernels.numba.multi_linear import check_weight
from dsopt.kernels.numba.runtime import DTYPES, flat, inner, kernel, nothing, run, store, unit_stride, widen
from dsopt.kernels.torch.gemm import is_slow
from dsopt.kernels.torch.mla_attention import mla_attention as aten
from dsopt.kernels.torch.mla_attention import visible_length
from dsopt.op import Kernel
from dsopt.ops.quant import refuse_scales

CHUNK = 64
SPLIT = 256
GROUP = 16  # rows that share a widened chunk

# heads times new tokens up to which this kernel is faster than widening the cache for ATen's GEMMs
FEW_ROWS = 32

_NDIMS = {"q_nope": 4, "q_rope": 4, "latent": 3, "k_rope": 3, "w_uk": 3, "w_uv": 3}


@inner
def add_row(out, to, a, at, w, row, step, count, n):
    """out[to + c] += sum_i a[at + i] * w[row + i * step + c] for i < count, c < n."""
    for i in range(count):
        first, base, factor = np.uint64(row + i * step), np.uint64(to), a[at + i]
        for c in range(np.uint64(n)):
            out[base + c] += factor * widen(w[first + c])


@inner
def add_4_rows(out, to, out_step, a, at, a_step, w, row, step, count, n):
    """`add_row` for four rows of out and of a, `count` a multiple of four."""
    o0, o_step = np.uint64(to), np.uint64(out_step)
    o1, o2, o3 = o0 + o_step, o0 + o_step * U2, o0 + o_step * U3
    at1, at2, at3 = at + a_step, at + 2 * a_step, at + 3 * a_step
    for i in range(0, count, 4):
        w0, w_step = np.uint64(row + i * step), np.uint64(step)
        w1, w2, w3 = w0 + w_step, w0 + w_step * U2, w0 + w_step * U3
        a0, a1, a2, a3 = a[at + i], a[at + i + 1], a[at + i + 2], a[at + i + 3]
        b0, b1, b2, b3 = a[at1 + i], a[at1 + i + 1], a[at1 + i + 2], a[at1 + i + 3]
        c0, c1, c2, c3 = a[at2 + i], a[at2 + i + 1], a[at2 + i + 2], a[at2 + i + 3]
        d0, d1, d2, d3 = a[at3 + i], a[at3 + i + 1], a[at3 + i + 2], a[at3 + i + 3]
        for c in range(np.uint64(n)):
            p, q, r, s = widen(w[w0 + c]), widen(w[w1 + c]), widen(w[w2 + c]), widen(w[w3 + c])
            out[o0 + c] += a0 * p + a1 * q + a2 * r + a3 * s
            out[o1 + c] += b0 * p + b1 * q + b2 * r + b3 * s
            out[o2 + c] += c0 * p + c1 * q + c2 * r + c3 * s
            out[o3 + c] += d0 * p + d1 * q + d2 * r + d3 * s


@inner
def _absorb(head, sizes, q_nope, q_strides, w_uk, w_strides, scale, absorbed):
    """absorbed[b, s, head] = scale * q_nope[b, head, s] @ w_uk[head]"""
    batch, heads, tokens, _, rank, nope, _, _ = sizes
    scaled = np.empty(nope, np.float32)
    for i in range(batch * tokens):
        at = i // tokens * q_strides[0] + head * q_strides[1] + i % tokens * q_strides[2]
        for d in range(nope):
            scaled[d] = widen(q_nope[at + d]) * scale
        to = (i * heads + head) * rank
        add_row(absorbed, to, scaled, 0, w_uk, head * w_strides[0], w_strides[1], nope, rank)


@inner
def _rotary(sizes, q_rope, strides, scale):
    """scale * q_rope as float32 (batch, tokens, heads, rope), flat."""
    batch, heads, tokens, _, _, _, rope, _ = sizes
    out = np.empty(batch * tokens * heads * rope, np.float32)
    for row in range(batch * tokens * heads):
        i, head = row // heads, row % heads
        at = i // tokens * strides[0] + head * strides[1] + i % tokens * strides[2]
        for d in range(rope):
            out[row * rope + d] = widen(q_rope[at + d]) * scale
    return out


@inner
def _all_hidden(added, strides, b, first_token, last_token, begin, end):
    """Whether all these keys are hidden from all these tokens."""
    if added.size == 0:
        return False
    for s in range(first_token, last_token + 1):
        at = b * strides[0] + s * strides[1]
        for t in range(at + begin, at + end):
            if added[t] != -np.inf:
                return False
    return True


@inner
def soften(scores, at, count, added, add_at, maximum):
    """Scores of one row's chunk become weights relative to its maximum so far: (new maximum, their sum)."""
    best, total = maximum, np.float32(0)
    for t in range(count):
        if added.size:
            add = added[add_at + t]
            # a hidden key's score may be anything
            scores[at + t] = add if add == -np.inf else scores[at + t] + add
        best = scores[at + t] if scores[at + t] > best else best
    for t in range(count):
        scores[at + t] = math.exp(scores[at + t] - best) if best > -np.inf else np.float32(0)
        total += scores[at + t]
    return best, total


@inner
def _attend(
    item, splits, sizes, absorbed, rotary, latent, l_strides, k_rope, k_strides, added, m_strides, partial
):
    """Fills partial (sums, maxima, totals) for the rows of one group and the keys of one split."""
    _, heads, tokens, cached, rank, _, rope, _ = sizes
    sums, maxima, totals = partial
    rows = heads * tokens
    groups = (rows + GROUP - 1) // GROUP
    b, group, split = item // (groups * splits), item // splits % groups, item % splits
    first = group * GROUP
    count = min(GROUP, rows - first)
    scores = np.zeros(GROUP * CHUNK, np.float32)
    dots, rope_dots = np.empty((count, ROWS), np.float32), np.empty((count, ROWS), np.float32)
    row = b * rows + np.arange(first, first + count)
    absorbed_at, rotary_at = row * rank, row * rope
    base = item * GROUP
    last = min(cached, (split + 1) * SPLIT)
    for begin in range(split * SPLIT, last, CHUNK):
        keys = min(CHUNK, last - begin)
        if _all_hidden(
            added, m_strides, b, first // heads, (first + count - 1) // heads, begin, begin + keys
        ):
            continue
        latent_at = b * l_strides[0] + begin * l_strides[1]
        k_at = b * k_strides[0] + begin * k_strides[1]
        for t in range(0, keys, ROWS):
            n = min(ROWS, keys - t)
            rows_dot(latent, latent_at + t * l_strides[1], l_strides[1], n, absorbed, absorbed_at, rank, dots)
            rows_dot(k_rope, k_at + t * k_strides[1], k_strides[1], n, rotary, rotary_at, rope, rope_dots)
            for r in range(count):
                for i in range(n):
                    scores[r * CHUNK + t + i] = dots[r, i] + rope_dots[r, i]
        for r in range(count):
            add_at = b * m_strides[0] + (first + r) // heads * m_strides[1] + begin
            before = maxima[base + r]
            best, total = soften(scores, r * CHUNK, keys, added, add_at, before)
            keep = np.float32(math.exp(before - best)) if best > before else np.float32(1)
            maxima[base + r] = best
            totals[base + r] = totals[base + r] * keep + total
            if keep != 1:
                for c in range((base + r) * rank, (base + r + 1) * rank):
                    sums[c] *= keep
        fours = keys // 4 * 4
        for r in range(0, count, 4):
            to, at = (base + r) * rank, r * CHUNK
            if count - r >= 4 and fours:
                add_4_rows(sums, to, rank, scores, at, CHUNK, latent, latent_at, l_strides[1], fours, rank)
                done = fours
            else:
                done = 0
            for i in range(min(4, count - r)):
                left = latent_at + done * l_strides[1]
                at = (r + i) * CHUNK + done
                add_row(sums, to + i * rank, scores, at, latent, left, l_strides[1], keys - done, rank)


@inner
def merge(row, splits, sizes, partial, mixed):
    """mixed[row] = the latents' mean under one row's weights, from its splits in their order."""
    _, heads, tokens, _, rank, _, _, _ = sizes
    sums, maxima, totals = partial
    rows = heads * tokens
    groups = (rows + GROUP - 1) // GROUP
    b, group, r = row // rows, row % rows // GROUP, row % rows % GROUP
    base = (b * groups + group) * splits
    best, total = np.float32(-np.inf), np.float32(0)
    for split in range(splits):
        best = max(best, maxima[(base + split) * GROUP + r])
    for c in range(row * rank, (row + 1) * rank):
        mixed[c] = 0
    for split in range(splits):
        at = (base + split) * GROUP + r
        if maxima[at] > -np.inf:
            keep = np.float32(math.exp(maxima[at] - best))
            total += totals[at] * keep
            for c in range(rank):
                mixed[row * rank + c] += sums[at * rank + c] * keep
    for c in range(row * rank, (row + 1) * rank):
        mixed[c] = mixed[c] / total if total != 0 else np.float32(0)


@inner
def _project(head, sizes, mixed, w_uv, strides, out):
    """out[b, s, head] = w_uv[head] @ mixed[b, s, head]"""
    batch, heads, tokens, _, rank, _, _, value = sizes
    dots = np.empty((batch * tokens, ROWS), np.float32)
    at = (np.arange(batch * tokens) * heads + head) * rank
    for first in range(0, value, ROWS):
        count = min(ROWS, value - first)
        rows_dot(w_uv, head * strides[0] + first * strides[1], strides[1], count, mixed, at, rank, dots)
        for i in range(batch * tokens):
            for c in range(count):
                store(out, (i * heads + head) * value + first + c, dots[i, c])


@inner
def partial_sums(items, rank):
    """Sums, maxima and totals of so many splits of groups, at first of no key."""
    sums, totals = np.zeros(items * GROUP * rank, np.float32), np.zeros(items * GROUP, np.float32)
    return sums, np.full(items * GROUP, -np.inf, np.float32), totals


@kernel
def _absorbed(
    sizes, q_nope, q_strides, q_rope, r_strides, latent, l_strides, k_rope, k_strides,
    w_uk, uk_strides, w_uv, uv_strides, added, m_strides, scale, out, absorbed, mixed,
):  # fmt: skip
    """See the module. added (batch, tokens, cached) by its strides, or empty; absorbed, all zeros, and mixed
    (batch, tokens, heads, rank) are for its own use."""
    for head in prange(sizes[1]):
        _absorb(head, sizes, q_nope, q_strides, w_uk, uk_strides, scale, absorbed)
    rotary = _rotary(sizes, q_rope, r_strides, scale)
    splits = (sizes[3] + SPLIT - 1) // SPLIT
    items = sizes[0] * ((sizes[1] * sizes[2] + GROUP - 1) // GROUP) * splits
    partial = partial_sums(items, sizes[4])
    for item in prange(items):
        _attend(
            item,
            splits,
            sizes,
            absorbed,
            rotary,
            latent,
            l_strides,
            k_rope,
            k_strides,
            added,
            m_strides,
            partial,
        )
    for row in prange(sizes[0] * sizes[1] * sizes[2]):
        merge(row, splits, sizes, partial, mixed)
    for head in prange(sizes[1]):
        _project(head, sizes, mixed, w_uv, uv_strides, out)


def added_mask(mask: torch.Tensor | None, tokens: int, cached: int, is_causal: bool) -> torch.Tensor | None:
    """What is added to scores, as float32 (batch or 1, heads or 1, tokens or 1, cached); -inf hides a key.

    A finite value that is some dtype's lowest hides too, unless it is all that a query is given: then softmax spreads
    over the keys evenly, as it does in the reference.
    """
    added = None
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if mask.dtype == torch.bool:
            added = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
        else:
            lowest = torch.finfo(torch.float32).min
            hidden = torch.finfo(torch.float16).min if mask.dtype == torch.float16 else -1e30
            # float64's lowest would turn into -inf, which means something else
            added = torch.where(mask == -math.inf, -math.inf, mask.float().clamp(min=lowest))
            hides = (added <= hidden) & (added > hidden).any(-1, keepdim=True)
            added = added.masked_fill(hides, -math.inf)
        added = added.expand(-1, -1, -1, cached)
    if is_causal:
        future = torch.ones(tokens, cached, dtype=torch.bool).triu(1)
        zeros = torch.zeros(1, 1, tokens, cached) if added is None else added
        added = zeros.masked_fill(future, -math.inf)
    return None if added is None else unit_stride(added)


def mask_memory(mask: torch.Tensor | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """What `added_mask` made, flat, and its strides as of (batch, heads, tokens); an empty array for None."""
    if mask is None:
        return nothing(torch.float32), (0, 0, 0)
    return flat(mask), tuple(s * (n > 1) for n, s in zip(mask.shape[:3], mask.stride()))


def absorbed(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    """The Numba kernel for any number of tokens; arguments and result as in `mla_attention_reference`."""
    batch, heads, tokens, nope = q_nope.shape
    _, cached, rank = latent.shape
    rope, value = q_rope.shape[3], w_uv.shape[1]
    out = torch.empty((batch, tokens, heads, value), dtype=q_nope.dtype)
    if out.numel() == 0:
        return out
    operands = []
    for x in (q_nope, q_rope, latent, k_rope, w_uk, w_uv):
        x = unit_stride(x)
        operands += [flat(x), x.stride()[:-1]]
    add, (by_batch, _, by_token) = mask_memory(added_mask(mask, tokens, cached, is_causal))
    sizes = (batch, heads, tokens, cached, rank, nope, rope, value)
    work = batch * heads * tokens * (rank * (nope + value) + cached * (2 * rank + rope))
    memory = np.zeros((2, batch * tokens * heads * rank), np.float32)
    run(work, _absorbed, sizes, *operands, add, (by_batch, by_token), np.float32(scale), flat(out), *memory)
    return out


def _through_aten(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal) -> torch.Tensor:
    """ATen's GEMMs over what is visible of the cache, in float32 where bfloat16 is slow."""
    dtype, cached = q_nope.dtype, latent.shape[1]
    length = visible_length(mask, q_nope.shape[2], cached, is_causal)
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., :length]
    args = (q_nope, q_rope, latent[:, :length], k_rope[:, :length], w_uk, w_uv)
    if is_slow(dtype):
        args = tuple(x.float() for x in args)
    return aten(*args, mask, scale, is_causal).to(dtype)


def mla_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    *_,
) -> torch.Tensor:
    few = q_nope.shape[1] * q_nope.shape[2] <= FEW_ROWS or latent.shape[1] == 0
    return (absorbed if few else _through_aten)(
        q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal
    )


def _check(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal=False, *scales_and_block):
    if reason := refuse_scales(*scales_and_block[:-1]):
        return reason
    tensors = dict(zip(_NDIMS, (q_nope, q_rope, latent, k_rope, w_uk, w_uv)))
    for name, x in tensors.items():
        if x.dtype != q_nope.dtype or x.device != q_nope.device:
            return f"needs one dtype and device, got {q_nope.dtype} q_nope and {x.dtype} {name} on {x.device}"
        if x.ndim != _NDIMS[name]:
            return f"needs {name} of {_NDIMS[name]} dimensions, got {list(x.shape)}"
    (batch, heads, tokens, nope), (_, cached, rank) = q_nope.shape, latent.shape
    rope, value = q_rope.shape[3], w_uv.shape[1]
    shapes = {"q_rope": (batch, heads, tokens, rope), "k_rope": (batch, cached, rope)}
    shapes |= {"latent": (batch, cached, rank)}
    for name, shape in shapes.items():
        if any(known(a != b) for a, b in zip(tensors[name].shape, shape)):
            return f"needs {name} of shape {list(shape)}, got {list(tensors[name].shape)}"
    reason = check_weight("w_uk", w_uk, q_nope, (heads, nope, rank))
    if (reason := reason or check_weight("w_uv", w_uv, q_nope, (heads, value, rank))) is not None:
        return reason
    if mask is None:
        return None
    if mask.device != q_nope.device:
        return f"needs a mask on {q_nope.device}, got {mask.device}"
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"needs a bool or float mask, got {mask.dtype}"
    if mask.ndim > 4 or (mask.ndim >= 3 and not known(mask.shape[-3] == 1)):
        return f"needs one mask for all heads, got {list(mask.shape)}"
    wanted = (batch, 1, tokens, cached)
    if any(known(a != 1) and known(a != b) for a, b in zip(reversed(mask.shape), reversed(wanted))):
        return f"needs a mask that broadcasts to {list(wanted)}, got {list(mask.shape)}"
    return None


KERNELS = (
    Kernel(
        "mla_attention", "numba", lambda *_: mla_attention, _check, device="cpu", dtypes=DTYPES, priority=10
    ),
)
