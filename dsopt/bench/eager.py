"""Each op as a user writes it in PyTorch: what eager and Inductor are measured on.

The arguments are the op's; what no model here uses (biases, other activations) is left out. Where the op's reference
is what a user writes, it is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from dsopt.ops import OPS


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved_in: bool, interleaved_out: bool
) -> torch.Tensor:
    """Pairs as complex numbers where they stay neighbours, halves turned by a concatenation where they do not."""
    if interleaved_in and interleaved_out:
        half = x.shape[-1] // 2
        turn = torch.complex(cos[..., :half].float(), sin[..., :half].float())
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
    if interleaved_in:
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: Sequence[int]
) -> torch.Tensor:
    """Scales repeated for the elements of their blocks."""
    rows, columns = weight.shape
    by_element = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    return (weight.float() * by_element).to(dtype)


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
    """Keys and values of every head made from the latent, then fused attention, as in transformers.

    w_uk and w_uv are views of one weight, as in the models, which one linear layer reads.
    """
    heads, nope, rank = w_uk.shape
    value = w_uv.shape[1]
    kv_b = torch.as_strided(w_uk, (heads, nope + value, rank), w_uk.stride())
    batch, keys, _ = latent.shape
    kv = F.linear(latent, kv_b.flatten(0, 1)).view(batch, keys, heads, nope + value).transpose(1, 2)
    k_nope, v = kv.split([nope, value], -1)
    k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, heads, -1, -1)), -1)
    q = torch.cat((q_nope, q_rope), -1)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=is_causal)
    return out.transpose(1, 2).contiguous()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
    sinks: None = None,
) -> torch.Tensor:
    """Keys and values repeated for the heads they serve, then fused attention, as in transformers."""
    batch, heads, _, _ = q.shape
    times = heads // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, times, -1, -1).reshape(batch, heads, *x.shape[2:]) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=is_causal)
    return out.transpose(1, 2).contiguous()


def moe_route(
    logits: torch.Tensor,
    topk: int,
    scoring: str,
    bias: torch.Tensor | None,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    outside: float | None,
    renormalize: bool,
    eps: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and choices by `torch.topk`, whose order among equals is free."""
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if topk_groups < num_groups:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.amax(-1) if group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
        chosen = best.topk(topk_groups, dim=-1, sorted=False).indices
        inside = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
        never = float("-inf") if outside is None else outside
        choice = grouped.masked_fill(~inside.unsqueeze(-1), never).flatten(-2)
    ids = choice.topk(topk, dim=-1).indices
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return weights * scale, ids


def moe_experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, *_
) -> torch.Tensor:
    """Grouped products over tokens sorted by expert; a loop over the experts where PyTorch has no such product."""
    if x.dtype != torch.bfloat16:
        return _expert_loop(x, ids, weights, w13, w2)
    experts, topk = w13.shape[0], ids.shape[1]
    expert, order = ids.flatten().sort()
    # counted as floats, the only ones that histc takes on a CPU
    counts = torch.histc(expert.float(), bins=experts, min=0, max=experts - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up = torch._grouped_mm(x[order // topk], w13.mT, offs=ends).chunk(2, -1)
    y = torch._grouped_mm(F.silu(gate) * up, w2.mT, offs=ends)[order.argsort()]
    return (y.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _expert_loop(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, choice = torch.where(ids == e)
        gate, up = F.linear(x[token], w13[e]).chunk(2, -1)
        out.index_add_(
            0, token, F.linear(F.silu(gate) * up, w2[e]) * weights[token, choice, None].to(x.dtype)
        )
    return out


EAGER: dict[str, Callable] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "multi_linear": OPS["multi_linear"].reference,
    "gated_mlp": OPS["gated_mlp"].reference,
    "dequantize": dequantize,
    "mla_attention": mla_attention,
    "attention": attention,
    "moe_route": moe_route,
    "moe_experts": moe_experts,
}
