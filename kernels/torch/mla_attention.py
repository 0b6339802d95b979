"""Latent attention through ATen: absorbed for few new tokens, expanded by groups of heads for many.

absorbed   scores = (q_nope w_uk) latent^T + q_rope k_rope^T; out = (softmax(scores) latent) w_uv^T
expanded   keys and values of a group of heads are made from the latent, then ATen's fused attention

Per head and cached token the first costs new * (2 rank + rope) multiply-adds, the second rank * (nope + v)
once and new * (nope + rope + v) on top; `absorbs` takes the cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from dsopt.kernels.torch.dequantize import dequantize
from dsopt.op import Kernel
from dsopt.ops.attention import LATENT_BLOCK

# expanded keys and values of one group of heads are kept below this, so that prefill needs little memory
_GROUP_BYTES = 64 << 20


def absorbs(new: int, rank: int, rope: int, nope: int, v: int) -> bool:
    """True when attending to the latent itself costs fewer multiply-adds than expanding it first."""
    return new * (2 * rank + rope) <= rank * (nope + v) + new * (nope + rope + v)


def visible_length(mask: torch.Tensor | None, new: int, cached: int, is_causal: bool) -> int:
    """How many leading cached tokens any query can see: what a static buffer holds beyond is not read.

    A row of an additive mask that hides every key with a finite value spreads its weight over all of them, so
    such a mask keeps the whole length.
    """
    if is_causal:
        return min(new, cached)
    if mask is None or cached == 0 or mask.numel() == 0:
        return cached
    rows = mask.expand(*mask.shape[:-1], cached).reshape(-1, cached)
    seen = (
        rows if mask.dtype == torch.bool else rows > -1e30 if mask.dtype != torch.float16 else rows > -65504
    )
    if mask.dtype != torch.bool and not bool((seen.any(-1) | (rows == float("-inf")).all(-1)).all()):
        return cached
    columns = seen.any(0).nonzero()
    return int(columns[-1]) + 1 if columns.numel() else 0


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
    w_uk_scale: torch.Tensor | None = None,
    w_uv_scale: torch.Tensor | None = None,
    latent_scale: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    """The op's formula with both expansions moved to the query side; heads share one GEMM over the latent."""
    batch, heads, new, _ = q_nope.shape
    if latent_scale is not None:
        length = visible_length(mask, new, latent.shape[1], is_causal)
        latent, k_rope, latent_scale = latent[:, :length], k_rope[:, :length], latent_scale[:, :length]
        mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., :length]
    w_uk, w_uv = _widened(w_uk, w_uk_scale, q_nope, block), _widened(w_uv, w_uv_scale, q_nope, block)
    latent = _widened(latent, latent_scale, q_nope, LATENT_BLOCK)
    cached, rank = latent.shape[1:]
    q = torch.cat((torch.einsum("bhsd,hdr->bhsr", q_nope, w_uk), q_rope), -1)
    keys = torch.cat((latent, k_rope), -1)
    scores = torch.bmm(q.reshape(batch, heads * new, keys.shape[-1]), keys.transpose(1, 2))
    weights = _softmax(scores.view(batch, heads, new, cached), mask, scale, is_causal)
    out = torch.bmm(weights.to(latent.dtype).view(batch, heads * new, cached), latent).view(
        batch, heads, new, rank
    )
    return torch.einsum("bhsr,hdr->bshd", out, w_uv).contiguous()


def _widened(
    x: torch.Tensor, scale: torch.Tensor | None, like: torch.Tensor, block: Sequence[int]
) -> torch.Tensor:
    return x if scale is None else dequantize(x, scale, like.dtype, block)


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None, scale: float, is_causal: bool) -> torch.Tensor:
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, float("-inf"))
    elif mask is not None:
        scores += mask
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores.masked_fill_(future, float("-inf"))
    # a query that may see nothing gives zeros, not NaN
    return scores.softmax(-1).nan_to_num_(0.0)


def expanded(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    w_uk_scale: torch.Tensor | None = None,
    w_uv_scale: torch.Tensor | None = None,
    latent_scale: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    """Keys and values made from what is visible of the latent, then fused attention, by groups of heads."""
    batch, heads, new, nope = q_nope.shape
    cached, v = latent.shape[1], w_uv.shape[1]
    length = visible_length(mask, new, cached, is_causal)
    out = torch.empty(batch, new, heads, v, dtype=q_nope.dtype, device=q_nope.device)
    if length == 0:
        return out.zero_()
    latent, k_rope = latent[:, :length], k_rope[:, :length]
    if latent_scale is not None:
        latent = dequantize(latent, latent_scale[:, :length], q_nope.dtype, LATENT_BLOCK)
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., :length]
    rope = q_rope.shape[-1]
    per_head = batch * length * 2 * (nope + rope) * latent.element_size()
    step = max(1, min(heads, _GROUP_BYTES // max(1, per_head)))
    for h in range(0, heads, step):
        group = slice(h, min(h + step, heads))
        count = group.stop - group.start
        k = torch.empty(batch, count, length, nope + rope, dtype=latent.dtype, device=latent.device)
        uk = _widened(w_uk[group], None if w_uk_scale is None else w_uk_scale[group], q_nope, block)
        uv = _widened(w_uv[group], None if w_uv_scale is None else w_uv_scale[group], q_nope, block)
        k[..., :nope] = F.linear(latent, uk.flatten(0, 1)).view(batch, length, count, nope).transpose(1, 2)
        k[..., nope:] = k_rope.unsqueeze(1)
        # fused attention on CPU wants values as wide as keys
        wide = nope + rope if v < nope + rope else v
        values = torch.zeros(batch, count, length, wide, dtype=latent.dtype, device=latent.device)
        values[..., :v] = F.linear(latent, uv.flatten(0, 1)).view(batch, length, count, v).transpose(1, 2)
        q = torch.cat((q_nope[:, group], q_rope[:, group]), -1)
        got = F.scaled_dot_product_attention(q, k, values, mask, scale=scale, is_causal=is_causal)
        out[:, :, group] = got[..., :v].transpose(1, 2)
    return out


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
    w_uk_scale: torch.Tensor | None = None,
    w_uv_scale: torch.Tensor | None = None,
    latent_scale: torch.Tensor | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    new, rank = q_nope.shape[2], latent.shape[-1]
    cheap = absorbs(new, rank, q_rope.shape[-1], q_nope.shape[-1], w_uv.shape[1])
    variant = absorbed if cheap and not is_causal else expanded
    scales = w_uk_scale, w_uv_scale, latent_scale, block
    return variant(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, is_causal, *scales)


KERNELS = (Kernel(op="mla_attention", backend="torch", plan=lambda *_: mla_attention, priority=1),)
