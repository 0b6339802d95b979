"""Latent attention: absorbed by Numba for few new tokens, expanded through ATen for many.

Absorbed, a query of each head meets the latent cache as it is:

    q' = q_nope @ w_uk
    out = (softmax(scale * (q' @ latent^T + q_rope @ k_rope^T) + mask) @ latent) @ w_uv^T

in float32 whatever the dtype. Keys are taken in splits of fixed size and these in chunks, which are widened once for
a group of rows (a row is one head of one new token); chunks that the mask hides are not read, so time
follows the visible part of a static cache. Splits are merged in order: nothing depends on the number of threads.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange

from dsopt.capture import known
from dsopt.kernels.numba.dots import ROWS, rows_dot
from dsopt.kernels.numba.multi_linear import check_weight
from dsopt.kernels.numba.runtime import DTYPES, flat, inner, kernel, nothing, run, store, unit_stride, widen
from dsopt.kernels.torch.gemm import bfloat16_is_slow
from dsopt.kernels.torch.mla_attention import expanded
from dsopt.op import Kernel

_CHUNK = 64
_SPLIT = 256
_GROUP = 16  # rows that share a widened chunk

# The rate of ATen's expanded form beside this kernel's own; see `prefers_expanded`.
EXPANDED_RATE = 1.5

_NDIMS = {"q_nope": 4, "q_rope": 4, "latent": 3, "k_rope": 3, "w_uk": 3, "w_uv": 3}


@inner
def _add_rows(a, at, w, row, step, count, n, out):
    """out[:n] += sum_i a[at + i] * w[row + i * step : ...] for i < count."""
    i = 0
    while i + 8 <= count:
        p = row + i * step
        w0, w1, w2, w3 = w[p : p + n], w[p + step :], w[p + 2 * step :], w[p + 3 * step :]
        w4, w5, w6, w7 = w[p + 4 * step :], w[p + 5 * step :], w[p + 6 * step :], w[p + 7 * step :]
        a0, a1, a2, a3 = a[at + i], a[at + i + 1], a[at + i + 2], a[at + i + 3]
        a4, a5, a6, a7 = a[at + i + 4], a[at + i + 5], a[at + i + 6], a[at + i + 7]
        for c in range(n):
            low = a0 * widen(w0[c]) + a1 * widen(w1[c]) + a2 * widen(w2[c]) + a3 * widen(w3[c])
            high = a4 * widen(w4[c]) + a5 * widen(w5[c]) + a6 * widen(w6[c]) + a7 * widen(w7[c])
            out[c] += low + high
        i += 8
    while i < count:
        w0 = w[row + i * step : row + i * step + n]
        for c in range(n):
            out[c] += a[at + i] * widen(w0[c])
        i += 1


@inner
def _soften(score, added, maximum):
    """Scores of one row's chunk become weights relative to its maximum so far: (new maximum, their sum)."""
    best = maximum
    for t in range(score.size):
        if added.size:
            # a hidden key's score may be anything
            score[t] = added[t] if added[t] == -np.inf else score[t] + added[t]
        best = score[t] if score[t] > best else best
    total = np.float32(0)
    for t in range(score.size):
        score[t] = math.exp(score[t] - best) if best > -np.inf else np.float32(0)
        total += score[t]
    return best, total


@inner
def _hidden(added, added_strides, b, first_token, last_token, begin, end):
    """Whether all these keys are hidden from all these tokens."""
    if added.size == 0:
        return False
    for s in range(first_token, last_token + 1):
        at = b * added_strides[0] + s * added_strides[1]
        for t in range(at + begin, at + end):
            if added[t] > -np.inf or added[t] != added[t]:
                return False
    return True


@kernel
def _absorbed(
    sizes, q_nope, q_nope_strides, q_rope, q_rope_strides, latent, latent_strides, k_rope, k_rope_strides,
    w_uk, w_uk_strides, w_uv, w_uv_strides, added, added_strides, scale, out,
):  # fmt: skip
    """See the module; added is flat float32, (batch, tokens, cached) by its strides, or empty."""
    batch, heads, tokens, cached, rank, nope, rope, value = sizes
    depth, rows = rank + rope, heads * tokens

    queries = np.zeros(batch * rows * depth, np.float32)
    for head in prange(heads):
        scaled = np.empty(nope, np.float32)
        for i in range(batch * tokens):
            b, s = i // tokens, i % tokens
            at = b * q_nope_strides[0] + head * q_nope_strides[1] + s * q_nope_strides[2]
            for d in range(nope):
                scaled[d] = widen(q_nope[at + d]) * scale
            to = (b * rows + s * heads + head) * depth
            w_at = head * w_uk_strides[0]
            _add_rows(scaled, 0, w_uk, w_at, w_uk_strides[1], nope, rank, queries[to : to + rank])
            at = b * q_rope_strides[0] + head * q_rope_strides[1] + s * q_rope_strides[2]
            for d in range(rope):
                queries[to + rank + d] = widen(q_rope[at + d]) * scale

    groups, splits = (rows + _GROUP - 1) // _GROUP, (cached + _SPLIT - 1) // _SPLIT
    sums = np.zeros((batch, groups, splits, _GROUP, rank), np.float32)
    maxima = np.full((batch, groups, splits, _GROUP), -np.inf, np.float32)
    totals = np.zeros((batch, groups, splits, _GROUP), np.float32)
    for item in prange(batch * groups * splits):
        b, group, split = item // (groups * splits), item // splits % groups, item % splits
        first_row = group * _GROUP
        last_row = min(rows, first_row + _GROUP)
        block = np.empty(_CHUNK * depth, np.float32)
        scores = np.empty((_GROUP, _CHUNK), np.float32)
        dots = np.empty((_GROUP, ROWS), np.float32)
        at = (b * rows + np.arange(first_row, last_row)) * depth
        for begin in range(split * _SPLIT, min(cached, (split + 1) * _SPLIT), _CHUNK):
            end = min(cached, (split + 1) * _SPLIT, begin + _CHUNK)
            if _hidden(added, added_strides, b, first_row // heads, (last_row - 1) // heads, begin, end):
                continue
            for t in range(begin, end):
                key = block[(t - begin) * depth : (t - begin + 1) * depth]
                p = b * latent_strides[0] + t * latent_strides[1]
                for c in range(rank):
                    key[c] = widen(latent[p + c])
                p = b * k_rope_strides[0] + t * k_rope_strides[1]
                for c in range(rope):
                    key[rank + c] = widen(k_rope[p + c])
            for t in range(0, end - begin, ROWS):
                count = min(ROWS, end - begin - t)
                rows_dot(block, t * depth, depth, count, queries, at, depth, dots)
                for r in range(last_row - first_row):
                    for i in range(count):
                        scores[r, t + i] = dots[r, i]
            for r in range(last_row - first_row):
                p = b * added_strides[0] + (first_row + r) // heads * added_strides[1]
                add = added[p + begin : p + end] if added.size else added
                before = maxima[b, group, split, r]
                best, total = _soften(scores[r, : end - begin], add, before)
                if best == -np.inf:
                    continue
                keep = math.exp(before - best)
                row = sums[b, group, split, r]
                if keep != 1:
                    for c in range(rank):
                        row[c] *= keep
                maxima[b, group, split, r] = best
                totals[b, group, split, r] = totals[b, group, split, r] * keep + total
                _add_rows(scores[r], 0, block, 0, depth, end - begin, rank, row)

    mixed = np.zeros(batch * rows * rank, np.float32)
    for item in prange(batch * rows):
        b, group, r = item // rows, item % rows // _GROUP, item % rows % _GROUP
        best = np.max(maxima[b, group, :, r]) if splits else np.float32(-np.inf)
        to = mixed[item * rank : (item + 1) * rank]
        total = np.float32(0)
        for split in range(splits):
            if maxima[b, group, split, r] == -np.inf:
                continue
            keep = math.exp(maxima[b, group, split, r] - best)
            total += totals[b, group, split, r] * keep
            for c in range(rank):
                to[c] += sums[b, group, split, r, c] * keep
        for c in range(rank):
            to[c] = to[c] / total if total != 0 else np.float32(0)

    blocks = (value + ROWS - 1) // ROWS
    for item in prange(heads * blocks):
        head, first = item // blocks, item % blocks * ROWS
        count = min(ROWS, value - first)
        dots = np.empty((batch * tokens, ROWS), np.float32)
        # (b, s, head) is row b * rows + s * heads + head
        at = (np.arange(batch * tokens) * heads + head) * rank
        rows_dot(
            w_uv,
            head * w_uv_strides[0] + first * w_uv_strides[1],
            w_uv_strides[1],
            count,
            mixed,
            at,
            rank,
            dots,
        )
        for i in range(batch * tokens):
            for c in range(count):
                store(out, (i * heads + head) * value + first + c, dots[i, c])


def _added(mask: torch.Tensor | None, tokens: int, cached: int, is_causal: bool) -> torch.Tensor | None:
    """What is added to scores, as float32 (batch or 1, tokens or 1, cached); -inf hides a key.

    A finite value that is some dtype's lowest hides too, unless it is all that a query is given: then softmax spreads
    over the keys evenly, as it does in the reference.
    """
    added = None
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)[:, 0]
        if mask.dtype == torch.bool:
            added = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
        else:
            lowest = torch.finfo(torch.float32).min
            hidden = torch.finfo(torch.float16).min if mask.dtype == torch.float16 else -1e30
            # float64's lowest would turn into -inf, which means something else
            added = torch.where(mask == -math.inf, -math.inf, mask.float().clamp(min=lowest))
            hides = (added <= hidden) & (added > hidden).any(-1, keepdim=True)
            added = added.masked_fill(hides, -math.inf)
        added = added.expand(-1, -1, cached)
    if is_causal:
        future = torch.ones(tokens, cached, dtype=torch.bool).triu(1)
        zeros = torch.zeros(1, tokens, cached) if added is None else added
        added = zeros.masked_fill(future, -math.inf)
    return None if added is None else unit_stride(added)


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
    added = _added(mask, tokens, cached, is_causal)
    strides = (0, 0) if added is None else tuple(s * (n > 1) for n, s in zip(added.shape[:2], added.stride()))
    add = nothing(torch.float32) if added is None else flat(added)
    sizes = (batch, heads, tokens, cached, rank, nope, rope, value)
    work = batch * heads * tokens * (rank * (nope + value) + cached * (2 * rank + rope))
    run(work, _absorbed, sizes, *operands, add, strides, np.float32(scale), flat(out))
    return out


def prefers_expanded(tokens: int, rank: int, nope: int, value: int) -> bool:
    """Whether expanding the cache costs less time than attending to it absorbed.

    For each head and cached token, expanding costs rank * (nope + value) multiply-adds once, and saves
    2 * rank - nope - value for each new token.
    """
    saved = 2 * rank - nope - value
    return saved > 0 and tokens * saved * EXPANDED_RATE > rank * (nope + value)


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
) -> torch.Tensor:
    args = (q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask)
    if not prefers_expanded(q_nope.shape[2], latent.shape[2], w_uk.shape[1], w_uv.shape[1]):
        return absorbed(*args, scale, is_causal)
    if q_nope.dtype == torch.bfloat16 and bfloat16_is_slow():
        args = tuple(x.float() if x is not None and x.dtype == torch.bfloat16 else x for x in args)
    return expanded(*args, scale, is_causal).to(q_nope.dtype)


def _check(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal=False):
    tensors = dict(zip(_NDIMS, (q_nope, q_rope, latent, k_rope, w_uk, w_uv)))
    for name, x in tensors.items():
        if x.dtype != q_nope.dtype or x.device != q_nope.device:
            return f"needs one dtype and device, got {q_nope.dtype} q_nope and {x.dtype} {name} on {x.device}"
        if x.ndim != _NDIMS[name]:
            return f"needs {name} of {_NDIMS[name]} dimensions, got {list(x.shape)}"
    for name in ("w_uk", "w_uv"):
        if (reason := check_weight(name, tensors[name], q_nope)) is not None:
            return reason
    if mask is None:
        return None
    if mask.device != q_nope.device:
        return f"needs a mask on {q_nope.device}, got {mask.device}"
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"needs a bool or float mask, got {mask.dtype}"
    if mask.ndim > 4 or (mask.ndim >= 3 and not known(mask.shape[-3] == 1)):
        return f"needs one mask for all heads, got {list(mask.shape)}"
    return None


KERNELS = (
    Kernel(
        "mla_attention", "numba", lambda *_: mla_attention, _check, device="cpu", dtypes=DTYPES, priority=10
    ),
)
