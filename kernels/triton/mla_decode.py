"""Latent attention for few new tokens: queries of all heads meet the latent cache as it is.

q'    = q_nope @ w_uk                                                             cuBLAS, one GEMM a head
o     = softmax(scale * (q' @ latent^T + q_rope @ k_rope^T) + mask) @ latent      split over keys, float32 inside
out   = o @ w_uv^T                                                                cuBLAS, one GEMM a head

One program takes a block of rows, a row being one head of one new token, and one split of the keys that any of them
sees; a tile of the latent serves both products. Where a static cache is mostly empty its free slots are not read:
splits divide what the mask shows, which the device alone knows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsopt.gpu import Capability
from dsopt.kernels.triton.masking import Mask, hide, soften

# the widest latent whose sums stay in registers, and the widest part that is rotated
MAX_RANK, MAX_ROPE = 512, 128
# Registers a thread may have. The compiler's own choice is what lets one more program run, for which it spills.
MAX_REGISTERS = 255
# fewest keys of a split, and most splits: what is saved by more is lost in merging them
SPLIT_KEYS, MAX_SPLITS = 64, 128
# channels of the latent that one program merges
MERGED = 64


class Tile(NamedTuple):
    """Rows and keys of one step; per_processor: programs that run on a multiprocessor at a time."""

    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    per_processor: int


@triton.jit(do_not_specialize=["new", "cached", "splits"])
def split_kernel(
    q_latent, q_rope, latent, k_rope, mask, ranges, out, state,
    heads, new, cached, rank, rope, splits, scale,
    q_latent_batch, q_latent_head, q_latent_token, q_rope_batch, q_rope_head, q_rope_token, q_rope_dim,
    latent_batch, latent_token, latent_dim, k_rope_batch, k_rope_token, k_rope_dim,
    mask_batch, mask_query, mask_key, ranges_batch, ranges_query,
    out_split, out_batch, out_head, out_token,
    KIND: tl.constexpr, IS_CAUSAL: tl.constexpr, ONE_TOKEN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """out[split] = softmax over one split of the keys, times latent; rows that see none of its keys get 0.

    state (2, splits, batch, new, heads): the largest score, and the sum of exp(score - largest); or None. Log-sum-exp
    alone would not do: beside the lowest number of float32, which hides a key, the logarithm of a sum is lost.
    """
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    used = row < heads * new
    # rows left over read what the last one does, and are not stored
    row = tl.minimum(row, heads * new - 1)
    token, head = row // heads, (row % heads).to(tl.int64)
    token_at = token.to(tl.int64)
    c = tl.arange(0, RANK)
    inside = (c < rank)[None, :]
    at = batch * q_latent_batch + head * q_latent_head + token_at * q_latent_token
    q = tl.load(q_latent + at[:, None] + c[None, :], mask=inside, other=0.0)
    latent += batch * latent_batch + c[None, :] * latent_dim
    if ROPE > 0:
        d = tl.arange(0, ROPE)
        turns = (d < rope)[None, :]
        at = batch * q_rope_batch + head * q_rope_head + token_at * q_rope_token
        q_turned = tl.load(q_rope + at[:, None] + d[None, :] * q_rope_dim, mask=turns, other=0.0)
        k_rope += batch * k_rope_batch + d[None, :] * k_rope_dim

    begin, end, query = 0, cached, token
    if KIND != 0:
        visible = ranges + batch * ranges_batch + token_at * ranges_query
        begin = tl.min(tl.load(visible), 0)
        end = tl.max(tl.load(visible + 1), 0)
        first = tl.program_id(0) * BLOCK_H // heads
        query = tl.zeros((1,), tl.int32) if ONE_TOKEN else token - first
        mask += batch * mask_batch + first.to(tl.int64) * mask_query
    if IS_CAUSAL:
        end = tl.minimum(end, tl.max(token, 0) + 1)
    keys = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
    begin += split * keys
    end = tl.minimum(end, begin + keys)

    largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    sums = tl.zeros((BLOCK_H, RANK), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        present = key < end
        wide = key.to(tl.int64)[:, None]
        kv = tl.load(latent + wide * latent_token, mask=present[:, None] & inside, other=0.0)
        scores = tl.dot(q, kv.T, input_precision="ieee")
        if ROPE > 0:
            turned = tl.load(k_rope + wide * k_rope_token, mask=present[:, None] & turns, other=0.0)
            scores = tl.dot(q_turned, turned.T, scores, input_precision="ieee")
        scores = hide(scores * scale, mask, mask_query, mask_key, query, key, present, KIND)
        if IS_CAUSAL:
            scores = tl.where(key[None, :] <= token[:, None], scores, float("-inf"))
        weights, factor, largest, total = soften(scores, largest, total)
        sums = tl.dot(weights.to(kv.dtype), kv, sums * factor[:, None], input_precision="ieee")

    sums /= tl.where(total == 0.0, 1.0, total)[:, None]
    at = split.to(tl.int64) * out_split + batch * out_batch + head * out_head + token_at * out_token
    tl.store(out + at[:, None] + c[None, :], sums.to(out.dtype.element_ty), mask=used[:, None] & inside)
    if state is not None:
        at = (split * tl.num_programs(2) + batch) * heads * new + row
        tl.store(state + at, largest, mask=used)
        tl.store(state + splits * tl.num_programs(2) * heads * new + at, total, mask=used)


@triton.jit(do_not_specialize=["new", "splits"])
def merge_kernel(
    partial, state, out, heads, new, rank, splits, out_batch, out_head, out_token,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row of out: its partial results weighted by exp(largest) * total; splits that saw nothing are not read.

    partial (splits, batch, new, heads, rank), state (2, splits, batch, new, heads), float32.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    split = tl.arange(0, SPLITS)
    at = split * rows + row
    largest = tl.load(state + at, mask=split < splits, other=float("-inf"))
    total = tl.load(state + splits * rows + at, mask=split < splits, other=0.0)
    saw = total != 0.0
    most = tl.max(largest, 0)
    weight = tl.exp(largest - tl.where(most == float("-inf"), 0.0, most)) * total
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    one = tl.load(
        partial + at[:, None] * rank + c[None, :], mask=saw[:, None] & (c < rank)[None, :], other=0.0
    )
    weights = tl.sum(weight, 0)
    merged = tl.sum(one * weight[:, None], 0) / tl.where(weights == 0.0, 1.0, weights)
    head, token, batch = row % heads, row // heads % new, row // heads // new
    at = batch * out_batch + head * out_head + token * out_token
    tl.store(out + at + c, merged.to(out.dtype.element_ty), mask=c < rank)


# Tiles for up to 16 rows and for more, by what fits: shared memory holds the queries and num_stages tiles of keys,
# registers the sums. None spills under Triton 3.6 where it is used; 64 rows do on 8.0 and 10.0.
USUAL, FLOAT32 = (Tile(16, 32, 4, 2, 1), Tile(16, 32, 4, 2, 1)), Tile(16, 16, 8, 1, 1)
ROOMY = {
    (8, 0): (Tile(16, 32, 4, 2, 2), Tile(32, 64, 8, 2, 1)),
    (9, 0): (Tile(16, 32, 4, 3, 2), Tile(64, 32, 8, 3, 1)),
    (10, 0): (Tile(16, 32, 4, 3, 2), Tile(32, 64, 8, 2, 1)),
    (10, 3): (Tile(16, 32, 4, 3, 2), Tile(32, 64, 8, 2, 1)),
}


def tile(rows: int, itemsize: int, capability: Capability) -> Tile:
    """The tile for so many rows (heads * new tokens) of elements of so many bytes."""
    return FLOAT32 if itemsize == 4 else ROOMY.get(capability, USUAL)[rows > 16]


def num_splits(programs: int, cached: int, room: int) -> int:
    """Splits of the keys that fill `room` places with `programs` of each split; 1 where they are filled anyway."""
    return max(1, min(room // max(1, programs), triton.cdiv(cached, SPLIT_KEYS), MAX_SPLITS))


def absorbed(
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
    splits: int,
) -> torch.Tensor:
    """Arguments and result as in `mla_attention_reference`, but for mask, of `prepare_mask`, tile and splits."""
    batch, heads, new, nope = q_nope.shape
    cached, rank = latent.shape[1:]
    rope, v = q_rope.shape[3], w_uv.shape[1]
    # (heads, batch * new, width): one GEMM a head
    q = torch.bmm(q_nope.transpose(0, 1).reshape(heads, batch * new, nope), w_uk)
    o = torch.empty_like(q)
    q_strides, o_strides = (new * rank, q.stride(0), rank), (new * rank, o.stride(0), rank)
    partial, state, partial_strides = o, None, (0, *o_strides)
    if splits > 1:
        partial = q.new_empty(splits, batch, new, heads, rank, dtype=torch.float32)
        state = q.new_empty(2, splits, batch, new, heads, dtype=torch.float32)
        a, b, c, d, _ = partial.stride()
        partial_strides = a, b, d, c
    padded = max(16, triton.next_power_of_2(rank))
    split_kernel[(triton.cdiv(heads * new, use.block_h), splits, batch)](
        q, q_rope, latent, k_rope, mask.values, mask.ranges, partial, state,
        heads, new, cached, rank, rope, splits, scale,
        *q_strides, *q_rope.stride(), *latent.stride(), *k_rope.stride(), *mask.strides, *partial_strides,
        KIND=mask.kind, IS_CAUSAL=is_causal, ONE_TOKEN=new == 1, BLOCK_H=use.block_h, BLOCK_N=use.block_n, RANK=padded,
        ROPE=max(16, triton.next_power_of_2(rope)) if rope else 0,
        num_warps=use.num_warps, num_stages=use.num_stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(batch * new * heads, triton.cdiv(rank, MERGED))](
            partial, state, o, heads, new, rank, splits, *o_strides,
            SPLITS=triton.next_power_of_2(splits), BLOCK_N=MERGED,
        )  # fmt: skip
    out = q.new_empty(batch * new, heads, v)
    torch.bmm(o, w_uv.mT, out=out.transpose(0, 1))
    return out.view(batch, new, heads, v)
