"""Attention through ATen's fused one, whose keys and values are not repeated for the heads they serve.

Heads of one group of queries become further queries of one token, or take turns where there are more tokens; ATen's own
grouping, which on the CPU or under a mask repeats the keys in memory, is used where it does not. What a static
cache holds beyond the visible keys is not read.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dsopt.kernels.torch.mla_attention import visible_length
from dsopt.op import Kernel
from dsopt.ops.attention import attention_reference


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention_reference` over the visible keys; with sinks, which ATen's attention has not, as that spells it."""
    batch, heads, tokens, _ = q.shape
    width = v.shape[-1]
    length = visible_length(mask, tokens, k.shape[2], is_causal)
    if length == 0 or q.numel() == 0:
        return q.new_zeros(batch, tokens, heads, width)
    k, v = k[:, :, :length], v[:, :, :length]
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = mask if mask.shape[-1] == 1 else mask[..., :length]
        # ATen takes a mask of the queries' dtype, or flags
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        if is_causal:  # nor does it take both
            past = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril()
            mask = mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, float("-inf"))
            is_causal = False
    if sinks is not None:
        return attention_reference(q, k, v, mask, scale, is_causal, sinks)
    return _grouped(q, k, v, mask, scale, is_causal).contiguous()


def _grouped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """The result as a view of (batch, tokens, heads, v_width)."""
    (batch, heads, tokens, _), kv_heads = q.shape, k.shape[1]
    shared = heads // kv_heads
    if shared == 1 or (mask is None and not q.is_cpu):
        return _fused(q, k, v, mask, scale, is_causal, shared > 1).transpose(1, 2)
    if tokens == 1:
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], kv_heads, shared, mask.shape[-1])
        # the one query sees the first key alone if it is causal
        got = _fused(q.reshape(batch, kv_heads, shared, -1), k, v, mask, scale, False)
        return got.reshape(batch, 1, heads, -1)
    out = q.new_empty(batch, tokens, kv_heads, shared, v.shape[-1])
    for i in range(shared):
        own = mask if mask is None or mask.shape[1] == 1 else mask[:, i::shared]
        out[:, :, :, i] = _fused(q[:, i::shared], k, v, own, scale, is_causal).transpose(1, 2)
    return out.view(batch, tokens, heads, -1)


def _fused(q, k, v, mask, scale, is_causal, enable_gqa=False) -> torch.Tensor:
    width = v.shape[-1]
    if q.is_cpu and width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))  # fused attention on the CPU wants values as wide as keys
    got = F.scaled_dot_product_attention(
        q, k, v, mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
    )
    return got[..., :width]


KERNELS = (Kernel(op="attention", backend="torch", plan=lambda *_: attention, priority=1),)
