"""Multi-head latent attention in both spellings, and V3.2's indexer.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C; the indexer: DeepSeek-V3.2-Exp's report,
equations 1-2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dsopt.models.config import Config
from dsopt.models.layers import RMSNorm, rotate_halves, rotate_pairs, wide


class LayerCache(NamedTuple):
    """Buffers of one layer for `max_tokens` tokens, written in place.

    latent (batch, max_tokens, kv_lora_rank), k_rope (batch, max_tokens, qk_rope_head_dim), and for V3.2
    index_key (batch, max_tokens, index_head_dim).
    """

    latent: torch.Tensor
    k_rope: torch.Tensor
    index_key: torch.Tensor | None = None


def expanded_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention over keys and values expanded from the latent: the formula of the paper.

    k[b,t,h] = cat(w_uk[h] @ latent[b,t], k_rope[b,t]);   v[b,t,h] = w_uv[h] @ latent[b,t]
    with w_uk[h], w_uv[h] the first qk_nope_head_dim and the other rows of head h in kv_b

    q_nope (batch, new, heads, qk_nope_head_dim), q_rope (batch, new, heads, qk_rope_head_dim)
    latent (batch, tokens, rank), k_rope (batch, tokens, qk_rope_head_dim)
    kv_b (heads * (qk_nope_head_dim + v_head_dim), rank)
    mask (batch or 1, new, tokens), bool: True where a query sees a token.
    Returns (batch, new, heads, v_head_dim).
    """
    heads, nope = q_nope.shape[-2:]
    kv = F.linear(latent, kv_b).unflatten(-1, (heads, -1))
    k_nope, v = kv[..., :nope], kv[..., nope:]
    q = torch.cat((q_nope, q_rope), -1)
    k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, heads, -1)), -1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.unsqueeze(1), scale=scale
    )
    return out.transpose(1, 2)


def absorbed_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The same attention with the expansion moved to queries and outputs, as in DeepSeek's inference code.

    scores = scale * ((q_nope @ w_uk) @ latent^T + q_rope @ k_rope^T);   out = (softmax(scores) @ latent) @ w_uv^T

    Arguments and result as in `expanded_attention`; every head reads the one latent.
    """
    heads, nope = q_nope.shape[-2:]
    w = kv_b.view(heads, -1, latent.shape[-1])
    w_uk, w_uv = w[:, :nope], w[:, nope:]
    q_latent = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
    scores = torch.einsum("bshc,btc->bsht", q_latent, latent) + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
    scores = (scores * scale).masked_fill(~mask.unsqueeze(2), float("-inf"))
    weights = wide(scores).softmax(-1).to(latent.dtype)
    context = torch.einsum("bsht,btc->bshc", weights, latent)
    return torch.einsum("bshc,hdc->bshd", context, w_uv)


class Indexer(nn.Module):
    """V3.2's choice of the index_topk tokens that each query sees, as a dense mask.

    score[b,s,t] = sum_h w[b,s,h] * relu(<q[b,s,h], k[b,t]>);   w = weights(x) / sqrt(heads * index_head_dim)

    Without the Hadamard transform of queries and keys, which leaves every product as it is, and without their
    FP8 rounding, so scores are those of the report before quantization.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.rope_dim = config.qk_rope_head_dim
        self.q_b = nn.Linear(config.q_lora_rank, self.heads * self.dim, bias=False)
        self.k = nn.Linear(config.hidden_size, self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights = nn.Linear(config.hidden_size, self.heads, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        q_latent: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        cache: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """(batch, new, tokens), bool: what `mask` shows and the indexer chose."""
        q = self._rotate(self.q_b(q_latent).unflatten(-1, (self.heads, self.dim)), cos[:, None], sin[:, None])
        k = self._rotate(self.k_norm(self.k(x)), cos, sin)
        if cache is not None:
            k = cache.index_copy_(1, positions, k)
        scores = torch.einsum("bshd,btd->bsht", wide(q), wide(k)).relu()
        weights = F.linear(wide(x), wide(self.weights.weight)) * (self.heads * self.dim) ** -0.5
        scores = torch.einsum("bsh,bsht->bst", weights, scores).masked_fill(~mask, float("-inf"))
        chosen = scores.topk(min(self.topk, scores.shape[-1]), dim=-1).indices
        return mask & torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned, rest = x.split([self.rope_dim, self.dim - self.rope_dim], -1)
        return torch.cat((rotate_halves(turned, cos, sin), rest), -1)


class MLA(nn.Module):
    """Multi-head latent attention with its projections.

    absorbed: which of `absorbed_attention` and `expanded_attention` computes it; they agree up to rounding.
    """

    def __init__(self, config: Config, absorbed: bool = False):
        super().__init__()
        self.config, self.absorbed = config, absorbed
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        if config.q_lora_rank is None:
            self.q = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a = nn.Linear(hidden, rank + config.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(rank, config.rms_norm_eps)
        self.kv_b = nn.Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o = nn.Linear(heads * config.v_head_dim, hidden, bias=False)
        self.indexer = None if config.index_topk is None else Indexer(config)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        cache: LayerCache | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (batch, new, hidden_size) -> the same shape.

        cos, sin (new, qk_rope_head_dim / 2) of the new tokens; mask (batch or 1, new, tokens), bool, tokens being
        the new ones or max_tokens of the cache. cache: new tokens are written to its rows `positions`, int64
        (new,), and the attention reads all of it under the mask.
        """
        config = self.config
        q_latent = None if config.q_lora_rank is None else self.q_norm(self.q_a(x))
        q = self.q(x) if q_latent is None else self.q_b(q_latent)
        q = q.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        q_rope = rotate_pairs(q_rope, cos[:, None], sin[:, None])
        latent, k_rope = self.kv_a(x).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_norm(latent), rotate_pairs(k_rope, cos, sin)
        if cache is not None:
            latent = cache.latent.index_copy_(1, positions, latent)
            k_rope = cache.k_rope.index_copy_(1, positions, k_rope)
        if self.indexer is not None:
            index_key = None if cache is None else cache.index_key
            mask = self.indexer(x, q_latent, cos, sin, mask, index_key, positions)
        attend = absorbed_attention if self.absorbed else expanded_attention
        out = attend(q_nope, q_rope, latent, k_rope, self.kv_b.weight, mask, config.softmax_scale)
        return self.o(out.flatten(2))
