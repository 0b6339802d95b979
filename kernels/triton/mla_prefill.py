"""Latent attention for many new tokens: keys and values of some heads are made from the latent, then attended to.

k[h] = latent @ w_uk[h]^T;  v[h] = latent @ w_uv[h]^T
out  = softmax(scale * (q_nope @ k^T + q_rope @ k_rope^T) + mask) @ v             blocks of queries, float32 inside

k_rope stays one for all heads. Heads are taken in groups, so that keys and values need little memory, and keys that
the mask hides from every query are neither made nor read: prefill into a static cache costs what it holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsopt.gpu import Capability
from dsopt.kernels.triton.masking import NONE, Mask, hide, soften

# expanded keys and values of one group of heads are kept below this
GROUP_BYTES = 256 << 20
# the widest parts of a head whose tiles fit
MAX_DIM, MAX_ROPE = 256, 64


class Tile(NamedTuple):
    """Queries and keys of one step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Tiles of attention for heads of up to 128 channels and wider: where 227 KB of shared memory are there, and elsewhere
# (84 KB). None spills under Triton 3.6 where it is used.
ROOMY, USUAL = (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)), (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2))
FLOAT32 = Tile(32, 16, 4, 1)
# tokens, outputs, depth, warps and stages of one step of the expansion, by bytes an element
EXPAND = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 8, 2)}


@triton.jit(do_not_specialize=["cached"])
def expand_kernel(
    latent, w, bounds, out, heads, cached, rank, width,
    latent_batch, latent_token, latent_dim, w_head, w_row, w_dim, bounds_batch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (batch, heads, cached, width) = latent @ w[head].T; tokens outside bounds[batch] = (first, end) are left.

    bounds: (batch, 2) or None.
    """
    columns = tl.cdiv(width, BLOCK_N)
    start = tl.program_id(0) // columns * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if bounds is not None:
        first = tl.load(bounds + batch * bounds_batch)
        end = tl.load(bounds + batch * bounds_batch + 1)
        if (start >= end) | (start + BLOCK_M <= first):
            return
    token = start + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    present, inside = token < cached, n < width
    latent += batch * latent_batch + token.to(tl.int64)[:, None] * latent_token + k[None, :] * latent_dim
    w += head * w_head + n.to(tl.int64)[None, :] * w_row + k.to(tl.int64)[:, None] * w_dim
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for depth in range(0, rank, BLOCK_K):
        left = k < rank - depth
        a = tl.load(latent, mask=present[:, None] & left[None, :], other=0.0)
        b = tl.load(w, mask=left[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        latent += BLOCK_K * latent_dim
        w += BLOCK_K * w_dim
    at = (batch * heads + head) * cached * width + token.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["new", "cached"])
def attend_kernel(
    q_nope, q_rope, k_nope, k_rope, v, mask, ranges, out,
    heads, new, cached, nope, rope, width, scale,
    q_nope_batch, q_nope_head, q_nope_token, q_nope_dim, q_rope_batch, q_rope_head, q_rope_token, q_rope_dim,
    k_rope_batch, k_rope_token, k_rope_dim,
    mask_batch, mask_query, mask_key, ranges_batch, ranges_query,
    out_batch, out_token, out_head,
    KIND: tl.constexpr, IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[batch, token, head] = softmax over keys, times v, for a block of tokens of one head.

    k_nope (batch, heads, cached, nope), v (batch, heads, cached, width), contiguous.
    """
    # under a causal mask the last block has most to do: it goes first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first = block * BLOCK_M
    # tokens left over read what the last one does, and are not stored
    step = tl.minimum(tl.arange(0, BLOCK_M), new - 1 - first)
    d, e = tl.arange(0, NOPE), tl.arange(0, WIDTH)
    straight, inside = d < nope, e < width
    q_nope += batch * q_nope_batch + head * q_nope_head + first.to(tl.int64) * q_nope_token
    q = tl.load(
        q_nope + (step[:, None] * q_nope_token + d[None, :] * q_nope_dim), mask=straight[None, :], other=0.0
    )
    if ROPE > 0:
        r = tl.arange(0, ROPE)
        turns = r < rope
        q_rope += batch * q_rope_batch + head * q_rope_head + first.to(tl.int64) * q_rope_token
        q_turned = tl.load(
            q_rope + (step[:, None] * q_rope_token + r[None, :] * q_rope_dim), mask=turns[None, :], other=0.0
        )
        k_rope += batch * k_rope_batch

    begin, end = 0, cached
    if KIND != 0:
        visible = ranges + batch * ranges_batch + (first + step).to(tl.int64) * ranges_query
        begin = tl.min(tl.load(visible), 0)
        end = tl.max(tl.load(visible + 1), 0)
        mask += batch * mask_batch + first.to(tl.int64) * mask_query
    if IS_CAUSAL:
        end = tl.minimum(end, tl.minimum(new, first + BLOCK_M))
    k_nope += (batch * heads + head) * cached * nope
    v += (batch * heads + head) * cached * width

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        present = key < end
        wide = key.to(tl.int64)
        k = tl.load(
            k_nope + wide[None, :] * nope + d[:, None], mask=straight[:, None] & present[None, :], other=0.0
        )
        scores = tl.dot(q, k, input_precision="ieee")
        if ROPE > 0:
            turned = tl.load(
                k_rope + wide[None, :] * k_rope_token + r[:, None] * k_rope_dim,
                mask=turns[:, None] & present[None, :],
                other=0.0,
            )
            scores = tl.dot(q_turned, turned, scores, input_precision="ieee")
        scores = hide(scores * scale, mask, mask_query, mask_key, step, key, present, KIND)
        if IS_CAUSAL:
            scores = tl.where(key[None, :] <= first + step[:, None], scores, float("-inf"))
        weights, factor, largest, total = soften(scores, largest, total)
        values = tl.load(
            v + wide[:, None] * width + e[None, :], mask=present[:, None] & inside[None, :], other=0.0
        )
        sums = tl.dot(weights.to(values.dtype), values, sums * factor[:, None], input_precision="ieee")

    sums /= tl.where(total == 0.0, 1.0, total)[:, None]
    out += batch * out_batch + head * out_head + first.to(tl.int64) * out_token
    used = first + tl.arange(0, BLOCK_M) < new
    tl.store(
        out + (tl.arange(0, BLOCK_M)[:, None] * out_token + e[None, :]),
        sums.to(out.dtype.element_ty),
        mask=used[:, None] & inside[None, :],
    )


def tile(widest: int, itemsize: int, capability: Capability) -> Tile:
    """The tile for heads of so many channels at most, of elements of so many bytes."""
    if itemsize == 4:
        return FLOAT32
    return (ROOMY if capability in ((9, 0), (10, 0), (10, 3)) else USUAL)[widest > 128]


def expanded(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    mask: Mask,
    scale: float,
    is_causal: bool,
    use: Tile,
) -> torch.Tensor:
    """Arguments and result as in `mla_attention_reference`, but for mask, of `prepare_mask`, and tile."""
    batch, heads, new, nope = q_nope.shape
    rope, v = q_rope.shape[3], w_uv.shape[1]
    if is_causal:
        # no query sees what comes after the last of them
        latent, k_rope = latent[:, :new], k_rope[:, :new]
    cached = latent.shape[1]
    bounds = None
    if mask.kind != NONE:
        bounds = torch.stack((mask.ranges[..., 0].amin(1), mask.ranges[..., 1].amax(1)), -1)
    out = q_nope.new_empty(batch, new, heads, v)
    per_head = batch * cached * (nope + v) * latent.element_size()
    step = max(1, min(heads, GROUP_BYTES // max(1, per_head)))
    for h in range(0, heads, step):
        group = slice(h, min(h + step, heads))
        count = group.stop - h
        k = _expand(latent, w_uk[group], bounds)
        values = _expand(latent, w_uv[group], bounds)
        q, q_turned, o = q_nope[:, group], q_rope[:, group], out[:, :, group]
        attend_kernel[(triton.cdiv(new, use.block_m), count, batch)](
            q, q_turned, k, k_rope, values, mask.values, mask.ranges, o,
            count, new, cached, nope, rope, v, scale,
            *q.stride(), *q_turned.stride(), *k_rope.stride(), *mask.strides, *o.stride()[:3],
            KIND=mask.kind, IS_CAUSAL=is_causal, BLOCK_M=use.block_m, BLOCK_N=use.block_n,
            NOPE=_padded(nope), ROPE=_padded(rope) if rope else 0, WIDTH=_padded(v),
            num_warps=use.num_warps, num_stages=use.num_stages,
        )  # fmt: skip
    return out


def _expand(latent: torch.Tensor, w: torch.Tensor, bounds: torch.Tensor | None) -> torch.Tensor:
    """latent (batch, cached, rank) @ w (heads, width, rank)^T -> (batch, heads, cached, width)."""
    batch, cached, rank = latent.shape
    heads, width, _ = w.shape
    out = latent.new_empty(batch, heads, cached, width)
    block_m, block_n, block_k, num_warps, num_stages = EXPAND[latent.element_size()]
    expand_kernel[(triton.cdiv(cached, block_m) * triton.cdiv(width, block_n), heads, batch)](
        latent, w, bounds, out, heads, cached, rank, width,
        *latent.stride(), *w.stride(), 0 if bounds is None else bounds.stride(0),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))
